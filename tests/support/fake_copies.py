"""The copies of csrc/host_copy.cpp, compiled for a device that puts them off as long as it may.

The device is tests/native/fake_copies.cpp: it copies when somebody waits for it, and not before.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType

import torch
from support.fake_device import ROOT

from llava_engine.runtime.host_copy import HostCopies

SOURCES = [ROOT / "csrc" / "host_copy.cpp", ROOT / "tests" / "native" / "fake_copies.cpp"]
DEVICE = 3
"""The only device there is."""


class FakeCopies:
    """A stream, `copies` upon it, and as many pieces of memory as it is told."""

    def __init__(self, path: Path, *, pieces: int, piece_bytes: int) -> None:
        self._library = library = ctypes.CDLL(str(path))
        library.fake_stream_new.restype = library.fake_event_new.restype = ctypes.c_void_p
        library.fake_queued.restype = library.fake_done.restype = ctypes.c_int64
        self.stream: int = library.fake_stream_new()
        self._events = [library.fake_event_new() for _ in range(pieces)]
        self._pinned = torch.zeros(pieces, piece_bytes, dtype=torch.uint8)
        self.copies = self.copies_to(DEVICE)

    def copies_to(self, device: int) -> HostCopies:
        return HostCopies(self._library, device, self._pinned, self._events)

    def __enter__(self) -> FakeCopies:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for event in self._events:
            self._library.fake_event_free(ctypes.c_void_p(event))
        self._library.fake_stream_free(ctypes.c_void_p(self.stream))

    def refuse(self, after: int) -> None:
        """All copies after so many."""
        self._library.fake_refuse(ctypes.c_void_p(self.stream), ctypes.c_int64(after))

    def finish(self) -> None:
        self._library.fake_finish(ctypes.c_void_p(self.stream))

    @property
    def queued(self) -> int:
        return int(self._library.fake_queued(ctypes.c_void_p(self.stream)))

    @property
    def done(self) -> int:
        return int(self._library.fake_done(ctypes.c_void_p(self.stream)))
