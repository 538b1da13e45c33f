"""What does a token cost in the whole runtime, LLaVA-1.5-7B's shape, random fp16 weights?

One picture and 25 text tokens, 128 new tokens each, from submission to the chunks of a ChunkStream:
one request after the other, the same beside two Python threads that compute, and 64 at once. The
engine's times are those at which its native loop saw the tokens; the reader's are those at which a
Python thread had the chunk in its hands. Then the first token alone: from pixels in memory, of a
picture seen before, from a JPEG's bytes, and from pixels with prefill="fp8".

Without a GPU it is llava-tiny's shape in float32, with fewer and shorter requests, pictures are
resampled with Pillow as in the engine there, and there is no prefill="fp8" and no floor.

    python -m bench.decode [--kernels auto|reference] [--prefill-chunk N] [--at-once N ...]
                           [--quantization nf4|int8|fp8] [--json PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.about import about
from bench.decode_step import DEVICE, ON_GPU, READ_BYTES_PER_S, floor_ms, make_model
from llava_engine import EngineConfig, SamplingParams
from llava_engine.channel import Channel
from llava_engine.image.load import LoadedImage
from llava_engine.image.picture_cache import PictureCache, PreparedPicture
from llava_engine.image.preprocess import ImageProcessorConfig, decoded_picture
from llava_engine.kernels.library import require_kernels
from llava_engine.runtime.decode_loop import TokenEvent
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.sequence import Picture, Sequence
from llava_engine.stream import ChunkStream
from llava_engine.text.prompt import placeholder_ids

NEW_TOKENS = 128 if ON_GPU else 16
REQUESTS = 10 if ON_GPU else 4  # one after the other
# Fewer: before the first token every call into torch waits for the GIL; on a CPU after it as well.
BUSY_REQUESTS = 2 if ON_GPU else 1
AT_ONCE = 64 if ON_GPU else 4
KV_BYTES = 30 << 30 if ON_GPU else 64 << 20
SIDE = 336 if ON_GPU else 112  # of a picture, in pixels
PROCESSOR = ImageProcessorConfig(shortest_edge=SIDE, crop_size=(SIDE, SIDE))
RESAMPLE = not ON_GPU  # in host memory, as the engine has it on a CPU


class Words:
    """Random weights say nothing: every token is a word."""

    def push(self, token_id: int) -> str:
        return f" {token_id}"

    def flush(self) -> str:
        return ""


class Bench:
    """A runtime, and when its tokens came."""

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        with torch.inference_mode():
            model = make_model(directory, config.quantization)
        self.weight_bytes = model.nbytes
        self.floor_ms = floor_ms(model, 1)
        self.image_tokens = model.config.image_tokens
        self.seen: list[TokenEvent] = []
        self.runtime = DeviceRuntime(
            model, device=DEVICE, config=config, on_tokens=self.seen.extend
        )
        self.runtime.add_worker("one", KV_BYTES)
        self._number = 0

    def picture(self) -> PreparedPicture:
        """A picture of SIDE x SIDE that no other request has, decoded in host memory."""
        self._number += 1
        generator = np.random.default_rng(self._number)
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        key = self._number.to_bytes(16, "big")
        decoded = decoded_picture(LoadedImage(pixels, key, 1), PROCESSOR, resample=RESAMPLE)
        return PreparedPicture(key, decoded)

    def submit(
        self, prepared: PreparedPicture, question: int = 100, new_tokens: int = NEW_TOKENS
    ) -> ChunkStream:
        """A request about a picture; questions of different numbers have other tokens."""
        key, length = prepared.key, self.image_tokens
        ids = [1, *placeholder_ids(key, length), *range(question, question + 25)]
        channel = Channel()
        channel.bind(Words(), len(ids), length)
        channel.on_change(self.runtime.wake)
        sampling = SamplingParams(ignore_eos=True)
        picture = Picture(key, 1, length, prepared.pixels)
        self.runtime.submit(
            Sequence(ids, (picture,), sampling, new_tokens, frozenset({2}), channel, seed=0)
        )
        return ChunkStream(channel)

    def one_after_the_other(self, count: int) -> dict[str, float]:
        """Milliseconds to the first chunk, and between tokens as engine and reader see them."""
        first, engine, reader = [], [], []
        for _ in range(count):
            self.seen.clear()
            picture = self.picture()
            start = time.perf_counter()
            times = [time.perf_counter() for _ in self.submit(picture)]
            first.append(1e3 * (times[0] - start))
            reader += [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
            stamps = [event.time_ns for event in self.seen]
            engine += [1e-6 * (b - a) for a, b in zip(stamps, stamps[1:], strict=False)]
        return {
            "first_token_ms": statistics.median(first),
            "token_ms": statistics.median(engine),
            "token_ms_mean": statistics.mean(engine),
            "token_ms_p99": percentile(engine, 0.99),
            "reader_token_ms": statistics.median(reader),
            "reader_token_ms_mean": statistics.mean(reader),
            "reader_token_ms_p99": percentile(reader, 0.99),
        }

    def first_token_ms(self, prepare: Callable[[int], PreparedPicture], question: int) -> float:
        """The median from a picture, which `prepare` makes inside that time, to the first chunk.

        It is the last one, too: what a cancelled request leaves in flight would count for the next.
        """
        times = []
        for turn in range(2 + REQUESTS):
            start = time.perf_counter()
            stream = self.submit(prepare(turn), question + turn, new_tokens=1)
            next(stream)
            times.append(1e3 * (time.perf_counter() - start))
            stream.text()
        return statistics.median(times[2:])

    def first_tokens(self) -> dict[str, float]:
        """Of pixels in memory, of a seen picture with a new question, of a JPEG's bytes."""
        fresh = [self.picture() for _ in range(2 + REQUESTS)]
        files = [jpeg(turn) for turn in range(2 + REQUESTS)]
        cache = PictureCache(
            PROCESSOR, max_bytes=1 << 30, max_pixels=1 << 30, capacity=0, resample=RESAMPLE
        )
        seen = fresh[0]
        return {
            "first_token_pixels_ms": self.first_token_ms(fresh.__getitem__, 100),
            "first_token_seen_ms": self.first_token_ms(lambda _: seen, 200),
            "first_token_jpeg_ms": self.first_token_ms(
                lambda turn: cache.prepare(files[turn]), 100
            ),
        }

    def at_once(self, count: int) -> float:
        """Tokens per second of `count` requests, from the first submission to the last chunk."""
        pictures = [self.picture() for _ in range(count)]
        start = time.perf_counter()
        streams = [self.submit(picture) for picture in pictures]
        threads = [threading.Thread(target=stream.text) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return count * NEW_TOKENS / (time.perf_counter() - start)


def jpeg(seed: int) -> bytes:
    """A photograph's like, 1920 x 1080: noise of many scales, at quality 90."""
    generator = np.random.default_rng(seed)
    total = np.zeros((1080, 1920, 3), np.float32)
    for step in (4, 16, 64, 256):
        coarse = generator.integers(0, 64, (1080 // step + 2, 1920 // step + 2, 3), dtype=np.uint8)
        total += Image.fromarray(coarse).resize((1920, 1080), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """Python threads that hold the GIL whenever they can."""
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            sum(number * number for number in range(1000))

    threads = [threading.Thread(target=compute) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def main() -> None:
    """Print first-token and inter-token times; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", choices=("auto", "reference"), default="auto")
    parser.add_argument("--prefill-chunk", type=int, default=EngineConfig().prefill_chunk)
    parser.add_argument("--quantization", choices=("nf4", "int8", "fp8"))
    parser.add_argument("--at-once", type=int, nargs="+", default=[AT_ONCE])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.kernels == "auto":
        require_kernels(DEVICE)
    if not ON_GPU:
        print(
            "no GPU: llava-tiny's shape in float32; left out are first_token_pixels_fp8_ms, "
            "floor_ms, read_bytes_per_s, of_floor, beside_two_computing_threads",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as directory:
        config = EngineConfig(
            device=DEVICE.type,
            kernels=arguments.kernels,
            prefill_chunk=arguments.prefill_chunk,
            quantization=arguments.quantization,
        )
        bench = Bench(Path(directory), config)
    print("ready", flush=True)
    bench.one_after_the_other(2)  # warms up
    idle = bench.one_after_the_other(REQUESTS)
    print("idle", idle, flush=True)
    beside: dict[str, object] = {}
    if ON_GPU:  # on a CPU every op waits for the threads: bench/interference.py asks that
        with computing_threads(2):
            busy = bench.one_after_the_other(BUSY_REQUESTS)
        print("busy", busy, flush=True)
        beside = {
            "beside_two_computing_threads": busy,
            "p99_busy_over_idle": busy["token_ms_p99"] / idle["token_ms_p99"],
        }
    bench.at_once(AT_ONCE)  # captures what larger batches need
    together = {
        f"tokens_per_s_{count}": statistics.median(bench.at_once(count) for _ in range(3))
        for count in arguments.at_once
    }
    firsts = bench.first_tokens()
    print(firsts, flush=True)
    floor, weight_bytes = bench.floor_ms, bench.weight_bytes
    bench.runtime.close()
    del bench
    if ON_GPU and arguments.kernels == "auto" and arguments.quantization is None:
        with tempfile.TemporaryDirectory() as directory:
            bench = Bench(Path(directory), dataclasses.replace(config, prefill="fp8"))
        pictures = [bench.picture() for _ in range(2 + REQUESTS)]
        firsts["first_token_pixels_fp8_ms"] = bench.first_token_ms(pictures.__getitem__, 100)
        bench.runtime.close()
    against_floor = {
        "floor_ms": floor,
        "read_bytes_per_s": READ_BYTES_PER_S,
        "of_floor": floor / idle["token_ms"],
    }
    record = {
        **about(),
        "kernels": arguments.kernels,
        "prefill_chunk": arguments.prefill_chunk,
        "quantization": arguments.quantization,
        "weight_bytes": weight_bytes,
        **idle,
        **firsts,
        **(against_floor if ON_GPU else {}),
        **beside,
        **together,
    }
    print(json.dumps(record, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
