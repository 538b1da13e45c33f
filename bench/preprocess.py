"""What does it take from decoded pixels in the host's memory to the rows of patches on the GPU?

For LLaVA-1.5's processor (336 x 336, bicubic) and fp16, pictures of each size in turn, so that no
cache holds them; the filter's weights for that size are known. Medians, in milliseconds:

    ms          from the pixels in pageable memory to the end of the last kernel
    host_ms     of that, until the calls have returned
    upload_ms   of that, until `upload` has, which copies the pixels to pinned memory
    pinned_ms   the same work from pinned memory that is there: the copy and the kernels, by events
    kernels_ms  the kernels alone, by events, back to back
    pillow_ms   the CPU path: Pillow's resize, crop, levels to float32
    resize_ms   of that, Image.resize alone

Without a GPU it is llava-tiny's processor (112 x 112) and float32, and as in the engine there `ms`
is Pillow's resize before the copy and the kernels' references; host_ms would be the same, and there
is neither pinned memory nor a kernel to time by events.

    python -m bench.preprocess [HEIGHTxWIDTH ...] [--repeats 200] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.about import about
from llava_engine.image.load import LoadedImage
from llava_engine.image.preprocess import ImageProcessorConfig, decoded_picture, preprocess
from llava_engine.kernels.library import require_kernels
from llava_engine.kernels.preprocess import DecodedPicture
from llava_engine.kernels.preprocess import preprocess as write_rows
from llava_engine.network.clip import patch_rows, patch_width
from llava_engine.runtime.streams import DeviceStreams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.float16 if ON_GPU else torch.float32
SIDE, PATCH = (336, 14) if ON_GPU else (112, 8)
PROCESSOR = ImageProcessorConfig(shortest_edge=SIDE, crop_size=(SIDE, SIDE))
RESAMPLE = not ON_GPU  # with Pillow, as the engine has it on a CPU
REPEATS = 200 if ON_GPU else 10
PICTURES_BYTES = 200 << 20  # of different pictures, at least 3


def median_ms(action: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` calls after a few that do not count."""
    times = []
    for _ in range(3 + repeats):
        started = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[3:])


def event_ms(action: Callable[[], object], repeats: int, calls: int = 1) -> float:
    """The same by events around `calls` of it, each."""
    times = []
    for _ in range(3 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(500_000 * calls)  # so that all is queued before any of it runs
        start.record()
        for _ in range(calls):
            action()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times[3:])


def on_the_device(rows: torch.Tensor, decoded: DecodedPicture, repeats: int) -> dict[str, float]:
    """The copy from pinned memory and the kernels, and the kernels alone, by events."""
    uploaded, places = DeviceStreams(torch.device("cpu")).upload(decoded.arrays)
    pinned, there = uploaded.pin_memory(), uploaded.to(DEVICE)

    def copy_and_write() -> None:
        there.copy_(pinned, non_blocking=True)
        write_rows(rows, decoded, there, places, PATCH)

    copied = event_ms(copy_and_write, repeats)
    kernels = event_ms(lambda: write_rows(rows, decoded, there, places, PATCH), repeats, calls=20)
    return {"pinned_ms": copied, "kernels_ms": kernels}


def measure(height: int, width: int, repeats: int) -> dict[str, object]:
    generator = np.random.default_rng(height * width)
    count = max(3, PICTURES_BYTES // (3 * height * width))
    images = [
        LoadedImage(generator.integers(0, 256, (height, width, 3), dtype=np.uint8), b"", 1)
        for _ in range(count)
    ]
    streams, turn = DeviceStreams(DEVICE), cycle(images)
    shape = (SIDE // PATCH) ** 2, patch_width(PATCH)
    rows = torch.full(shape, torch.nan, dtype=DTYPE, device=DEVICE)
    host, uploads = [], []

    def prepare() -> DecodedPicture:
        started = time.perf_counter()
        decoded = decoded_picture(next(turn), PROCESSOR, resample=RESAMPLE)
        begun = time.perf_counter()
        uploaded, places = streams.upload(decoded.arrays)
        uploads.append(1e3 * (time.perf_counter() - begun))
        write_rows(rows, decoded, uploaded, places, PATCH)
        host.append(1e3 * (time.perf_counter() - started))
        if ON_GPU:
            torch.cuda.synchronize()
        return decoded

    with torch.inference_mode(), streams.prefilling():
        decoded = prepare()
        expected = preprocess(images[0], PROCESSOR)
        expected = patch_rows(torch.from_numpy(expected)[None], PATCH)[0].to(DTYPE)
        assert torch.equal(rows.cpu(), expected), "not the CPU path's rows"

        whole = median_ms(prepare, repeats)
        by_events = on_the_device(rows, decoded, repeats) if ON_GPU else {}
    fewer = max(5, repeats // 10)
    whole_cpu = median_ms(lambda: preprocess(next(turn), PROCESSOR), fewer)
    full = (
        (SIDE, int(SIDE * width / height)) if width > height else (int(SIDE * height / width), SIDE)
    )
    source = Image.fromarray(images[0].pixels)
    return {
        "height": height,
        "width": width,
        "uploaded_bytes": sum(array.nbytes for array in decoded.arrays),
        "ms": whole,
        **({"host_ms": statistics.median(host[4:])} if ON_GPU else {}),
        "upload_ms": statistics.median(uploads[4:]),
        **by_events,
        "pillow_ms": whole_cpu,
        "resize_ms": median_ms(lambda: source.resize(full[::-1], Image.Resampling.BICUBIC), fewer),
    }


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def main() -> None:
    """Print a line per size; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    usual = [(1080, 1920), (336, 336), (2400, 1080), (3000, 4000)]
    parser.add_argument("sizes", type=size, nargs="*", default=usual, metavar="HEIGHTxWIDTH")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    require_kernels(DEVICE)
    if not ON_GPU:
        print(
            "no GPU: llava-tiny's processor in float32, Pillow resizes; left out are host_ms, "
            "pinned_ms, kernels_ms",
            flush=True,
        )
    results = []
    for height, width in arguments.sizes:
        result = measure(height, width, arguments.repeats)
        results.append(result)
        figures = "  ".join(f"{k} {v:.4f}" for k, v in result.items() if k.endswith("ms"))
        print(f"preprocess {width}x{height} uint8 on the host -> patch rows: {figures}", flush=True)
    record = {
        **about(),
        "repeats": arguments.repeats,
        "sizes": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
