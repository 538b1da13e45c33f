"""Captured steps on the GPU: bit for bit what the same kernels give one by one, rows and cache.

And what a runtime does with them: capture again when the cache moves, let rows go in mid-run, keep
nothing.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.decode_rows import at_random
from support.gpu import GPU, NEEDS_GPU, NEW_TOKENS, Sink, World
from support.pictures import random_pictures
from transformers import LlavaForConditionalGeneration

from llava_engine import EngineConfig, SamplingParams
from llava_engine.kernels.library import require_kernels
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import load_model
from llava_engine.runtime.decode_graph import StepGraphs, bucket_of
from llava_engine.runtime.decoder import Decoder
from llava_engine.runtime.kv_cache import KVCache
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.sequence import Sequence
from llava_engine.runtime.streams import DeviceStreams

pytestmark = NEEDS_GPU

BLOCK_SIZE = 16
STEPS = 24
SHAPES = {
    "odd": {"head_dim": 16},
    "wide": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}


@pytest.mark.parametrize("seed", range(10))
def test_rows_advance_as_written_out(seed: int) -> None:
    chance = random.Random(seed)
    rows = at_random(chance, chance.choice([1, 2, 33, 64, 1500]), device="cuda")
    for _ in range(12):
        rows.step([chance.randrange(rows.vocab) for _ in range(rows.count)])


@pytest.fixture(scope="module", params=SHAPES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(made, seed=3, text_config=SHAPES[request.param])
    return made


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def model(request: pytest.FixtureRequest, directory: Path) -> LlavaModel:
    require_kernels(GPU)
    return load_model(directory, device=GPU, dtype=request.param)


def decoder_of(model: LlavaModel, *, overlap: bool) -> tuple[Decoder, KVCache]:
    """A decoder over a cache of random keys and values, with room for 64 rows of six blocks."""
    text = model.config.text
    cache = KVCache(
        num_layers=text.num_layers,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        block_size=BLOCK_SIZE,
        dtype=model.dtype,
        device=GPU,
    )
    cache.resize(1 + 64 * 6, {})
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    config = EngineConfig(device="cuda", block_size=BLOCK_SIZE, programmatic_launch=overlap)
    return Decoder(model, cache, DeviceStreams(GPU), max_model_len=400, config=config), cache


def sequences_of(chance: random.Random, count: int, vocab: int) -> list[Sequence]:
    """Every kind of sampling and of end; block 0 belongs to nobody."""
    blocks = list(range(1, 1 + 64 * 6))
    chance.shuffle(blocks)
    made = []
    for _ in range(count):
        sampling = SamplingParams(
            temperature=chance.choice([0.0, 0.0, 0.8, 1.5]),
            top_k=chance.choice([0, 0, 30]),
            top_p=chance.choice([1.0, 0.9]),
            repetition_penalty=chance.choice([1.0, 1.0, 1.3]),
            ignore_eos=chance.random() < 0.5,
        )
        length = chance.randint(1, 6 * BLOCK_SIZE - STEPS)
        sequence = Sequence(
            [chance.randrange(vocab) for _ in range(length)],
            (),
            sampling,
            chance.choice([1, 5, STEPS, 100]),
            frozenset(chance.sample(range(vocab), chance.choice([1, 8]))),
            Sink(),
            seed=chance.randrange(1 << 63),
        )
        sequence.computed = length - 1
        sequence.block_table = [blocks.pop() for _ in range(6)]
        made.append(sequence)
    return made


def drained(decoder: Decoder) -> list[tuple[int, int, int, bool]]:
    """Step (from 0), row, token and end of everything that the run gives."""
    events, ended = [], False
    until = time.monotonic() + 60
    while not ended:
        assert time.monotonic() < until, "the run hangs"
        tokens, ended = decoder.wait(60)
        events += [event for _, event in tokens]
    first = events[0].step
    return sorted((e.step - first, e.row, e.token, e.finished) for e in events)


def step_by_step(
    decoder: Decoder, sequences: list[Sequence], remaining: list[int], rows: int
) -> list[tuple[int, int, int, bool]]:
    """The same from the kernels launched one by one over `rows` rows, padding included."""
    events, going = [], set(range(len(sequences)))
    first, decoder._next_step = decoder._next_step, decoder._next_step + STEPS
    ring = decoder._state.ring
    with decoder._streams.decoding():
        decoder._state.fill(sequences, remaining, first)
        for step in range(STEPS):
            decoder._step(rows)
            torch.cuda.current_stream().synchronize()
            for row in sorted(going):
                number, token, flags, _ = ring[(first + step) % len(ring), row].tolist()
                assert number == first + step + 1
                events.append((step, row, token, bool(flags)))
                if flags:
                    going.remove(row)
    decoder._streams.decoded()
    return events


@pytest.mark.parametrize("overlap", [False, True])
def test_a_graph_gives_what_its_kernels_give(
    model: LlavaModel, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "_worth", lambda self, rows: 0)  # to the end, however few are left
    chance = random.Random()
    seed = random.SystemRandom().randrange(1 << 30)
    chance.seed(seed)
    print("seed", seed)
    with torch.inference_mode():
        decoder, cache = decoder_of(model, overlap=overlap)
        for count in (1, 2, 3, 4, 5, 8, 11, 16, 23, 32, 41, 64):
            sequences = sequences_of(chance, count, model.config.text.vocab_size)
            remaining = [sequence.max_new_tokens for sequence in sequences]
            start = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
            want = step_by_step(decoder, sequences, remaining, bucket_of(count, 64))
            after = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
            for tensor, before in zip((*cache.keys, *cache.values), start, strict=True):
                tensor.copy_(before)
            torch.cuda.synchronize()
            decoder.start(sequences, remaining, STEPS, until_one_ends=False)
            assert drained(decoder) == want
            torch.cuda.synchronize()
            for tensor, one_by_one in zip((*cache.keys, *cache.values), after, strict=True):
                assert torch.equal(tensor, one_by_one)
            owned = [block for sequence in sequences for block in sequence.block_table]
            others = torch.ones(cache.num_blocks, dtype=torch.bool)
            others[owned] = False
            for tensor, before in zip((*cache.keys, *cache.values), start, strict=True):
                assert torch.equal(tensor[others], before[others])
        decoder.close()


def test_runs_follow_each_other_and_stop_when_told(model: LlavaModel) -> None:
    """One run in pieces is one run: each begins where the last one's tokens ended."""
    chance = random.Random(3)
    with torch.inference_mode():
        decoder, _ = decoder_of(model, overlap=True)
        (sequence,) = sequences_of(chance, 1, model.config.text.vocab_size)
        sequence.sampling = SamplingParams(ignore_eos=True)
        want = [token for _, _, token, _ in step_by_step(decoder, [sequence], [STEPS], 1)]
        got: list[int] = []
        while len(got) < STEPS:
            decoder.start([sequence], [STEPS - len(got)], STEPS - len(got), until_one_ends=False)
            decoder.stop()
            tokens = [token for _, _, token, _ in drained(decoder)]
            assert tokens, "a run has at least one step"
            got += tokens
            sequence.token_ids += tokens
            sequence.computed += len(tokens)
        assert got == want
        decoder.close()


def test_a_capture_stands_beside_another_threads_work(model: LlavaModel) -> None:
    """Allocations, copies and synchronisation elsewhere do not spoil it."""
    over = threading.Event()
    errors: list[BaseException] = []

    def busy() -> None:
        try:
            while not over.is_set():
                x = torch.randn(300, 300, device=GPU)
                float((x @ x).sum())
                del x
                torch.cuda.empty_cache()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    with torch.inference_mode():
        decoder, _ = decoder_of(model, overlap=True)
        for rows in (1, 2, 4, 8, 16):
            decoder.prepare(rows)
        over.set()
        thread.join()
        assert not errors
        sequences = sequences_of(random.Random(4), 16, model.config.text.vocab_size)
        remaining = [sequence.max_new_tokens for sequence in sequences]
        want = step_by_step(decoder, sequences, remaining, 16)
        decoder.start(sequences, remaining, STEPS, until_one_ends=True)
        got = drained(decoder)
        assert got == [event for event in want if event[0] <= got[-1][0]]
        decoder.close()


@pytest.fixture(scope="module")
def world(directory: Path) -> World:
    require_kernels(GPU)
    theirs = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float16)
    ours = load_model(directory, device=GPU, dtype=torch.float16)
    pictures = random_pictures(0, 6, ours.config.vision.image_size)
    made = World(ours, theirs.eval().to(GPU), pictures)
    made.measure([(n % 6, [20 + n]) for n in range(16)])
    return made


@pytest.fixture
def runtime(world: World) -> Iterator[DeviceRuntime]:
    config = EngineConfig(device="cuda", block_size=BLOCK_SIZE, prefill_chunk=40, max_batch=32)
    made = DeviceRuntime(world.ours, device=GPU, config=config)
    made.add_worker("one", 400 * made.kv_block_bytes)
    yield made
    made.close()


def settled(runtime: DeviceRuntime) -> None:
    deadline = time.monotonic() + 30
    while runtime.load() and time.monotonic() < deadline:
        runtime.wake()
        time.sleep(0.005)
    assert runtime.load() == 0
    assert runtime.num_free_blocks == runtime.num_blocks


def test_a_moving_cache_is_captured_again(
    world: World, runtime: DeviceRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []
    graph_of = StepGraphs.__call__

    def counted(self: StepGraphs, rows: int) -> int:
        if rows not in self:
            captured.append(rows)
        return graph_of(self, rows)

    monkeypatch.setattr(StepGraphs, "__call__", counted)
    asked: list[tuple[int | None, list[int]]] = [(n % 6, [40 + n]) for n in range(8)]
    world.measure(asked)

    def ask() -> list[Sink]:
        sinks = [Sink() for _ in asked]
        for request, sink in zip(asked, sinks, strict=True):
            runtime.submit(world.sequence(*request, sink))
        return sinks

    sinks = ask()
    runtime.add_worker("two", 100 * runtime.kv_block_bytes)  # while they run
    for request, sink in zip(asked, sinks, strict=True):
        world.agrees(*request, sink.wait())
    sinks = ask()
    runtime.remove_worker("one")
    for request, sink in zip(asked, sinks, strict=True):
        world.agrees(*request, sink.wait())
    settled(runtime)
    assert captured.count(1) >= 1
    assert len(captured) > len(set(captured)), "nothing was captured twice"


def test_rows_that_go_in_mid_run_disturb_nobody(world: World, runtime: DeviceRuntime) -> None:
    chance = random.Random(8)
    asked: list[tuple[int | None, list[int]]] = [(n % 6, [60 + n]) for n in range(24)]
    world.measure(asked)
    sinks = [Sink(chance.choice([None, 2, 5, 9])) for _ in asked]
    for request, sink in zip(asked, sinks, strict=True):
        runtime.submit(world.sequence(*request, sink))
    for request, sink in zip(asked, sinks, strict=True):
        tokens = sink.wait()
        world.agrees(*request, tokens)
        assert len(tokens) == NEW_TOKENS or sink.cancelled
    settled(runtime)


def test_runtimes_that_come_and_go_leave_no_memory_and_no_thread(
    world: World, record_property: Callable[[str, object], None]
) -> None:
    config = EngineConfig(device="cuda", block_size=BLOCK_SIZE, max_batch=32)

    def once() -> tuple[int, int]:
        made = DeviceRuntime(world.ours, device=GPU, config=config)
        made.add_worker("one", 400 * made.kv_block_bytes)
        sinks = [Sink(3) for _ in range(40)]
        for index, sink in enumerate(sinks):
            made.submit(world.sequence(index % 6, [index], sink))
        for sink in sinks:
            sink.wait()
        made.close()
        del made
        gc.collect()
        torch.cuda.synchronize()
        # torch keeps cuBLAS's workspace for every stream that it ever had; ours are new each time.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        threads = len(list(Path("/proc/self/task").iterdir()))
        return torch.cuda.memory_reserved(), threads

    once()
    first = once()
    for _ in range(3):
        last = once()
    record_property("reserved", f"{first} {last}")
    assert last == first
