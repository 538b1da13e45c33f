"""How near to its floor is one decoding step, by batch? LLaVA-1.5-7B's shape, random fp16 weights.

A step is embedding, decoder, head and greedy sampling as one CUDA graph, every sequence at a
context of 665 tokens. Its floor is the time to read the weights and the keys and values once at an
H100's rate of reading (shared/performance.md). Variants of the same step run side by side.

Without a GPU it is llava-tiny's shape in float32, and the step is called as it is, by the clock: no
graph, no programmatic launch, none of the fused products, which take 16 bits, and no floor.

    python -m bench.decode_step [--json PATH] [--rows 1 2 ...] [--quantization nf4|int8|fp8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.about import about
from llava_engine.demo import model_dir
from llava_engine.kernels import linear, quant_linear
from llava_engine.kernels.library import programmatic_launch, require_kernels
from llava_engine.kernels.sampling import sample
from llava_engine.network.config import LlavaConfig
from llava_engine.network.llama import Batch
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import random_model
from llava_engine.quant import Format

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.float16 if ON_GPU else torch.float32
ROWS = [1, 2, 4, 8, 16, 32, 64] if ON_GPU else [1, 2, 4, 8]
CONTEXT, BLOCK, TABLE_WIDTH = 665, 64, 64
READ_BYTES_PER_S = 3.10e12
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


def make_model(directory: Path, quantization: Format | None = None) -> LlavaModel:
    """Random weights of the true shape; without a GPU of llava-tiny's."""
    (directory / "config.json").write_text(json.dumps(SHAPE))
    config = LlavaConfig.from_directory(directory if ON_GPU else model_dir())
    return random_model(config, device=DEVICE, dtype=DTYPE, seed=0, quantization=quantization)


def make_caches(model: LlavaModel, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random keys and values for `rows` sequences."""
    text = model.config.text
    shape = (rows * -(-CONTEXT // BLOCK), text.num_kv_heads, BLOCK, text.head_dim)
    keys, values = (
        [torch.randn(shape, device=DEVICE, dtype=DTYPE) * 0.1 for _ in range(text.num_layers)]
        for _ in range(2)
    )
    return keys, values


def make_batch(rows: int) -> Batch:
    """Every sequence decodes its 665th token; blocks are dealt out in random order."""
    blocks = -(-CONTEXT // BLOCK)
    table = torch.zeros(rows, TABLE_WIDTH, dtype=torch.int32, device=DEVICE)
    table[:, :blocks] = torch.randperm(rows * blocks, device=DEVICE).view(rows, blocks)
    positions = torch.full((rows,), CONTEXT - 1, device=DEVICE)
    last = table[:, (CONTEXT - 1) // BLOCK].long()
    return Batch(
        positions=positions,
        slot_mapping=last * BLOCK + (CONTEXT - 1) % BLOCK,
        block_table=table,
        query_start=torch.arange(rows + 1, dtype=torch.int32, device=DEVICE),
        context_lens=torch.full((rows,), CONTEXT, dtype=torch.int32, device=DEVICE),
        max_query_len=1,
    )


def floor_ms(model: LlavaModel, rows: int) -> float:
    """Weights of the decoder and its head, and the keys and values, read once."""
    text = model.config.text
    hidden, dim = text.hidden_size, text.head_dim
    heads = text.num_heads + 2 * text.num_kv_heads
    layer = heads * dim * hidden + text.num_heads * dim * hidden
    layer += 3 * text.intermediate_size * hidden
    quantised = sum(product.quantised_nbytes for product, _ in model.quantised())
    weights = quantised or 2 * text.num_layers * layer
    kept = rows * CONTEXT * 2 * text.num_kv_heads * dim * text.num_layers
    return (weights + 2 * (text.vocab_size * hidden + kept)) / READ_BYTES_PER_S * 1e3


def step_ms(step: Callable[[], object], chained: bool) -> float:
    """The median replay of the step's graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), programmatic_launch(chained):
        step()
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def wall_ms(step: Callable[[], object]) -> float:
    """The median call of the step on a CPU, where a call has done its work when it returns."""
    times = []
    for _ in range(25):
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[5:])


def products(model: LlavaModel, rows: int) -> Callable[[], object]:
    """The step's fused products alone, each depending on the one before."""
    decoder = model._decoder
    x = torch.randn(rows, 4096, device=DEVICE, dtype=torch.float16)
    q = torch.empty(rows, 32, 128, device=DEVICE, dtype=torch.float16)
    wide = torch.empty(rows, 11008, device=DEVICE, dtype=torch.float16)
    logits = torch.empty(rows, 32064, device=DEVICE)
    cache = torch.zeros(rows, 32, BLOCK, 128, device=DEVICE, dtype=torch.float16)
    batch = make_batch(rows)
    slots = torch.arange(rows, device=DEVICE) * BLOCK

    places = decoder._cos_sin, batch.positions, slots
    quantised = any(True for _ in model.quantised())
    append, add, silu_mul = (
        (
            quant_linear.quant_norm_qkv_rope_append,
            quant_linear.quant_linear_add,
            quant_linear.quant_norm_linear_silu_mul,
        )
        if quantised
        else (linear.norm_qkv_rope_append, linear.linear_add, linear.norm_linear_silu_mul)
    )

    def layers() -> None:
        for layer in decoder._layers:
            before = q, cache, cache, x, layer.input_norm, 1e-5
            qkv, out, gate_up, down = (
                product.matrix if quantised else product.weight for product in layer.products
            )
            append(*before, qkv, *places)
            add(x, q.view(rows, -1), out)
            silu_mul(wide, x, layer.post_norm, 1e-5, gate_up)
            add(x, wide, down)

    def step() -> None:
        layers()
        if rows <= linear.most_rows(model._head):
            linear.norm_linear(logits, x, decoder.norm, 1e-5, model._head)
        else:
            model.logits(x)

    return step


def whole(
    model: LlavaModel, rows: int, caches: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> Callable[[], object]:
    """Embedding to sampled token."""
    batch = make_batch(rows)
    words = min(32000, model.config.text.vocab_size)
    tokens = torch.randint(words, (rows,), device=DEVICE)
    zeros, ones = torch.zeros(rows, device=DEVICE), torch.ones(rows, device=DEVICE)

    def step() -> None:
        logits = model.decode_logits(tokens, batch, *caches)
        none = zeros.int()
        sample(tokens, logits, zeros, none, ones, ones, None, batch.positions, batch.positions)

    return step


def variants(
    model: LlavaModel, rows: int, caches: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> dict[str, float]:
    """The step's graph in each of its variants on a GPU, and its floor."""
    row = {"rows": rows, "floor_ms": floor_ms(model, rows)}
    row["step_ms"] = step_ms(whole(model, rows, caches), chained=True)
    row["unchained_ms"] = step_ms(whole(model, rows, caches), chained=False)
    decoder = model._decoder
    if rows <= decoder.fused_rows:
        row["products_ms"] = step_ms(products(model, rows), chained=True)
        row["products_unchained_ms"] = step_ms(products(model, rows), chained=False)
        most, decoder.fused_rows = decoder.fused_rows, 0
        row["unfused_ms"] = step_ms(whole(model, rows, caches), chained=True)
        decoder.fused_rows = most
    row["of_floor"] = row["floor_ms"] / row["step_ms"]
    return row


def main() -> None:
    """Print a table of step times; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--quantization", choices=("nf4", "int8", "fp8"))
    arguments = parser.parse_args()
    require_kernels(DEVICE)
    if not ON_GPU:
        print(
            "no GPU: llava-tiny's shape in float32, by the clock; left out are floor_ms, of_floor, "
            "read_bytes_per_s, unchained_ms, products_ms, products_unchained_ms, unfused_ms",
            flush=True,
        )
    results = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory), arguments.quantization)
        caches = make_caches(model, max(arguments.rows))
        for rows in arguments.rows:
            if ON_GPU:
                row = variants(model, rows, caches)
            else:
                row = {"rows": rows, "step_ms": wall_ms(whole(model, rows, caches))}
            results.append(row)
            print({name: round(value, 3) for name, value in row.items()}, flush=True)
    record = {
        **about(),
        "quantization": arguments.quantization,
        "context": CONTEXT,
        **({"read_bytes_per_s": READ_BYTES_PER_S} if ON_GPU else {}),
        "steps": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
