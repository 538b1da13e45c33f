"""The CLIP vision tower: rows of patches in, hidden states of the feature layers out.

Layers behind the last feature layer are never built (Radford et al. 2021; numerics as in
transformers' CLIPVisionModel).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from llava_engine.kernels.activation import quick_gelu
from llava_engine.kernels.dense_attention import dense_attention
from llava_engine.kernels.norm import embed_norm
from llava_engine.network.config import VisionConfig
from llava_engine.network.layers import ACTIVATIONS, LayerNorm, Linear, Placement, Slot

PREFIX = "vision_tower.vision_model"


def patch_width(patch_size: int) -> int:
    """The length of a patch's row: its values, rounded up so that every row is 16 bytes aligned."""
    return -(-3 * patch_size * patch_size // 8) * 8


def patch_rows(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Pixels [n, 3, side, side] to the rows that the tower takes, [n, patches, width].

    Patches go from left to right, then down; a row's columns by channel, then y, then x, as in the
    embedding's weight, and the last ones up to patch_width are 0. Pixels beyond the last whole
    patch are left out.
    """
    n, across = len(pixels), pixels.shape[-1] // patch_size
    side, values = across * patch_size, 3 * patch_size * patch_size
    patches = pixels[..., :side, :side].reshape(n, 3, across, patch_size, across, patch_size)
    rows = patches.permute(0, 2, 4, 1, 3, 5).reshape(n, across * across, values)
    return F.pad(rows, (0, patch_width(patch_size) - values))


class VisionTower:
    """feature_layers: which hidden states are wanted; 0 is the first layer's input."""

    def __init__(
        self, config: VisionConfig, feature_layers: tuple[int, ...], place: Placement
    ) -> None:
        hidden, patch = config.hidden_size, config.patch_size
        self._feature_layers = feature_layers
        self._class_embedding = place.empty(hidden)
        values = 3 * patch * patch
        self._patches = Linear(patch_width(patch), hidden, False, place)
        self._patches.weight[:, values:].zero_()
        self._patch_embedding = self._patches.weight[:, :values].view(hidden, 3, patch, patch)
        self._position_embedding = place.empty(config.num_patches + 1, hidden)
        self._pre_norm = LayerNorm(hidden, config.layer_norm_eps, place)
        self._layers = [_Layer(config, place) for _ in range(max(feature_layers))]

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """Rows of patch_rows [n, patches, width] to [n, 1 + patches, hidden * feature layers]."""
        n, hidden = len(patches), len(self._class_embedding)
        embedded = self._patches(patches)
        states = patches.new_empty(n, len(self._position_embedding), hidden)
        norm = self._pre_norm
        embed_norm(
            states,
            embedded,
            self._class_embedding,
            self._position_embedding,
            norm.weight,
            norm.bias,
            norm.eps,
        )
        residual = states.view(-1, hidden)
        x = torch.empty_like(residual)
        pending = None
        kept = {}
        for index, layer in enumerate(self._layers):
            if index in self._feature_layers:
                kept[index] = states + (0 if pending is None else pending.view_as(states))
            pending = layer(residual, pending, x, n)
        if pending is not None:
            residual += pending
        kept[len(self._layers)] = states
        wanted = [kept[index] for index in self._feature_layers]
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted, dim=-1)

    def slots(self) -> Iterator[Slot]:
        yield f"{PREFIX}.embeddings.class_embedding", self._class_embedding
        yield f"{PREFIX}.embeddings.patch_embedding.weight", self._patch_embedding
        yield f"{PREFIX}.embeddings.position_embedding.weight", self._position_embedding
        yield from self._pre_norm.slots(f"{PREFIX}.pre_layrnorm")
        for index, layer in enumerate(self._layers):
            yield from layer.slots(f"{PREFIX}.encoder.layers.{index}")


class _Layer:
    def __init__(self, config: VisionConfig, place: Placement) -> None:
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self._num_heads = config.num_heads
        self._hidden_act = config.hidden_act
        self._norm1 = LayerNorm(hidden, eps, place)
        self._qkv = Linear(hidden, 3 * hidden, True, place)
        self._out = Linear(hidden, hidden, True, place)
        self._norm2 = LayerNorm(hidden, eps, place)
        self._fc1 = Linear(hidden, config.intermediate_size, True, place)
        self._fc2 = Linear(config.intermediate_size, hidden, True, place)

    def __call__(
        self, residual: torch.Tensor, pending: torch.Tensor | None, x: torch.Tensor, n: int
    ) -> torch.Tensor:
        """Hidden states of n pictures to the next ones, as residual + pending; returns the latter.

        The next norm adds the two where it reads them. residual: [n * tokens, hidden], written.
        pending: its like, None before the first layer. x: their like, for what comes between.
        """
        self._norm1(x, residual, pending)
        qkv = self._qkv(x).view(n, len(x) // n, 3, self._num_heads, -1)
        attended = dense_attention(*qkv.permute(2, 0, 3, 1, 4).unbind())
        self._norm2(x, residual, self._out(attended.transpose(1, 2).reshape(x.shape)))
        return self._fc2(_activated(self._fc1(x), self._hidden_act))

    def slots(self, prefix: str) -> Iterator[Slot]:
        hidden, wide = self._out.weight.shape[0], self._fc1.weight.shape[0]
        attention = f"{prefix}.self_attn"
        yield from self._norm1.slots(f"{prefix}.layer_norm1")
        yield from self._qkv.slots({f"{attention}.{name}_proj": hidden for name in "qkv"})
        yield from self._out.slots({f"{attention}.out_proj": hidden})
        yield from self._norm2.slots(f"{prefix}.layer_norm2")
        yield from self._fc1.slots({f"{prefix}.mlp.fc1": wide})
        yield from self._fc2.slots({f"{prefix}.mlp.fc2": hidden})


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "quick_gelu":
        quick_gelu(x, x)
        return x
    return ACTIVATIONS[activation](x)
