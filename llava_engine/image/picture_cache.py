"""Pictures ready for a vision tower, kept so that the same file is decoded once.

A file's bytes are hashed before anything is decoded. Knows files and pixels; what is made of the
pixels, and what of that is kept, is the runtime's.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from llava_engine.image.load import DecodeJpeg, load_image, pixel_limit, read_image
from llava_engine.image.preprocess import ImageProcessorConfig, decoded_picture, picture_key
from llava_engine.kernels.preprocess import DecodedPicture

# Bytes of pictures, in whoever's hands, that are still to be resampled on a device. While there are
# more, further ones are resampled here, which gives the same and takes much less memory to keep.
_MOST_DECODED = 512 << 20


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPicture:
    """A picture as one image processor prepares it.

    key: of `preprocess.picture_key`. pixels: of `preprocess.decoded_picture`; requests share them.
    """

    key: bytes
    pixels: DecodedPicture


class PictureCache:
    """Prepares pictures with one image processor, and keeps those that came as files.

    max_bytes, max_pixels, decode_jpeg: as `load.load_image` takes them; the limits hold for kept
        pictures, too.
    capacity: bytes of pixels that are kept, those of the most recently used files.
    resample: as `preprocess.decoded_picture` takes it.

    Any number of threads may use it. Two that bring the same new file at once both decode it.
    """

    def __init__(
        self,
        processor: ImageProcessorConfig,
        *,
        max_bytes: int,
        max_pixels: int,
        capacity: int,
        resample: bool,
        decode_jpeg: DecodeJpeg | None = None,
    ) -> None:
        self._processor = processor
        self._resample = resample
        self._decode_jpeg = decode_jpeg
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._capacity = capacity
        self._decoded: WeakSet[DecodedPicture] = WeakSet()
        self._lock = threading.Lock()  # guards all of these, and lowering the capacity
        self._recent: OrderedDict[tuple[bytes, int], PreparedPicture] = OrderedDict()
        self._bytes = 0

    def prepare(self, source: Any) -> PreparedPicture:
        """Read and decode a picture that `load.check_image` accepts, or find it.

        Raises ImageTooLarge or ImageDecodeError; such a picture is judged anew each time.
        """
        encoded = read_image(source, max_bytes=self._max_bytes)
        if encoded is None:
            return self._prepare(source)
        # A picture that passed under another limit of Pillow's has not passed under this one.
        file = encoded.content, pixel_limit(self._max_pixels)
        known = self._find(file)
        if known is None:
            known = self._prepare(encoded)
            self._keep(file, known)
        return known

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels kept now, never above the capacity."""
        with self._lock:
            return self._bytes

    def close(self) -> None:
        """Keep nothing, now and from now on."""
        with self._lock:
            self._capacity = self._bytes = 0
            self._recent.clear()

    def _prepare(self, source: Any) -> PreparedPicture:
        image = load_image(
            source,
            max_bytes=self._max_bytes,
            max_pixels=self._max_pixels,
            decode_jpeg=self._decode_jpeg,
        )
        with self._lock:
            held = sum(picture.nbytes for picture in self._decoded)
        resample = self._resample or held > _MOST_DECODED
        pixels = decoded_picture(image, self._processor, resample=resample)
        if not resample:
            with self._lock:
                self._decoded.add(pixels)
        return PreparedPicture(picture_key(image, self._processor), pixels)

    def _find(self, file: tuple[bytes, int]) -> PreparedPicture | None:
        with self._lock:
            if file in self._recent:
                self._recent.move_to_end(file)
            return self._recent.get(file)

    def _keep(self, file: tuple[bytes, int], picture: PreparedPicture) -> None:
        size = picture.pixels.nbytes
        with self._lock:
            if size > self._capacity or file in self._recent:
                return
            self._recent[file] = picture
            self._bytes += size
            while self._bytes > self._capacity:
                _, dropped = self._recent.popitem(last=False)
                self._bytes -= dropped.pixels.nbytes
