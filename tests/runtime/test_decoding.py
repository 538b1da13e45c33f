"""Runs of decoding steps on the CPU, idle rows among them, against transformers and plain steps."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from support.runtime import Sink, World, running, settled

from llava_engine import FinishReason, SamplingParams
from llava_engine.channel import Channel
from llava_engine.errors import RequestTimeout, WorkerDied
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime import decoder
from llava_engine.runtime.decode_loop import DeviceFailed, EagerLoop, TokenEvent
from llava_engine.runtime.decode_state import MAX_EOS
from llava_engine.runtime.decoder import Decoder
from llava_engine.runtime.model_runner import ModelRunner
from llava_engine.runtime.scheduler import Scheduled
from llava_engine.runtime.sequence import Sequence


@dataclass
class Told:
    """A token from a run, and which of its sequence's it is."""

    sequence: Sequence
    event: TokenEvent
    place: int


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """What the decoder said, while rows that finish stay in the run as idle ones."""
    told: list[Told] = []
    wait = Decoder.wait

    def watched(
        self: Decoder, timeout: float | None
    ) -> tuple[list[tuple[Sequence, TokenEvent]], bool]:
        tokens, ended = wait(self, timeout)
        told.extend(Told(owner, event, owner.completion_len) for owner, event in tokens)
        return tokens, ended

    monkeypatch.setattr(Decoder, "wait", watched)
    monkeypatch.setattr(Decoder, "_worth", lambda self, rows: 0)
    return told


@dataclass
class Asked:
    picture: int | None
    question: list[int]
    count: int
    penalty: float
    ignore_eos: bool
    eos: frozenset[int] = frozenset()
    sink: Sink = field(default_factory=Sink)


@pytest.mark.parametrize("seed", range(4))
def test_rows_end_where_transformers_text_would(world: World, runs: list[Told], seed: int) -> None:
    """By one of several ids, by the number of tokens and by the context, as the device decides."""
    chance = random.Random(seed)
    max_model_len = world.ours.config.image_tokens + 40
    asked, answers = [], []
    for _ in range(12):
        request = Asked(
            chance.choice([None, 0, 2]),
            [chance.randrange(3, 400) for _ in range(chance.randint(1, 30))],
            chance.randint(1, 30),
            chance.choice([1.0, 1.0, 1.3, 0.8]),
            chance.random() < 0.2,
        )
        prompt = 1 + len(request.question)
        if request.picture is not None:
            prompt += world.ours.config.image_tokens
        answer = world.expected(request.picture, request.question, 30, request.penalty)
        unlikely = [100_000 + n for n in range(chance.choice([0, 3, MAX_EOS - 1]))]
        request.eos = frozenset([chance.choice(answer), *unlikely])
        answer = answer[: min(request.count, max_model_len - prompt)]
        ends = [place for place, token in enumerate(answer) if token in request.eos]
        if ends and not request.ignore_eos:
            answers.append((answer[: ends[0] + 1], FinishReason.STOP))
        else:
            answers.append((answer, FinishReason.LENGTH))
        asked.append(request)
    for runtime in running(world, 400, max_model_len=max_model_len, prefill_chunk=1000):
        sequences = []
        for request in asked:
            sampling = SamplingParams(
                ignore_eos=request.ignore_eos, repetition_penalty=request.penalty
            )
            sequences.append(
                world.sequence(
                    request.picture,
                    request.question,
                    request.count,
                    request.sink,
                    sampling=sampling,
                    eos=request.eos,
                )
            )
            runtime.submit(sequences[-1])
        for request, (tokens, reason) in zip(asked, answers, strict=True):
            assert request.sink.wait() == tokens
            assert request.sink.reason is reason
        settled(runtime)
    lengths = {
        id(sequence): len(tokens) for sequence, (tokens, _) in zip(sequences, answers, strict=True)
    }
    for told in runs:
        assert told.event.finished == (told.place == lengths[id(told.sequence)] - 1)
    assert sum(told.event.finished for told in runs) > 3


def test_sampled_rows_are_those_of_single_steps(
    world: World, runs: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(9)
    settings = [
        SamplingParams(
            temperature=chance.choice([0.0, 0.7, 1.5]),
            top_k=chance.choice([0, 1, 20]),
            top_p=chance.choice([1.0, 0.8]),
            repetition_penalty=chance.choice([1.0, 1.2]),
            ignore_eos=chance.random() < 0.5,
        )
        for _ in range(16)
    ]
    eos = frozenset(range(2, 12))

    def answers() -> list[tuple[list[int], FinishReason | None]]:
        for runtime in running(world, 400):
            sinks = [Sink() for _ in settings]
            for index, (sampling, sink) in enumerate(zip(settings, sinks, strict=True)):
                few = frozenset(random.Random(index).sample(sorted(eos), 8))
                runtime.submit(
                    world.sequence(
                        index % 3, [50], 20, sink, sampling=sampling, seed=index, eos=few
                    )
                )
            got = [(sink.wait(), sink.reason) for sink in sinks]
        return got

    in_runs = answers()
    assert runs
    runs.clear()
    monkeypatch.setattr(Decoder, "takes", lambda self, sequence: False)
    assert answers() == in_runs
    assert not runs


def test_more_ends_than_a_row_holds(world: World, runs: list[Told]) -> None:
    want = world.expected(0, [21], 12)
    eos = frozenset([want[7], *range(100_000, 100_000 + MAX_EOS)])
    for runtime in running(world, 400):
        many, few = Sink(), Sink()
        runtime.submit(world.sequence(0, [21], 12, many, sampling=SamplingParams(), eos=eos))
        runtime.submit(world.sequence(0, [22], 12, few))
        assert many.wait() == want[: want.index(want[7]) + 1]
        assert few.wait() == world.expected(0, [22], 12)
        settled(runtime)


def test_a_cached_prompt_that_ends_in_a_picture(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Its last token is a placeholder: no token of the vocabulary that a row could begin with."""
    want = world.expected(0, [], 5)
    for runtime in running(world, 400, block_size=world.ours.config.image_tokens):
        for cached in (0, world.ours.config.image_tokens):
            sink = Sink()
            runtime.submit(world.sequence(0, [], 5, sink))
            assert sink.wait() == want
            assert sink.cached == cached
    assert not caplog.records, "it was tried in a run"


def test_the_hook_sees_every_decoded_token_in_time(world: World) -> None:
    told: list[TokenEvent] = []
    before = time.monotonic_ns()
    for runtime in running(world, 400, on_tokens=told.extend):
        sink = Sink()
        runtime.submit(world.sequence(None, [20, 21], 30, sink))
        tokens = sink.wait()
    assert [event.token for event in told] == tokens[1:]  # the first is prefill's
    assert [event.finished for event in told] == [False] * 28 + [True]
    times = [before, *(event.time_ns for event in told), time.monotonic_ns()]
    assert times == sorted(times)
    steps = [event.step for event in told]
    assert steps == list(range(steps[0], steps[0] + 29))


class Guest(Sink):
    """Notes how far somebody else was when it ended."""

    def __init__(self, host: Sink) -> None:
        super().__init__()
        self.host, self.host_was_at = host, 0

    def finish(self, reason: FinishReason) -> None:
        self.host_was_at = len(self.host.tokens)
        super().finish(reason)


def test_who_comes_during_a_run_does_not_wait_for_its_end(world: World) -> None:
    for runtime in running(world, 400):
        patient = Sink()
        guest = Guest(patient)
        runtime.submit(world.sequence(None, [20], 200, patient))
        while not patient.tokens:
            time.sleep(0.001)
        runtime.submit(world.sequence(None, [30], 2, guest))
        assert guest.wait() == world.expected(None, [30], 2)
        assert guest.host_was_at < 200
        assert patient.wait() == world.expected(None, [20], 200)


def test_who_comes_while_a_run_starts_is_not_overlooked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `stop` finds no run to stop."""
    patient = Sink()
    guest = Guest(patient)
    start = Decoder.start
    submit: list[Callable[[], None]] = []

    def late(self: Decoder, *arguments: Any, **options: Any) -> None:
        if submit:
            submit.pop()()
        start(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "start", late)
    for runtime in running(world, 400):
        submit.append(partial(runtime.submit, world.sequence(None, [30], 2, guest)))
        runtime.submit(world.sequence(None, [20], 200, patient))
        assert guest.wait() == world.expected(None, [30], 2)
        assert guest.host_was_at < 10
        assert patient.wait() == world.expected(None, [20], 200)


def test_who_finishes_ends_no_run(
    world: World, runs: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Channel, which the pool's sequences have as their sink, is as good as cancelled then."""
    start = Decoder.start
    batches: list[list[Sequence]] = []

    def watched(self: Decoder, sequences: list[Sequence], *arguments: Any, **options: Any) -> None:
        batches.append(sequences)
        start(self, sequences, *arguments, **options)

    monkeypatch.setattr(Decoder, "start", watched)
    for runtime in running(world, 400):
        channels = [Channel(), Channel()]
        sequences = [
            world.sequence(None, [20], count, channel)
            for count, channel in zip((60, 5), channels, strict=True)
        ]
        for sequence in sequences:
            runtime.submit(sequence)
        runtime.add_worker("two", 1)  # so both are there
        tokens: list[int] = []
        while not channels[0].cancelled:
            channels[0].wait()
            tokens += channels[0].take()[0]
        tokens += channels[0].take()[0]
        assert tokens == world.expected(None, [20], 60)
        settled(runtime)
    assert batches[-1] == sequences, "the one that was left got a run of its own"


class Woken(EagerLoop):
    """Returns from `wait` whenever `stop` was called, with steps in flight, as the native loop."""

    woken = asked = False
    for_nothing = 0

    def run(self, rows: int, first_step: int, max_steps: int, stop_at: int) -> None:
        super().run(rows, first_step, max_steps, stop_at)
        self.asked = False

    def stop(self) -> None:
        self.woken = self.asked = True

    def wait(self, timeout: float | None) -> tuple[list[TokenEvent], bool]:
        if self.woken and self._unfinished:
            self.woken = False
            Woken.for_nothing += 1
            assert Woken.for_nothing < 1000, "it turns round and round"
            return [], False
        if self.asked:
            super().stop()
        return super().wait(timeout)


def test_what_is_in_flight_is_waited_for_quietly(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "EagerLoop", Woken)
    monkeypatch.setattr(Woken, "for_nothing", 0)
    for runtime in running(world, 400):
        patient, guest = Sink(), Sink()
        runtime.submit(world.sequence(None, [20], 200, patient))
        while not patient.tokens:
            time.sleep(0.001)
        runtime.submit(world.sequence(None, [30], 2, guest))
        assert guest.wait() == world.expected(None, [30], 2)
        assert patient.wait() == world.expected(None, [20], 200)
    assert Woken.for_nothing < 10


def test_an_idle_runtime_keeps_no_sequence(world: World) -> None:
    for runtime in running(world, 400):
        sink = Sink()
        sequence = world.sequence(0, [20], 10, sink)
        kept = weakref.ref(sequence)
        runtime.submit(sequence)
        del sequence
        assert sink.wait() == world.expected(0, [20], 10)
        runtime.add_worker("two", 1)  # by now its last step is behind the loop
        gc.collect()
        assert kept() is None


def test_a_deadline_ends_its_own_row_during_a_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LlavaModel.decode_logits
    deadline = time.monotonic() + 1
    calls = 0

    def slow(self: LlavaModel, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        while calls == 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return original(self, *arguments)

    monkeypatch.setattr(LlavaModel, "decode_logits", slow)
    for runtime in running(world, 400):
        late, other = Sink(), Sink()
        runtime.submit(world.sequence(None, [20], 100_000, late, deadline=deadline))
        runtime.submit(world.sequence(None, [30], 150, other))
        assert other.wait() == world.expected(None, [30], 150)
        with pytest.raises(RequestTimeout):
            late.wait()
        assert len(late.tokens) < 8
        settled(runtime)


def test_a_cancelled_row_gets_no_further_and_the_others_do(world: World) -> None:
    for runtime in running(world, 400):
        gone, other = Sink(cancel_after=5), Sink()
        runtime.submit(world.sequence(None, [20], 100_000, gone))
        runtime.submit(world.sequence(None, [30], 60, other))
        assert other.wait() == world.expected(None, [30], 60)
        assert gone.wait()[:5] == world.expected(None, [20], 5)
        assert gone.reason is FinishReason.CANCELLED
        settled(runtime)


def test_a_step_that_fails_costs_no_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlavaModel.decode_logits
    calls = 0

    def failing(self: LlavaModel, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (3, 4, 20):
            raise torch.OutOfMemoryError("planted")
        return original(self, *arguments)

    monkeypatch.setattr(LlavaModel, "decode_logits", failing)
    for runtime in running(world, 400):
        sinks = [Sink() for _ in range(3)]
        for index, sink in enumerate(sinks):
            runtime.submit(world.sequence(index, [60], 30, sink))
        for index, sink in enumerate(sinks):
            assert sink.wait() == world.expected(index, [60], 30)
        settled(runtime)
    assert calls > 20


def test_a_row_that_fails_alone_too_ends_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ModelRunner.run

    def broken(self: LlavaModel, *arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("planted")

    def picky(
        self: ModelRunner, step: list[Scheduled], launched: Callable[[], None]
    ) -> list[int | None]:
        if any(entry.sequence.seed == 7 and entry.sequence.completion_len for entry in step):
            raise ValueError("planted")
        return run(self, step, launched)

    monkeypatch.setattr(LlavaModel, "decode_logits", broken)
    monkeypatch.setattr(ModelRunner, "run", picky)
    for runtime in running(world, 400):
        sinks = [Sink() for _ in range(3)]
        for index, sink in enumerate(sinks):
            runtime.submit(world.sequence(index, [60], 8, sink, seed=7 if index == 1 else 0))
        for index in (0, 2):
            assert sinks[index].wait() == world.expected(index, [60], 8)
        with pytest.raises(Exception, match="ValueError"):
            sinks[1].wait()
        settled(runtime)


@pytest.mark.parametrize("error", [torch.AcceleratorError("planted"), DeviceFailed("planted")])
def test_a_lost_device_ends_every_stream(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def lost(self: LlavaModel, *arguments: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(LlavaModel, "decode_logits", lost)
    for runtime in running(world, 400):
        causes: list[BaseException] = []
        runtime.on_death(causes.append)
        sinks = [Sink() for _ in range(3)]
        for index, sink in enumerate(sinks):
            runtime.submit(world.sequence(index, [60], 30, sink))
        for sink in sinks:
            with pytest.raises(WorkerDied) as raised:
                sink.wait()
            assert raised.value.__cause__ is error
        runtime._thread.join(30)
        assert causes == [error]
