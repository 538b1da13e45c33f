"""Rows in e4m3: the references against e4m3 written out in numpy, and transformers' norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.kernels import poisoned
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava_engine.kernels.fp8 import FP8, quantize_rows, rms_norm_fp8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# The finite numbers of e4m3 that are not negative, by their code: 4 bits of exponent, biased by 7,
# and 3 of mantissa; 0x7f is NaN.
CODES = np.arange(0x7F)
TABLE = np.where(
    CODES < 8, CODES * 2.0**-9, (8 + CODES % 8) * 2.0 ** (np.maximum(CODES // 8, 1) - 10)
)


def nearest(values: np.ndarray) -> np.ndarray:
    """The codes of float64 numbers up to 448 in absolute value, ties to the even code."""
    sizes = np.abs(values)
    above = np.clip(np.searchsorted(TABLE, sizes), 1, len(TABLE) - 1)
    low, high = sizes - TABLE[above - 1], TABLE[above] - sizes
    codes = np.where((high < low) | ((high == low) & (above % 2 == 0)), above, above - 1)
    return np.where(np.signbit(values), codes | 0x80, codes).astype(np.uint8)


def quantized(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of the rows of x, none of which is all zero."""
    wide = x.float().numpy()
    scales = np.abs(wide).max(axis=1) / np.float32(448)
    scaled = wide * (np.float32(1) / scales)[:, None]
    return nearest(np.clip(scaled, -448, 448).astype(np.float64)), scales


def blanks(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return poisoned(rows, columns, dtype=FP8), poisoned(rows)


def codes(out: torch.Tensor) -> np.ndarray:
    return out.view(torch.uint8).numpy()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def test_the_table_is_e4m3() -> None:
    assert (TABLE[1], TABLE[8], TABLE[0x38], TABLE[-1]) == (2.0**-9, 2.0**-6, 1.0, 448.0)
    assert (np.diff(TABLE) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 4096)], ids=str)
def test_quantize_rows(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator) ** 3 * torch.logspace(0, 3, shape[0]).unsqueeze(1)
    x = x.to(dtype)
    out, scales = blanks(*shape)
    quantize_rows(out, scales, x)
    expected, expected_scales = quantized(x)
    assert np.array_equal(scales.numpy(), expected_scales)
    assert np.array_equal(codes(out), expected)


def test_every_half_up_to_448_goes_to_its_nearest() -> None:
    """448 in the row makes its scale 1."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    x = x[x.abs() <= 448].unsqueeze(0)
    assert x.shape[1] > 40_000
    out, scales = blanks(*x.shape)
    quantize_rows(out, scales, x)
    assert scales.tolist() == [1.0]
    assert np.array_equal(codes(out)[0], nearest(x[0].double().numpy()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_of_a_row_is_448_whatever_its_size(dtype: torch.dtype) -> None:
    """Also where rounding the reciprocal would put it beyond what e4m3 holds."""
    sizes = torch.finfo(dtype).max * 0.9 * 2.0 ** -torch.arange(12.0)
    x = sizes.unsqueeze(1) * torch.tensor([[1.0, -1.0, 0.37]])
    out, scales = blanks(*x.shape)
    quantize_rows(out, scales, x.to(dtype))
    assert (out.float()[:, :2] == torch.tensor([448.0, -448.0])).all()
    assert scales.isfinite().all()


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-31])
def test_a_row_of_zeros_has_scale_one(largest: float) -> None:
    x = torch.tensor([[0.0, largest, -largest], [0.0, 3.0, 1.0]])
    out, scales = blanks(2, 3)
    quantize_rows(out, scales, x)
    assert out[0].float().tolist() == [0.0, 0.0, 0.0] and float(scales[0]) == 1.0
    assert float(out[1, 1].float()) == 448.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_makes_the_rows_products_nan_and_no_others(
    bad: float, dtype: torch.dtype
) -> None:
    x = torch.ones(3, 5, dtype=dtype)
    x[1, 2] = bad
    out, scales = blanks(3, 5)
    quantize_rows(out, scales, x)
    products = out.float().sum(dim=1) * scales
    assert products[1].isnan()
    assert products[[0, 2]].allclose(torch.tensor(5.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 4096)], ids=str)
def test_rms_norm_fp8_is_llamas_norm_quantised(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    norm = LlamaRMSNorm(shape[1], eps=1e-3).to(dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    with torch.inference_mode():
        norm.weight.copy_(torch.randn(shape[1], generator=generator))
        expected, expected_scales = quantized(norm(x))
        out, scales = blanks(*shape)
        rms_norm_fp8(out, scales, x, norm.weight, 1e-3)
    assert np.array_equal(codes(out), expected)
    assert np.array_equal(scales.numpy(), expected_scales)
