"""What does a token cost in the whole runtime, LLaVA-1.5-7B's shape, random fp16 weights?

One picture and 25 text tokens, 128 new tokens, through DeviceRuntime: alone and 64 at once. No step
graph exists yet, so this is the host's launch rate as much as the GPU's speed.

    python bench/decode.py [--kernels auto|reference] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from llava_engine import EngineConfig, FinishReason, SamplingParams
from llava_engine.errors import LlavaError
from llava_engine.kernels.library import require_kernels
from llava_engine.network.config import LlavaConfig
from llava_engine.network.weights import random_model
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.sequence import Picture, Sequence
from llava_engine.text.prompt import placeholder_ids

NEW_TOKENS = 128
DEVICE = torch.device("cuda")
SHAPE = {
    "model_type": "llava",
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
}


class Sink:
    """Notes when each token came."""

    cancelled = False

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ended = threading.Event()
        self.error: LlavaError | None = None

    def start(self, cached_tokens: int) -> None: ...

    def put(self, token_id: int) -> None:
        self.times.append(time.perf_counter())

    def finish(self, reason: FinishReason) -> None:
        self.ended.set()

    def fail(self, error: LlavaError) -> None:
        self.error = error
        self.ended.set()

    def wait(self) -> list[float]:
        self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.times


def request(number: int, length: int, sink: Sink) -> Sequence:
    """A picture that no other request has, then 25 text tokens."""
    key = number.to_bytes(16, "big")
    pixels = np.random.default_rng(number).standard_normal((3, 336, 336), dtype=np.float32)
    ids = [1, *placeholder_ids(key, length), *range(100, 125)]
    return Sequence(
        ids,
        (Picture(key, 1, length, pixels),),
        SamplingParams(ignore_eos=True),
        NEW_TOKENS,
        frozenset({2}),
        sink,
        seed=0,
    )


def main() -> None:
    """Print first-token and inter-token times; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", choices=("auto", "reference"), default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.kernels == "auto":
        require_kernels(DEVICE)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(SHAPE))
        config = LlavaConfig.from_directory(Path(directory))
    with torch.inference_mode():
        model = random_model(config, device=DEVICE, dtype=torch.float16, seed=0)
    runtime = DeviceRuntime(
        model, device=DEVICE, config=EngineConfig(device="cuda", kernels=arguments.kernels)
    )
    runtime.add_worker("one", 30 << 30)
    length = config.image_tokens
    first, between = [], []
    for number in range(4):  # the first warms up
        sink = Sink()
        start = time.perf_counter()
        runtime.submit(request(number, length, sink))
        times = sink.wait()
        if number:
            first.append(times[0] - start)
            between += [b - a for a, b in zip(times, times[1:], strict=False)]
    sinks = [Sink() for _ in range(64)]
    requests = [request(100 + number, length, sink) for number, sink in enumerate(sinks)]
    start = time.perf_counter()
    for sequence in requests:
        runtime.submit(sequence)
    for sink in sinks:
        sink.wait()
    together = time.perf_counter() - start
    runtime.close()
    record = {
        "commit": os.environ.get("COMMIT", "unknown"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": arguments.kernels,
        "first_token_ms": 1e3 * statistics.median(first),
        "token_ms": 1e3 * statistics.median(between),
        "token_ms_p99": 1e3 * sorted(between)[int(0.99 * len(between))],
        "tokens_per_s_64": 64 * NEW_TOKENS / together,
    }
    print(json.dumps(record))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
