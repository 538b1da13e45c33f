"""Runs one step: builds the flat batch, encodes pictures, runs the decoder, samples.

A step mixes prefill chunks and decoding sequences freely. Nothing here advances a sequence, so a
step that fails can be run again, whole or sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
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
        self._streams = streams
        self._encode = PictureEncoder(model, streams, captures=captures)
        self._device = device = model.device
        text = model.config.text
        self._sampler = Sampler(text.vocab_size, model.config.image_token_id)
        self._prefill = prefill_attention(attention, text, model.dtype, device)
        self._block_size = cache.block_size
        self._overlap = overlap

    def run(self, step: list[Scheduled], launched: Callable[[], None]) -> list[int | None]:
        """The sampled token of each entry that reaches its sequence's end, else None.

        launched: called once the device has all its work, before that is waited for.
        """
        self.encode_pictures(
            [(entry.sequence, picture) for entry in step for picture in _pictures_in(entry)]
        )
        # The device encodes while the rest is prepared, and waits for nothing until it has sampled.
        complete = [row for row, entry in enumerate(step) if entry.completes]
        sequences = [step[row].sequence for row in complete]
        arrays = self._arrays(step)
        query_start = arrays[-1]
        last_rows = query_start[1:][complete].astype(np.int64) - 1
        arguments = self._sampler.arguments(sequences) if complete else []
        there = self._streams.upload_vectors([*arrays, last_rows, *arguments])
        last, *sampling = there[len(arrays) :]
        embeds, batch = self._embed(step, there[0]), self._batch(arrays, there)
        with programmatic_launch(self._overlap):
            hidden = self._model.forward(embeds, batch, self._cache.keys, self._cache.values, last)
        tokens: list[int | None] = [None] * len(step)
        if complete:
            sampled = self._sampler(self._model.logits(hidden), sampling)
        launched()
        if complete:
            for row, token in zip(complete, sampled.tolist(), strict=True):
                tokens[row] = token
        return tokens

    def close(self) -> None:
        """Drop what was captured; nothing may run any more."""
        self._encode.close()

    def encode_pictures(self, pictures: list[tuple[Sequence, Picture]]) -> None:
        """Give every sequence its picture's features, encoding each picture once.

        In a step it is done first; before that it may be, while the device decodes.
        """
        missing: dict[bytes, Picture] = {}
        wanted: list[tuple[Sequence, bytes]] = []
        for sequence, picture in pictures:
            if picture.key in sequence.features:
                continue
            wanted.append((sequence, picture.key))
            known = self._features.get(picture.key)
            if known is None:
                missing[picture.key] = picture
            else:
                sequence.features[picture.key] = known
        if missing:
            encoded = self._encode([picture.pixels for picture in missing.values()])
            for key, batched in zip(missing, encoded.unbind(), strict=True):
                features = batched.clone()  # a view would keep the whole batch alive
                self._features.put(key, features)
                for sequence, wanted_key in wanted:
                    if wanted_key == key:
                        sequence.features[key] = features

    def _arrays(self, step: list[Scheduled]) -> list[npt.NDArray[Any]]:
        """Token ids [T], then what a Batch has: positions, slot_mapping, block_table, context_lens
        and query_start."""
        size = self._block_size
        width = max(len(entry.sequence.block_table) for entry in step)
        table = np.zeros((len(step), width), dtype=np.int32)
        ids, positions, slots = [], [], []
        for row, entry in enumerate(step):
            start, end = entry.sequence.computed, entry.sequence.computed + entry.num_tokens
            blocks = np.asarray(entry.sequence.block_table, dtype=np.int64)
            table[row, : len(blocks)] = blocks
            places = np.arange(start, end)
            positions.append(places)
            slots.append(blocks[places // size] * size + places % size)
            ids.append(np.asarray(entry.sequence.token_ids[start:end], dtype=np.int64))
        return [
            np.maximum(np.concatenate(ids), 0),  # a picture's rows are overwritten
            np.concatenate(positions),
            np.concatenate(slots),
            table.reshape(-1),
            np.array([entry.sequence.computed + entry.num_tokens for entry in step], np.int32),
            np.cumsum([0, *(entry.num_tokens for entry in step)], dtype=np.int32),
        ]

    def _batch(self, arrays: list[npt.NDArray[Any]], there: list[torch.Tensor]) -> Batch:
        """The step as the decoder takes it, of `_arrays` and their copies on the device."""
        *_, table, context_lens, query_start = arrays
        sequences = len(context_lens)
        _, positions, slot_mapping, block_table, lens_there, start_there, *_ = there
        counts, lens = np.diff(query_start).tolist(), context_lens.tolist()
        return Batch(
            positions=positions,
            slot_mapping=slot_mapping,
            block_table=block_table.view(sequences, -1),
            context_lens=lens_there,
            query_start=start_there,
            max_query_len=max(counts),
            dense=self._prefill.plan(
                counts, lens, table.reshape(sequences, -1), self._block_size, self._device
            )
            if self._prefill is not None
            else None,
        )

    def _embed(self, step: list[Scheduled], token_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [tokens, hidden] of the step, with features in the pictures' rows."""
        embeds = self._model.embed(token_ids)
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


def _pictures_in(entry: Scheduled) -> list[Picture]:
    """The pictures that have rows in the entry's chunk."""
    start, end = entry.sequence.computed, entry.sequence.computed + entry.num_tokens
    return [
        picture
        for picture in entry.sequence.pictures
        if picture.offset < end and start < picture.offset + picture.length
    ]
