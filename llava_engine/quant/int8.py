"""Weights in bitsandbytes' 8 bits: whole numbers, with the largest absolute value of each row.

Weights alone: activations keep their type, where bitsandbytes' LLM.int8() quantises them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava_engine.kernels.dequantize import dequantize_int8
from llava_engine.kernels.quant_linear import QuantMatrix
from llava_engine.quant import bnb


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A matrix whose row i is values[i] * scb[i] / 127.

    values: int8 [outputs, inputs]. scb: float32 [outputs], the rows' largest absolute values.
    """

    FORMAT: ClassVar[Literal["int8"]] = "int8"

    values: torch.Tensor
    scb: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8Weight:
        """Quantise a weight [outputs, inputs], float16, bfloat16 or float32, by bitsandbytes.

        It rounds to float16 first. Raises KernelsNotBuilt where that package is missing.
        """
        functional = bnb.functional(cls.FORMAT)
        values, scb, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return cls(values, scb)

    @classmethod
    def stack(cls, parts: Sequence[Int8Weight]) -> Int8Weight:
        """Matrices of one width, one below the other."""
        return cls(
            torch.cat([part.values for part in parts]), torch.cat([part.scb for part in parts])
        )

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [outputs, inputs] in `dtype`, to the bit what bitsandbytes makes of it."""
        return dequantize_int8(self.values, self.scb, dtype)

    def matrix(self, apart: int = 1) -> QuantMatrix:
        """As the kernels take it; apart: see QuantMatrix."""
        return QuantMatrix(self.values, self.scb, self.outputs, self.inputs, apart)

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [self.values, self.scb]

    @property
    def outputs(self) -> int:
        """Rows."""
        return self.values.shape[0]

    @property
    def inputs(self) -> int:
        """Columns."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())
