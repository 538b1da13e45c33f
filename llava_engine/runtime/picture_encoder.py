"""Pictures to embedding rows: the vision tower and the projector, captured for a few at a time.

The tower launches hundreds of small kernels, which take the host longer than the GPU. Knows pixels
only; whose picture it is, and what is kept, is the model runner's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llava_engine.network.clip import patch_rows
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

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """Pixels float32 [n, 3, side, side] to rows [n, image_tokens, hidden], the caller's own."""
        there = self._streams.upload(torch.from_numpy(pixels)).to(self._model.dtype)
        patches = patch_rows(there, self._model.config.vision.patch_size)
        if self._graphs is None or len(patches) > _MOST_CAPTURED:
            return self._model.encode_images(patches)
        encoding = self._encodings.get(len(patches))
        if encoding is None:
            encoding = self._encodings[len(patches)] = self._capture(self._graphs, patches)
        encoding.patches.copy_(patches)
        self._graphs.launch(encoding.graph)
        return encoding.rows.clone()

    def close(self) -> None:
        """Drop what was captured."""
        self._encodings.clear()
        if self._graphs is not None:
            self._graphs.clear()

    def _capture(self, graphs: CapturedGraphs, like: torch.Tensor) -> _Encoding:
        config, model = self._model.config, self._model
        patches = torch.zeros_like(like)
        rows = like.new_empty(len(like), config.image_tokens, config.text.hidden_size)

        def encode() -> None:
            model.encode_images(patches, rows)

        graph = graphs.capture(encode)
        return _Encoding(patches, rows, graph)
