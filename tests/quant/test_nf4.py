"""NF4 weights are bitsandbytes' to the bit, whichever tensors a fused matrix is made of."""

from __future__ import annotations

import sys

import bitsandbytes.functional as bnb
import pytest
import torch

from llava_engine.errors import KernelsNotBuilt, UnsupportedModel
from llava_engine.kernels.dequantize import CODEBOOK
from llava_engine.quant.nf4 import Nf4Weight, fits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rows of 1, 3 and 172 blocks (the 7B's down): groups of 256 end within rows and between them.
SHAPES = [(5, 64), (300, 192), (7, 11008), (4, 16384)]


def weight(outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, or one group's scale would do for all."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(outputs, 1, generator=generator) * 0.1
    return (torch.randn(outputs, inputs, generator=generator) * sizes).to(dtype)


def dequantised(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By bitsandbytes alone."""
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    state.dtype = dtype
    return bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_bitsandbytes_to_the_bit(
    shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype
) -> None:
    plain = weight(*shape, stored)
    ours = Nf4Weight.of(plain).dequantize(dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, dequantised(plain, dtype))


def test_a_stack_is_its_parts_each_with_its_own_offset_and_phase() -> None:
    plain = [weight(rows, 320, torch.float16, seed) for seed, rows in enumerate((100, 37, 61))]
    stacked = Nf4Weight.stack([Nf4Weight.of(part) for part in plain])
    truth = torch.cat([dequantised(part, torch.float32) for part in plain])
    assert (stacked.outputs, stacked.inputs) == (198, 320)
    assert torch.equal(stacked.dequantize(torch.float32), truth)
    assert len(stacked.scales2[:, 2].unique()) == 3
    assert not torch.equal(truth, dequantised(torch.cat(plain), torch.float32))


def test_the_tensors_are_what_the_kernels_document() -> None:
    plain = weight(9, 11008, torch.float16)
    codes, state = bnb.quantize_4bit(
        plain, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    ours = Nf4Weight.of(plain)
    assert torch.equal(ours.codes, codes.view(9, 5504))
    assert torch.equal(ours.absmax, state.absmax.view(9, 172))
    assert torch.equal(ours.code2, state.state2.code)
    scales2 = ours.scales2
    for row in range(9):
        group, phase = divmod(row * 172, 256)
        assert scales2[row, 0] == state.state2.absmax[group]
        if group + 1 < len(state.state2.absmax):
            assert scales2[row, 1] == state.state2.absmax[group + 1]
        assert scales2[row, 2] == state.offset and scales2[row, 3] == phase


def test_bytes_are_half_a_byte_a_weight_and_the_scales() -> None:
    ours = Nf4Weight.of(weight(128, 4096, torch.float16))
    assert ours.nbytes == 128 * 4096 // 2 + 128 * 64 + 128 * 16 + 1024


def test_the_codebook_is_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(CODEBOOK), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("inputs", [96, 32, 16384 + 64])
def test_rows_that_are_no_whole_blocks_are_refused(inputs: int) -> None:
    assert not fits(inputs)
    with pytest.raises(UnsupportedModel, match=f"multiple of 64 inputs.*has {inputs}"):
        Nf4Weight.of(weight(2, inputs, torch.float16))


def test_different_maps_do_not_stack() -> None:
    one, other = (
        Nf4Weight.of(weight(4, 64, torch.float16)),
        Nf4Weight.of(weight(4, 64, torch.float16)),
    )
    other = Nf4Weight(other.codes, other.absmax, other.code2 * 2, other.scales2)
    with pytest.raises(UnsupportedModel, match="nested_quant_map"):
        Nf4Weight.stack([one, other])


def test_without_bitsandbytes_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(KernelsNotBuilt, match=r'nf4.*pip install "llava-engine\[quant\]"'):
        Nf4Weight.of(weight(4, 64, torch.float16))


def test_a_bitsandbytes_that_cannot_be_loaded_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart is missing")

    monkeypatch.setattr("llava_engine.quant.bnb.importlib.import_module", broken)
    with pytest.raises(KernelsNotBuilt, match="cannot be loaded") as raised:
        Nf4Weight.of(weight(4, 64, torch.float16))
    assert isinstance(raised.value.__cause__, OSError)
