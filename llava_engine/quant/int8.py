"""Weights in bitsandbytes' 8 bits: whole numbers, with the largest absolute value of each row.

Weights alone: activations keep their type, where bitsandbytes' LLM.int8() quantises them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava_engine.kernels.dequantize import dequantize_int8
from llava_engine.quant import bnb
from llava_engine.quant.rows import RowScaled


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight(RowScaled):
    """A matrix whose row i is values[i] * scales[i] / 127.

    values: int8. scales: the rows' largest absolute values, bitsandbytes' SCB.
    """

    FORMAT: ClassVar[Literal["int8"]] = "int8"

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8Weight:
        """Quantise a weight [outputs, inputs], float16, bfloat16 or float32, by bitsandbytes.

        It rounds to float16 first. Raises KernelsNotBuilt where that package is missing.
        """
        functional = bnb.functional(cls.FORMAT)
        values, scb, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return cls(values, scb)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [outputs, inputs] in `dtype`, to the bit what bitsandbytes makes of it."""
        return dequantize_int8(self.values, self.scales, dtype)
