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
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.about import about
from llava_engine.kernels.activation import silu_mul
from llava_engine.kernels.attention import attention_workspace, paged_attention
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
from llava_engine.kernels.varlen_attention import torch_flash_varlen_attention
from llava_engine.network.attention import PrefillAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
if ON_GPU:
    DTYPE, HIDDEN, WIDE, HEADS, DIM, VOCAB, BLOCK = torch.float16, 4096, 11008, 32, 128, 32064, 64
    FEATURES = 1024  # of a patch, which the projector takes
else:
    DTYPE, HIDDEN, WIDE, HEADS, DIM, VOCAB, BLOCK = torch.float32, 192, 384, 6, 32, 768, 64
    FEATURES = 192
L2_BYTES = 50 << 20

Call = Callable[[], object]


@dataclass
class Case:
    """One op at one size. make() gives a pair of calls, ours and torch's, on fresh buffers.

    nbytes: the fewest bytes that must move. flops: the operations, where they are the limit.
    """

    name: str
    nbytes: int
    make: Callable[[], tuple[Call, Call]]
    flops: int = 0


def half(*shape: int) -> torch.Tensor:
    """Random numbers in DTYPE, which is half precision on a GPU."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def replay_us(calls: list[Call]) -> float:
    """Microseconds per call of a graph that makes all of them, the median of 15 replays.

    On the CPU of calls one after the other, which nothing captures.
    """
    if not ON_GPU:
        return plain_us(calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(18):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times[3:])


def plain_us(calls: list[Call]) -> float:
    """Microseconds per call on the CPU, the median of 15 rounds of all of them."""
    times = []
    for _ in range(18):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(1e6 * (time.perf_counter() - start) / len(calls))
    return statistics.median(times[3:])


def start_on_cpu(left_out: str) -> None:
    """Say what a run on the CPU is of, and keep it to one thread.

    The cores are shared: a second thread would often wait for its turn, and the first one for it.
    """
    torch.set_num_threads(1)
    print(f"cpu, one thread: references, llava-tiny's sizes, float32; left out: {left_out}")


def copy_ceiling() -> float:
    """GB/s of a large device copy, bytes read and written together: the better of torch's two."""
    source = torch.randint(1 << 60, (1 << 27,), device=DEVICE)
    target = torch.empty_like(source)
    by_copy = replay_us([lambda: target.copy_(source)] * 4)
    by_kernel = replay_us([lambda: torch.bitwise_not(source, out=target)] * 4)
    return 2 * source.nbytes / min(by_copy, by_kernel) / 1e3


def matmul_ceiling() -> float:
    """TFLOP/s of a large product of random matrices, by torch."""
    a, b = half(8192, 8192), half(8192, 8192)
    out = torch.empty_like(a)
    return 2 * 8192**3 / replay_us([lambda: torch.mm(a, b, out=out)] * 4) / 1e6


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


def attention(sequences: int, new: int, context: int, kv_heads: int = HEADS) -> Case:
    """Dense keys for torch: [sequences, kv_heads, context, DIM], causal at the end."""

    def make() -> tuple[Call, Call]:
        blocks = -(-context // BLOCK)
        k_cache, v_cache = (half(sequences * blocks, kv_heads, BLOCK, DIM) for _ in range(2))
        order = torch.randperm(sequences * blocks, device=DEVICE).int()
        q = half(sequences * new, HEADS, DIM)
        out = torch.empty_like(q)
        starts = (torch.arange(sequences + 1, device=DEVICE) * new).int()
        contexts = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE)
        table = order.view(sequences, blocks)
        workspace = attention_workspace(HEADS, kv_heads, DIM, DEVICE)
        k, v = (half(sequences, kv_heads, context, DIM) for _ in range(2))
        dense = q.view(sequences, new, HEADS, DIM).transpose(1, 2)
        causal = new == context
        mask = None
        if 1 < new < context:
            mask = torch.ones(new, context, dtype=torch.bool, device=DEVICE).tril(context - new)
        return (
            lambda: paged_attention(
                out, q, k_cache, v_cache, table, starts, contexts, workspace, new, DIM**-0.5
            ),
            lambda: F.scaled_dot_product_attention(
                dense, k, v, attn_mask=mask, is_causal=causal, enable_gqa=kv_heads != HEADS
            ),
        )

    seen = new * context - new * (new - 1) // 2
    name = f"attention S={sequences} new={new} context={context}"
    nbytes = 4 * sequences * DIM * (kv_heads * context + HEADS * new)
    flops = 4 * sequences * seen * HEADS * DIM
    return Case(f"{name} kv_heads={kv_heads}", nbytes, make, flops)


def dense_prefill(sequences: int, new: int, context: int) -> Case:
    """Chunks as a step has them: q, k and v are slices of one matrix, earlier keys in the cache."""

    def make() -> tuple[Call, Call]:
        blocks = -(-context // BLOCK)
        k_cache, v_cache = (half(sequences * blocks, HEADS, BLOCK, DIM) for _ in range(2))
        table = torch.randperm(sequences * blocks).view(sequences, blocks).numpy()
        q, k, v = half(sequences * new, 3 * HEADS, DIM).chunk(3, dim=1)
        planner = PrefillAttention(
            torch_flash_varlen_attention,
            min_rows=2,
            num_kv_heads=HEADS,
            key_bytes=4 * HEADS * DIM,
        )
        plan = planner.plan([new] * sequences, [context] * sequences, table, BLOCK, DEVICE)
        assert plan is not None and not plan.num_paged
        if new == context:
            by_heads = [x.view(sequences, new, HEADS, DIM).transpose(1, 2) for x in (q, k, v)]
            return (
                lambda: plan(q, k, v, k_cache, v_cache, DIM**-0.5),
                lambda: cudnn(*by_heads),
            )
        keys, values = (half(sequences * context, HEADS, DIM) for _ in range(2))
        lengths = (plan.cu_query, plan.cu_context, new, context)
        return (
            lambda: plan(q, k, v, k_cache, v_cache, DIM**-0.5),
            lambda: torch_flash_varlen_attention(q, keys, values, *lengths, DIM**-0.5),
        )

    seen = new * context - new * (new - 1) // 2
    nbytes = 4 * sequences * DIM * HEADS * (context + new)
    flops = 4 * sequences * seen * HEADS * DIM
    return Case(f"dense prefill S={sequences} new={new} context={context}", nbytes, make, flops)


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of whole prompts by cuDNN, [S, heads, n, D]."""
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    return op(q, k, v, None, False, 0.0, True, False)[0]


def cudnn_first_call_ms() -> float:
    """Milliseconds of the first call at a length that is new to the process, the median of five."""
    times = []
    for length in (620, 611, 612, 613, 614, 615):
        q, k, v = (half(1, HEADS, length, DIM) for _ in range(3))
        torch.cuda.synchronize()
        start = time.perf_counter()
        cudnn(q, k, v)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


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
