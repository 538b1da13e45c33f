"""The copies of csrc/host_copy.cpp, compiled for a device that puts them off as long as it may.

The device is tests/native/fake_copies.cpp: it copies when somebody waits for it, and not before.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import TracebackType

import torch
from support.fake_device import ROOT

from llava_engine.runtime.host_copy import HostCopies

SOURCES = [ROOT / "csrc" / "host_copy.cpp", ROOT / "tests" / "native" / "fake_copies.cpp"]
FLAGS = ("-O1", "-Wl,--wrap=memcpy,--wrap=pthread_setname_np")
"""To compile them with."""
DEVICE = 3
"""The only device there is."""


class Helpers(IntEnum):
    """What befalls the threads of copiers."""

    PROMPT = 0
    HELD = 1
    """Before they are ready, until it is another of these."""
    SLOW = 2
    """Every row of an array takes them 0.3 ms."""


def helper_threads() -> int:
    """Threads of copiers in this process that have not ended."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            count += (task / "comm").read_text().startswith("llava-copy:")
    return count


class FakeCopies:
    """A stream, `copies` upon it by so many threads, and as many pieces of memory as it is told."""

    def __init__(
        self,
        path: Path,
        *,
        pieces: int,
        piece_bytes: int,
        threads: int | None = 1,
        helpers: Helpers = Helpers.PROMPT,
    ) -> None:
        self._library = library = ctypes.CDLL(str(path))
        library.fake_stream_new.restype = library.fake_event_new.restype = ctypes.c_void_p
        library.fake_queued.restype = library.fake_done.restype = ctypes.c_int64
        self.stream: int = library.fake_stream_new()
        self._events = [library.fake_event_new() for _ in range(pieces)]
        self._pinned = torch.zeros(pieces, piece_bytes, dtype=torch.uint8)
        self.set_helpers(helpers)
        self.copies = self.copies_to(DEVICE, threads)

    def copies_to(self, device: int, threads: int | None) -> HostCopies:
        return HostCopies(self._library, device, self._pinned, self._events, threads)

    def set_helpers(self, helpers: Helpers) -> None:
        self._library.fake_helpers(int(helpers))

    def __enter__(self) -> FakeCopies:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.set_helpers(Helpers.PROMPT)  # or those that are held never end
        self.copies.close()
        for event in self._events:
            self._library.fake_event_free(ctypes.c_void_p(event))
        self._library.fake_stream_free(ctypes.c_void_p(self.stream))

    def refuse(self, after: int) -> None:
        """All copies after so many; -1: none any more."""
        self._library.fake_refuse(ctypes.c_void_p(self.stream), ctypes.c_int64(after))

    def finish(self) -> None:
        self._library.fake_finish(ctypes.c_void_p(self.stream))

    @property
    def queued(self) -> int:
        return int(self._library.fake_queued(ctypes.c_void_p(self.stream)))

    @property
    def done(self) -> int:
        return int(self._library.fake_done(ctypes.c_void_p(self.stream)))
