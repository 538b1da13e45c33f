"""Encoded pictures, kept so that none is encoded twice while anybody may need it again.

Knows keys and tensors only; the owner is the runtime's loop thread.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict

import torch


class FeatureCache:
    """The most recently used features up to `max_bytes`, and whatever a sequence still holds.

    Features are [image_tokens, hidden] tensors; a key stands for content and preprocessing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._recent: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        # Features that fell out of `_recent` live on here as long as a sequence holds them.
        self._alive: weakref.WeakValueDictionary[bytes, torch.Tensor] = (
            weakref.WeakValueDictionary()
        )

    def get(self, key: bytes) -> torch.Tensor | None:
        """The features under `key`, or None if they must be encoded."""
        if key in self._recent:
            self._recent.move_to_end(key)
        return self._alive.get(key)

    def put(self, key: bytes, features: torch.Tensor) -> None:
        """Keep `features`, at the expense of the least recently used."""
        self._alive[key] = features
        if features.nbytes > self._max_bytes:
            return
        replaced = self._recent.pop(key, None)
        self._bytes += features.nbytes - (replaced.nbytes if replaced is not None else 0)
        self._recent[key] = features
        while self._bytes > self._max_bytes:
            _, dropped = self._recent.popitem(last=False)
            self._bytes -= dropped.nbytes

    def clear(self) -> None:
        """Drop all that the cache itself keeps."""
        self._recent.clear()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the cache itself keeps."""
        return self._bytes
