"""How long do the vision tower and the projector take? LLaVA-1.5-7B's shape, random fp16 weights.

Each is replayed as a CUDA graph, the median of the replays: the tower from the rows of patches to
the features of its last layer but one, for 1, 2, 4 and 8 pictures, beside transformers' eager one;
the projector beside the same two products and GELU by plain torch. Variants of the tower:

    ms                  as the engine runs it
    chained_ms          kernels may start before their predecessors end
    with_projector_ms   from the patches to the decoder's rows

"activated product us" times a layer's fc1 and quick-GELU over the weights of all layers: as the
engine runs them, and by kernels.matmul, which has them in one kernel.

Without CUDA it is llava-tiny's shape in float32, and plain calls are timed, not graphs; what only a
GPU has is left out: the chained launches, flash attention, the graphs' memory.

    python -m bench.vision [--json PATH] [--pictures 1 2 ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import CLIPVisionConfig, CLIPVisionModel

from bench.about import about
from bench.decode_step import SHAPE
from bench.timing import DEVICE, DTYPE, ON_GPU, replay_us, start_on_cpu
from llava_engine import demo
from llava_engine.kernels.dense_attention import dense_attention
from llava_engine.kernels.library import programmatic_launch, require_kernels
from llava_engine.kernels.matmul import matmul_store
from llava_engine.kernels.projector import project
from llava_engine.network import clip
from llava_engine.network.config import LlavaConfig
from llava_engine.network.layers import Linear
from llava_engine.network.llava import LlavaModel
from llava_engine.network.weights import random_model
from llava_engine.runtime.graph import CapturedGraphs

REPLAYS = 40

Call = Callable[[], object]


def make_model() -> LlavaModel:
    """The true tower and projector, and one layer of the decoder."""
    if not ON_GPU:
        config = LlavaConfig.from_directory(demo.model_dir())
        return random_model(config, device=DEVICE, dtype=DTYPE, seed=0)
    text = {**SHAPE["text_config"], "num_hidden_layers": 1}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps({**SHAPE, "text_config": text}))
        config = LlavaConfig.from_directory(Path(name))
    return random_model(config, device=DEVICE, dtype=DTYPE, seed=0)


def random_patches(model: LlavaModel, pictures: int) -> torch.Tensor:
    vision = model.config.vision
    side = vision.image_size
    pixels = torch.randn(pictures, 3, side, side, device=DEVICE, dtype=DTYPE)
    return clip.patch_rows(pixels, vision.patch_size)


def replay_ms(call: Call, chained: bool) -> float:
    if not ON_GPU:
        return median_ms(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), programmatic_launch(chained):
        call()
    return median_ms(graph.replay)


def median_ms(call: Call) -> float:
    if not ON_GPU:
        return round(replay_us([call]) / 1e3, 4)
    times = []
    for _ in range(5 + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times[5:]), 4)


def tower(model: LlavaModel, pictures: int) -> dict[str, float]:
    patches = random_patches(model, pictures)

    def features() -> torch.Tensor:
        return model._tower(patches)

    results = {"pictures": pictures, "ms": replay_ms(features, False)}
    if ON_GPU:
        results["chained_ms"] = replay_ms(features, True)
    results["with_projector_ms"] = replay_ms(lambda: model.encode_images(patches), False)
    return results


def their_tower(model: LlavaModel) -> CLIPVisionModel:
    """transformers' tower of the same shape, which computes its last layer too."""
    vision = model.config.vision
    config = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    with DEVICE:  # on the CPU its random weights take seconds
        return CLIPVisionModel(config).eval().to(DTYPE)


def eager_ms(theirs: CLIPVisionModel, pictures: int) -> float:
    side = theirs.config.image_size
    pixels = torch.randn(pictures, 3, side, side, device=DEVICE, dtype=DTYPE)
    return median_ms(lambda: theirs(pixels, output_hidden_states=True))


def activated_product(model: LlavaModel, pictures: int) -> dict[str, float]:
    """Microseconds of a layer's first product of its MLP with quick-GELU: the engine's, and by
    kernels.matmul, which has the activation in it."""
    vision, layers = model.config.vision, model._tower._layers
    rows = pictures * (vision.num_patches + 1)
    x = torch.randn(rows, vision.hidden_size, device=DEVICE, dtype=DTYPE)
    out = x.new_empty(rows, vision.intermediate_size)

    def by_matmul(layer: Linear) -> None:
        matmul_store(out, x, layer.weight, layer.bias, vision.hidden_act)

    products = [layer._fc1 for layer in layers]
    engine = [lambda fc1=fc1: clip._activated(fc1(x), vision.hidden_act) for fc1 in products]
    return {
        "engine": round(replay_us(engine), 2),
        "matmul": round(replay_us([lambda fc1=fc1: by_matmul(fc1) for fc1 in products]), 2),
    }


def attention(model: LlavaModel, pictures: int) -> dict[str, float]:
    """Microseconds of a layer's attention: the engine's, and flash."""
    vision = model.config.vision
    tokens, heads = vision.num_patches + 1, vision.num_heads
    shape = (pictures, tokens, 3, heads, vision.hidden_size // heads)
    made = [torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(8)]
    parts = [fused.permute(2, 0, 3, 1, 4).unbind() for fused in made]
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    results = {
        "dense_attention": round(replay_us([lambda p=p: dense_attention(*p) for p in parts]), 2),
    }
    if ON_GPU:
        results["flash"] = round(replay_us([lambda p=p: flash(*p) for p in parts]), 2)
    return results


def projector(model: LlavaModel, pictures: int) -> dict[str, float]:
    """Milliseconds of a call, out of graphs of several over features of their own."""
    first, second = model._projector1, model._projector2
    vision = model.config.vision
    shape = (pictures, vision.num_patches + 1, vision.hidden_size)
    features = [torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(8)]
    out = features[0].new_empty(pictures, vision.num_patches, model.config.text.hidden_size)

    def ours(given: torch.Tensor) -> None:
        project(out, given[:, 1:], first.weight, first.bias, second.weight, second.bias)

    def plain(given: torch.Tensor) -> torch.Tensor:
        middle = F.gelu(F.linear(given[:, 1:], first.weight, first.bias))
        return F.linear(middle, second.weight, second.bias)

    def ms(call: Callable[[torch.Tensor], object], chained: bool) -> float:
        with programmatic_launch(True) if chained else nullcontext():
            return round(replay_us([lambda f=f: call(f) for f in features]) / 1e3, 5)

    results = {"pictures": pictures, "ms": ms(ours, False)}
    if ON_GPU:
        results["chained_ms"] = ms(ours, True)
    results["unfused_ms"] = ms(plain, False)
    return results


def graph_mb(model: LlavaModel, counts: list[int]) -> dict[str, float]:
    """Memory that graphs for so many pictures keep, one after the other in the same pool."""
    graphs = CapturedGraphs(torch.cuda.Stream())
    kept: dict[str, float] = {}
    for pictures in counts:
        patches = random_patches(model, pictures)
        rows = model.encode_images(patches)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graphs.capture(lambda p=patches, r=rows: model.encode_images(p, r))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        kept[str(pictures)] = round((torch.cuda.memory_reserved() - before) / 2**20, 1)
    graphs.clear()
    return kept


@torch.inference_mode()
def main() -> None:
    """Print a line per measurement; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    default_pictures = [1, 2, 4, 8] if ON_GPU else [1, 2]
    parser.add_argument("--pictures", type=int, nargs="*", default=default_pictures)
    arguments = parser.parse_args()
    require_kernels(DEVICE)
    if not ON_GPU:
        start_on_cpu("chained launches, flash attention, the graphs' memory")
    model = make_model()
    theirs = their_tower(model)
    record: dict[str, object] = {
        **about(),
        "transformers": transformers.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }

    def keep(name: str, value: object) -> None:
        record[name] = value
        print(name, json.dumps(value), flush=True)

    for pictures in arguments.pictures:
        keep(f"tower {pictures}", tower(model, pictures))
        keep(f"projector {pictures}", projector(model, pictures))
        keep(f"activated product us {pictures}", activated_product(model, pictures))
        keep(f"attention us {pictures}", attention(model, pictures))
        keep(f"transformers eager ms {pictures}", eager_ms(theirs, pictures))
    if ON_GPU:
        keep("graph pool MB", graph_mb(model, arguments.pictures))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
