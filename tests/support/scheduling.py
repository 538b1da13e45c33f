"""What tests of the scheduler alone share: sinks that write down what they are told, no model."""

from __future__ import annotations

from llava_engine.errors import LlavaError
from llava_engine.runtime.kv_cache import BlockPool
from llava_engine.runtime.scheduler import Scheduled, Scheduler
from llava_engine.runtime.sequence import Sequence
from llava_engine.types import FinishReason, SamplingParams

EOS = 7


class Sink:
    def __init__(self) -> None:
        self.cancelled = False
        self.room = 1 << 30
        self.cached: int | None = None
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self.error: LlavaError | None = None

    def start(self, cached_tokens: int) -> None:
        assert self.cached is None
        self.cached = cached_tokens

    def put(self, token_id: int) -> None:
        assert self.reason is None and self.error is None and self.room > 0
        self.room -= 1
        self.tokens.append(token_id)

    def flush(self) -> None: ...

    def finish(self, reason: FinishReason) -> None:
        assert self.reason is None and self.error is None
        self.reason = reason

    def fail(self, error: LlavaError) -> None:
        assert self.reason is None and self.error is None
        self.error = error


def sequence(prompt: list[int], max_new_tokens: int = 4, **options: object) -> Sequence:
    sampling = SamplingParams(ignore_eos=bool(options.pop("ignore_eos", False)))
    return Sequence(
        list(prompt), (), sampling, max_new_tokens, frozenset({EOS}), Sink(), seed=0, **options
    )


def sink(sequence: Sequence) -> Sink:
    assert isinstance(sequence.sink, Sink)
    return sequence.sink


def scheduler(blocks: int = 64, block_size: int = 4, **limits: int) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(blocks, block_size)
    options = {"max_batch": 8, "prefill_chunk": 16, "max_model_len": 100, **limits}
    return Scheduler(pool, **options), pool


def next_token(sequence: Sequence) -> int:
    """A model that any change of the tokens it sees would show: a hash of all of them."""
    return 8 + sum(i * t for i, t in enumerate(sequence.token_ids, 1)) % 50


def advance(scheduler: Scheduler, now: float = 0.0) -> list[Scheduled]:
    step = scheduler.schedule(now)
    for entry in step:
        completes = entry.completes
        scheduler.complete(entry, next_token(entry.sequence) if completes else None)
    return step


def expected(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(8 + sum(i * t for i, t in enumerate(ids, 1)) % 50)
    return ids[len(prompt) :]
