"""What is not read to its place: weights that are quantised, or dequantised, on their way there.

Each is read into one of two rooms on the device and put to use while the next is read into the
other, so that a model takes little more memory while it is loaded than afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from llava_engine.network.layers import Linear
from llava_engine.network.safetensors_file import StoredTensor
from llava_engine.network.saved_weights import SavedWeight
from llava_engine.network.tensor_reader import Place
from llava_engine.quant import QuantisedWeight, quantised, stacked


class Staged(Protocol):
    """Something to read into a room, uint8 [nbytes or more], and to make use of."""

    @property
    def nbytes(self) -> int: ...

    def places(self, room: torch.Tensor) -> list[Place]: ...

    def use(self, room: torch.Tensor) -> None: ...


class Quantised:
    """The 16-bit matrices of a product, which are quantised."""

    def __init__(self, product: Linear, parts: list[StoredTensor], dtype: torch.dtype) -> None:
        self._product = product
        self._parts = parts
        self._dtype = dtype
        self.nbytes = product.outputs * product.inputs * dtype.itemsize

    def places(self, room: torch.Tensor) -> list[Place]:
        return list(zip(self._parts, self._matrices(room), strict=True))

    def use(self, room: torch.Tensor) -> None:
        format = self._product.format
        assert format is not None
        self._product.load(quantised(format, self._matrices(room)))

    def _matrices(self, room: torch.Tensor) -> list[torch.Tensor]:
        whole = room[: self.nbytes].view(self._dtype).view(-1, self._product.inputs)
        return list(torch.split(whole, [part.shape[0] for part in self._parts]))


class AsSaved:
    """The matrices of a product that were saved quantised."""

    def __init__(self, product: Linear, parts: list[SavedWeight]) -> None:
        self._product = product
        self._parts = parts
        self.nbytes = sum(part.nbytes for part in parts)

    def places(self, room: torch.Tensor) -> list[Place]:
        return [
            place
            for part, mine in zip(self._parts, self._rooms(room), strict=True)
            for place in part.places(mine)
        ]

    def use(self, room: torch.Tensor) -> None:
        rooms = self._rooms(room)
        weights: list[QuantisedWeight] = [
            part.weight(mine) for part, mine in zip(self._parts, rooms, strict=True)
        ]
        self._product.load(stacked(weights))  # no longer in the room

    def _rooms(self, room: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split(room[: self.nbytes], [part.nbytes for part in self._parts])


class Dequantised:
    """A matrix that was saved quantised and has its place in the model's own type."""

    def __init__(self, view: torch.Tensor, saved: SavedWeight) -> None:
        self._view = view
        self._saved = saved
        self.nbytes = saved.nbytes

    def places(self, room: torch.Tensor) -> list[Place]:
        return self._saved.places(room)

    def use(self, room: torch.Tensor) -> None:
        self._view.copy_(self._saved.dequantize(room, self._view.dtype))


class Room:
    """The two rooms of a list of things, which take turns."""

    def __init__(self, staged: Sequence[Staged], device: torch.device) -> None:
        self._staged = staged
        size = max((each.nbytes for each in staged), default=0)
        self._rooms = torch.empty(min(2, len(staged)), size, dtype=torch.uint8, device=device)

    def places(self, index: int) -> list[Place]:
        return self._staged[index].places(self._rooms[index % 2])

    def use(self, index: int) -> None:
        self._staged[index].use(self._rooms[index % 2])
