"""What do a layer's products of many rows take, ours against cuBLAS's, each with what follows it?

LLaVA-1.5-7B's decoder in fp16, by the rows of a step. QKV with RoPE and the cache, O and down with
the residual and the next norm, gate and up with SiLU: ours in one kernel (and a norm), cuBLAS's
with the kernels that the engine has for the rest. Then all four, layer after layer, as a chain, and
ours in float8 without the quantising. Replays of CUDA graphs over the weights of eight layers.

Without CUDA it is llava-tiny's decoder in float32, the references and torch's own product in place
of cuBLAS's, in plain calls. float8 is left out, since the references only imitate it.

    python -m bench.matmul [--rows 602 1024 ...] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from bench.about import about
from bench.timing import BLOCK, DEVICE, DIM, HEADS, HIDDEN, ON_GPU, WIDE, half, start_on_cpu
from bench.vision import replay_ms
from llava_engine.kernels.activation import silu_mul
from llava_engine.kernels.library import require_kernels
from llava_engine.kernels.matmul import matmul_add, matmul_rope_append, matmul_silu_mul
from llava_engine.kernels.norm import add_rms_norm, rms_norm
from llava_engine.kernels.rope_kv import rope_append
from llava_engine.quant.fp8 import Fp8Weight

LAYERS = 8
SHAPES = {
    "qkv": (3 * HIDDEN, HIDDEN),
    "out": (HIDDEN, HIDDEN),
    "gate_up": (2 * WIDE, HIDDEN),
    "down": (HIDDEN, WIDE),
}

Product = Callable[[torch.Tensor], None]


def products(rows: int) -> tuple[dict[str, Product], dict[str, Product]]:
    """Ours and cuBLAS's, by name; each takes the weight."""
    x, wide, residual, normed = (half(rows, n) for n in (HIDDEN, WIDE, HIDDEN, HIDDEN))
    activated, gate_up, sums = half(rows, WIDE), half(rows, 2 * WIDE), half(rows, HIDDEN)
    fused, q, norm = half(rows, 3 * HEADS, DIM), half(rows, HEADS, DIM), half(HIDDEN)
    blocks = -(-rows // BLOCK)
    caches = [half(blocks, HEADS, BLOCK, DIM) for _ in range(2)]
    cos_sin, positions = torch.randn(4096, DIM, device=DEVICE), torch.arange(rows, device=DEVICE)
    slots = torch.randperm(blocks * BLOCK, device=DEVICE)[:rows]

    def qkv(weight: torch.Tensor) -> None:
        matmul_rope_append(q, *caches, x, weight, cos_sin, positions, slots)

    def qkv_torch(weight: torch.Tensor) -> None:
        torch.mm(x, weight.T, out=fused.view(rows, -1))
        parts = fused.chunk(3, dim=1)
        rope_append(*parts, cos_sin, positions, slots, *caches)

    def added(given: torch.Tensor) -> Product:
        def run(weight: torch.Tensor) -> None:
            matmul_add(residual, given, weight)
            rms_norm(normed, residual, norm, 1e-5)

        return run

    def added_torch(given: torch.Tensor) -> Product:
        def run(weight: torch.Tensor) -> None:
            torch.mm(given, weight.T, out=sums)
            add_rms_norm(normed, residual, sums, norm, 1e-5)

        return run

    def silu_torch(weight: torch.Tensor) -> None:
        torch.mm(x, weight.T, out=gate_up)
        silu_mul(activated, gate_up)

    ours: dict[str, Product] = {
        "qkv": qkv,
        "out": added(x),
        "gate_up": lambda weight: matmul_silu_mul(activated, x, weight),
        "down": added(wide),
    }
    theirs: dict[str, Product] = {
        "qkv": qkv_torch,
        "out": added_torch(x),
        "gate_up": silu_torch,
        "down": added_torch(wide),
    }
    return ours, theirs


def chain(ways: dict[str, Product], weights: list[dict[str, torch.Tensor]]) -> Callable[[], None]:
    def work() -> None:
        for layer in weights:
            for name, product in ways.items():
                product(layer[name])

    return work


def fp8_chain(rows: int, weights: list[dict[str, Fp8Weight]]) -> Callable[[], None]:
    x, wide = Fp8Weight.of(half(rows, HIDDEN)), Fp8Weight.of(half(rows, WIDE))
    residual, activated, q = half(rows, HIDDEN), half(rows, WIDE), half(rows, HEADS, DIM)
    blocks = -(-rows // BLOCK)
    caches = [half(blocks, HEADS, BLOCK, DIM) for _ in range(2)]
    cos_sin, places = torch.randn(4096, DIM, device=DEVICE), torch.arange(rows, device=DEVICE)

    def work() -> None:
        for layer in weights:
            qkv, out, gate_up, down = (layer[name] for name in SHAPES)
            matmul_rope_append(
                q,
                *caches,
                x.values,
                qkv.values,
                cos_sin,
                places,
                places,
                x_scales=x.scales,
                weight_scales=qkv.scales,
            )
            matmul_add(residual, x.values, out.values, None, x.scales, out.scales)
            matmul_silu_mul(activated, x.values, gate_up.values, x.scales, gate_up.scales)
            matmul_add(residual, wide.values, down.values, None, wide.scales, down.scales)

    return work


def main() -> None:
    """Print a line for every number of rows; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_rows = [602, 640, 1024, 2048] if ON_GPU else [220]
    parser.add_argument("--rows", type=int, nargs="*", default=default_rows)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    require_kernels(DEVICE)
    if not ON_GPU:
        start_on_cpu("float8; what is called cublas is torch's product")
    weights = [
        {name: half(*shape) / shape[1] ** 0.5 for name, shape in SHAPES.items()}
        for _ in range(LAYERS)
    ]
    eighths = [{name: Fp8Weight.of(w) for name, w in layer.items()} for layer in weights]
    flops = 2 * LAYERS * sum(outputs * inputs for outputs, inputs in SHAPES.values())
    lines = []
    for rows in arguments.rows:
        ours, theirs = products(rows)
        line: dict[str, object] = {"rows": rows}
        for name in SHAPES:
            alone = [{name: layer[name]} for layer in weights]
            line[f"{name}_us"] = [
                round(1e3 * replay_ms(chain({name: ways[name]}, alone), chained=True) / LAYERS, 1)
                for ways in (ours, theirs)
            ]
        chains = {"ours": chain(ours, weights), "cublas": chain(theirs, weights)}
        if ON_GPU:
            chains["fp8"] = fp8_chain(rows, eighths)
        for label, work in chains.items():
            ms = replay_ms(work, chained=True)
            line[f"{label}_ms_32_layers"] = round(ms * 32 / LAYERS, 3)
            line[f"{label}_tflops"] = round(rows * flops / ms / 1e9, None if ON_GPU else 4)
        print(json.dumps(line), flush=True)
        lines.append(line)
    record = {
        **about(),
        "ours_then_cublas": lines,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
