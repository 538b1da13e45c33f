"""Plain JPEGs decoded on the GPU by nvImageCodec, for EngineConfig(image_decode="gpu").

Takes what `header.read_header` let through, so every limit was kept before. What is not plain, or
what the GPU's decoder refuses, is None here and Pillow's to decode and to judge. Knows nothing of
orientation, of keys or of what the pixels are for.

The pixels are nearly Pillow's: of 1920x1080 files on an H100 (nvJPEG 13.3, chroma interpolated as
in libjpeg-turbo) 4:4:4 was the same, baseline 4:2:0 differed by 1 level at most and 0.0001 in the
mean, progressive 4:2:0 by 3 and 0.02. Other GPUs and versions may differ more.

nvJPEG runs in this process and on the engine's GPU: where a stranger's file sets off a fault of its
own, the engine goes down with it.
"""

from __future__ import annotations

import importlib
import io
import logging
import re
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from llava_engine.errors import KernelsNotBuilt, UnsupportedModel
from llava_engine.image.header import Header
from llava_engine.image.load import Pixels

logger = logging.getLogger(__name__)

Lane = Callable[[bytes], Pixels | None]
"""Decodes one JPEG at a time, by one thread at a time, to uint8 [height, width, 3] as it is stored
in the file; None if it cannot. Of an exception only a new lane recovers."""

# Larger ones would take hundreds of MiB of the device's memory, which the pool did not plan for.
_MAX_PIXELS = 16 << 20
_KEPT_BYTES = 32 << 20  # of a lane's output that is kept for the next picture
_MAX_SEGMENTS = 512  # 64 scans with their tables; others are not plain

_BASELINE, _PROGRESSIVE = 0xC0, 0xC2
_TABLES = (0xC4, 0xDB, 0xE0, 0xEE)  # Huffman, quantisation; JFIF and Adobe
_SCAN = 0xDA
_END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # what ends a scan's data
_LUMA_SAMPLING = (0x11, 0x12, 0x21, 0x22)  # 4:4:4, 4:4:0, 4:2:2, 4:2:0 beside chroma's 1 x 1


class GpuJpegDecoder:
    """Decodes plain JPEGs, for any number of threads: each takes a lane that no other has.

    There are as many lanes as threads that ever decoded at once; `open_lane` makes them. Each holds
    device memory that the pool does not count: 40 MiB after a 1920x1080 picture, some 200 after
    one of 12 Mpixel.
    """

    def __init__(self, open_lane: Callable[[], Lane]) -> None:
        self._open_lane = open_lane
        self._lock = threading.Lock()  # guards the two below
        self._idle: list[Lane] = []
        self._closed = False

    def __call__(self, header: Header) -> Pixels | None:
        """The picture as stored, uint8 [height, width, 3], or None if Pillow is to decode it."""
        jpeg = plain_jpeg(header)
        if jpeg is None:
            return None
        try:
            with self._lock:
                lane = self._idle.pop() if self._idle else None
            if lane is None:
                lane = self._open_lane()
            pixels = lane(jpeg)
        except Exception:
            # Too little memory, or a lost device, which the runtime will notice for itself.
            logger.warning("A JPEG is decoded on the CPU: the GPU's decoder failed", exc_info=True)
            return None
        with self._lock:
            if not self._closed:
                self._idle.append(lane)
        if pixels is None or pixels.shape != (header.height, header.width, 3):
            return None
        return pixels

    def close(self) -> None:
        """Let go of all lanes, now and from now on."""
        with self._lock:
            self._closed = True
            self._idle.clear()


def jpeg_decoder(name: str, device: torch.device) -> GpuJpegDecoder | None:
    """What EngineConfig(image_decode=name) means for a model on `device`; None is Pillow for all.

    Raises UnsupportedModel on a device other than CUDA, and KernelsNotBuilt where nvImageCodec is
    not installed or cannot decode.
    """
    if name != "gpu":
        return None
    if device.type != "cuda":
        raise UnsupportedModel(
            f'EngineConfig(image_decode="gpu") needs CUDA, and the model is on {device}'
        )
    try:
        codec = importlib.import_module("nvidia.nvimgcodec")
    except ImportError as error:
        raise KernelsNotBuilt(
            'EngineConfig(image_decode="gpu") needs nvImageCodec, which is not installed; install '
            'it (pip install "llava-engine[gpu-decode]"), or leave image_decode at "cpu"'
        ) from error
    decoder = GpuJpegDecoder(lambda: _CudaLane(codec, device))
    # nvImageCodec loads without nvJPEG or with one that the driver is too old for, and would then
    # refuse every picture: found out here, not in silence later.
    if decoder(_probe()) is None:
        raise KernelsNotBuilt(
            f"nvImageCodec is installed, but cannot decode a JPEG on {device}; it needs nvJPEG "
            '(pip install "llava-engine[gpu-decode]") and a driver that is recent enough for it'
        )
    return decoder


def plain_jpeg(header: Header) -> bytes | None:
    """The file up to its end marker, if a GPU decodes it as libjpeg-turbo does, else None.

    Plain are baseline and progressive Huffman files of 8 bits, grey or YCbCr with 4:4:4, 4:4:0,
    4:2:2 or 4:2:0 chroma, of at most 16 Mpixel and whole: a file without an end marker is cut
    short, and what that means is not the GPU's to decide. Files with restart intervals are not:
    the run that sent nvJPEG a large one stopped there.
    """
    if header.format != "JPEG" or header.width * header.height > _MAX_PIXELS:
        return None
    data = header.data
    framed = False
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if data[at : at + 2] == _END:
            return data[: at + 2] if framed else None
        if at + 4 > len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            return None
        at += 2 + length
        if marker in (_BASELINE, _PROGRESSIVE):
            if framed or not _plain_frame(body, header):
                return None
            framed = True
        elif marker == 0xEE and body[:5] == b"Adobe" and (len(body) < 12 or body[11] != 1):
            return None  # RGB or CMYK
        elif marker == _SCAN:
            found = _MARKER.search(data, at)
            if not framed or found is None:
                return None
            at = found.start()
        elif marker not in _TABLES:
            return None
    return None


def _plain_frame(body: bytes, header: Header) -> bool:
    """Whether a frame header (ISO 10918-1 B.2.2) is what `plain_jpeg` says."""
    if len(body) < 6:
        return False
    bits, height, width, components = struct.unpack_from(">BHHB", body)
    if bits != 8 or (width, height) != (header.width, header.height):
        return False
    if len(body) != 6 + 3 * components:
        return False
    names, sampling = body[6::3], body[7::3]
    if components == 1:
        return sampling[0] == 0x11
    # libjpeg takes other names for YCbCr, too, but not all of them.
    return names == b"\1\2\3" and sampling[0] in _LUMA_SAMPLING and sampling[1:] == b"\x11\x11"


def _probe() -> Header:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(file, "JPEG")
    return Header("JPEG", 64, 64, 1, 1, file.getvalue())


class _CudaLane:
    """A decoder of nvImageCodec with a stream of its own and the output of its last picture."""

    def __init__(self, codec: Any, device: torch.device) -> None:
        self._codec = codec
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        kinds = codec.BackendKind
        self._decoder = codec.Decoder(
            device_id=self._stream.device.index,
            max_num_cpu_threads=1,
            # Without its own CPU decoders: pictures that the GPU does not take are Pillow's.
            backends=[codec.Backend(kinds.HW_GPU_ONLY), codec.Backend(kinds.HYBRID_CPU_GPU)],
            options=":fancy_upsampling=1",  # as libjpeg-turbo does it
        )
        self._params = codec.DecodeParams(
            apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB
        )
        self._image: Any = None

    def __call__(self, jpeg: bytes) -> Pixels | None:
        try:
            source = self._codec.CodeStream(jpeg)
        except Exception:  # it cannot be parsed; the lane is none the worse
            return None
        image = self._decoder.decode(
            source,
            image=self._image,
            params=self._params,
            cuda_stream=self._stream.cuda_stream,
        )
        self._image = None
        if image is None:
            return None
        with torch.cuda.stream(self._stream):
            pixels = torch.as_tensor(image, device=self._stream.device)
            # Not pinned: who decodes may keep the pixels and count their bytes, and torch rounds up
            # what it pins and does not give it back. Not image.cpu() either: that pins anew each
            # time, and unpinning waits for all the device's work.
            host = torch.empty(pixels.shape, dtype=torch.uint8)
            host.copy_(pixels)
        if image.capacity <= _KEPT_BYTES:
            self._image = image
        decoded: Pixels = host.numpy()
        return decoded
