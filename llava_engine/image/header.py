"""What a picture's file says before a pixel is decoded: format, size, frames, orientation.

Reads the bytes with its own small parsers, in a bounded number of steps and without copying what
they point at, and hands on only what draws the first frame: comments, EXIF, profiles, text chunks
and later frames never reach Pillow, so they can neither exhaust it nor make it warn. Knows neither
Pillow nor pixels.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from llava_engine.errors import ImageDecodeError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAGIC_BYTES = 16
"""`sniff` needs this many bytes to decide."""

_MAX_PARTS = 1 << 17  # segments, chunks or blocks that one file may have
_MAX_SCANS = 64  # of a progressive JPEG; each costs a pass over the whole picture
_MAX_TIFF_VALUES = 1 << 17  # of one tag: enough for 64 Mpixel in tiles of 32 x 16
# Pillow decodes run-length BMPs in Python: about 1 us a run, and 0.06 us for each pixel that no run
# sets. Runs set at most 255 pixels in 2 bytes.
_MAX_RLE_BYTES = 1 << 20
_SMALL_RLE_PIXELS = 1 << 19
_RLE_PIXELS_PER_BYTE = 128
_MAX_PAGES = 1000  # of a TIFF that are counted

_ORIENTATION = 0x0112
# The tags that Pillow and libtiff need to draw a page, without orientation.
_TIFF_TAGS = frozenset(
    [256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320]
    + [322, 323, 324, 325, 338, 339, 347, 512, 513, 514, 515, 529, 530, 531, 532]
)
_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


@dataclass(frozen=True, slots=True)
class Header:
    """What one file announces.

    width, height: of the picture as stored, before the orientation is applied.
    frames: counted up to a bound.
    orientation: EXIF's, 1 to 8.
    data: a file of the same format that holds the first frame alone.
    tile_pixels: of one tile of a TIFF, which is decoded whole however little of it shows.
    jpeg: whether JPEG codes the pixels, as it may in a TIFF too.
    """

    format: str
    width: int
    height: int
    frames: int
    orientation: int
    data: bytes
    tile_pixels: int = 0
    jpeg: bool = False


def sniff(start: bytes) -> str | None:
    """The format that a file's first bytes announce, or None."""
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if start[:2] == b"BM":
        return "BMP"
    if start[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    return None


def read_header(content: bytes) -> Header:
    """Parse the header of an encoded picture. Raises ImageDecodeError."""
    format = sniff(content[:MAGIC_BYTES])
    if format is None:
        what = "it is empty" if not content else "its first bytes are of none of them"
        raise ImageDecodeError(
            f"not a picture of a supported format ({', '.join(FORMATS)}): {what}"
        )
    try:
        header = _PARSERS[format](content)
    except (IndexError, struct.error) as error:
        raise ImageDecodeError(f"the {format} picture is cut short or broken") from error
    if header.width < 1 or header.height < 1:
        raise ImageDecodeError(f"the {format} picture has no pixels")
    return header


def _broken(format: str, what: str) -> ImageDecodeError:
    return ImageDecodeError(f"the {format} picture is broken: {what}")


def _jpeg(content: bytes) -> Header:
    """ISO 10918-1 B.1: keep every segment that the decoder needs (APP14 tells CMYK and YCCK)."""
    kept = [b"\xff\xd8"]
    width = height = 0
    orientation = 1
    at = 2
    for _ in range(_MAX_PARTS):
        at = content.find(b"\xff", at)
        if at < 0:
            raise IndexError
        marker = content[at + 1]
        if marker in (0x00, 0xFF):  # stuffing and fill
            at += 1
            continue
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:
            at += 2
            continue
        if marker == 0xDA:
            scans = content[at:]
            if scans.count(b"\xff\xda") > _MAX_SCANS:
                raise _broken("JPEG", "too many scans")
            return Header(
                "JPEG", width, height, 1, orientation, b"".join([*kept, scans]), jpeg=True
            )
        if marker == 0xD9:
            break
        (length,) = struct.unpack_from(">H", content, at + 2)
        segment = content[at : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", segment, 5)
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0" and orientation == 1:
            orientation = _exif_orientation(segment[10:])
        if marker in (0xE0, 0xEE) or not (0xE1 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        at += 2 + max(length, 2)
    raise _broken("JPEG", "no scan found")


def _png(content: bytes) -> Header:
    """PNG 1.2 chunks; of an APNG the IDAT picture is the first frame."""
    if content[12:16] != b"IHDR":
        raise _broken("PNG", "no header chunk")
    width, height = struct.unpack_from(">II", content, 16)
    kept = [content[:8]]
    frames = orientation = 1
    at = 8
    for _ in range(_MAX_PARTS):
        if at + 8 > len(content):
            break  # cut short: whether enough pixels are here is for the decoder to say
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(content[at : at + 12 + length])
        elif kind == b"acTL" and length == 8:
            frames = max(1, struct.unpack_from(">I", content, at + 8)[0])
        elif kind == b"eXIf":
            orientation = _exif_orientation(content[at + 8 : at + 8 + min(length, 1 << 16)])
        if kind == b"IEND":
            break
        at += 12 + length
    else:
        raise _broken("PNG", "too many chunks")
    return Header("PNG", width, height, frames, orientation, b"".join(kept))


def _webp(content: bytes) -> Header:
    """RFC 9649. Pillow copies the metadata chunks without parsing them, so all are kept."""
    kind = content[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(content[24:27], "little")
        height = 1 + int.from_bytes(content[27:30], "little")
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", content, 21)[0]
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
    else:
        raise _broken("WEBP", "no picture chunk")
    frames, orientation = 0, 1
    at = 12
    for _ in range(_MAX_PARTS):
        if at + 8 > len(content):
            break
        kind, length = struct.unpack_from("<4sI", content, at)
        if kind == b"ANMF":
            frames += 1
        elif kind == b"EXIF":
            exif = content[at + 8 : at + 8 + min(length, 1 << 16)]
            orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
        at += 8 + length + (length & 1)
    else:
        raise _broken("WEBP", "too many chunks")
    return Header("WEBP", width, height, max(frames, 1), orientation, content)


def _gif(content: bytes) -> Header:
    """GIF89a: screen, palette, the graphic control and data of the first image; others counted.

    The picture grows to hold a first image that lies partly outside the screen, as in Pillow.
    """
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    kept = [content[:at]]
    frames, steps = 0, 0
    while at + 10 < len(content) and content[at] != 0x3B and steps < _MAX_PARTS:
        start, kind = at, content[at]
        steps += 1
        if kind == 0x2C:
            left, top, w, h, flags = struct.unpack_from("<HHHHB", content, at + 1)
            at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif kind == 0x21:
            at += 2
        else:
            at += 1
            continue
        while at < len(content) and content[at] and steps < _MAX_PARTS:
            at += 1 + content[at]
            steps += 1
        if steps >= _MAX_PARTS:
            break
        at += 1
        if kind == 0x2C:
            if not frames:
                width, height = max(width, left + w), max(height, top + h)
                kept.append(content[start:at])
            frames += 1
        elif not frames and content[start + 1] == 0xF9:
            kept.append(content[start:at])
    if not frames:
        raise _broken("GIF", "no image found")
    return Header("GIF", width, height, frames, 1, b"".join([*kept, b";"]))


def _bmp(content: bytes) -> Header:
    """The sizes of BITMAPCOREHEADER (12 bytes) or of BITMAPINFOHEADER and its successors."""
    if struct.unpack_from("<I", content, 14)[0] == 12:
        width, height = struct.unpack_from("<HH", content, 18)
    else:
        width, height = struct.unpack_from("<ii", content, 18)
        compression = struct.unpack_from("<I", content, 30)[0]
        if compression in (1, 2) and len(content) > _MAX_RLE_BYTES:
            raise _broken("BMP", "run-length data above 1 MiB")
        most = _SMALL_RLE_PIXELS + _RLE_PIXELS_PER_BYTE * len(content)
        if compression in (1, 2) and width * abs(height) > most:
            raise _broken("BMP", "most pixels are in no run")
    return Header("BMP", width, abs(height), 1, 1, content)  # a negative height is top-down


def _tiff(content: bytes) -> Header:
    """TIFF 6.0: a new directory with the drawing tags of the first page is put at the end.

    Offsets inside a TIFF are absolute, so the copied entries keep their meaning.
    """
    order = "<" if content[:2] == b"II" else ">"
    (first,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, first)
    if count > 4096:
        raise _broken("TIFF", "too many tags")
    kept: list[bytes] = []
    values: dict[int, int] = {}
    seen: set[int] = set()
    for at in range(first + 2, first + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", content, at)
        if tag in seen:  # readers differ in which of two entries they believe
            raise _broken("TIFF", f"tag {tag} stands twice")
        seen.add(tag)
        if number == 1 and kind in (3, 4):
            values[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), content, at + 8)[
                0
            ]
        if tag not in _TIFF_TAGS or kind not in _TIFF_TYPE_BYTES:
            continue
        if number > _MAX_TIFF_VALUES:
            raise _broken("TIFF", f"tag {tag} holds too many values")
        size = number * _TIFF_TYPE_BYTES[kind]
        if size > 4 and struct.unpack_from(order + "I", content, at + 8)[0] + size > len(content):
            raise _broken("TIFF", f"tag {tag} lies outside the file")
        kept.append(content[at : at + 12])
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    pointer = struct.pack(order + "I", len(content))
    orientation = values.get(_ORIENTATION, 1)
    return Header(
        "TIFF",
        width=values.get(256, 0),
        height=values.get(257, 0),
        frames=_tiff_pages(content, order, first),
        orientation=orientation if 1 <= orientation <= 8 else 1,
        data=content[:4] + pointer + content[8:] + directory,
        tile_pixels=values.get(322, 0) * values.get(323, 0),
        jpeg=values.get(259) in (6, 7),
    )


def _tiff_pages(content: bytes, order: str, offset: int) -> int:
    seen: set[int] = set()
    while offset and offset not in seen and len(seen) < _MAX_PAGES:
        try:
            (count,) = struct.unpack_from(order + "H", content, offset)
            (following,) = struct.unpack_from(order + "I", content, offset + 2 + 12 * count)
        except struct.error:
            break
        seen.add(offset)
        offset = following
    return max(len(seen), 1)


def _exif_orientation(exif: bytes) -> int:
    """The orientation tag of IFD0 (Exif 2.3, 4.6.4), or 1 where there is none that makes sense."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (offset,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, offset)
        for at in range(offset + 2, offset + 2 + 12 * min(count, 512), 12):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", exif, at)
            if tag == _ORIENTATION:
                return value if kind == 3 and number == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


_PARSERS = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
}
