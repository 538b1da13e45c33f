"""Pictures that Pillow does not write."""

from __future__ import annotations

import struct
import zlib


def huge_headers() -> dict[str, bytes]:
    """Of each format a file that announces as many pixels as it can, or 200,000 x 200,000."""
    side = 200_000
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr
    png += struct.pack(">I", zlib.crc32(ihdr))
    canvas = (side - 1).to_bytes(3, "little") * 2
    webp = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    tags = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (279, 100)]
    ifd = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags
    )
    return {
        "PNG": png,
        "WEBP": b"RIFF" + struct.pack("<I", len(webp)) + webp,
        "BMP": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, side, side, 1, 24, *[0] * 6),
        "TIFF": b"II*\0\x08\0\0\0" + ifd + bytes(4),
        "JPEG": b"\xff\xd8\xff\xc0\0\x0b\x08\xff\xff\xff\xff\x01\x01\x11\0\xff\xda\0\x08"
        + bytes(9),
        "GIF": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    }


def rle_bmp(width: int, height: int, data: bytes) -> bytes:
    """A run-length BMP of 8 bits a pixel and 256 greys."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<III", start + len(data), 0, start) + head + palette + data
