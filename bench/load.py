"""How long do weights take from the page cache to a device, against safetensors' own ways?

Checkpoints of LLaVA-1.5-7B's shape with as many layers as make the size asked for, in shards of
about 5 GB, written just before and read once, so that they are in the page cache (--folder must
have room; they are deleted). Ways, each to a model whose memory torch has cached, the median of
--repeats after one that does not count:

    load_model   this engine's, header checks and allocation included
    get_tensor   safe_open on the CPU (mmap), each tensor copied to its place (ours before 2d5b0c8)
    safe_open    safe_open on the device, each tensor copied to its place
    bytes        what the files' pages take to be read by one thread into one buffer: no device

With --readers and --piece-mb load_model is also tried with other numbers of threads and buffers.

    python -m bench.load [GB ...] [--device cuda] [--stored float16] [--dtype float16] [--json PATH]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.about import about
from bench.decode_step import SHAPE
from llava_engine.network import tensor_reader
from llava_engine.network.llava import LlavaConfig, LlavaModel
from llava_engine.network.weights import load_model

SHARD_BYTES = 5 << 30
INDEX = "model.safetensors.index.json"


def make_checkpoint(directory: Path, nbytes: int, stored: torch.dtype) -> int:
    """Write a checkpoint of about `nbytes`; returns the bytes of its tensors."""
    meta = torch.device("meta")

    def model_of(layers: int) -> LlavaModel:
        text = {**SHAPE["text_config"], "num_hidden_layers": layers}
        (directory / "config.json").write_text(json.dumps({**SHAPE, "text_config": text}))
        config = LlavaConfig.from_directory(directory)
        return LlavaModel(config, device=meta, dtype=stored)

    one, two = model_of(1).nbytes, model_of(2).nbytes
    model = model_of(1 + max(0, round((nbytes - one) / (two - one))))
    random = _random_values(stored)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def write() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, view in model.slots():
        if "norm" in name and name.endswith(".weight"):
            shard[name] = torch.ones(view.shape, dtype=stored)
        else:
            shard[name] = random(view.shape)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            write()
    if shard:
        write()
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return model.nbytes


def _random_values(dtype: torch.dtype) -> Callable[[torch.Size], torch.Tensor]:
    """Tensors of random numbers, standard deviation 0.02; drawing them all would take a minute."""
    block = torch.empty(1 << 24).normal_(0, 0.02).to(dtype)
    generator = torch.Generator().manual_seed(0)

    def values(shape: torch.Size) -> torch.Tensor:
        start = int(torch.randint(len(block), (), generator=generator))
        rolled = block.roll(start) if shape.numel() >= len(block) else block[start:]
        copies = -(-shape.numel() // len(rolled))
        return rolled.repeat(copies)[: shape.numel()].view(shape).clone()

    return values


def through_safetensors(directory: Path, device: torch.device, dtype: torch.dtype, at: str) -> None:
    """Every tensor from safe_open(device=at) to its place in a new model."""
    model = LlavaModel(LlavaConfig.from_directory(directory), device=device, dtype=dtype)
    places = dict(model.slots())
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt", device=at) as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                places[name].copy_(file.get_tensor(name))


def read_bytes(directory: Path) -> None:
    buffer = bytearray(16 << 20)
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def seconds(action: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """The times of `repeats` calls after a first one, each to the end of its copies."""
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return times[1:]


def measure(arguments: argparse.Namespace, gigabytes: float) -> dict[str, object]:
    device = torch.device(arguments.device)
    stored, dtype = getattr(torch, arguments.stored), getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        directory = Path(name)
        nbytes = make_checkpoint(directory, int(gigabytes * 1e9), stored)

        def load() -> object:
            return load_model(directory, device=device, dtype=dtype)

        ways: dict[str, Callable[[], object]] = {
            "load_model": load,
            "get_tensor": lambda: through_safetensors(directory, device, dtype, "cpu"),
            "safe_open": lambda: through_safetensors(directory, device, dtype, str(device)),
            "bytes": lambda: read_bytes(directory),
        }
        results = {}

        def run(way: str, action: Callable[[], object]) -> None:
            times = seconds(action, device, arguments.repeats)
            median = statistics.median(times)
            results[way] = {
                "s": round(median, 4),
                "worst_s": round(max(times), 4),
                "gb_per_s": round(nbytes / median / 1e9, 2),
            }
            print(f"{nbytes / 1e9:6.2f} GB  {way:24} {results[way]}", flush=True)

        for way in arguments.ways:
            run(way, ways[way])
        usual = tensor_reader.READERS, tensor_reader.PIECE_BYTES
        for readers, piece_mb in itertools.product(arguments.readers, arguments.piece_mb):
            tensor_reader.READERS, tensor_reader.PIECE_BYTES = readers, piece_mb << 20
            run(f"load_model {readers} x {piece_mb} MB", load)
        tensor_reader.READERS, tensor_reader.PIECE_BYTES = usual
    return {"bytes": nbytes, "ways": results}


def main() -> None:
    """Print a line per size and way; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=float, nargs="*", default=[14.0], metavar="GB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stored", default="float16", help="the type in the files")
    parser.add_argument("--dtype", default="float16", help="the type on the device")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=["load_model", "get_tensor", "safe_open"])
    parser.add_argument("--readers", type=int, nargs="*", default=[])
    parser.add_argument("--piece-mb", type=int, nargs="*", default=[16])
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    record = {
        **about(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "stored": arguments.stored,
        "dtype": arguments.dtype,
        "readers": tensor_reader.READERS,
        "piece_bytes": tensor_reader.PIECE_BYTES,
        "sizes": [measure(arguments, size) for size in arguments.sizes],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
