"""The Llama decoder on flat batches: embedding rows in, normalised hidden rows out.

A batch is the new tokens of any number of sequences, one after the other; their past is in the
paged KV cache, which the caller owns (Touvron et al. 2023; numerics as in transformers' Llama).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from llava_engine.errors import UnsupportedModel
from llava_engine.kernels import linear, quant_linear
from llava_engine.kernels.activation import silu_mul
from llava_engine.kernels.attention import attention_workspace, paged_attention
from llava_engine.kernels.decoder import DecoderTensors, decoder_layers
from llava_engine.kernels.library import hold, using_references
from llava_engine.kernels.matmul import HEAD_DIM
from llava_engine.kernels.norm import add_rms_norm, rms_norm
from llava_engine.kernels.rope_kv import rope_append
from llava_engine.network.attention import DensePrefill, attention
from llava_engine.network.config import RopeConfig, TextConfig
from llava_engine.network.layers import ACTIVATIONS, Linear, Placement, Slab, Slot

PREFIX = "language_model.model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Where the T rows of a step belong, for S sequences.

    positions: int64 [T], of each row in its sequence.
    slot_mapping: int64 [T], where its key and value go: block * block_size + offset.
    block_table: int32 [S, max_blocks]. query_start: int32 [S + 1], first row of each sequence.
    context_lens: int32 [S], tokens of each sequence up to and with this step's.
    max_query_len: the most rows that a sequence has here.
    dense: the sequences at the end that do not attend through the block table.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    max_query_len: int
    dense: DensePrefill | None = None


class LlamaDecoder:
    """Embedding, decoder layers and final norm; the head is network.llava's."""

    def __init__(self, config: TextConfig, place: Placement) -> None:
        self._eps = config.rms_norm_eps
        self.embedding = place.empty(config.vocab_size, config.hidden_size)
        workspace = attention_workspace(
            config.num_heads, config.num_kv_heads, config.head_dim, place.device
        )
        self._workspace, self._scale = workspace, config.head_dim**-0.5
        self._head_dim = config.head_dim
        self._layers = [
            _Layer(config, place, workspace, f"{PREFIX}.layers.{index}")
            for index in range(config.num_layers)
        ]
        for alike in zip(*(layer.products for layer in self._layers), strict=True):
            quantised = [product for product in alike if product.format is not None]
            slab = Slab(len(quantised))
            for product in quantised:
                product.slab = slab
        self.norm = place.empty(config.hidden_size)
        self._plain = all(layer.plain for layer in self._layers)
        self._quantised = any(True for _ in self.quantised())
        self._fp8: list[torch.Tensor] = []
        self._one_call: DecoderTensors | None = None
        self._held: object = None  # its tensors
        self.fused_rows = min(layer.fused_rows for layer in self._layers)
        """The most sequences that `decode` takes."""
        self._cos_sin = cos_sin_table(
            config.rope, config.head_dim, config.max_position_embeddings, place.device
        )

    def in_one_call(self, dense: DensePrefill | None) -> DecoderTensors | None:
        """What the ops take that run all layers of a batch, if they can. dense: as in Batch."""
        weights = self._weights
        if weights is None or dense is not None:
            return None
        if self._one_call is None:
            scales, fp8, norm, cos_sin = self._scales, self._fp8, self.norm, self._cos_sin
            self._held = hold([*weights, *scales, *fp8, norm, cos_sin, self._workspace])
            self._one_call = DecoderTensors(
                weights, scales, fp8, norm, cos_sin, self._workspace, self._scale, self._eps
            )
        return self._one_call

    @cached_property
    def _weights(self) -> list[torch.Tensor] | None:
        if not self._plain or any(product.matrix is None for product, _ in self.quantised()):
            return None
        return [tensor for layer in self._layers for tensor in layer.weights()]

    @cached_property
    def _scales(self) -> list[torch.Tensor]:
        products = [product for layer in self._layers for product in layer.products]
        return [_stored(product)[1] for product in products] if self._quantised else []

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] to [T, hidden]."""
        return F.embedding(token_ids, self.embedding)

    def __call__(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """embeds [T, hidden], which are overwritten, to [T, hidden] after the final norm, or of
        these the `wanted` rows, int64 [R]; fills the batch's cache slots."""
        residual = embeds
        in_one = self.in_one_call(batch.dense)
        if in_one is not None:
            rows = len(residual) if wanted is None else len(wanted)
            out = residual.new_empty(rows, residual.shape[1])
            decoder_layers(
                out,
                residual,
                k_caches,
                v_caches,
                in_one,
                batch.positions,
                batch.slot_mapping,
                batch.block_table,
                batch.query_start,
                batch.context_lens,
                wanted,
                batch.max_query_len,
            )
            return out
        x = torch.empty_like(residual)
        rms_norm(x, residual, self._layers[0].input_norm, self._eps)
        next_norms = [layer.input_norm for layer in self._layers[1:]] + [self.norm]
        for layer, next_norm, k_cache, v_cache in zip(
            self._layers, next_norms, k_caches, v_caches, strict=True
        ):
            attended = layer.attend(x, batch, self._cos_sin, k_cache, v_cache)
            add_rms_norm(x, residual, attended, layer.post_norm, self._eps)
            add_rms_norm(x, residual, layer.mlp(x), next_norm, self._eps)
        return x if wanted is None else x[wanted]

    def decode(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """embeds [T, hidden], which are overwritten, to [T, hidden] before the final norm.

        One token per sequence, in five kernels a layer.
        """
        for layer, k_cache, v_cache in zip(self._layers, k_caches, v_caches, strict=True):
            layer.decode(embeds, batch, self._cos_sin, k_cache, v_cache)
        return embeds

    def normalised(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm of rows [R, hidden]."""
        out = torch.empty_like(hidden)
        rms_norm(out, hidden, self.norm, self._eps)
        return out

    def quantised(self) -> Iterator[tuple[Linear, dict[str, int]]]:
        """The products that have a format, with the names and output sizes of their matrices."""
        for layer in self._layers:
            for product, parts in layer.products.items():
                if product.format is not None:
                    yield product, parts

    def quantize_for_prefill(self) -> None:
        """Give every product of the layers its weight in fp8 (`Linear.fp8`).

        Raises UnsupportedModel where no kernel would use them.
        """
        if not all(product.in_fp8 for product, _ in self.quantised()):
            raise UnsupportedModel(
                'prefill="fp8" is for weights in 16 bits, or in fp8 where the compiled kernels run'
            )
        if not self._plain:
            raise UnsupportedModel('prefill="fp8" is for decoders with SiLU and without biases')
        if self._head_dim != HEAD_DIM and self.norm.is_cuda and not using_references():
            raise UnsupportedModel(
                f'prefill="fp8" is for heads of {HEAD_DIM} dimensions, not {self._head_dim}'
            )
        for layer in self._layers:
            for product in layer.products:
                product.quantize_for_prefill()
        copies = [product.fp8 for layer in self._layers for product in layer.products]
        self._fp8 = [
            tensor for copy in copies if copy is not None for tensor in (copy.values, copy.scales)
        ]
        self._one_call = None  # they are part of it

    @property
    def fp8_nbytes(self) -> int:
        """Bytes of the fp8 copies."""
        products = [product for layer in self._layers for product in layer.products]
        copies = [product.fp8 for product in products if product.format is None]
        return sum(copy.nbytes for copy in copies if copy is not None)

    def slots(self) -> Iterator[Slot]:
        yield f"{PREFIX}.embed_tokens.weight", self.embedding
        for layer in self._layers:
            yield from layer.slots()
        yield f"{PREFIX}.norm.weight", self.norm


class _Layer:
    def __init__(
        self, config: TextConfig, place: Placement, workspace: torch.Tensor, prefix: str
    ) -> None:
        hidden, dim = config.hidden_size, config.head_dim
        self._prefix = prefix
        self._num_heads, self._num_kv_heads, self._dim = config.num_heads, config.num_kv_heads, dim
        self._scale = dim**-0.5
        self._workspace = workspace  # one for all layers, which run one after the other
        self._hidden_act = config.hidden_act
        self._wide = config.intermediate_size
        self.input_norm = place.empty(hidden)
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        queries, keys = config.num_heads * dim, config.num_kv_heads * dim
        self.products: dict[Linear, dict[str, int]] = {}
        """With the names and output sizes of the checkpoint's matrices, in a step's order."""

        def product(inputs: int, bias: bool, parts: dict[str, int], apart: int = 1) -> Linear:
            outputs, names = sum(parts.values()), [f"{name}.weight" for name in parts]
            made = Linear(inputs, outputs, bias, place, place.format(names, inputs), apart)
            self.products[made] = parts
            return made

        self._qkv = product(
            hidden,
            config.attention_bias,
            {
                f"{attention}.q_proj": queries,
                f"{attention}.k_proj": keys,
                f"{attention}.v_proj": keys,
            },
            apart=dim // 2,
        )
        self._out = product(queries, config.attention_bias, {f"{attention}.o_proj": hidden})
        self.post_norm = place.empty(hidden)
        wide = self._wide
        self._gate_up = product(
            hidden, config.mlp_bias, {f"{mlp}.gate_proj": wide, f"{mlp}.up_proj": wide}, apart=wide
        )
        self._down = product(wide, config.mlp_bias, {f"{mlp}.down_proj": hidden})
        self._eps = config.rms_norm_eps
        self.plain = self._hidden_act in ("silu", "swish") and all(
            product.bias is None for product in self.products
        )
        """Whether the fused ops are made for it."""
        self.fused_rows = 0
        if self.plain:
            self.fused_rows = min(product.fused_rows for product in self.products)

    def weights(self) -> tuple[torch.Tensor, ...]:
        """What decoder_layers takes of a layer."""
        qkv, out, gate_up, down = (_stored(product)[0] for product in self.products)
        return self.input_norm, qkv, out, self.post_norm, gate_up, down

    def decode(
        self,
        residual: torch.Tensor,
        batch: Batch,
        cos_sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> None:
        rows, eps = len(residual), self._eps
        q = residual.new_empty(rows, self._num_heads, self._dim)
        places = cos_sin, batch.positions, batch.slot_mapping
        before = q, k_cache, v_cache, residual, self.input_norm, eps
        if self._qkv.matrix is None:
            linear.norm_qkv_rope_append(*before, self._qkv.weight, *places)
        else:
            quant_linear.quant_norm_qkv_rope_append(*before, self._qkv.matrix, *places)
        attended = torch.empty_like(q)
        paged_attention(
            attended,
            q,
            k_cache,
            v_cache,
            batch.block_table,
            batch.query_start,
            batch.context_lens,
            self._workspace,
            1,
            self._scale,
        )
        _add_product(residual, attended.view(rows, -1), self._out)
        activated = residual.new_empty(rows, self._wide)
        normed = activated, residual, self.post_norm, eps
        if self._gate_up.matrix is None:
            linear.norm_linear_silu_mul(*normed, self._gate_up.weight)
        else:
            quant_linear.quant_norm_linear_silu_mul(*normed, self._gate_up.matrix)
        _add_product(residual, activated, self._down)

    def attend(
        self,
        x: torch.Tensor,
        batch: Batch,
        cos_sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        qkv = self._qkv(x).view(len(x), -1, self._dim)
        q = qkv[:, : self._num_heads]
        k, v = qkv[:, self._num_heads :].chunk(2, dim=1)
        rope_append(q, k, v, cos_sin, batch.positions, batch.slot_mapping, k_cache, v_cache)
        attended = attention(q, k, v, k_cache, v_cache, batch, self._workspace, self._scale)
        return self._out(attended.view(len(x), -1))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self._gate_up(x)
        if self._hidden_act in ("silu", "swish"):
            activated = torch.empty(len(x), self._wide, dtype=x.dtype, device=x.device)
            silu_mul(activated, gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            activated = ACTIVATIONS[self._hidden_act](gate) * up
        return self._down(activated)

    def slots(self) -> Iterator[Slot]:
        yield f"{self._prefix}.input_layernorm.weight", self.input_norm
        yield f"{self._prefix}.post_attention_layernorm.weight", self.post_norm
        for product, parts in self.products.items():
            yield from product.slots(parts)


def _add_product(residual: torch.Tensor, x: torch.Tensor, product: Linear) -> None:
    if product.matrix is None:
        linear.linear_add(residual, x, product.weight)
    else:
        quant_linear.quant_linear_add(residual, x, product.matrix)


def _stored(product: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """A product's weight as it is, and its scales; without a format the weight again."""
    if product.matrix is None:
        return product.weight, product.weight
    return product.matrix.weight, product.matrix.scales


def cos_sin_table(
    rope: RopeConfig, head_dim: int, length: int, device: torch.device
) -> torch.Tensor:
    """float32 [length, head_dim]: cosines, then sines, of position * frequency."""
    if device.type == "meta":  # to do arithmetic there torch imports its compiler: a second
        return torch.empty(length, head_dim, device=device)
    frequencies = inverse_frequencies(rope, head_dim).to(device)
    angles = torch.arange(length, device=device).float().unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 [head_dim / 2], in radians per token.

    "linear" stretches positions by `factor`. "llama3" stretches only waves that are long beside the
    original context, and blends in between (Llama 3.1's reference code; as in transformers).
    """
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return frequencies
    stretched = frequencies / rope.factor
    if rope.kind == "linear":
        return stretched
    periods = rope.original_len * frequencies / (2 * math.pi)
    share = (periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * stretched + share * frequencies
