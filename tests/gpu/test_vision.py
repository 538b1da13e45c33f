"""The vision tower and the projector on the GPU: their kernels against float64, both together
against transformers with the same weights, at twice its error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.gpu import GPU, NEEDS_GPU
from support.kernels import blank, normal, within_twice
from support.pictures import random_pictures
from transformers import LlavaForConditionalGeneration

from llava_engine.kernels.activation import quick_gelu
from llava_engine.kernels.dense_attention import dense_attention
from llava_engine.kernels.library import references
from llava_engine.kernels.norm import add_layer_norm, embed_norm, layer_norm
from llava_engine.kernels.projector import project
from llava_engine.network.clip import patch_rows
from llava_engine.network.weights import load_model
from llava_engine.runtime.graph import CapturedGraphs
from llava_engine.runtime.picture_encoder import MOST_AT_ONCE, PictureEncoder
from llava_engine.runtime.streams import DeviceStreams

pytestmark = NEEDS_GPU

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [(1, 1), (3, 7), (2, 192), (577, 1024), (17, 1000), (5, 4104), (2, 11008)]
FLOOR = 1e-6

MODELS: dict[str, dict[str, Any]] = {
    # LLaVA-1.5's tower but for the number of layers: its sizes choose the kernels.
    "large": {
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        "text_config": {"hidden_size": 512},
    },
    # Neither rows of whole vectors nor heads that cuDNN takes; pixels behind the last patch.
    "odd": {
        "vision_feature_layer": [-2, 0, 2],
        "vision_config": {
            "hidden_size": 42,
            "intermediate_size": 70,
            "num_attention_heads": 3,
            "image_size": 57,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
    },
    "whole": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu_pytorch_tanh",
    },
}


def check(op: Callable[..., None], ours: torch.Tensor, *inputs: object) -> torch.Tensor:
    """The kernel's result in `ours`, plain torch's and the reference's in float64."""
    plain = torch.full_like(ours, torch.nan)
    truth = torch.full_like(ours, torch.nan, dtype=torch.float64)
    op(ours, *inputs)
    with references():
        op(plain, *inputs)
        op(truth, *[x.double() if isinstance(x, torch.Tensor) else x for x in inputs])
    within_twice(ours, plain, truth, FLOOR)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    x = normal(generator, *shape, dtype=dtype) * 3 + 5
    weight, bias = normal(generator, 2, shape[1], dtype=dtype)
    ours = check(layer_norm, blank(*shape, dtype=dtype), x, weight, bias, 1e-5)
    layer_norm(x, x, weight, bias, 1e-5)
    assert torch.equal(x, ours), "in place"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_add_layer_norm(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, residual = (normal(generator, *shape, dtype=dtype) for _ in range(2))
    weight, bias = normal(generator, 2, shape[1], dtype=dtype)
    total = residual + x
    expected = check(layer_norm, blank(*shape, dtype=dtype), total, weight, bias, 1e-6)
    add_layer_norm(x, residual, x, weight, bias, 1e-6)
    assert torch.equal(residual, total)
    assert torch.equal(x, expected)


def test_layer_norm_takes_rows_that_are_not_aligned(generator: torch.Generator) -> None:
    x = normal(generator, 1 + 3 * 64, dtype=torch.float16)[1:].view(3, 64)
    weight, bias = normal(generator, 2, 64, dtype=torch.float16)
    check(layer_norm, blank(3, 64, dtype=torch.float16), x, weight, bias, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 16, 42), (2, 576, 1024)], ids=str)
def test_embed_norm(
    shape: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    n, patches, hidden = shape
    check(
        embed_norm,
        blank(n, patches + 1, hidden, dtype=dtype),
        normal(generator, n, patches, hidden, dtype=dtype),
        normal(generator, hidden, dtype=dtype),
        normal(generator, patches + 1, hidden, dtype=dtype),
        normal(generator, hidden, dtype=dtype),
        normal(generator, hidden, dtype=dtype),
        1e-5,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*ROWS, (1, 0)], ids=str)
def test_quick_gelu(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    x = normal(generator, *shape, dtype=dtype) * 8
    if x.numel() > 2:
        x.view(-1)[:2] = torch.tensor([-6e4, 6e4])  # where the exponential overflows
    ours = check(quick_gelu, blank(*shape, dtype=dtype), x) if x.numel() else x.clone()
    quick_gelu(x, x)
    assert torch.equal(x, ours), "in place"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(16, 64), (3, 14), (2, 8)], ids=str)
@pytest.mark.parametrize("tokens", [(1, 577), (3, 577), (2, 17), (2, 1)], ids=str)
def test_dense_attention(
    tokens: tuple[int, int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    fused = normal(generator, *tokens, 3, *heads, dtype=dtype) * 2
    q, k, v = fused.permute(2, 0, 3, 1, 4)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * heads[1] ** -0.5, dim=-1) @ v

    truth = plain(q.double(), k.double(), v.double())
    ours = dense_attention(q, k, v)
    within_twice(ours, plain(q, k, v), truth, FLOOR)
    if heads == (16, 64) and dtype != torch.float32:
        assert ours.transpose(1, 2).is_contiguous(), "the next product would copy it"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("apart", [0, 1, 2])
@pytest.mark.parametrize(
    "shape", [(1, 1, 8, 16), (3, 5, 9, 11), (2, 577, 96, 200), (5, 24, 48, 1024)], ids=str
)
def test_project(
    shape: tuple[int, int, int, int],
    apart: int,
    bias: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """apart: rows before each picture, which belong to none."""
    n, patches, inputs, hidden = shape
    features = blank(n, apart + patches, inputs, dtype=dtype)[:, apart:]
    features.copy_(normal(generator, n, patches, inputs, dtype=dtype))
    w1 = normal(generator, hidden, inputs, dtype=dtype) * inputs**-0.5
    w2 = normal(generator, hidden, hidden, dtype=dtype) * hidden**-0.5
    b1, b2 = (normal(generator, hidden, dtype=dtype) if bias else None for _ in range(2))
    rows = blank(n + 2, patches, hidden, dtype=dtype)
    check(project, rows[1:-1], features, w1, b1, w2, b2)
    assert rows[0].isnan().all() and rows[-1].isnan().all(), "rows that are another's"


@pytest.mark.parametrize("inputs", [8, 9], ids=["ours", "cublas"])
@pytest.mark.parametrize("room", [(2, 5), (3, 4), (4, 5)], ids=str)
def test_projector_refuses_an_out_of_other_rows(
    room: tuple[int, int], inputs: int, generator: torch.Generator
) -> None:
    features = normal(generator, 3, 5, inputs, dtype=torch.float16)
    w1 = normal(generator, 16, inputs, dtype=torch.float16)
    w2 = normal(generator, 16, 16, dtype=torch.float16)
    out = blank(*room, 16, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="as many pictures and patches"):
        project(out, features, w1, None, w2, None)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_tower_and_projector_against_transformers(
    name: str, dtype: torch.dtype, tmp_path: Path, generator: torch.Generator
) -> None:
    make_checkpoint(tmp_path, **MODELS[name])
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval().to(GPU)
    ours = load_model(tmp_path, device=GPU, dtype=dtype)
    config = ours.config
    side, patch = config.vision.image_size, config.vision.patch_size
    pixels = normal(generator, 5, 3, side, side, dtype=dtype)
    layers = config.vision_feature_layers

    def oracle(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states of the feature layers, and the embedding rows."""
        states = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = theirs.get_image_features(pixels).pooler_output
        return torch.cat([states[layer] for layer in layers], dim=-1), torch.stack(list(features))

    with torch.inference_mode():
        plain = {n: oracle(pixels[:n]) for n in (1, 2, 5)}
        theirs.double()
        truth = oracle(pixels.double())
        for n, (states, rows) in plain.items():
            patches = patch_rows(pixels[:n], patch)
            within_twice(ours._tower(patches), states, truth[0][:n], FLOOR)
            out = blank(n, config.image_tokens, config.text.hidden_size, dtype=dtype)
            ours.encode_images(patches, out)
            within_twice(out, rows, truth[1][:n], FLOOR)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_captured_encoding_gives_what_the_same_calls_give(
    dtype: torch.dtype, overlap: bool, tmp_path: Path, generator: torch.Generator
) -> None:
    make_checkpoint(tmp_path, **MODELS["large"])
    model = load_model(tmp_path, device=GPU, dtype=dtype)
    shape = (model.config.image_tokens, model.config.text.hidden_size)
    graphs = CapturedGraphs(torch.cuda.Stream(), overlap=overlap)
    try:
        with torch.inference_mode():
            for n in (1, 3, 8):
                pictures = normal(generator, n, 3, 336, 336, dtype=dtype)
                patches, rows = patch_rows(pictures, 14), blank(n, *shape, dtype=dtype)
                graph = graphs.capture(lambda p=patches, r=rows: model.encode_images(p, r))
                for _ in range(3):
                    patches.copy_(patch_rows(normal(generator, *pictures.shape, dtype=dtype), 14))
                    expected = model.encode_images(patches)
                    rows.fill_(torch.nan)
                    torch.cuda.synchronize()
                    graphs.launch(graph)
                    torch.cuda.synchronize()
                    assert torch.equal(rows, expected)
    finally:
        graphs.clear()


def test_the_encoders_graphs_share_what_they_read_and_write(tmp_path: Path) -> None:
    """Any number of pictures in any order, each batch's rows its own."""
    make_checkpoint(tmp_path, **MODELS["large"])
    model = load_model(tmp_path, device=GPU, dtype=torch.float16)
    streams = DeviceStreams(GPU)
    captured = PictureEncoder(model, streams, captures=True)
    plain = PictureEncoder(model, streams, captures=False)
    pictures = random_pictures(5, MOST_AT_ONCE + 3, model.config.vision.image_size)
    try:
        with torch.inference_mode(), streams.prefilling():
            expected = [plain([picture])[0] for picture in pictures]
            made = [captured(pictures[first:]) for first in (0, 10, 8, 3, 10, 7, 0)]
            torch.cuda.synchronize()
            for first, rows in zip((0, 10, 8, 3, 10, 7, 0), made, strict=True):
                torch.testing.assert_close(rows, expected[first:], rtol=1e-2, atol=1e-2)
                if len(rows) == 1:
                    assert torch.equal(rows[0], expected[first])
    finally:
        captured.close()
