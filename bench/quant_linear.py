"""What do products with 8- and 4-bit weights take by batch, beside bitsandbytes' own kernels?

The four products of a layer of LLaVA-1.5-7B with all that is folded in, random weights, as graphs
of calls that rotate over gigabytes of weights; medians of replays. "many" are those of many rows,
without the norm, and beside them torch's product alone with a 16-bit weight. bitsandbytes' 4-bit
products, where the package is there, are the product alone: no norm, rotation, activation or
residual.

Without CUDA they are llava-tiny's products by their references in float32, which unpack the weights
at every call, timed without graphs; the copy's rate and bitsandbytes' GPU kernels are left out.

    python -m bench.quant_linear [--json PATH] [--rows 1 2 ...] [--many 64 ...] [--formats nf4 ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.about import about
from bench.timing import (
    BLOCK,
    DEVICE,
    DIM,
    HEADS,
    HIDDEN,
    ON_GPU,
    WIDE,
    Call,
    copy_ceiling,
    half,
    replay_us,
    start_on_cpu,
)
from llava_engine.kernels.library import programmatic_launch, require_kernels
from llava_engine.kernels.matmul import matmul_add, matmul_rope_append, matmul_silu_mul
from llava_engine.kernels.quant_linear import (
    QuantMatrix,
    dequantize_rows,
    quant_linear_add,
    quant_norm_linear_silu_mul,
    quant_norm_qkv_rope_append,
)

FORMATS = ("int8", "fp8", "nf4")
ROTATED_BYTES = 1 << 31 if ON_GPU else 0
TILE_BYTES = 32 << 20  # of dequantised rows, as csrc/decoder.cpp has them


@dataclass(frozen=True)
class Product:
    """A product of the layer: its matrix, and how far apart its pairs' rows are."""

    name: str
    outputs: int
    inputs: int
    apart: int


PRODUCTS = (
    Product("qkv", 3 * HIDDEN, HIDDEN, DIM // 2),
    Product("out", HIDDEN, HIDDEN, 1),
    Product("gate_up", 2 * WIDE, HIDDEN, WIDE),
    Product("down", HIDDEN, WIDE, 1),
)


def random_matrix(kind: str, product: Product) -> QuantMatrix:
    """Random bits where every pattern is a number, small scales."""
    outputs, inputs = product.outputs, product.inputs

    def bits(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, device=DEVICE, dtype=torch.uint8)

    if kind == "nf4":
        head = torch.rand(outputs // 16, 64, device=DEVICE) * 1e-3
        head[:, 3::4] = 0
        steps = bits(outputs // 16, -(-inputs // 128) * 1056)
        packed = torch.cat((head.view(torch.uint8), steps), dim=1)
        code = torch.linspace(-1, 1, 256, device=DEVICE)
        return QuantMatrix(packed, code, outputs, inputs, product.apart)
    scales = torch.full((outputs,), 1e-3, device=DEVICE)
    values = bits(outputs, inputs)
    if kind == "int8":
        return QuantMatrix(values.view(torch.int8), scales, outputs, inputs, product.apart)
    finite = (values & 0xBF).view(torch.float8_e4m3fn)
    return QuantMatrix(finite, scales, outputs, inputs, product.apart)


def caller(product: Product, rows: int) -> Callable[[QuantMatrix], Call]:
    """What makes a call of the product with a matrix."""
    x, gain, residual = half(rows, product.inputs), half(product.inputs), half(rows, HIDDEN)
    if product.name == "qkv":
        q, cache = half(rows, HEADS, DIM), half(rows, HEADS, BLOCK, DIM)
        places = torch.arange(rows, device=DEVICE)
        where = (torch.randn(4096, DIM, device=DEVICE), places, places * BLOCK)
        return lambda matrix: (
            lambda: quant_norm_qkv_rope_append(q, cache, cache, x, gain, 1e-5, matrix, *where)
        )
    if product.name == "gate_up":
        out = half(rows, WIDE)
        return lambda matrix: lambda: quant_norm_linear_silu_mul(out, x, gain, 1e-5, matrix)
    return lambda matrix: lambda: quant_linear_add(residual, x, matrix)


def many_caller(product: Product, rows: int) -> Callable[[QuantMatrix], Call]:
    """The same by the products of many rows."""
    x, residual = half(rows, product.inputs), half(rows, HIDDEN)
    if product.name == "qkv":
        q, cache = half(rows, HEADS, DIM), half(-(-rows // BLOCK), HEADS, BLOCK, DIM)
        places = torch.arange(rows, device=DEVICE)
        where = (torch.randn(4096, DIM, device=DEVICE), places, places)
        return lambda matrix: (
            lambda: matmul_rope_append(
                q, cache, cache, x, matrix.weight, *where, weight_scales=matrix.scales
            )
        )
    if product.name == "gate_up":
        out = half(rows, WIDE)
        return lambda matrix: (
            lambda: matmul_silu_mul(out, x, matrix.weight, weight_scales=matrix.scales)
        )
    return lambda matrix: (
        lambda: matmul_add(residual, x, matrix.weight, weight_scales=matrix.scales)
    )


def nbytes(matrix: QuantMatrix) -> int:
    return matrix.weight.nbytes + matrix.scales.nbytes


def ours(
    kind: str, product: Product, rows_of: list[int], many: list[int]
) -> Iterator[dict[str, object]]:
    first = random_matrix(kind, product)
    count = max(4, ROTATED_BYTES // nbytes(first))
    matrices = [first, *(random_matrix(kind, product) for _ in range(count - 1))]
    makers = [(rows, "few", caller) for rows in rows_of]
    makers += [(rows, "many", many_caller) for rows in many]
    for rows, op, maker in makers:
        call = maker(product, rows)
        calls = [call(matrix) for matrix in matrices]
        with programmatic_launch(True):
            times = [replay_us(calls) for _ in range(2)]
        case = {
            "format": kind,
            "product": product.name,
            "rows": rows,
            "op": op,
            "us": times[0],
            "us_again": times[1],
            "gb_per_s": nbytes(first) / times[0] / 1e3,
        }
        if op == "many":
            x, whole = half(rows, product.inputs), half(product.outputs, product.inputs)
            copies = [whole, *(whole.clone() for _ in range(ROTATED_BYTES // whole.nbytes // 2))]
            case["torch_16_bit_us"] = replay_us([partial(F.linear, x, each) for each in copies])
        yield case
    tile = half(min(TILE_BYTES // 2 // product.inputs, product.outputs), product.inputs)
    starts = range(0, product.outputs - len(tile) + 1, len(tile))
    calls = [
        partial(dequantize_rows, tile, matrix, start) for matrix in matrices[:4] for start in starts
    ]
    us = replay_us(calls) * product.outputs / len(tile)
    yield {"format": kind, "product": product.name, "rows": 0, "op": "dequantise", "us": us}


def theirs(product: Product, rows_of: list[int]) -> Iterator[dict[str, object]]:
    """bitsandbytes' matmul_4bit with double-quantised weights."""
    import bitsandbytes

    functional = bitsandbytes.functional
    weight = half(product.outputs, product.inputs) * 0.02
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    count = max(4, ROTATED_BYTES // packed.nbytes)
    weights = [packed, *(packed.clone() for _ in range(count - 1))]
    for rows in rows_of:
        x = half(rows, product.inputs)
        calls = [
            partial(bitsandbytes.matmul_4bit, x, codes.t(), quant_state=state) for codes in weights
        ]
        yield {
            "format": "bitsandbytes nf4",
            "product": product.name,
            "rows": rows,
            "op": "few",
            "us": replay_us(calls),
        }


def main() -> None:
    """Print one line per case; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    default_rows = [1, 2, 4, 8, 16, 32, 64] if ON_GPU else [1, 8]
    parser.add_argument("--rows", type=int, nargs="+", default=default_rows)
    parser.add_argument("--many", type=int, nargs="*", default=[17, 32, 64, 602] if ON_GPU else [8])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments = parser.parse_args()
    require_kernels(DEVICE)
    torch.manual_seed(0)
    cases = []
    with torch.inference_mode():
        ceiling = None
        if ON_GPU:
            ceiling = copy_ceiling()
            print(f"{torch.cuda.get_device_name()}: copy {ceiling:.0f} GB/s")
        else:
            start_on_cpu("the copy's rate, bitsandbytes' GPU kernels")
        for kind in arguments.formats:
            for product in PRODUCTS:
                cases += report(ours(kind, product, arguments.rows, arguments.many), ceiling)
        if ON_GPU and importlib.util.find_spec("bitsandbytes") is not None:
            few = [rows for rows in arguments.rows if rows <= 16]
            for product in PRODUCTS:
                cases += report(theirs(product, few), ceiling)
    record = {
        **about(),
        "copy_gb_per_s": ceiling,
        "rows": cases,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def report(cases: Iterator[dict[str, object]], ceiling: float | None) -> list[dict[str, object]]:
    """The cases, printed in a line."""
    made, share = [], "share_of_copy_ceiling"
    for case in cases:
        if ceiling is not None and "gb_per_s" in case:
            case[share] = case["gb_per_s"] / ceiling
        made.append(case)
    line = "  ".join(
        f"{case['op']} {case['rows']}: {case['us']:.1f}"
        + (f"/{case['torch_16_bit_us']:.1f}" if case["op"] == "many" else "")
        + (f" ({100 * case[share]:.0f}%)" if share in case else "")
        for case in made
    )
    print(f"{made[0]['format']:>16} {made[0]['product']:<8} {line}", flush=True)
    return made


if __name__ == "__main__":
    main()
