"""Weights in fewer bits than the activations' type, one kind per file.

Each is a frozen record of device tensors in the rows' natural order: `of` quantises, `stack` makes
fused matrices, `dequantize` is what they mean, `tensors` is what kernels take.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from llava_engine.quant.fp8 import Fp8Weight
from llava_engine.quant.int8 import Int8Weight
from llava_engine.quant.nf4 import Nf4Weight

Format: TypeAlias = Literal["nf4", "int8", "fp8"]
QuantisedWeight: TypeAlias = Nf4Weight | Int8Weight | Fp8Weight
