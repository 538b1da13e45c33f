"""int8 weights are bitsandbytes' to the bit."""

from __future__ import annotations

import sys

import bitsandbytes.functional as bnb
import pytest
import torch

from llava_engine.errors import KernelsNotBuilt
from llava_engine.quant.int8 import Int8Weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight(outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(outputs, 1, generator=generator) * 0.1
    return (torch.randn(outputs, inputs, generator=generator) * sizes).to(dtype)


def dequantised(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By bitsandbytes alone, as transformers calls it."""
    values, scb, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    return bnb.int8_vectorwise_dequant(values, scb).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (40, 11008)], ids=str)
def test_it_is_bitsandbytes_to_the_bit(
    shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype
) -> None:
    plain = weight(*shape, stored)
    ours = Int8Weight.of(plain).dequantize(dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, dequantised(plain, dtype))


def test_rows_are_to_half_a_step_what_they_were() -> None:
    plain = weight(20, 96, torch.float16)
    off = (Int8Weight.of(plain).dequantize(torch.float32) - plain.float()).abs()
    assert (off <= plain.float().abs().amax(dim=1, keepdim=True) / 127 / 2 * (1 + 1e-5)).all()


def test_a_stack_is_its_parts() -> None:
    plain = [weight(rows, 48, torch.float16, seed) for seed, rows in enumerate((3, 1, 9))]
    stacked = Int8Weight.stack([Int8Weight.of(part) for part in plain])
    truth = torch.cat([dequantised(part, torch.float32) for part in plain])
    assert torch.equal(stacked.dequantize(torch.float32), truth)
    assert (stacked.outputs, stacked.inputs) == (13, 48)
    assert stacked.nbytes == 13 * 48 + 13 * 4


def test_without_bitsandbytes_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(KernelsNotBuilt, match=r'int8.*pip install "llava-engine\[quant\]"'):
        Int8Weight.of(weight(4, 64, torch.float16))
