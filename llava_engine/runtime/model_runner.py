"""Runs one step: builds the flat batch, encodes pictures, runs the decoder, samples.

A step mixes prefill chunks and decoding sequences freely. Nothing here advances a sequence, so a
step that fails can be run again, whole or sequence by sequence.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from llava_engine.kernels.library import programmatic_launch
from llava_engine.network.attention import prefill_attention
from llava_engine.network.llama import Batch
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime.feature_cache import FeatureCache
from llava_engine.runtime.kv_cache import KVCache
from llava_engine.runtime.picture_encoder import PictureEncoder
from llava_engine.runtime.sampler import Sampler
from llava_engine.runtime.scheduler import Scheduled
from llava_engine.runtime.sequence import Picture, Sequence
from llava_engine.runtime.streams import DeviceStreams


class ModelRunner:
    """A model, its KV cache and its encoded pictures on one device."""

    def __init__(
        self,
        model: LlavaModel,
        cache: KVCache,
        features: FeatureCache,
        streams: DeviceStreams,
        *,
        attention: str = "paged",
        captures: bool = False,
        overlap: bool = False,
    ) -> None:
        """attention: as in EngineConfig. captures: whether work may be captured as CUDA graphs.
        overlap: whether kernels may start before their predecessors end.
        Raises as network.attention.prefill_attention."""
        self._model = model
        self._cache = cache
        self._features = features
        self._encode = PictureEncoder(model, streams, captures=captures)
        self._device = device = model.device
        text = model.config.text
        self._sampler = Sampler(text.vocab_size, model.config.image_token_id, device)
        self._prefill = prefill_attention(attention, text, model.dtype, device)
        self._block_size = cache.block_size
        self._overlap = overlap

    def run(self, step: list[Scheduled]) -> list[int | None]:
        """The sampled token of each entry that reaches its sequence's end, else None."""
        self._encode_pictures(step)
        embeds, batch = self._embed(step), self._batch(step)
        with programmatic_launch(self._overlap):
            hidden = self._model.forward(embeds, batch, self._cache.keys, self._cache.values)
        ends = list(accumulate(entry.num_tokens for entry in step))
        complete = [row for row, entry in enumerate(step) if entry.completes]
        tokens: list[int | None] = [None] * len(step)
        if complete:
            last = torch.tensor([ends[row] - 1 for row in complete], device=self._device)
            logits = self._model.logits(hidden[last])
            sampled = self._sampler(logits, [step[row].sequence for row in complete])
            for row, token in zip(complete, sampled, strict=True):
                tokens[row] = token
        return tokens

    def close(self) -> None:
        """Drop what was captured; nothing may run any more."""
        self._encode.close()

    def _encode_pictures(self, step: list[Scheduled]) -> None:
        """Give every sequence the features that its chunk needs, encoding each picture once."""
        missing: dict[bytes, Picture] = {}
        wanted: list[tuple[Sequence, bytes]] = []
        for entry in step:
            for picture in _pictures_in(entry):
                if picture.key in entry.sequence.features:
                    continue
                wanted.append((entry.sequence, picture.key))
                known = self._features.get(picture.key)
                if known is None:
                    missing[picture.key] = picture
                else:
                    entry.sequence.features[picture.key] = known
        if missing:
            encoded = self._encode([picture.pixels for picture in missing.values()])
            for key, batched in zip(missing, encoded.unbind(), strict=True):
                features = batched.clone()  # a view would keep the whole batch alive
                self._features.put(key, features)
                for sequence, wanted_key in wanted:
                    if wanted_key == key:
                        sequence.features[key] = features

    def _embed(self, step: list[Scheduled]) -> torch.Tensor:
        """Input embeddings [tokens, hidden] of the step, with features in the pictures' rows."""
        ids: list[int] = []
        for entry in step:
            start = entry.sequence.computed
            ids += entry.sequence.token_ids[start : start + entry.num_tokens]
        token_ids = torch.tensor(ids, dtype=torch.int64, device=self._device)
        embeds = self._model.embed(token_ids.clamp_(min=0))
        row = 0
        for entry in step:
            start = entry.sequence.computed
            for picture in _pictures_in(entry):
                first = max(start, picture.offset)
                last = min(start + entry.num_tokens, picture.offset + picture.length)
                features = entry.sequence.features[picture.key]
                embeds[row + first - start : row + last - start] = features[
                    first - picture.offset : last - picture.offset
                ]
            row += entry.num_tokens
        return embeds

    def _batch(self, step: list[Scheduled]) -> Batch:
        size = self._block_size
        width = max(len(entry.sequence.block_table) for entry in step)
        table = np.zeros((len(step), width), dtype=np.int32)
        positions, slots, lens = [], [], []
        for row, entry in enumerate(step):
            blocks = np.asarray(entry.sequence.block_table, dtype=np.int64)
            table[row, : len(blocks)] = blocks
            start = entry.sequence.computed
            places = np.arange(start, start + entry.num_tokens)
            positions.append(places)
            slots.append(blocks[places // size] * size + places % size)
            lens.append(start + entry.num_tokens)
        counts = [entry.num_tokens for entry in step]
        starts = np.cumsum([0, *counts])
        return Batch(
            positions=self._tensor(np.concatenate(positions), np.int64),
            slot_mapping=self._tensor(np.concatenate(slots), np.int64),
            block_table=self._tensor(table, np.int32),
            query_start=self._tensor(starts, np.int32),
            context_lens=self._tensor(np.asarray(lens), np.int32),
            max_query_len=max(counts),
            dense=self._prefill.plan(counts, lens, table, size, self._device)
            if self._prefill is not None
            else None,
        )

    def _tensor(self, values: np.ndarray, dtype: type[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values.astype(dtype)).to(self._device)


def _pictures_in(entry: Scheduled) -> list[Picture]:
    """The pictures that have rows in the entry's chunk."""
    start, end = entry.sequence.computed, entry.sequence.computed + entry.num_tokens
    return [
        picture
        for picture in entry.sequence.pictures
        if picture.offset < end and start < picture.offset + picture.length
    ]
