"""What the formats share that have 8 bits a weight and a scale a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from llava_engine.kernels.quant_linear import QuantMatrix


@dataclass(frozen=True, slots=True, eq=False)
class RowScaled:
    """A matrix of 8-bit numbers. What they and the scales stand for is the format's.

    values: int8 or float8_e4m3fn [outputs, inputs]. scales: float32 [outputs].
    """

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Matrices of one width, one below the other."""
        return cls(
            torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts])
        )

    def matrix(self, apart: int = 1) -> QuantMatrix:
        """As the kernels take it; apart: see QuantMatrix."""
        return QuantMatrix(self.values, self.scales, self.outputs, self.inputs, apart)

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [self.values, self.scales]

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
        """Bytes of both tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())
