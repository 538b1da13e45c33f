"""A sequence: one request's token ids, pictures and sampling, and where its tokens go.

Text does not exist here. The runtime talks back through a `TokenSink` and never learns who reads.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llava_engine.errors import LlavaError
from llava_engine.types import FinishReason, SamplingParams

if TYPE_CHECKING:
    import torch

    from llava_engine.kernels.preprocess import DecodedPicture


class TokenSink(Protocol):
    """The runtime's way back to a request. Every method may be called from any thread and returns
    at once; calls after `finish` or `fail` have no effect."""

    @property
    def cancelled(self) -> bool:
        """True once nobody wants further tokens."""

    @property
    def room(self) -> int:
        """Tokens that it takes before its reader must catch up. Only `put` makes it less."""

    def start(self, cached_tokens: int) -> None:
        """The prompt is admitted; `cached_tokens` of it were found in the KV cache."""

    def put(self, token_id: int) -> None:
        """One sampled token, the end-of-sequence token included; the reader sees it at the next
        `flush`, or the end, at the latest."""

    def flush(self) -> None:
        """Wake the reader for what was put."""

    def finish(self, reason: FinishReason) -> None:
        """The sequence ended as asked."""

    def fail(self, error: LlavaError) -> None:
        """The sequence ended with an error."""


class SequenceStatus(enum.Enum):
    """Where a sequence is in the scheduler."""

    WAITING = "waiting"  # not admitted yet, or preempted
    RUNNING = "running"  # holds blocks
    PAUSED = "paused"  # its reader is too far behind; holds no blocks
    FINISHED = "finished"  # holds nothing


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture's place in a prompt.

    key: digest of content, mode, size and preprocessing; equal keys mean equal features.
    offset, length: the placeholders' place in the prompt, in tokens.
    pixels: what the vision tower's input is made from, once the features are needed.
    """

    key: bytes
    offset: int
    length: int
    pixels: DecodedPicture


class Sequence:
    """One request in the runtime.

    token_ids: the prompt, in which pictures stand as placeholder ids (text.prompt), and then
        the sampled tokens. Placeholders are negative, so no vocabulary id collides with one.
    deadline: time.monotonic() seconds after which the sequence fails with RequestTimeout.
    cache_salt: sequences share KV blocks only with those of the same salt.
    priority: lower runs first; equal ones run in order of arrival.
    worker: the share of KV blocks that it draws on.
    """

    def __init__(
        self,
        token_ids: list[int],
        pictures: tuple[Picture, ...],
        sampling: SamplingParams,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        sink: TokenSink,
        *,
        seed: int,
        deadline: float | None = None,
        cache_salt: bytes = b"",
        priority: int = 0,
        worker: str = "",
    ) -> None:
        self.token_ids = token_ids
        self.prompt_len = len(token_ids)
        self.pictures = pictures
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.eos_token_ids = eos_token_ids
        self.sink = sink
        self.seed = seed
        self.deadline = deadline
        self.cache_salt = cache_salt
        self.priority = priority
        self.worker = worker
        self.status = SequenceStatus.WAITING
        self.arrival = 0
        self.computed = 0
        """Tokens whose keys and values are in the cache."""
        self.block_table: list[int] = []
        self.digests: list[bytes] = []
        """Chained digests of the full blocks of token_ids, for prefix reuse."""
        self.published = 0
        """Leading blocks of block_table whose content others may reuse."""
        self.features: dict[bytes, torch.Tensor] = {}
        """Encoded pictures, held from the first chunk that needs them to the last."""
        self.started = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def completion_len(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: lower priority value, then earlier arrival."""
        return self.priority, self.arrival

    @property
    def uncomputed(self) -> int:
        return len(self.token_ids) - self.computed
