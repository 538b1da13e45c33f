"""LLaVA: the vision tower, the projector, the decoder and its head, as one model.

Knows tensors only: which rows of a prompt are pictures, and how is sampled, is the runtime's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from llava_engine.kernels import linear
from llava_engine.kernels.library import hold
from llava_engine.kernels.prefill import StepInputs, prefill_in_parts, prefill_step
from llava_engine.kernels.projector import project
from llava_engine.network.attention import DensePrefill
from llava_engine.network.clip import VisionTower
from llava_engine.network.config import LlavaConfig
from llava_engine.network.layers import (
    ACTIVATIONS,
    FormatOf,
    Linear,
    Placement,
    Slot,
    unquantised,
)
from llava_engine.network.llama import Batch, LlamaDecoder

__all__ = ["Batch", "LlavaConfig", "LlavaModel", "batch_of"]


class LlavaModel:
    """The network of `config`, its weights uninitialised until network.weights fills them.

    format: of the decoder's products; the rest is in `dtype`. The caller turns gradients off
    (torch.inference_mode).
    """

    def __init__(
        self,
        config: LlavaConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        format: FormatOf = unquantised,
    ) -> None:
        place = Placement(device, dtype, format)
        text, layers = config.text, config.vision_feature_layers
        self.config = config
        self.device = device
        self.dtype = dtype
        self._tower = VisionTower(config.vision, layers, place)
        inputs, bias = config.vision.hidden_size * len(layers), config.projector_bias
        self._projector1 = Linear(inputs, text.hidden_size, bias, place)
        self._projector2 = Linear(text.hidden_size, text.hidden_size, bias, place)
        self._decoder = LlamaDecoder(text, place)
        self._head = (
            self._decoder.embedding
            if config.tie_word_embeddings
            else place.empty(text.vocab_size, text.hidden_size)
        )
        self._held = hold([self._decoder.embedding, self._head])

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, their fp8 copies included."""
        quantised = sum(product.quantised_nbytes for product, _ in self.quantised())
        return sum(view.nbytes for _, view in self.slots()) + quantised + self._decoder.fp8_nbytes

    def quantised(self) -> Iterator[tuple[Linear, dict[str, int]]]:
        """The products that have a format, each with its matrices' names in a checkpoint, without
        ".weight", and their output sizes."""
        return self._decoder.quantised()

    def quantize_for_prefill(self) -> None:
        """Make the fp8 copies that EngineConfig(prefill="fp8") needs, of the decoder's products
        alone, unless they are there. The weights must be filled."""
        self._decoder.quantize_for_prefill()

    def encode_images(
        self, patches: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows of network.clip.patch_rows [n, patches, width], in the model's dtype, to embedding
        rows [n, image_tokens, hidden]: `rows`, dense, where it is given."""
        features = self._tower(patches)
        if self.config.drop_class_token:
            features = features[:, 1:]
        if rows is None:
            rows = features.new_empty(*features.shape[:2], self.config.text.hidden_size)
        first, second = self._projector1, self._projector2
        if self.config.projector_hidden_act == "gelu":
            project(rows, features, first.weight, first.bias, second.weight, second.bias)
        else:
            rows.copy_(second(ACTIVATIONS[self.config.projector_hidden_act](first(features))))
        return rows

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Vocabulary ids int64 [T] to embedding rows [T, hidden]."""
        return self._decoder.embed(token_ids)

    def forward(
        self,
        embeds: torch.Tensor,
        batch: Batch,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embedding rows [T, hidden], which are overwritten, to hidden rows after the final norm:
        [T, hidden], or the `wanted` ones, int64 [R].

        k_caches, v_caches: one [num_blocks, kv_heads, block_size, head_dim] per layer; the batch's
        keys and values are written to them.
        """
        return self._decoder(embeds, batch, k_caches, v_caches, wanted)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden rows [R, hidden] to float32 [R, vocab_size]."""
        return F.linear(hidden, self._head).float()

    def prefill(
        self,
        tokens: torch.Tensor,
        uploaded: torch.Tensor,
        sizes: list[int],
        features: Sequence[torch.Tensor],
        feature_rows: Sequence[int],
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
        max_query_len: int,
        dense: DensePrefill | None = None,
    ) -> None:
        """A whole step up to its sampled tokens, in one call where the kernels can.

        max_query_len, dense: as in Batch; the rest as in kernels.prefill.prefill_step.
        """
        decoder, head = self._decoder, self._head
        what = tokens, uploaded, sizes, decoder.embedding, features, feature_rows
        in_one = decoder.in_one_call(dense)
        if in_one is not None:
            prefill_step(*what, k_caches, v_caches, in_one, head, max_query_len)
            return

        def layers(embeds: torch.Tensor, inputs: StepInputs[torch.Tensor]) -> torch.Tensor:
            batch = batch_of(inputs, max_query_len, dense)
            return self.forward(embeds, batch, k_caches, v_caches, inputs.wanted)

        prefill_in_parts(*what, layers, head)

    def decode_logits(
        self,
        token_ids: torch.Tensor,
        batch: Batch,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """A decoding step: each sequence's last token, int64 [S], to float32 [S, vocab_size].

        batch: one row per sequence; caches: as in `forward`. Needs no host synchronisation, so that
        it can be captured into a graph.
        """
        decoder, head = self._decoder, self._head
        embeds = decoder.embed(token_ids)
        if len(token_ids) > decoder.fused_rows:
            return self.logits(decoder(embeds, batch, k_caches, v_caches))
        hidden = decoder.decode(embeds, batch, k_caches, v_caches)
        if len(hidden) > linear.most_rows(head):
            return self.logits(decoder.normalised(hidden))
        logits = torch.empty(len(hidden), len(head), dtype=torch.float32, device=hidden.device)
        eps = self.config.text.rms_norm_eps
        linear.norm_linear(logits, hidden, decoder.norm, eps, head)
        return logits

    def slots(self) -> Iterator[Slot]:
        """Every tensor that a checkpoint must have, by its published name, but for the matrices of
        `quantised`."""
        hidden = self.config.text.hidden_size
        yield from self._tower.slots()
        yield from self._projector1.slots({"multi_modal_projector.linear_1": hidden})
        yield from self._projector2.slots({"multi_modal_projector.linear_2": hidden})
        yield from self._decoder.slots()
        if not self.config.tie_word_embeddings:
            yield "language_model.lm_head.weight", self._head


def batch_of(
    inputs: StepInputs[torch.Tensor], max_query_len: int, dense: DensePrefill | None = None
) -> Batch:
    """A step as the decoder takes it."""
    return Batch(
        positions=inputs.positions,
        slot_mapping=inputs.slot_mapping,
        block_table=inputs.block_table,
        query_start=inputs.query_start,
        context_lens=inputs.context_lens,
        max_query_len=max_query_len,
        dense=dense,
    )
