"""The native decode loop of csrc/decode_loop.cpp, compiled for a device that a test drives.

The device is tests/native/fake_device.cpp: it completes a step when the test allows it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

import pytest
import torch

from llava_engine.runtime.native_loop import NativeLoop

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "csrc" / "decode_loop.cpp", ROOT / "tests" / "native" / "fake_device.cpp"]
PATIENCE = 120.0
"""Seconds after which what did not happen is a failure. Nothing is expected to take long."""

GRAPH = 0x1000
"""The handle of the graph that steps a FakeDevice; every other one it refuses."""

Tokens = list[list[int]]


def compile_native(made: Path, sources: list[Path], *flags: str) -> Path:
    """Compile C++ sources against the fake CUDA; skips only where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler on the PATH")
    fake = ROOT / "tests" / "native" / "fake_cuda"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [compiler, "-std=c++20", "-g", "-pthread", *warnings, f"-I{fake}", *flags]
    subprocess.run([*command, *map(str, sources), "-o", str(made)], check=True)
    return made


class Launcher(ctypes.Structure):
    """What the thread that launches is like."""

    _fields_ = (
        ("name", ctypes.c_char * 16),
        ("blocked_signals", ctypes.c_uint64),
        ("device", ctypes.c_int32),
        ("capture_mode", ctypes.c_int32),
        ("timer_slack", ctypes.c_int64),
    )


class FakeDevice:
    """A device with `rows` rows, all steps of which wait to be allowed, and loops upon it."""

    def __init__(self, path: Path, *, rows: int = 4, ring_steps: int = 16) -> None:
        self.library = ctypes.CDLL(str(path))
        self._path = path
        self.ring = torch.zeros((ring_steps, rows, 4), dtype=torch.int32)
        self.library.fake_new.restype = ctypes.c_void_p
        for name in ("launched", "completed", "most_in_flight"):
            getattr(self.library, f"fake_{name}").restype = ctypes.c_int64
        handle = self.library.fake_new(ctypes.c_void_p(self.ring.data_ptr()), ring_steps, rows)
        self.stream = ctypes.c_void_p(handle)
        self._loops: list[NativeLoop] = []

    def __enter__(self) -> FakeDevice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.break_after(-1, 999)  # or what a test leaves would never come to an end
        for loop in self._loops:
            loop.close()
        self.library.fake_free(self.stream)

    def loop(self, *, ahead: int = 2, index: int = 0) -> NativeLoop:
        assert self.stream.value is not None
        loop = NativeLoop(
            torch.device("cuda", index),
            self.stream.value,
            self.ring,
            lambda rows: GRAPH,
            ahead=ahead,
            library=self.library,
        )
        self._loops.append(loop)
        return loop

    def fill(self, tokens: Tokens, lengths: list[int], first_step: int) -> None:
        """tokens[step][row]; a row finishes with the last of its length."""
        flat = [token for step in tokens for token in step]
        self.library.fake_fill(
            self.stream,
            ctypes.c_void_p(GRAPH),
            (ctypes.c_int32 * len(lengths))(*lengths),
            len(lengths),
            (ctypes.c_int32 * len(flat))(*flat),
            len(tokens),
            ctypes.c_int64(first_step),
        )

    def allow(self, steps: int) -> None:
        self.library.fake_allow(self.stream, ctypes.c_int64(steps))

    def complete_at_query(self) -> None:
        """Let all steps complete once the device is asked; those in flight do before it answers."""
        self.library.fake_complete_at_query(self.stream)

    def refuse_launch(self, after: int, error: int) -> None:
        self.library.fake_refuse(self.stream, ctypes.c_int64(after), error)

    def break_after(self, completed: int, error: int) -> None:
        """Fail for good after so many steps; -1: now."""
        self.library.fake_break(self.stream, ctypes.c_int64(completed), error)

    def drop(self, step: int, row: int) -> None:
        self.library.fake_drop(self.stream, ctypes.c_int64(step), ctypes.c_int64(row))

    def wait_for(self, what: str, count: int, *, holding_the_gil: bool = False) -> None:
        """Until `count` steps are "launched" or "completed", or `count` more "queries" made."""
        library = ctypes.PyDLL(str(self._path)) if holding_the_gil else self.library
        wait = getattr(library, f"fake_wait_{what}")
        came = wait(self.stream, ctypes.c_int64(count), ctypes.c_double(PATIENCE))
        assert came, f"it never came to {count} {what}"

    @property
    def launched(self) -> int:
        return int(self.library.fake_launched(self.stream))

    @property
    def completed(self) -> int:
        return int(self.library.fake_completed(self.stream))

    @property
    def most_in_flight(self) -> int:
        return int(self.library.fake_most_in_flight(self.stream))

    @property
    def threads(self) -> int:
        """Threads of loops that have not ended, upon any device."""
        return int(self.library.fake_threads())

    @property
    def launcher(self) -> Launcher:
        launcher = Launcher()
        self.library.fake_launcher(self.stream, ctypes.byref(launcher))
        return launcher
