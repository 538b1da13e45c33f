"""The references of the products of few rows, against the same written out in float64."""

from __future__ import annotations

import pytest
import torch
from support.kernels import poisoned
from support.linear import HEADS, product_truth, qkv_case, qkv_truth, silu_truth
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_engine.kernels.linear import (
    linear_add,
    most_rows,
    norm_linear,
    norm_linear_silu_mul,
    norm_qkv_rope_append,
)

CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.1},
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_products(dtype: torch.dtype, generator: torch.Generator) -> None:
    x, gain, weight, before = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((3, 40), (40,), (6, 40), (3, 6))
    )
    added = before.clone()
    linear_add(added, x, weight)
    close = CLOSE[dtype]
    torch.testing.assert_close(
        added.double(), before.double() + x.double() @ weight.double().T, **close
    )
    out = poisoned(3, 6)
    norm_linear(out, x, gain, 1e-5, weight)
    torch.testing.assert_close(out.double(), product_truth(x, gain, 1e-5, weight), **close)
    activated = poisoned(3, 3, dtype=dtype)
    norm_linear_silu_mul(activated, x, gain, 1e-5, weight)
    truth = silu_truth(x, gain, 1e-5, weight)
    torch.testing.assert_close(activated.double(), truth, **close)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_qkv(heads: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    case = qkv_case(3, heads, 24, dtype, generator)
    made = case.blank()
    norm_qkv_rope_append(*made, *case.inputs)
    for mine, truth in zip(made, qkv_truth(case), strict=True):
        torch.testing.assert_close(mine.double(), truth, equal_nan=True, **CLOSE[dtype])


def test_what_the_kernels_take() -> None:
    assert most_rows(torch.empty(2, 32, dtype=torch.float16)) == 8
    assert most_rows(torch.empty(4096, 11008, dtype=torch.bfloat16, device="meta")) == 8
    assert most_rows(torch.empty(5120, 13824, dtype=torch.bfloat16, device="meta")) == 7
    assert most_rows(torch.empty(2, 32)) == 0
    assert most_rows(torch.empty(2, 40, dtype=torch.float16)) == 0
    assert most_rows(torch.empty(3, 32, dtype=torch.float16)) == 0


@pytest.mark.parametrize(("capability", "rows"), [((8, 0), 0), ((8, 9), 0), ((9, 0), 8)])
def test_no_gpu_before_hopper_has_the_shared_memory(
    capability: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """plan_ring takes up to 226 KB: an A100 has 163 KB for a block, an RTX 4090 has 99."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        weight = torch.empty(4096, 4096, dtype=torch.float16, device="cuda:0")
    assert most_rows(weight) == rows
