"""What does each CUDA kernel take, against the copy ceiling and against torch's own way?

Sizes are those of LLaVA-1.5-7B in fp16. Each case runs inside a CUDA graph over rotating buffers
that together outgrow the L2 cache (up to 32 of them: the small cases stay in it); the time is the
median replay over the calls in it, launch gaps included. "torch" is plain torch for the same
result, captured the same way; for attention that is scaled_dot_product_attention over dense keys
and values, which need no paging. "dense prefill" is EngineConfig(attention="torch"): flash over
the step's own keys or gathered ones, beside cuDNN for whole prompts and flash without the gathering
for chunks; the "attention" case of the same sizes is attention="paged".

Without CUDA the references are timed instead, call by call, on llava-tiny's sizes in float32; the
rates and ceilings are left out, since buffers so small stay in the caches, and so is what only CUDA
has.

    python -m bench.kernels [--json PATH]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.about import about
from bench.attention_cases import attention, cudnn_first_call_ms, dense_prefill
from bench.timing import (
    BLOCK,
    DEVICE,
    DIM,
    DTYPE,
    FEATURES,
    HEADS,
    HIDDEN,
    L2_BYTES,
    ON_GPU,
    VOCAB,
    WIDE,
    Call,
    Case,
    copy_ceiling,
    half,
    matmul_ceiling,
    replay_us,
    start_on_cpu,
)
from llava_engine.kernels.activation import silu_mul
from llava_engine.kernels.fp8 import FP8, quantize_rows, rms_norm_fp8
from llava_engine.kernels.library import require_kernels
from llava_engine.kernels.linear import (
    linear_add,
    norm_linear,
    norm_linear_silu_mul,
    norm_qkv_rope_append,
)
from llava_engine.kernels.norm import add_rms_norm, rms_norm
from llava_engine.kernels.projector import project
from llava_engine.kernels.rope_kv import rope_append
from llava_engine.kernels.sampling import sample


def norms(tokens: int) -> Iterator[Case]:
    def make(add: bool) -> tuple[Call, Call]:
        x, residual, weight = half(tokens, HIDDEN), half(tokens, HIDDEN), half(HIDDEN)
        out = torch.empty_like(x)
        if not add:
            return (
                lambda: rms_norm(out, x, weight, 1e-5),
                lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-5),
            )
        return (
            lambda: add_rms_norm(out, residual, x, weight, 1e-5),
            lambda: F.rms_norm(residual.add_(x), (HIDDEN,), weight, 1e-5),
        )

    row = 2 * tokens * HIDDEN
    yield Case(f"rms_norm T={tokens}", 2 * row + 2 * HIDDEN, lambda: make(False))
    yield Case(f"add_rms_norm T={tokens}", 4 * row + 2 * HIDDEN, lambda: make(True))


def fp8_rows(tokens: int) -> Iterator[Case]:
    """What fp8 products of a layer need: norms, attention's rows and the activated ones."""

    def make(columns: int, norm: bool) -> tuple[Call, Call]:
        x, weight = half(tokens, columns), half(columns)
        out = torch.empty_like(x, dtype=FP8)
        scales = torch.empty(tokens, device=DEVICE)

        def plain() -> None:
            rows = F.rms_norm(x, (columns,), weight, 1e-5) if norm else x
            torch.div(rows.abs().amax(dim=1), 448.0, out=scales)
            out.copy_(rows / scales.unsqueeze(1))

        if norm:
            return lambda: rms_norm_fp8(out, scales, x, weight, 1e-5), plain
        return lambda: quantize_rows(out, scales, x), plain

    for columns, norm in ((HIDDEN, True), (HIDDEN, False), (WIDE, False)):
        name = f"{'rms_norm_fp8' if norm else 'quantize_rows'} T={tokens} of {columns}"
        yield Case(name, 3 * tokens * columns, partial(make, columns, norm))


def activation(tokens: int) -> Case:
    def make() -> tuple[Call, Call]:
        gate_up, out = half(tokens, 2 * WIDE), half(tokens, WIDE)
        gate, up = gate_up.chunk(2, dim=-1)
        return lambda: silu_mul(out, gate_up), lambda: F.silu(gate) * up

    return Case(f"silu_mul T={tokens}", 6 * tokens * WIDE, make)


def rope(tokens: int) -> Case:
    def make() -> tuple[Call, Call]:
        fused = half(tokens, 3 * HEADS, DIM)
        q, k, v = fused.chunk(3, dim=1)
        blocks = -(-tokens // BLOCK)
        k_cache, v_cache = half(blocks, HEADS, BLOCK, DIM), half(blocks, HEADS, BLOCK, DIM)
        cos_sin = torch.randn(4096, DIM, device=DEVICE)
        positions = torch.arange(tokens, device=DEVICE)
        slots = torch.randperm(blocks * BLOCK, device=DEVICE)[:tokens]

        def plain() -> None:
            cos, sin = cos_sin[positions].to(DTYPE).unsqueeze(1).chunk(2, dim=-1)
            for x in (q, k):
                left, right = x.chunk(2, dim=-1)
                x.copy_(torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1))
            block, offset = slots // BLOCK, slots % BLOCK
            k_cache[block, :, offset] = k
            v_cache[block, :, offset] = v

        return (
            lambda: rope_append(q, k, v, cos_sin, positions, slots, k_cache, v_cache),
            plain,
        )

    return Case(f"rope_append T={tokens}", 2 * tokens * HEADS * DIM * 7, make)


def linears(rows: int) -> Iterator[Case]:
    """The products of a decoding step with all that is folded in, beside torch's own parts."""

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return half(outputs, inputs) * inputs**-0.5

    def qkv() -> tuple[Call, Call]:
        x, gain, weight = half(rows, HIDDEN), half(HIDDEN), matrix(3 * HIDDEN, HIDDEN)
        q, cache = half(rows, HEADS, DIM), half(rows, HEADS, BLOCK, DIM)
        cos_sin, places = torch.randn(4096, DIM, device=DEVICE), torch.arange(rows, device=DEVICE)
        where = (cos_sin, places, places * BLOCK)
        return (
            lambda: norm_qkv_rope_append(q, cache, cache, x, gain, 1e-5, weight, *where),
            lambda: F.linear(F.rms_norm(x, (HIDDEN,), gain, 1e-5), weight),  # and no more
        )

    def add(inputs: int) -> tuple[Call, Call]:
        x, weight, residual = half(rows, inputs), matrix(HIDDEN, inputs), half(rows, HIDDEN)
        return (
            lambda: linear_add(residual, x, weight),
            lambda: residual.add_(F.linear(x, weight)),
        )

    def gate_up() -> tuple[Call, Call]:
        x, gain, weight = half(rows, HIDDEN), half(HIDDEN), matrix(2 * WIDE, HIDDEN)
        out = half(rows, WIDE)

        def plain() -> torch.Tensor:
            gate, up = F.linear(F.rms_norm(x, (HIDDEN,), gain, 1e-5), weight).chunk(2, dim=-1)
            return F.silu(gate) * up

        return lambda: norm_linear_silu_mul(out, x, gain, 1e-5, weight), plain

    def head() -> tuple[Call, Call]:
        x, gain, weight = half(rows, HIDDEN), half(HIDDEN), matrix(VOCAB, HIDDEN)
        out = torch.empty(rows, VOCAB, device=DEVICE)
        return (
            lambda: norm_linear(out, x, gain, 1e-5, weight),
            lambda: F.linear(F.rms_norm(x, (HIDDEN,), gain, 1e-5), weight).float(),
        )

    yield Case(f"norm_qkv_rope_append R={rows}", 6 * HIDDEN * HIDDEN, qkv)
    yield Case(f"linear_add R={rows} inputs={HIDDEN}", 2 * HIDDEN * HIDDEN, lambda: add(HIDDEN))
    yield Case(f"norm_linear_silu_mul R={rows}", 4 * WIDE * HIDDEN, gate_up)
    yield Case(f"linear_add R={rows} inputs={WIDE}", 2 * HIDDEN * WIDE, lambda: add(WIDE))
    yield Case(f"norm_linear R={rows}", 2 * VOCAB * HIDDEN, head)


def projector(rows: int) -> Case:
    def make() -> tuple[Call, Call]:
        features, w1, w2 = half(1, rows, FEATURES), half(HIDDEN, FEATURES), half(HIDDEN, HIDDEN)
        b1, b2, out = half(HIDDEN), half(HIDDEN), half(1, rows, HIDDEN)
        return (
            lambda: project(out, features, w1, b1, w2, b2),
            lambda: out.copy_(F.linear(F.gelu(F.linear(features, w1, b1)), w2, b2)),
        )

    weights = HIDDEN * (FEATURES + HIDDEN)
    nbytes = 2 * (weights + rows * (FEATURES + 3 * HIDDEN))
    return Case(f"project N={rows}", nbytes, make, 2 * rows * weights)


def sampling(rows: int, temperature: float, top_k: int, top_p: float) -> Case:
    def make() -> tuple[Call, Call]:
        logits = 3 * torch.randn(rows, VOCAB, device=DEVICE)
        out = torch.empty(rows, dtype=torch.int64, device=DEVICE)
        ones = torch.ones(rows, device=DEVICE)
        integers = torch.arange(rows, device=DEVICE)

        def plain() -> torch.Tensor:
            if temperature == 0:
                return logits.argmax(dim=-1)
            scores = logits / temperature
            if top_k:
                scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
            if top_p < 1:
                ranked, order = scores.sort(dim=-1)
                dropped = ranked.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
                scores = scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
            noise = torch.empty_like(scores).exponential_()
            return (scores.softmax(dim=-1) / noise).argmax(dim=-1)

        return (
            lambda: sample(
                out,
                logits,
                *columns,
                ones,
                None,
                integers,
                integers,
            ),
            plain,
        )

    columns = (
        torch.full((rows,), temperature, device=DEVICE),
        torch.full((rows,), top_k, dtype=torch.int32, device=DEVICE),
        torch.full((rows,), top_p, device=DEVICE),
    )
    name = f"sample R={rows} temperature={temperature} top_k={top_k} top_p={top_p}"
    return Case(name, 4 * rows * VOCAB, make)


def cases() -> Iterator[Case]:
    for tokens in (1, 64, 620):
        yield from norms(tokens)
        yield activation(tokens)
        yield rope(tokens)
    yield from fp8_rows(620)
    for sequences, context in ((1, 665), (1, 4096), (2, 665), (8, 665), (64, 665)):
        yield attention(sequences, 1, context)
    yield attention(8, 1, 2048, kv_heads=8)
    yield attention(1, 620, 620)
    yield attention(4, 620, 620)
    yield attention(1, 2048, 2048)
    yield attention(1, 512, 1536)
    yield attention(1, 620, 620, kv_heads=8)
    for sequences, new, context in ((1, 620, 620), (4, 620, 620), (1, 512, 1536)):
        yield dense_prefill(sequences, new, context)
    # Whether gathering pays: network.attention's _WORTH_IT.
    for new in (32, 64, 128, 256):
        yield attention(1, new, 640)
        yield dense_prefill(1, new, 640)
    yield attention(8, 128, 744)
    yield dense_prefill(8, 128, 744)
    for rows in (1, 2, 4, 8):
        yield from linears(rows)
    yield projector(576)
    for rows in (1, 64):
        yield sampling(rows, 0.0, 0, 1.0)
        yield sampling(rows, 1.0, 0, 1.0)
        yield sampling(rows, 0.7, 50, 0.9)


def tiny_cases() -> Iterator[Case]:
    """A few of them for the CPU; llava-tiny's picture is 196 tokens."""
    for tokens in (1, 220):
        yield from norms(tokens)
        yield activation(tokens)
        yield rope(tokens)
    yield from fp8_rows(220)
    for sequences in (1, 8):
        yield attention(sequences, 1, 240)
    yield attention(8, 1, 240, kv_heads=2)
    yield attention(1, 220, 220)
    yield attention(1, 64, 240)
    for rows in (1, 8):
        yield from linears(rows)
    yield projector(196)
    yield sampling(8, 0.0, 0, 1.0)
    yield sampling(8, 1.0, 0, 1.0)
    yield sampling(8, 0.7, 50, 0.9)


def measure_on_cpu(case: Case) -> dict[str, float | str]:
    pairs = [case.make() for _ in range(4)]
    ours = replay_us([pair[0] for pair in pairs])
    again = replay_us([pair[0] for pair in pairs])
    plain = replay_us([pair[1] for pair in pairs])
    return {"case": case.name, "us": ours, "us_again": again, "torch_us": plain}


def measure(case: Case, ceiling: float) -> dict[str, float | str]:
    count = max(4, min(32, 3 * L2_BYTES // case.nbytes + 1))
    pairs = [case.make() for _ in range(count)]
    ours = replay_us([pair[0] for pair in pairs])
    again = replay_us([pair[0] for pair in pairs])
    plain = replay_us([pair[1] for pair in pairs])
    rate = case.nbytes / ours / 1e3
    return {
        "case": case.name,
        "us": ours,
        "us_again": again,
        "torch_us": plain,
        "gb_per_s": rate,
        "share_of_copy_ceiling": rate / ceiling,
        "tflop_per_s": case.flops / ours / 1e6,
    }


def main() -> None:
    """Print one line per case; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    require_kernels(DEVICE)
    torch.manual_seed(0)
    if not ON_GPU:
        main_on_cpu(arguments.json)
        return
    with torch.inference_mode():
        ceiling = copy_ceiling()
        products = matmul_ceiling()
        print(
            f"{torch.cuda.get_device_name()}: copy {ceiling:.0f} GB/s, product of 8192 x 8192 "
            f"{products:.0f} TFLOP/s"
        )
        first_cudnn = cudnn_first_call_ms()
        print(f"cuDNN attention at a new length: {first_cudnn:.1f} ms")
        rows = []
        for case in cases():
            row = measure(case, ceiling)
            rows.append(row)
            print(
                f"{row['case']:<52} {row['us']:8.2f} us ({row['us_again']:.2f})"
                f" {row['gb_per_s']:6.0f} GB/s {100 * row['share_of_copy_ceiling']:4.0f} %"
                f" {row['tflop_per_s']:5.0f} TFLOP/s   torch {row['torch_us']:8.2f} us",
                flush=True,
            )
    if arguments.json:
        record = {
            **about(),
            "copy_gb_per_s": ceiling,
            "matmul_tflop_per_s": products,
            "cudnn_first_call_ms": first_cudnn,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


@torch.inference_mode()
def main_on_cpu(path: Path | None) -> None:
    """The same lines and keys, but for what the module says is left out; a ceiling is null."""
    start_on_cpu("rates and ceilings, cuDNN, the dense prefill by flash")
    rows = []
    for case in tiny_cases():
        row = measure_on_cpu(case)
        rows.append(row)
        print(
            f"{row['case']:<52} {row['us']:8.2f} us ({row['us_again']:.2f})"
            f"   torch {row['torch_us']:8.2f} us",
            flush=True,
        )
    if path:
        unknown = dict.fromkeys(("copy_gb_per_s", "matmul_tflop_per_s", "cudnn_first_call_ms"))
        path.write_text(json.dumps({**about(), **unknown, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
