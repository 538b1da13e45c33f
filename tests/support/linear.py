"""Cases of the products of few rows, and what they must give, written out in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

HEADS = [(4, 4, 8), (6, 2, 12), (3, 1, 2), (8, 2, 128), (5, 5, 80)]
"""Query heads, key heads, dimensions."""


@dataclass
class QkvCase:
    """Arguments of norm_qkv_rope_append; the cache has 40 blocks of 5."""

    heads: tuple[int, int, int]
    inputs: tuple[Any, ...]

    def blank(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """Poisoned q, k_cache and v_cache."""
        q_heads, kv_heads, dim = self.heads
        x = self.inputs[0]
        shapes = ((len(x), q_heads, dim), (40, kv_heads, 5, dim), (40, kv_heads, 5, dim))
        return tuple(
            torch.full(shape, torch.nan, dtype=dtype or x.dtype, device=x.device)
            for shape in shapes
        )


def angles(length: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """A table of cosines and sines [length, dim]."""
    turned = torch.rand(length, dim // 2, generator=generator, device=generator.device) * 7
    return torch.cat((turned.cos(), turned.sin()), dim=-1)


def qkv_case(
    rows: int,
    heads: tuple[int, int, int],
    inputs: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> QkvCase:
    """Random rows; the last of several is a padding row."""
    device = generator.device
    q_heads, kv_heads, dim = heads
    x, gain = (
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in ((rows, inputs), (inputs,))
    )
    outputs = (q_heads + 2 * kv_heads) * dim
    qkv = torch.randn(outputs, inputs, generator=generator, device=device) * inputs**-0.5
    positions = torch.randint(300, (rows,), generator=generator, device=device)
    slots = torch.randperm(200, generator=generator, device=device)[:rows]
    if rows > 1:
        slots[-1] = -1
    cos_sin = angles(300, dim, generator)
    return QkvCase(heads, (x, gain, 1e-5, qkv.to(dtype), cos_sin, positions, slots))


def norm_truth(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in float64."""
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain.double()


def product_truth(
    x: torch.Tensor, gain: torch.Tensor, eps: float, weight: torch.Tensor
) -> torch.Tensor:
    """The normalised rows' product in float64."""
    return norm_truth(x, gain, eps) @ weight.double().T


def silu_truth(
    x: torch.Tensor, gain: torch.Tensor, eps: float, gate_up: torch.Tensor
) -> torch.Tensor:
    """SiLU of the gate's product, times that of up, in float64."""
    gate, up = product_truth(x, gain, eps, gate_up).chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def qkv_truth(case: QkvCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and the caches in float64, NaN where nothing is to be written."""
    q_heads, kv_heads, dim = case.heads
    x, gain, eps, qkv, cos_sin, positions, slots = case.inputs
    made = product_truth(x, gain, eps, qkv).view(len(x), -1, dim)
    turned, v = made[:, : q_heads + kv_heads], made[:, q_heads + kv_heads :]
    cos, sin = cos_sin.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    left, right = turned.chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    _, k_cache, v_cache = case.blank(torch.float64)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // 5, :, slot % 5] = turned[row, q_heads:]
            v_cache[slot // 5, :, slot % 5] = v[row]
    return turned[:, :q_heads], k_cache, v_cache
