"""The references of the vision tower's and the projector's ops, against transformers or float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.kernels import poisoned, within_twice
from transformers import CLIPVisionConfig
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from llava_engine.kernels.activation import quick_gelu
from llava_engine.kernels.dense_attention import dense_attention
from llava_engine.kernels.norm import add_layer_norm, embed_norm, layer_norm
from llava_engine.kernels.projector import project
from llava_engine.network.clip import patch_rows, patch_width

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def layer_norm_truth(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return centred / scale * weight.double() + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1000)], ids=str)
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    x, residual = (torch.randn(shape, generator=generator).to(dtype) + 2 for _ in range(2))
    weight, bias = torch.randn(2, shape[1], generator=generator).to(dtype)
    out = poisoned(*shape, dtype=dtype)
    layer_norm(out, x, weight, bias, 1e-3)
    plain = F.layer_norm(x, shape[1:], weight, bias, 1e-3)
    within_twice(out, plain, layer_norm_truth(x, weight, bias, 1e-3), 1e-6)
    total = residual + x
    plain = F.layer_norm(total, shape[1:], weight, bias, 1e-3)
    add_layer_norm(x, residual, x, weight, bias, 1e-3)
    assert torch.equal(residual, total)
    within_twice(x, plain, layer_norm_truth(total, weight, bias, 1e-3), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", [(28, 7), (33, 8), (9, 9)], ids=str)
def test_patch_rows_and_embed_norm_are_clips(
    sides: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Pixels to the first hidden states, the convolution as a product of rows."""
    side, patch, hidden = *sides, 24
    theirs = CLIPVisionEmbeddings(
        CLIPVisionConfig(image_size=side, patch_size=patch, hidden_size=hidden)
    ).to(dtype)
    norm = torch.nn.LayerNorm(hidden, eps=1e-3, dtype=dtype)
    pixels = torch.randn(3, 3, side, side, generator=generator).to(dtype)
    with torch.inference_mode():
        for parameter in [*theirs.parameters(), *norm.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        plain = norm(theirs(pixels))
        rows = patch_rows(pixels, patch)
        assert rows.shape == (3, (side // patch) ** 2, patch_width(patch))
        assert rows.shape[-1] % 8 == 0 and rows.is_contiguous()
        values = 3 * patch * patch
        assert not rows[..., values:].any()
        weight = torch.randn(hidden, rows.shape[-1], generator=generator).to(dtype)
        weight[:, :values] = theirs.patch_embedding.weight.flatten(1)
        out = poisoned(*plain.shape, dtype=dtype)
        embed_norm(
            out,
            F.linear(rows, weight),
            theirs.class_embedding,
            theirs.position_embedding.weight,
            norm.weight,
            norm.bias,
            norm.eps,
        )
        truth = norm.double()(theirs.double()(pixels.double()))
    within_twice(out, plain, truth, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quick_gelu_is_clips(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(5, 33, generator=generator).to(dtype) * 8
    out = poisoned(5, 33, dtype=dtype)
    quick_gelu(out, x)
    theirs = ACT2FN["quick_gelu"]
    within_twice(out, theirs(x), theirs(x.double()), 1e-6)
    quick_gelu(x, x)
    assert torch.equal(x, out), "in place"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_attention(dtype: torch.dtype, generator: torch.Generator) -> None:
    n, tokens, heads, dim = 2, 11, 3, 8
    fused = torch.randn(n, tokens, 3, heads, dim, generator=generator).to(dtype)
    q, k, v = fused.permute(2, 0, 3, 1, 4)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * dim**-0.5, dim=-1) @ v

    truth = plain(q.double(), k.double(), v.double())
    within_twice(dense_attention(q, k, v), plain(q, k, v), truth, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("apart", [0, 1, 3])
def test_project(apart: int, bias: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    """apart: rows between two pictures, which belong to neither."""
    features = poisoned(3, apart + 5, 9, dtype=dtype)[:, apart:]
    features.copy_(torch.randn(features.shape, generator=generator))
    w1, w2 = (torch.randn(shape, generator=generator).to(dtype) for shape in ((11, 9), (11, 11)))
    b1, b2 = torch.randn(2, 11, generator=generator).to(dtype) if bias else (None, None)
    out = poisoned(3, 5, 11, dtype=dtype)
    project(out, features, w1, b1, w2, b2)
    middle = features.double() @ w1.double().T + (b1.double() if b1 is not None else 0)
    middle = middle * (1 + torch.erf(middle / 2**0.5)) / 2
    truth = middle @ w2.double().T + (b2.double() if b2 is not None else 0)
    within_twice(out, F.linear(F.gelu(F.linear(features, w1, b1)), w2, b2), truth, 1e-6)


def _samples(generator: torch.Generator) -> dict[str, tuple[object, ...]]:
    x, square = torch.randn(4, 6, generator=generator), torch.randn(6, 6, generator=generator)
    return {
        "layer_norm": (poisoned(4, 6), x, x[0], x[1], 1e-5),
        "add_layer_norm": (poisoned(4, 6), x.clone(), x, x[0], x[1], 1e-5),
        "embed_norm": (poisoned(2, 4, 6), torch.randn(2, 3, 6), x[0], x, x[0], x[1], 1e-5),
        "quick_gelu": (poisoned(4, 6), x),
        "project": (poisoned(2, 2, 6), x.view(2, 2, 6), square, x[0], square, None),
    }


@pytest.mark.parametrize(
    "name", ["layer_norm", "add_layer_norm", "embed_norm", "quick_gelu", "project"]
)
def test_schema_and_fake(name: str, generator: torch.Generator) -> None:
    """Each op mutates what its schema says and nothing else, and has a fake."""
    torch.library.opcheck(
        getattr(torch.ops.llava_engine, name).default,
        _samples(generator)[name],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
