"""What would a captured graph give prefill, which makes one call for all layers?

LLaVA-1.5-7B's shape, random fp16 weights: one sequence's prefill on the prefill stream, prepared as
the model runner does it, from embeddings to the final norm of the last row. Three ways in turn:

    call    as the engine runs it
    graph   the same captured, for exactly so many tokens
    bucket  captured for as many, or more up to a multiple of 64, which is what an engine would
            have; rows behind the sequence's end are multiplied, but no row sees their keys

Medians, in milliseconds, of each:

    _ms         of the host, until the call or the launch has returned; the device was idle before
    _total_ms   of that moment to the end of the device's work
    _device_ms  by events, all of it queued before any of it runs

capture_ms is for the graph's capture, with the run before it that the engine's captures make. It
holds graph_mb of the device's memory, and of these pool_mb, its tensors', can be shared by graphs.
*_difference: of its result from the call's, whose rows have a root mean square of 1.

Without a GPU it is llava-tiny's shape in float32 and call_ms alone, which is then all of it.

    python -m bench.prefill_graph [TOKENS ...] [--repeats 30] [--pause SECONDS] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.about import about
from bench.decode_step import DEVICE, ON_GPU, make_model
from bench.timing import start_on_cpu
from llava_engine import EngineConfig, SamplingParams
from llava_engine.channel import Channel
from llava_engine.kernels.library import programmatic_launch, require_kernels
from llava_engine.kernels.prefill import pack, unpack
from llava_engine.network.llama import Batch
from llava_engine.network.llava import LlavaModel, batch_of
from llava_engine.runtime.feature_cache import FeatureCache
from llava_engine.runtime.graph import CapturedGraphs
from llava_engine.runtime.kv_cache import KVCache
from llava_engine.runtime.model_runner import ModelRunner
from llava_engine.runtime.scheduler import Scheduled
from llava_engine.runtime.sequence import Sequence
from llava_engine.runtime.streams import DeviceStreams

TOKENS = [32, 128, 602, 1024, 2048] if ON_GPU else [32, 128, 602]
REPEATS = 30 if ON_GPU else 5
BUCKET = 64
WARM_UP = 3
SLEEP_CYCLES = 30_000_000  # of the device: some 17 ms, for the host to queue everything
CLOSE = 0.05  # a graph's result to the call's
CONFIG = EngineConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """A sequence's rows and where they belong. The layers overwrite `embeds`, a copy of `given`."""

    given: torch.Tensor
    embeds: torch.Tensor
    batch: Batch
    last: torch.Tensor


class Bench:
    """A model, and blocks for one sequence of up to `most` tokens."""

    def __init__(self, model: LlavaModel, streams: DeviceStreams, most: int) -> None:
        text = model.config.text
        self.model, self.streams = model, streams
        self.cache = KVCache(
            num_layers=text.num_layers,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            block_size=CONFIG.block_size,
            dtype=model.dtype,
            device=model.device,
        )
        self.runner = ModelRunner(
            model, self.cache, FeatureCache(0), streams, attention=CONFIG.attention
        )
        chance = random.Random(0)
        self.ids = [chance.randrange(5, text.vocab_size) for _ in range(most)]
        self.blocks = list(range(-(-most // CONFIG.block_size)))
        chance.shuffle(self.blocks)
        self.cache.resize(len(self.blocks), {})

    def prepare(self, tokens: int) -> Prefill:
        """What ModelRunner.run would upload, as the decoder takes it."""
        ids, sampling = self.ids[:tokens], SamplingParams(ignore_eos=True)
        sequence = Sequence(ids, (), sampling, 1, frozenset(), Channel(), seed=0)
        sequence.block_table = self.blocks[: -(-tokens // CONFIG.block_size)]
        step = [Scheduled(sequence, tokens)]
        uploaded, sizes = pack(self.runner._inputs(step, [0]))
        inputs = unpack(self.streams.upload([uploaded])[0], sizes)
        embeds, batch = self.model.embed(inputs.token_ids), batch_of(inputs, tokens)
        return Prefill(given=embeds.clone(), embeds=embeds, batch=batch, last=inputs.wanted)

    def padded(self, exact: Prefill, bucket: int) -> Prefill:
        """The same sequence in so many rows; those behind it belong to none."""
        whole, mine = self.prepare(bucket), exact.batch
        batch = replace(whole.batch, query_start=mine.query_start, context_lens=mine.context_lens)
        return replace(whole, batch=batch, last=exact.last)

    def call(self, prefill: Prefill) -> torch.Tensor:
        """The last row [1, hidden] after all layers, on the current stream."""
        with programmatic_launch(CONFIG.programmatic_launch):
            keys, values = self.cache.keys, self.cache.values
            return self.model.forward(prefill.embeds, prefill.batch, keys, values, prefill.last)

    def result(self, prefill: Prefill, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `run` makes of it; earlier keys and values are gone."""
        prefill.embeds.copy_(prefill.given)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.zero_()
        return run().clone()

    def captured(
        self, graphs: CapturedGraphs, prefill: Prefill, expected: torch.Tensor
    ) -> tuple[int, dict[str, float]]:
        """Its graph, and what that takes and holds. What it leaves is near `expected`."""
        self.result(prefill, lambda: self.call(prefill))  # what the first call loads is no graph's
        free, reserved = device_memory()
        left: list[torch.Tensor] = []
        started = time.perf_counter()
        graph = graphs.capture(lambda: left.append(self.call(prefill)))
        took = 1e3 * (time.perf_counter() - started)
        free_now, reserved_now = device_memory()

        def run() -> torch.Tensor:
            graphs.launch(graph)
            return left[-1]

        left[-1].fill_(torch.nan)
        off = float((self.result(prefill, run) - expected).abs().max())
        assert off < CLOSE, f"a graph's result is not the call's: {off}"
        figures = {
            "capture_ms": took,
            "graph_mb": (free - free_now) / 2**20,
            "pool_mb": (reserved_now - reserved) / 2**20,
            "difference": off,
        }
        return graph, figures


def device_memory() -> tuple[int, int]:
    """Bytes that the device has free, and that torch has of it, nothing unused."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()


def measure(bench: Bench, tokens: int, repeats: int, pause: float) -> dict[str, float]:
    """The figures of one number of tokens."""
    exact = bench.prepare(tokens)
    runs: dict[str, tuple[Prefill, Callable[[], object]]] = {
        "call": (exact, lambda: bench.call(exact))
    }
    if bench.streams.prefill is None:
        return {"tokens": tokens, **medians(runs, repeats, pause)}
    bucket = -(-tokens // BUCKET) * BUCKET
    padded = bench.padded(exact, bucket)
    expected = bench.result(exact, lambda: bench.call(exact))
    graphs = CapturedGraphs(bench.streams.prefill, overlap=CONFIG.programmatic_launch)
    try:
        graph, figures = bench.captured(graphs, exact, expected)
        wider, of_wider = bench.captured(graphs, padded, expected)
        runs["graph"] = exact, lambda: graphs.launch(graph)
        runs["bucket"] = padded, lambda: graphs.launch(wider)
        times = medians(runs, repeats, pause)
    finally:
        graphs.clear()
    figures["graph_difference"] = figures.pop("difference")
    figures["bucket_difference"] = of_wider["difference"]
    return {"tokens": tokens, "bucket": bucket, **times, **figures}


def medians(
    runs: dict[str, tuple[Prefill, Callable[[], object]]], repeats: int, pause: float
) -> dict[str, float]:
    """Each of the runs once in every repetition, so that drifting clocks hit all alike."""
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(WARM_UP + repeats):
        for name, (prefill, run) in runs.items():
            prefill.embeds.copy_(prefill.given)
            if ON_GPU:
                torch.cuda.synchronize()
            time.sleep(pause)
            started = time.perf_counter()
            run()
            times[f"{name}_ms"].append(1e3 * (time.perf_counter() - started))
            if ON_GPU:
                torch.cuda.synchronize()
                times[f"{name}_total_ms"].append(1e3 * (time.perf_counter() - started))
                times[f"{name}_device_ms"].append(event_ms(prefill, run))
    return {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}


def event_ms(prefill: Prefill, run: Callable[[], object]) -> float:
    """Between events, behind a sleep of the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prefill.embeds.copy_(prefill.given)
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@torch.inference_mode()
def main() -> None:
    """Print a line per number of tokens; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--pause", type=float, default=0.0, help="of the host before each")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    require_kernels(DEVICE)
    if not ON_GPU:
        start_on_cpu("graphs and their memory, call_total_ms, call_device_ms")
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory))
    streams = DeviceStreams(DEVICE)
    cases = []
    with streams.prefilling():
        bench = Bench(model, streams, max(arguments.tokens) + BUCKET)
        for tokens in arguments.tokens:
            case = measure(bench, tokens, arguments.repeats, arguments.pause)
            cases.append(case)
            print({name: round(value, 4) for name, value in case.items()}, flush=True)
    streams.close()
    options = {"repeats": arguments.repeats, "pause": arguments.pause, "cases": cases}
    if arguments.json:
        arguments.json.write_text(json.dumps({**about(), **options}, indent=1) + "\n")


if __name__ == "__main__":
    main()
