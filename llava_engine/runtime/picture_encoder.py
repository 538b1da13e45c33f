"""Pictures to embedding rows: the vision tower and the projector, captured for a few at a time.

The tower launches hundreds of small kernels, which take the host longer than the GPU. What it reads
is made from decoded pixels right before. Whose picture it is, and what is kept, is the model
runner's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llava_engine.kernels.preprocess import DecodedPicture, preprocess
from llava_engine.network.clip import patch_width
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime.graph import CapturedGraphs
from llava_engine.runtime.streams import DeviceStreams

_MOST_CAPTURED = 4  # pictures; for more at once the GPU takes longer than the launches


@dataclass
class _Encoding:
    """A captured encoding: what it reads, what it writes, and the graph."""

    patches: torch.Tensor
    rows: torch.Tensor
    graph: int


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
        self._encodings: dict[int, _Encoding] = {}

    def __call__(self, pictures: list[DecodedPicture]) -> torch.Tensor:
        """Embedding rows [n, image_tokens, hidden], the caller's own."""
        count = len(pictures)
        if self._graphs is None or count > _MOST_CAPTURED:
            patches = self._empty_patches(count)
            self._prepare(patches, pictures)
            return self._model.encode_images(patches)
        encoding = self._encodings.get(count)
        if encoding is None:
            encoding = self._encodings[count] = self._capture(self._graphs, count)
        self._prepare(encoding.patches, pictures)
        self._graphs.launch(encoding.graph)
        return encoding.rows.clone()

    def close(self) -> None:
        """Drop what was captured."""
        self._encodings.clear()
        if self._graphs is not None:
            self._graphs.clear()

    def _empty_patches(self, count: int) -> torch.Tensor:
        model, vision = self._model, self._model.config.vision
        shape = count, vision.num_patches, patch_width(vision.patch_size)
        return torch.empty(shape, dtype=model.dtype, device=model.device)

    def _prepare(self, patches: torch.Tensor, pictures: list[DecodedPicture]) -> None:
        """Upload the pictures and write the rows of their patches."""
        patch_size = self._model.config.vision.patch_size
        for rows, picture in zip(patches, pictures, strict=True):
            preprocess(rows, picture, self._streams.upload(picture.arrays), patch_size)

    def _capture(self, graphs: CapturedGraphs, count: int) -> _Encoding:
        config, model = self._model.config, self._model
        patches = self._empty_patches(count).zero_()
        rows = patches.new_empty(count, config.image_tokens, config.text.hidden_size)

        def encode() -> None:
            rows.copy_(model.encode_images(patches))

        graph = graphs.capture(encode)
        return _Encoding(patches, rows, graph)
