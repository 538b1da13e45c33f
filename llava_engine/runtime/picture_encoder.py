"""Pictures to embedding rows: the vision tower and the projector, captured for a few at a time.

The tower launches hundreds of small kernels, which take the host longer than the GPU. What it reads
is made from decoded pixels right before. Whose picture it is, and what is kept, is the model
runner's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llava_engine.kernels.preprocess import DecodedPicture, preprocess
from llava_engine.network.clip import patch_width
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime.graph import CapturedGraphs
from llava_engine.runtime.streams import DeviceStreams

MOST_AT_ONCE = 8
"""Pictures; more are encoded in several turns, since the GPU gains little by more and attention
plans anew for every number of them."""


class _Captured(NamedTuple):
    """A graph, and what it reads and writes for each of its pictures."""

    graph: int
    patches: tuple[torch.Tensor, ...]
    rows: tuple[torch.Tensor, ...]


class PictureEncoder:
    """Encodes batches of pictures on the prefill stream, which is the current one.

    captures: whether the work may be captured; it is for a number of pictures at its first use.
    """

    def __init__(self, model: LlavaModel, streams: DeviceStreams, *, captures: bool) -> None:
        self._model = model
        self._streams = streams
        self._graphs: CapturedGraphs | None = None
        if captures and streams.prefill is not None:
            self._graphs = CapturedGraphs(streams.prefill)
        self._captured: dict[int, _Captured] = {}
        # What every graph reads and writes, the first pictures of them.
        self._patches: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None

    def __call__(self, pictures: list[DecodedPicture]) -> list[torch.Tensor]:
        """Each picture's embedding rows [image_tokens, hidden], the caller's own."""
        encoded: list[torch.Tensor] = []
        for start in range(0, len(pictures), MOST_AT_ONCE):
            turn = pictures[start : start + MOST_AT_ONCE]
            if self._graphs is None:
                patches, together = self._empty_patches(len(turn)), self._empty_rows(len(turn))
                self._prepare(patches.unbind(), turn)
                rows = self._model.encode_images(patches, together).unbind()
            else:
                rows = self._replay(self._graphs, turn)
            # A graph's rows are overwritten by the next, and a view would keep all of them alive.
            encoded += [each.clone() for each in rows]
        return encoded

    def close(self) -> None:
        """Drop what was captured."""
        self._captured.clear()
        self._patches = self._rows = None
        if self._graphs is not None:
            self._graphs.clear()

    def _empty_patches(self, count: int) -> torch.Tensor:
        model, vision = self._model, self._model.config.vision
        shape = count, vision.num_patches, patch_width(vision.patch_size)
        return torch.empty(shape, dtype=model.dtype, device=model.device)

    def _empty_rows(self, count: int) -> torch.Tensor:
        model, config = self._model, self._model.config
        shape = count, config.image_tokens, config.text.hidden_size
        return torch.empty(shape, dtype=model.dtype, device=model.device)

    def _prepare(self, patches: tuple[torch.Tensor, ...], pictures: list[DecodedPicture]) -> None:
        """Upload the pictures and write the rows of the patches of each.

        In one upload, since Python's lock is given up and asked for again with each; what pictures
        have in common, as their levels, is uploaded once.
        """
        arrays = {id(array): array for picture in pictures for array in picture.arrays}
        there, places = self._streams.upload(list(arrays.values()))
        place_of = dict(zip(arrays, places, strict=True))
        patch_size = self._model.config.vision.patch_size
        for rows, picture in zip(patches, pictures, strict=True):
            its_places = [place_of[id(array)] for array in picture.arrays]
            preprocess(rows, picture, there, its_places, patch_size)

    def _replay(
        self, graphs: CapturedGraphs, pictures: list[DecodedPicture]
    ) -> tuple[torch.Tensor, ...]:
        captured = self._captured.get(len(pictures))
        if captured is None:
            captured = self._captured[len(pictures)] = self._capture(graphs, len(pictures))
        self._prepare(captured.patches, pictures)
        graphs.launch(captured.graph)
        return captured.rows

    def _capture(self, graphs: CapturedGraphs, count: int) -> _Captured:
        if self._patches is None or self._rows is None:
            self._patches = self._empty_patches(MOST_AT_ONCE).zero_()
            self._rows = self._empty_rows(MOST_AT_ONCE)
        patches, rows, model = self._patches[:count], self._rows[:count], self._model

        def encode() -> None:
            model.encode_images(patches, rows)

        return _Captured(graphs.capture(encode), patches.unbind(), rows.unbind())
