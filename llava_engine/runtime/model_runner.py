"""Runs one step: encodes pictures, builds the flat batch, has the model prefill and sample.

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
from llava_engine.kernels.prefill import StepInputs, pack
from llava_engine.network.attention import DensePrefill, prefill_attention
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime.feature_cache import FeatureCache
from llava_engine.runtime.kv_cache import KVCache
from llava_engine.runtime.picture_encoder import PictureEncoder
from llava_engine.runtime.sampler import sampling_inputs
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
        self._vocab_size, self._image_token_id = text.vocab_size, model.config.image_token_id
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
        # Each call below that leaves Python gives up its lock: they are few.
        complete = [row for row, entry in enumerate(step) if entry.completes]
        inputs = self._inputs(step, complete)
        packed, sizes = pack(inputs)
        uploaded, _ = self._streams.upload([packed])
        features, feature_rows = _features_in(step)
        dense = self._dense(inputs)
        tokens = torch.empty(len(complete), dtype=torch.int64, device=self._device)
        with programmatic_launch(self._overlap):
            self._model.prefill(
                tokens,
                uploaded,
                sizes,
                features,
                feature_rows,
                self._cache.keys,
                self._cache.values,
                max(entry.num_tokens for entry in step),
                dense,
            )
        launched()
        sampled: list[int | None] = [None] * len(step)
        if complete:
            for row, token in zip(complete, tokens.tolist(), strict=True):
                sampled[row] = token
        return sampled

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
            for key, features in zip(missing, encoded, strict=True):
                self._features.put(key, features)
                for sequence, wanted_key in wanted:
                    if wanted_key == key:
                        sequence.features[key] = features

    def _inputs(self, step: list[Scheduled], complete: list[int]) -> StepInputs[npt.NDArray[Any]]:
        """The step on the host; those of its entries that are `complete` sample."""
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
        query_start = np.cumsum([0, *(entry.num_tokens for entry in step)], dtype=np.int32)
        ends = [entry.sequence.computed + entry.num_tokens for entry in step]
        return StepInputs(
            token_ids=np.maximum(np.concatenate(ids), 0),  # a picture's rows are overwritten
            positions=np.concatenate(positions),
            slot_mapping=np.concatenate(slots),
            wanted=query_start[1:][complete].astype(np.int64) - 1,
            block_table=table,
            query_start=query_start,
            context_lens=np.array(ends, np.int32),
            **sampling_inputs(
                [step[row].sequence for row in complete], self._vocab_size, self._image_token_id
            ),
        )

    def _dense(self, inputs: StepInputs[npt.NDArray[Any]]) -> DensePrefill | None:
        if self._prefill is None:
            return None
        counts, lens = np.diff(inputs.query_start).tolist(), inputs.context_lens.tolist()
        return self._prefill.plan(counts, lens, inputs.block_table, self._block_size, self._device)


def _features_in(step: list[Scheduled]) -> tuple[list[torch.Tensor], list[int]]:
    """The features with rows in the step, and of each where there these begin, the first of them
    and how many."""
    features, rows, row = [], [], 0
    for entry in step:
        start = entry.sequence.computed
        for picture in _pictures_in(entry):
            first = max(start, picture.offset)
            last = min(start + entry.num_tokens, picture.offset + picture.length)
            features.append(entry.sequence.features[picture.key])
            rows += [row + first - start, first - picture.offset, last - first]
        row += entry.num_tokens
    return features, rows


def _pictures_in(entry: Scheduled) -> list[Picture]:
    """The pictures that have rows in the entry's chunk."""
    start, end = entry.sequence.computed, entry.sequence.computed + entry.num_tokens
    return [
        picture
        for picture in entry.sequence.pictures
        if picture.offset < end and start < picture.offset + picture.length
    ]
