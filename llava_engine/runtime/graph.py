"""Work of one CUDA stream, captured once and launched again without its launch costs.

Knows nothing of the work but that it takes static tensors and no host synchronisation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from llava_engine.kernels.library import c_library, programmatic_launch


class CapturedGraphs:
    """Graphs of `stream` that share their memory: one runs at a time, and what it leaves there is
    gone with the next.

    overlap: let kernels start before their predecessors end. One thread owns it.
    """

    def __init__(self, stream: torch.cuda.Stream, *, overlap: bool = False) -> None:
        self._stream = stream
        self._overlap = overlap
        self._library = c_library()
        self._library.llava_engine_error_text.restype = ctypes.c_char_p
        self._graphs: list[int] = []
        self._memory: torch.cuda.MemPool | None = None

    def capture(self, work: Callable[[], None]) -> int:
        """The raw cudaGraphExec_t of `work`, which is called twice. It lives until `clear`.

        The first call runs, so that what is allocated or chosen at first use is there. Raises
        RuntimeError.
        """
        stream = ctypes.c_void_p(self._stream.cuda_stream)
        graph = ctypes.c_void_p()
        with torch.cuda.stream(self._stream), programmatic_launch(self._overlap):
            if self._memory is None:
                self._memory = torch.cuda.MemPool()  # of the stream's device
                # Its destructor calls the device, and ends the process if that is lost: so it
                # lives until `clear` has seen that the device answers.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._memory))
            work()
            self._stream.synchronize()
            with torch.cuda.use_mem_pool(self._memory, self._stream.device):
                self._check(self._library.llava_engine_capture_begin(stream))
                try:
                    work()
                finally:
                    # The stream must leave capture mode, whatever happened.
                    error = self._library.llava_engine_capture_end(stream, ctypes.byref(graph))
                    if graph.value is not None:
                        self._graphs.append(graph.value)
        self._check(error)
        assert graph.value is not None
        return graph.value

    def launch(self, graph: int) -> None:
        """Run a captured graph on the stream. Raises RuntimeError."""
        stream = ctypes.c_void_p(self._stream.cuda_stream)
        self._check(self._library.llava_engine_graph_launch(ctypes.c_void_p(graph), stream))

    def clear(self) -> None:
        """Drop every graph, when what is in flight is done. Raises what a lost device raises."""
        if self._memory is None:
            return
        memory, self._memory = self._memory, None
        try:
            self._stream.synchronize()
        finally:
            while self._graphs:
                self._library.llava_engine_graph_destroy(ctypes.c_void_p(self._graphs.pop()))
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(memory))

    def _check(self, error: int) -> None:
        if error != 0:
            text = self._library.llava_engine_error_text(error).decode()
            raise RuntimeError(f"a captured graph cannot be had: {text} (CUDA error {error})")
