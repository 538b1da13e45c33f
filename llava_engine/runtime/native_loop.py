"""`NativeLoop`: the DecodeLoop of csrc/decode_loop.cpp, whose thread launches captured steps ahead.

The thread needs no GIL, so no Python thread can hold up the device. Knows rows and raw CUDA handles
only. Every call into the library gives up the GIL.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable

import torch

from llava_engine.kernels.library import c_library
from llava_engine.runtime.decode_loop import DeviceFailed, TokenEvent

AHEAD = 2
"""Steps in flight: one that runs and one that is ready behind it, so that the device never waits
for the host unless the loop's thread comes more than a whole step late (4 ms for 7B in 16 bits).
Each one more tolerates another step's lateness, and costs every stop, so every new request's first
token, another step's time; and a step that computes nothing whenever a run ends by EOS."""

_EVENT = struct.Struct("=qqiiii")  # llava_decode_event
_EVENTS = 256  # taken by one call; more wait for the next

# The states and the cudaError_t values that csrc/decode_loop.cpp tells apart.
_RUNNING, _ENDED, _DEVICE_FAILED, _ENTRY_MISSING = range(4)
_INVALID_VALUE = 1
_ILLEGAL_STATE = 401

_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_out_int = ctypes.POINTER(_int)
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "create": (_pointer, [_int, _pointer, _pointer, _int, _int, _out_int]),
    "run": (_int, [_pointer, _pointer, ctypes.c_char_p, _int, _int64, _int64, _int, _int]),
    "wait": (_int, [_pointer, _pointer, _int, _int64, _out_int, _out_int]),
    "wake": (None, [_pointer]),
    "stop": (None, [_pointer]),
    "launched": (_int64, [_pointer]),
    "close": (None, [_pointer]),
    "destroy": (None, [_pointer]),
}


class NativeLoop:
    """Decodes the rows of a DecodeState by replaying its step graphs; see DecodeLoop.

    stream: raw cudaStream_t of `device`, which nobody else uses during a run. ring: DecodeState's,
        int32 [ring_steps, max_batch, 4], pinned.
    step_graph: gives the raw cudaGraphExec_t that steps (at least) the first n rows; it must live
        until the run has ended.
    ahead: steps in flight at most. library: has the C functions; None: the compiled library.

    Raises KernelsNotBuilt, and DeviceFailed if the device refuses. `close` ends its thread.
    """

    def __init__(
        self,
        device: torch.device,
        stream: int,
        ring: torch.Tensor,
        step_graph: Callable[[int], int],
        *,
        ahead: int = AHEAD,
        library: ctypes.CDLL | None = None,
    ) -> None:
        if ring.dtype != torch.int32 or ring.dim() != 3 or ring.size(2) != 4:
            raise ValueError("ring must be int32 [ring_steps, max_batch, 4]")
        if not ring.is_contiguous() or ring.is_cuda:
            raise ValueError("ring must be dense host memory")
        if ahead < 1:
            raise ValueError("ahead must be at least 1")
        self._library = library = c_library() if library is None else library
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"llava_decode_loop_{name}")
            function.restype, function.argtypes = result, arguments
        library.llava_engine_error_text.restype = ctypes.c_char_p
        self._ring = ring  # must outlive the native loop
        self._step_graph = step_graph
        self._ahead = ahead
        self._prepared: tuple[int, int] | None = None  # rows, graph
        self._events = ctypes.create_string_buffer(_EVENTS * _EVENT.size)
        error = _int()
        self._handle: int | None = library.llava_decode_loop_create(
            device.index or 0, stream, ring.data_ptr(), len(ring), ring.size(1), error
        )
        if self._handle is None:
            raise self._failure("the decode loop cannot start", error.value)
        # Freed with this object and not by `close`, after which `stop` may still be called. Not at
        # the interpreter's exit: a daemon thread may be waiting in it then.
        weakref.finalize(self, library.llava_decode_loop_destroy, self._handle).atexit = False

    def prepare(self, rows: int) -> None:
        self._prepared = None
        self._prepared = rows, self._step_graph(rows)

    def run(self, rows: int, first_step: int, max_steps: int, stop_at: int) -> None:
        if self._prepared is None or self._prepared[0] != rows:
            raise ValueError(f"{rows} rows were not prepared")
        error = self._library.llava_decode_loop_run(
            self._handle,
            self._prepared[1],
            b"\1" * rows,
            rows,
            first_step,
            max_steps,
            self._ahead,
            stop_at,
        )
        if error == _ILLEGAL_STATE:
            raise ValueError("a run is on, or the loop is closed")
        if error == _INVALID_VALUE:
            raise ValueError("rows, steps or the graph are not ones that the loop can run")
        if error != 0:
            raise self._failure("a run cannot start", error)

    def wait(self, timeout: float | None) -> tuple[list[TokenEvent], bool]:
        # More than the C side takes as a number is as good as forever.
        limit = -1 if timeout is None else int(min(max(timeout, 0.0), 1e9) * 1e9)
        state, error = _int(), _int()
        count = self._library.llava_decode_loop_wait(
            self._handle, self._events, _EVENTS, limit, state, error
        )
        if state.value == _ENTRY_MISSING:
            raise DeviceFailed("the device has finished its steps, but a token never arrived")
        if state.value not in (_RUNNING, _ENDED):
            raise self._failure("the device failed while it was decoding", error.value)
        taken = memoryview(self._events)[: count * _EVENT.size]
        events = [
            TokenEvent(step, row, token, bool(flags & 1), time_ns)
            for step, time_ns, row, token, flags, _ in _EVENT.iter_unpack(taken)
        ]
        return events, state.value == _ENDED

    def stop(self) -> None:
        self._library.llava_decode_loop_stop(self._handle)

    def wake(self) -> None:
        self._library.llava_decode_loop_wake(self._handle)

    def close(self) -> None:
        self._library.llava_decode_loop_close(self._handle)

    @property
    def launched(self) -> int:
        """Steps launched in the current or last run."""
        return int(self._library.llava_decode_loop_launched(self._handle))

    def _failure(self, what: str, error: int) -> DeviceFailed:
        text = self._library.llava_engine_error_text(error).decode()
        return DeviceFailed(f"{what}: {text} (CUDA error {error})")
