"""Weights in bitsandbytes' NF4: 16 levels, a scale per block of 64, the scales in 8 bits.

Blocks run on from row to row of a checkpoint's tensor, and so do the groups of 256 scales that
share a scale of their own. Here every row knows its own two groups at most, so that matrices made
of several tensors' rows need nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava_engine.errors import UnsupportedModel
from llava_engine.kernels.dequantize import BLOCK, GROUP, dequantize_nf4, nf4_levels
from llava_engine.kernels.quant_linear import QuantMatrix, pack_nf4
from llava_engine.quant import bnb


def fits(inputs: int) -> bool:
    """Whether rows of so many weights are whole blocks, in two groups at most."""
    return inputs % BLOCK == 0 and inputs // BLOCK <= GROUP


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Weight:
    """A matrix in NF4 with double quantisation; w = level * (code2[absmax] * group + offset).

    codes: uint8 [outputs, inputs / 2], two levels' indices each; the high half is the first.
    absmax: uint8 [outputs, inputs / 64], the blocks' scales, indices into code2.
    code2: float32 [256].
    scales2: float32 [outputs, 4], of each row: its first group's scale; the next group's; the
        offset; how many scales of the first group are those of earlier rows.
    """

    FORMAT: ClassVar[Literal["nf4"]] = "nf4"

    codes: torch.Tensor
    absmax: torch.Tensor
    code2: torch.Tensor
    scales2: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Nf4Weight:
        """Quantise a weight [outputs, inputs], float16, bfloat16 or float32, by bitsandbytes.

        Raises KernelsNotBuilt where that package is missing, UnsupportedModel as from_flat.
        """
        functional = bnb.functional(cls.FORMAT)
        _require_fit(weight.shape[1])
        codes, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=cls.FORMAT
        )
        return cls.from_flat(
            codes,
            state.absmax,
            state.state2.code,
            state.state2.absmax,
            float(state.offset),
            inputs=weight.shape[1],
        )

    @classmethod
    def from_flat(
        cls,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        code2: torch.Tensor,
        absmax2: torch.Tensor,
        offset: float,
        *,
        inputs: int,
    ) -> Nf4Weight:
        """A whole tensor as bitsandbytes has it.

        codes: uint8 [weights / 2, 1]. absmax: uint8 [weights / 64]. code2: float32 [256].
        absmax2: float32, one per 256 of absmax. Raises UnsupportedModel unless `inputs` is a
        multiple of 64 and at most 16384.
        """
        _require_fit(inputs)
        blocks = inputs // BLOCK
        absmax = absmax.view(-1, blocks)
        first_block = torch.arange(len(absmax), device=absmax.device) * blocks
        group = first_block // GROUP
        scales2 = torch.stack(
            (
                absmax2[group],
                absmax2[(group + 1).clamp(max=len(absmax2) - 1)],
                torch.full_like(absmax2[group], offset),
                (first_block % GROUP).float(),
            ),
            dim=1,
        )
        return cls(codes.view(-1, inputs // 2), absmax, code2, scales2)

    @classmethod
    def stack(cls, parts: Sequence[Nf4Weight]) -> Nf4Weight:
        """Matrices of one width, one below the other. Raises UnsupportedModel where their code2
        differ, which bitsandbytes never does."""
        code2 = parts[0].code2
        if not all(torch.equal(part.code2, code2) for part in parts[1:]):
            raise UnsupportedModel("tensors of one fused product have different nested_quant_maps")
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.absmax for part in parts]),
            code2.clone(),
            torch.cat([part.scales2 for part in parts]),
        )

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [outputs, inputs] in `dtype`, to the bit what bitsandbytes makes of it."""
        return dequantize_nf4(self.codes, self.absmax, self.code2, self.scales2, dtype)

    def matrix(self, apart: int = 1) -> QuantMatrix:
        """As the kernels take it; apart: see QuantMatrix."""
        packed = pack_nf4(self.codes, self.absmax, self.scales2, apart)
        return QuantMatrix(packed, self.code2, self.outputs, self.inputs, apart)

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [self.codes, self.absmax, self.scales2, self.code2]

    @property
    def outputs(self) -> int:
        """Rows."""
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:
        """Columns."""
        return self.codes.shape[1] * 2

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())


def dequantize_flat(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    code2: torch.Tensor,
    absmax2: torch.Tensor,
    offset: float,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """A tensor of any shape out of what from_flat takes, blocks running on from row to row."""
    count = shape[0] * shape[1]
    groups = absmax2.repeat_interleave(GROUP)[: len(absmax)]
    scales = (code2[absmax.int()] * groups + offset).repeat_interleave(BLOCK)[:count]
    return (nf4_levels(codes).view(-1)[:count] * scales).view(shape).to(dtype)


def _require_fit(inputs: int) -> None:
    if not fits(inputs):
        raise UnsupportedModel(
            f"nf4 is for products of a multiple of {BLOCK} inputs, at most {BLOCK * GROUP}; "
            f"this one has {inputs}"
        )
