"""How long does a JPEG take to pixels in host memory, by Pillow and by nvImageCodec?

Both through load_image, limits, header and orientation included, the median of --repeats calls
after warm ones; then with several threads at once. With the mean and the largest difference of the
two decoders' pixels in levels, and, for the pictures of nvImageCodec's own choice, what each of its
backends (the GPU's JPEG engines, its kernels) and simple upsampling would have taken and given.
Where there is no GPU or no nvImageCodec, Pillow is measured alone.

    python -m bench.jpeg_decode [--repeats 9] [--json PATH]
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.about import about
from llava_engine.errors import KernelsNotBuilt
from llava_engine.image.gpu_decode import GpuJpegDecoder, Lane, jpeg_decoder
from llava_engine.image.gpu_decode import _CudaLane as CudaLane
from llava_engine.image.load import load_image

LIMITS = {"max_bytes": 1 << 26, "max_pixels": 1 << 26}
FULL_HD = "1920x1080"
FILES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "336x336": ((336, 336), {"subsampling": 2}),
    FULL_HD: ((1920, 1080), {"subsampling": 2}),
    "1920x1080 4:4:4": ((1920, 1080), {"subsampling": 0}),
    "1920x1080 progressive": ((1920, 1080), {"subsampling": 2, "progressive": True}),
    "4000x3000": ((4000, 3000), {"subsampling": 2}),
}


@functools.cache
def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth and rough parts, edges and saturated colours, somewhat as in a photograph."""
    rng = np.random.default_rng(seed)
    width, height = size
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(8):
        cells = rng.integers(0, 256, (3 << octave, 4 << octave, 3), dtype=np.uint8)
        layer = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
        total += (np.asarray(layer, np.float32) - 128) * 0.62**octave
    flat = np.arange(width)[None, :] // 97 + np.arange(height)[:, None] // 61
    total[flat % 5 == 0] = np.array((235, 20, 40), np.float32) - 128
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


def encode(name: str) -> bytes:
    (width, height), options = FILES[name]
    times = 1 + (width > 1920)
    pixels = np.tile(np.asarray(photo((width // times, height // times))), (times, times, 1))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def wall_ms(work: Callable[[], object], repeats: int) -> dict[str, float]:
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e3)
    return {"ms": round(statistics.median(times), 3), "worst_ms": round(max(times), 3)}


def per_second(work: Callable[[], object], threads: int, count: int) -> float:
    """Pictures a second, of `count` that as many threads take from one queue."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: work(), range(2 * threads)))
        begin = time.perf_counter()
        list(pool.map(lambda _: work(), range(count)))
        return round(count / (time.perf_counter() - begin), 1)


def difference(content: bytes, decoder: GpuJpegDecoder) -> dict[str, float]:
    ours = load_image(content, **LIMITS, decode_jpeg=decoder)
    pillows = load_image(content, **LIMITS)
    assert ours.content != pillows.content, "the GPU refused the file"
    apart = np.abs(ours.pixels.astype(np.int16) - pillows.pixels)
    return {"mean": round(float(apart.mean()), 4), "max": int(apart.max())}


def open_decoder(device: torch.device) -> GpuJpegDecoder | None:
    """nvImageCodec, or None where it is not installed; where it is and fails, that is an error."""
    try:
        return jpeg_decoder("gpu", device)
    except KernelsNotBuilt as error:
        if isinstance(error.__cause__, ImportError):
            return None
        raise


def variants(device: torch.device) -> dict[str, GpuJpegDecoder]:
    """nvImageCodec with one backend only, or with the simple upsampling of chroma."""
    from nvidia import nvimgcodec as codec

    def lane(kinds: list[Any], options: str) -> Callable[[], Lane]:
        def opened() -> Lane:
            lane = CudaLane(codec, device)
            lane._decoder = codec.Decoder(
                device_id=0,
                max_num_cpu_threads=1,
                backends=[codec.Backend(kind) for kind in kinds],
                options=options,
            )
            return lane

        return opened

    engines, kernels = codec.BackendKind.HW_GPU_ONLY, codec.BackendKind.HYBRID_CPU_GPU
    fancy = ":fancy_upsampling=1"
    return {
        "engines": GpuJpegDecoder(lane([engines], fancy)),
        "engines, simple": GpuJpegDecoder(lane([engines], ":fancy_upsampling=0")),
        "kernels": GpuJpegDecoder(lane([kernels], fancy)),
        "kernels, simple": GpuJpegDecoder(lane([kernels], ":fancy_upsampling=0")),
        "kernels, Huffman on the CPU": GpuJpegDecoder(
            lane([kernels], f"{fancy} nvjpeg_cuda_decoder:hybrid_huffman_threshold=99999999")
        ),
        "kernels, strict": GpuJpegDecoder(lane([kernels], f"{fancy} :extra_flags=4")),
    }


def main() -> None:
    """Print a line per file and decoder; write JSON if asked."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9 if on_gpu else 3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    if on_gpu:
        torch.zeros(1, device=device)

    begin = time.perf_counter()
    decoder = open_decoder(device) if on_gpu else None
    opened = time.perf_counter() - begin
    if decoder is None:
        print(
            f"no {'nvImageCodec' if on_gpu else 'GPU'}: Pillow alone; left out are gpu, gpu_per_s, "
            "levels_apart, device_mib_more, import_and_first_picture_s, variants",
            flush=True,
        )
    record: dict[str, Any] = {
        **about(),
        **({} if decoder is None else {"import_and_first_picture_s": round(opened, 3)}),
        "files": {},
        "threads": {},
        **({} if decoder is None else {"variants": {}}),
    }

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")

    def show(name: str, found: object) -> None:
        print(f"{name:45} {found}", flush=True)

    contents = {name: encode(name) for name in FILES}
    for name, content in contents.items():

        def pillow(content: bytes = content) -> object:
            return load_image(content, **LIMITS)

        def gpu(content: bytes = content) -> object:
            return load_image(content, **LIMITS, decode_jpeg=decoder)

        record["files"][name] = found = {
            "bytes": len(content),
            "pillow": wall_ms(pillow, arguments.repeats),
        }
        if decoder is not None:
            free = torch.cuda.mem_get_info(device)[0]
            found["gpu"] = wall_ms(gpu, arguments.repeats)
            found["levels_apart"] = difference(content, decoder)
            found["device_mib_more"] = (free - torch.cuda.mem_get_info(device)[0]) >> 20
        show(name, found)
    content = contents[FULL_HD]
    for threads in (1, 4, 8):
        record["threads"][threads] = found = {
            "pillow_per_s": per_second(lambda: load_image(content, **LIMITS), threads, 48),
        }
        if decoder is not None:
            found["gpu_per_s"] = per_second(
                lambda: load_image(content, **LIMITS, decode_jpeg=decoder), threads, 96
            )
        show(f"{threads} threads", found)
    if decoder is None:
        save()
        return
    decoder.close()
    save()  # what a variant may do is not known
    for name, variant in variants(device).items():
        for file in (FULL_HD, "1920x1080 progressive"):
            content = contents[file]
            try:
                apart = difference(content, variant)
            except AssertionError as error:
                record["variants"][f"{file}, {name}"] = str(error)
                show(f"{file}, {name}", error)
                continue
            record["variants"][f"{file}, {name}"] = found = {
                **wall_ms(
                    lambda content=content, variant=variant: load_image(
                        content, **LIMITS, decode_jpeg=variant
                    ),
                    arguments.repeats,
                ),
                "levels_apart": apart,
            }
            show(f"{file}, {name}", found)
        variant.close()
    save()


if __name__ == "__main__":
    main()
