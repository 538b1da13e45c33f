"""Weights in fewer bits than the activations' type, one kind per file.

Each is a frozen record of device tensors in the rows' natural order: `of` quantises, `stack` makes
fused matrices, `dequantize` is what they mean. kernels.quant_linear has them as kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch

from llava_engine.quant import nf4
from llava_engine.quant.fp8 import Fp8Weight
from llava_engine.quant.int8 import Int8Weight
from llava_engine.quant.nf4 import Nf4Weight

Format: TypeAlias = Literal["nf4", "int8", "fp8"]
QuantisedWeight: TypeAlias = Nf4Weight | Int8Weight | Fp8Weight

_OF: dict[Format, Callable[[torch.Tensor], QuantisedWeight]] = {
    "nf4": Nf4Weight.of,
    "int8": Int8Weight.of,
    "fp8": Fp8Weight.of,
}


def fits(format: Format, inputs: int) -> bool:
    """Whether a matrix of so many columns can be had in the format."""
    return format != "nf4" or nf4.fits(inputs)


def quantised(format: Format, parts: Sequence[torch.Tensor]) -> QuantisedWeight:
    """Matrices [outputs, inputs] of one width, each quantised by itself, one below the other.

    Raises as the format's `of`.
    """
    return stacked([_OF[format](part) for part in parts])


def stacked(parts: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """Matrices of one format and width, one below the other, in memory of their own."""
    return type(parts[0]).stack(parts)  # type: ignore[arg-type]  # of one format
