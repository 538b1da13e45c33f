"""A picture from a path, bytes, a binary file, a PIL image or an array to 8-bit RGB pixels.

Everything that can go wrong with a stranger's picture becomes an ImageError here. Knows Pillow
and numpy; knows nothing of URLs, of models or of what the pixels are for.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from llava_engine.errors import ImageDecodeError, ImageError, ImageTooLarge
from llava_engine.image.header import Header, read_header

Pixels = npt.NDArray[np.uint8]
DecodeJpeg = Callable[[Header], Pixels | None]
"""Another decoder than Pillow's: the picture as stored, uint8 height x width x 3, or None if it is
Pillow's to decode."""

# The plugins themselves, not Image.open: it warns about large pictures through the process-wide
# warnings filters (an error under -W error), which no thread can set for itself alone. Size is
# judged before, from the header.
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
# A few bytes can announce any number of pixels: 36 make a WebP of 64 Mpixel that takes 1 GB and
# 0.8 s. A file may have (so many pixels, and so many more for each byte). Huffman codes, LZW and
# deflate need more bytes even for one colour, at 4 bits a pixel or more. JPEG and WebP cost the
# most a pixel.
_PROPORTION = {"JPEG": (1 << 20, 512), "WEBP": (1 << 21, 1024)}
_OTHER_PROPORTION = (1 << 22, 2048)
_BAND_PIXELS = 1 << 20  # converted at a time, so that no second copy of a picture is held
_PLAIN_PIXELS = 1 << 23  # of a picture that is turned into bytes whole, for a moment twice
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_WIDE_GREY_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """A picture's file as it was given, nothing of it judged yet but its length.

    content: 16-byte digest of data.
    """

    data: bytes
    content: bytes


@dataclass(frozen=True, slots=True, eq=False)
class LoadedImage:
    """A decoded picture.

    pixels: uint8 height x width x 3, C-contiguous RGB, upright, transparency laid on white.
    content: 16-byte digest of what was given and of who decoded it; equal for equal files, and
        different for two PIL images or arrays that differ in mode, size, palette or orientation
        alone.
    frames: in the file, of which `pixels` is the first; 1 for PIL images and arrays.
    """

    pixels: Pixels
    content: bytes
    frames: int


def check_image(source: object) -> None:
    """Refuse what can be no picture, without I/O.

    Accepted are a path, bytes, a binary file, a PIL image and a uint8 height x width x 3 array.
    Raises TypeError for other types and dtypes, ValueError for wrong shapes and for URLs, and what
    a path object raises that cannot say its path.
    """
    if isinstance(source, str):
        if source[:8].lower().startswith(("http://", "https://")):
            raise ValueError("image is a URL; describe_url fetches those")
        if not source or "\0" in source:
            raise ValueError("image must be a path, not an empty string or one that holds NUL")
    elif isinstance(source, np.ndarray):
        if source.dtype.kind == "f":
            raise TypeError(
                f"image must be uint8 with values 0 to 255, not {source.dtype}; for floats in "
                "0..1 pass (image * 255).round().astype(numpy.uint8)"
            )
        if source.dtype != np.uint8:
            raise TypeError(f"image must be a uint8 array, not {source.dtype}")
        if source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"image must be height x width x 3, not {_shape(source)}")
        if not source.size:
            raise ValueError(f"image has no pixels: {_shape(source)}")
    elif isinstance(source, os.PathLike):
        os.fspath(source)  # a fault of the caller's class is no broken picture
    elif not (
        isinstance(source, (bytes, bytearray, memoryview, Image.Image))
        or callable(getattr(source, "read", None))
    ):
        raise TypeError(
            "image must be a path, bytes, a binary file, a PIL image or a uint8 array, "
            f"not {type(source).__name__}"
        )


def pixel_limit(max_pixels: int) -> int:
    """Width x height that is allowed now: Pillow's MAX_IMAGE_PIXELS counts where it is lower."""
    return min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)


def read_image(source: Any, *, max_bytes: int) -> EncodedImage | None:
    """The file of a picture that `check_image` accepts; None for a PIL image or an array.

    max_bytes: as in `load_image`. Raises ImageTooLarge or ImageDecodeError.
    """
    if isinstance(source, (np.ndarray, Image.Image)):
        return None
    with _as_image_errors():
        data = _read(source, max_bytes)
        # SHA-256 because processors have instructions for it: 0.40 ms for 724 kB, BLAKE2b 1.0 ms.
        return EncodedImage(data, hashlib.sha256(data).digest()[:16])


def load_image(
    source: Any, *, max_bytes: int, max_pixels: int, decode_jpeg: DecodeJpeg | None = None
) -> LoadedImage:
    """Decode a picture that `check_image` accepts, or one that `read_image` has read.

    max_bytes: of the encoded file. max_pixels: width x height, judged from the header; Pillow's
    MAX_IMAGE_PIXELS counts too where it is lower, and is never changed; and a file of few bytes
    may not have many pixels. decode_jpeg: is given JPEG files that passed these limits, before
    Pillow.
    Needs about 7 bytes of memory a pixel (some 20 for WebP, whose decoder keeps canvases) and
    twice the encoded bytes.
    Raises ImageTooLarge or ImageDecodeError.
    """
    limit = pixel_limit(max_pixels)
    if not isinstance(source, EncodedImage):
        source = read_image(source, max_bytes=max_bytes) or source
    with _as_image_errors():
        if isinstance(source, EncodedImage):
            return _from_encoded(source, limit, decode_jpeg)
        if isinstance(source, np.ndarray):
            return _from_array(source, limit)
        return _from_pil(source, limit)


@contextmanager
def _as_image_errors() -> Iterator[None]:
    """Raise an ImageError for whatever goes wrong."""
    try:
        yield
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise ImageTooLarge("the picture does not fit in memory") from error
    except Exception as error:
        # Pillow raises nearly every kind of exception for broken files, and its messages may
        # hold memory addresses.
        raise ImageDecodeError("the picture cannot be read: it is broken or cut short") from error


def _read(source: Any, max_bytes: int) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = source.nbytes if isinstance(source, memoryview) else len(source)
        _check_bytes(size, max_bytes)
        return bytes(source)
    if isinstance(source, (str, os.PathLike)):
        try:
            # A FIFO would block and a device has no end.
            if os.path.exists(source) and not os.path.isfile(source):
                raise ImageDecodeError(f"{os.fspath(source)!r} is not a regular file")
            with open(source, "rb") as file:
                content = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a valid path"
            raise ImageDecodeError(f"cannot read {os.fspath(source)!r}: {reason}") from error
        _check_bytes(len(content), max_bytes)
        return content
    parts: list[bytes] = []
    size = 0
    while size <= max_bytes:  # a raw file may give less than it is asked for
        try:
            part = source.read(max_bytes + 1 - size)
        except Exception as error:
            raise ImageDecodeError("reading the picture's file object failed") from error
        if not isinstance(part, (bytes, bytearray, memoryview)):
            kind = type(part).__name__
            raise ImageDecodeError(f"the picture's file object gave {kind}, not bytes")
        if not part:
            break
        parts.append(bytes(part))
        size += len(parts[-1])
    _check_bytes(size, max_bytes)
    return b"".join(parts)


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageTooLarge(f"the picture has more than the {max_bytes} bytes allowed")


def _check_pixels(width: int, height: int, limit: int) -> None:
    if width < 1 or height < 1:
        raise ImageDecodeError(f"the picture has no pixels: {width} x {height}")
    if width * height > limit:
        raise ImageTooLarge(f"the picture has {width} x {height} pixels; allowed are {limit}")


def _from_encoded(encoded: EncodedImage, limit: int, decode_jpeg: DecodeJpeg | None) -> LoadedImage:
    header = read_header(encoded.data)
    _check_pixels(header.width, header.height, limit)
    if header.tile_pixels > limit:
        raise ImageTooLarge(f"the picture's tiles have {header.tile_pixels} pixels")
    small, each_byte = _PROPORTION.get("JPEG" if header.jpeg else header.format, _OTHER_PROPORTION)
    most = small + each_byte * len(header.data)
    if max(header.width * header.height, header.tile_pixels) > most:
        raise ImageTooLarge(
            f"the picture has {header.width} x {header.height} pixels; allowed are {most} "
            f"with {len(header.data)} bytes of data"
        )
    limit = min(limit, most)
    if decode_jpeg is not None and header.format == "JPEG":
        decoded = decode_jpeg(header)
        if decoded is not None:
            # Not Pillow's pixels to the last bit, so nothing made of those may pass for these.
            content = hashlib.blake2b(encoded.content, digest_size=16, person=b"decode_jpeg")
            pixels = _upright(decoded, header.orientation)
            return LoadedImage(pixels, content.digest(), header.frames)
    with _decode(header, limit) as image:
        pixels = _to_rgb(image, header.orientation, None)
    return LoadedImage(pixels, encoded.content, header.frames)


def _decode(header: Header, limit: int) -> ImageFile.ImageFile:
    image = _PLUGINS[header.format](io.BytesIO(header.data))
    _check_pixels(*image.size, limit)  # files with two headers exist
    image.load()
    return image


def _from_pil(image: Image.Image, limit: int) -> LoadedImage:
    _check_pixels(*image.size, limit)
    image.load()
    orientation = image.getexif().get(0x0112, 1)
    if orientation not in range(1, 9):
        orientation = 1
    palette = image.palette.tobytes() if image.palette is not None else None
    described = (image.mode, image.size, orientation, palette, image.info.get("transparency"))
    digest = _digest("pil", described)
    pixels = _to_rgb(image, orientation, digest)
    return LoadedImage(pixels, digest.digest()[:16], 1)


def _from_array(array: Pixels, limit: int) -> LoadedImage:
    _check_pixels(array.shape[1], array.shape[0], limit)
    pixels = array.copy(order="C")  # the caller may go on writing into theirs
    digest = _digest("array", (str(pixels.dtype), pixels.shape))
    digest.update(pixels.reshape(-1).data)
    return LoadedImage(pixels, digest.digest()[:16], 1)


def _digest(kind: str, described: object) -> hashlib._Hash:
    """Of a picture that is no file's bytes, which never begin so. Processors have instructions for
    SHA-256: it takes half of blake2b's time."""
    return hashlib.sha256(f"{kind} {described!r}\0".encode())


def _to_rgb(image: Image.Image, orientation: int, digest: hashlib._Hash | None) -> Pixels:
    """Convert band by band into an upright array; `digest` takes in each band's raw bytes."""
    width, height = image.size
    plain = image.mode == "RGB" and "transparency" not in image.info
    if plain and digest is None and orientation == 1 and width * height <= _PLAIN_PIXELS:
        return _rgb(image.tobytes(), height, width)  # most pictures: copied once
    pixels = _empty_upright(width, height, orientation)
    stored = _as_stored(pixels, orientation)
    for top, bottom in _bands(width, height):
        band = image.crop((0, top, width, bottom))
        raw = band.tobytes() if plain or digest is not None else b""
        if digest is not None:
            digest.update(raw)
        stored[top:bottom] = _rgb(raw, bottom - top, width) if plain else _band_to_rgb(band)
    return pixels


def _rgb(raw: bytes, height: int, width: int) -> Pixels:
    """The pixels of an RGB picture, which cannot be written to."""
    return np.frombuffer(raw, np.uint8).reshape(height, width, 3)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn a picture that lies as it is stored; itself if it lies right."""
    if orientation == 1:
        return pixels
    upright = _empty_upright(pixels.shape[1], pixels.shape[0], orientation)
    _as_stored(upright, orientation)[:] = pixels
    return upright


def _empty_upright(width: int, height: int, orientation: int) -> Pixels:
    upright = (height, width) if orientation < 5 else (width, height)
    return np.empty((*upright, 3), np.uint8)


def _bands(width: int, height: int) -> Iterator[tuple[int, int]]:
    rows = max(1, _BAND_PIXELS // width)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def _as_stored(upright: Pixels, orientation: int) -> Pixels:
    """A view of the upright array in which the picture lies as the file stores it (Exif 4.6.4)."""
    view = upright.transpose(1, 0, 2) if orientation >= 5 else upright
    if orientation in (3, 4, 6, 7):
        view = view[::-1]
    if orientation in (2, 3, 7, 8):
        view = view[:, ::-1]
    return view


def _band_to_rgb(band: Image.Image) -> Pixels:
    if band.mode in _WIDE_GREY_MODES:
        return _wide_grey_to_rgb(band)
    if band.mode == "F":
        raise ImageDecodeError("pictures of floating-point pixels are not supported")
    if band.mode in _ALPHA_MODES or "transparency" in band.info:
        band = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        white.alpha_composite(band)
        band = white
    return np.asarray(band.convert("RGB"))


def _wide_grey_to_rgb(band: Image.Image) -> Pixels:
    """16-bit grey to its high byte, as Pillow itself reduces 16-bit colour.

    Mode I, 32 bits wide, is what Pillow holds 16-bit data in where it has no better mode.
    """
    wide = np.asarray(band).astype(np.int64)
    grey = (wide.clip(0, 0xFFFF) >> 8).astype(np.uint8)
    transparent = band.info.get("transparency")
    if isinstance(transparent, int):
        grey[wide == transparent] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def _shape(array: npt.NDArray[Any]) -> str:
    return " x ".join(map(str, array.shape)) or "a scalar"
