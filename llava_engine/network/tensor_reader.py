"""Tensors of safetensors files to their places on a device, as fast as the files can be read.

Threads read pieces of the files by position: on the CPU straight into the tensors, elsewhere into
pinned buffers, two a thread, whose copies to the device run beside the reading. Types are converted
where the tensor lies.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias

import torch

from llava_engine.network.safetensors_file import SafetensorsFile, StoredTensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The types of weights that are read, by their names in the files."""

_TYPES = {**DTYPES, "U8": torch.uint8, "I8": torch.int8}
"""And those of quantised weights, which nothing converts."""

READERS = 8
PIECE_BYTES = 16 << 20
"""The most that one read takes, and the size of a buffer: 256 MB are pinned in all."""


Place: TypeAlias = tuple[StoredTensor, torch.Tensor]
"""A stored tensor and the one to fill, which has its shape, or is dense and of as many numbers."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a file, from `offset` on, and the part of a tensor that they fill.

    step: of read_in_turn.
    """

    step: int
    file: SafetensorsFile
    offset: int
    nbytes: int
    dtype: torch.dtype
    part: torch.Tensor

    @property
    def as_stored(self) -> bool:
        """Whether the part holds the very bytes of the file."""
        return self.part.dtype == self.dtype and self.part.is_contiguous()


def read_tensors(
    places: Iterable[Place], device: torch.device, on_read: Callable[[int], None]
) -> None:
    """Fill each tensor, on `device`, from the stored one; types of DTYPES, and bytes as bytes.

    on_read: called in this thread with the number of bytes just read. Raises WeightsError where a
    file ends early or cannot be read, and what torch raises where memory is short; then some
    tensors are filled and others not. No thread and no buffer is left either way, and every copy
    has been made.
    """
    read_in_turn([list(places)], device, on_read, lambda step: None)


def read_in_turn(
    steps: Sequence[Sequence[Place]],
    device: torch.device,
    on_read: Callable[[int], None],
    on_step: Callable[[int], None],
) -> None:
    """read_tensors, step after step, while what was read is put to use.

    on_step: called in this thread with the number of a step whose places are filled, as work on the
    device's current stream will see. The next step is read meanwhile, and the one behind that only
    when on_step has returned: its places may be the same memory. Raises what on_step raises, too.
    """
    pieces = [list(_pieces(index, places)) for index, places in enumerate(steps)]
    every = [piece for step in pieces for piece in step]
    reader: Callable[[], _Reader]
    buffer_bytes = max((piece.nbytes for piece in every), default=0)
    converts = not all(piece.as_stored for piece in every)
    most_readers = len(every)
    del every
    uploads = None
    if device.type == "cuda":
        uploads = stream = _stream_after_current(device)
        reader, count = (lambda: _PinnedReader(buffer_bytes, stream)), READERS
    else:
        # torch converts with all cores already.
        reader, count = (lambda: _HostReader(buffer_bytes)), 1 if converts else READERS

    def use(step: int) -> None:
        if uploads is None:
            on_step(step)
            return
        current = torch.cuda.current_stream(device)
        current.wait_stream(uploads)
        on_step(step)
        uploads.wait_stream(current)

    try:
        _run(pieces, reader, min(count, most_readers), on_read, use)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # those of the readers hold buffers
        raise
    finally:
        if uploads is not None:
            uploads.synchronize()
            # What torch's allocators keep for another time: the buffers, and where it converted.
            torch._C._host_emptyCache()
            if converts:
                torch.cuda.empty_cache()


def _pieces(step: int, places: Iterable[Place]) -> Iterator[_Piece]:
    """The reads to do, in the order of the files' bytes."""
    for stored, tensor in sorted(places, key=lambda place: (place[0].file.name, place[0].offset)):
        if stored.nbytes == 0:
            continue
        rows = tensor.view(-1) if tensor.is_contiguous() else tensor
        row_bytes = stored.nbytes // len(rows)
        most = max(1, PIECE_BYTES // row_bytes)
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            offset = stored.offset + start * row_bytes
            nbytes = len(part) * row_bytes
            yield _Piece(step, stored.file, offset, nbytes, _TYPES[stored.dtype], part)


def _run(
    steps: list[list[_Piece]],
    reader: Callable[[], _Reader],
    count: int,
    on_read: Callable[[int], None],
    on_step: Callable[[int], None],
) -> None:
    """Read all pieces with `count` threads; the first thing that goes wrong stops them all."""
    pieces: SimpleQueue[_Piece | None] = SimpleQueue()
    read: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
    unread = [len(step) for step in steps]
    futures: list[Future[None]] = []

    def hand_out(step: int) -> None:
        for piece in steps[step] if step < len(steps) else ():
            pieces.put(piece)

    def filled(step: int) -> bool:
        """Wait for the step; false if a thread gave up."""
        while unread[step]:
            done = read.get()
            if done is None:
                return False
            of_step, nbytes = done
            unread[of_step] -= 1
            on_read(nbytes)
        return True

    with ThreadPoolExecutor(max(1, count), thread_name_prefix="llava-load") as threads:
        try:
            hand_out(0)
            hand_out(1)
            for _ in range(count):
                futures.append(threads.submit(_read_pieces, pieces, reader, read))
            for step in range(len(steps)):
                if not filled(step):
                    break
                on_step(step)
                hand_out(step + 2)
        finally:
            steps.clear()
            with suppress(Empty):
                while True:
                    pieces.get_nowait()
            for _ in range(count):
                pieces.put(None)
    while futures:
        futures.pop().result()  # popped, so that no error's traceback leads back to the error


def _read_pieces(
    pieces: SimpleQueue[_Piece | None],
    make_reader: Callable[[], _Reader],
    read: SimpleQueue[tuple[int, int] | None],
) -> None:
    """A thread: take pieces up to a None; puts each one's step and bytes in `read`, and None if it
    cannot go on."""
    reader = piece = None
    try:
        reader = make_reader()
        with torch.inference_mode():  # the tensors may have been made in it
            while (piece := pieces.get()) is not None:
                reader.read(piece)
                read.put((piece.step, piece.nbytes))
    except BaseException as error:
        # Who keeps the error keeps its frames, and with them buffers and the tensor: those of what
        # was called, and this one.
        traceback.clear_frames(error.__traceback__)
        reader = piece = None
        read.put(None)
        raise


class _Reader(Protocol):
    """What a thread reads pieces with."""

    def read(self, piece: _Piece) -> None: ...


class _HostReader:
    """Reads into tensors of the CPU; what must be converted goes through a buffer."""

    def __init__(self, buffer_bytes: int) -> None:
        self._buffer = torch.empty(buffer_bytes, dtype=torch.uint8)  # costs nothing until written

    def read(self, piece: _Piece) -> None:
        if piece.as_stored:
            _read_bytes(piece, piece.part.view(-1).view(torch.uint8))
        else:
            raw = self._buffer[: piece.nbytes]
            _read_bytes(piece, raw)
            piece.part.copy_(raw.view(piece.dtype).view(piece.part.shape))


class _PinnedReader:
    """Reads into one pinned buffer while the other is copied to the GPU on `stream`."""

    def __init__(self, buffer_bytes: int, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._buffers = deque(_pinned(buffer_bytes) for _ in range(2))

    def read(self, piece: _Piece) -> None:
        buffer, copied = self._buffers[0]
        self._buffers.rotate()
        copied.synchronize()
        raw = buffer[: piece.nbytes]
        _read_bytes(piece, raw)
        part = piece.part
        with torch.cuda.stream(self._stream):
            source = raw.view(piece.dtype).view(part.shape)
            if not piece.as_stored:
                source = source.to(part.device, non_blocking=True)
            part.copy_(source, non_blocking=True)
            copied.record(self._stream)


def _pinned(nbytes: int) -> tuple[torch.Tensor, torch.cuda.Event]:
    """A buffer, and the event of its last copy, which is waited for without a busy core."""
    buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return buffer, torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _read_bytes(piece: _Piece, raw: torch.Tensor) -> None:
    piece.file.read(raw.numpy().data, piece.offset)


def _stream_after_current(device: torch.device) -> torch.cuda.Stream:
    """A stream to fill tensors on, behind what the current one may still do with their memory."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
