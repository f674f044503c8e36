"""Tiny valid images made from nothing, and a strict PNG reader for looking at drawn ones.

Every maker's files were seen to open in a real decoder (Pillow 13), with the size asked for.
"""

from __future__ import annotations

import random
import struct
import zlib
from typing import Iterator, NamedTuple

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_MODES = {0: "L", 2: "RGB", 4: "LA", 6: "RGBA"}  # by the colour type of the header
CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


# ---- Making PNG -------------------------------------------------------------------------------


def png(
    width: int,
    height: int,
    *,
    alpha: bool = False,
    rgb: tuple[int, int, int] = (200, 80, 40),
    seed: int | None = None,
    hole: tuple[int, int, int, int] | None = None,
) -> bytes:
    """Return a PNG: one colour, or the noise of `seed`; `hole` (x, y, w, h) is transparent."""
    alpha = alpha or hole is not None
    rows = noise_rows(width, height, seed) if seed is not None else [bytes(rgb) * width] * height
    if alpha:
        rows = [with_alpha(row, y, hole) for y, row in enumerate(rows)]
    return png_file(width, height, 6 if alpha else 2, b"".join(b"\0" + row for row in rows))


def noise_rows(width: int, height: int, seed: int) -> list[bytes]:
    """Return rows of RGB noise that doesn't compress, the same for the same seed."""
    source = random.Random(seed)
    size = width * 3
    return [source.getrandbits(size * 8).to_bytes(size, "big") for _ in range(height)]


def with_alpha(row: bytes, y: int, hole: tuple[int, int, int, int] | None) -> bytes:
    """Return an RGB row as RGBA: opaque, but clear where the hole crosses row `y`."""
    pixels = bytearray(b"\xff" * (len(row) // 3 * 4))
    for channel in range(3):
        pixels[channel::4] = row[channel::3]
    if hole and hole[1] <= y < hole[1] + hole[3]:
        for x in range(hole[0], hole[0] + hole[2]):
            pixels[x * 4 + 3] = 0
    return bytes(pixels)


def png_file(width: int, height: int, colour_type: int, scanlines: bytes) -> bytes:
    """Return a PNG of these scanlines, each with its filter byte in front."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(scanlines)), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(kind, data) for kind, data in chunks)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one PNG chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# ---- Reading PNG ------------------------------------------------------------------------------


class Png(NamedTuple):
    """A decoded PNG; each row holds its pixels' channels one after another."""

    width: int
    height: int
    mode: str
    rows: list[bytes]

    def pixel(self, x: int, y: int) -> tuple[int, ...]:
        """Return the channels of one pixel."""
        size = CHANNELS[self.mode]
        return tuple(self.rows[y][x * size : (x + 1) * size])


def read_png(data: bytes) -> Png:
    """Decode a plain PNG (8 bits, not interlaced, no filters); ValueError for any other."""
    chunks = list(png_chunks(data))
    kinds = [kind for kind, _ in chunks]
    if kinds[:1] != [b"IHDR"] or kinds[-1] != b"IEND":
        raise ValueError(f"chunks out of order: {kinds}")
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    depth, colour_type, *methods = rest
    if depth != 8 or colour_type not in PNG_MODES or methods != [0, 0, 0]:
        raise ValueError(f"unsupported kind of PNG: {rest}")
    mode = PNG_MODES[colour_type]
    size = CHANNELS[mode]
    stream = zlib.decompressobj()
    scanlines = stream.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    if not stream.eof or stream.unused_data:
        raise ValueError("the pixel data is cut or has a tail")
    stride = 1 + width * size
    if len(scanlines) != height * stride or any(scanlines[::stride]):
        raise ValueError(f"not the pixels of {width}x{height} {mode}, or rows with a filter")
    starts = range(1, len(scanlines), stride)
    return Png(width, height, mode, [scanlines[at : at + stride - 1] for at in starts])


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the chunks as (kind, data); every byte of the file must belong to one."""
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError("no PNG signature")
    at = len(PNG_SIGNATURE)
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8].ljust(8, b"\0"))
        body = data[at + 8 : at + 8 + size]
        if data[at : at + 12 + size] != png_chunk(kind, body):
            raise ValueError(f"damaged chunk {kind!r}")
        if kind[:1].isupper() and kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            raise ValueError(f"unknown critical chunk {kind!r}")
        yield kind, body
        at += 12 + size


# ---- JPEG -------------------------------------------------------------------------------------


def jpeg(width: int, height: int, *, comment: bytes = b"", exif: bytes = b"") -> bytes:
    """Return a mid-grey baseline JPEG; a `comment` makes it unlike others of its size."""
    blocks = -(-width // 8) * -(-height // 8)
    one_code = b"\1" + bytes(15) + b"\0"  # a single code, 0, one bit long, that means 0
    segments = [
        (0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
        (0xDB, b"\0" + b"\1" * 64),
        (0xC0, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"),
        (0xC4, b"\x00" + one_code),
        (0xC4, b"\x10" + one_code),
        *([(0xE1, b"Exif\0\0" + exif)] if exif else []),
        *([(0xFE, comment)] if comment else []),
        (0xDA, b"\1\1\0\0\x3f\0"),
    ]
    body = b"".join(jpeg_segment(marker, data) for marker, data in segments)
    return b"\xff\xd8" + body + jpeg_scan(blocks) + b"\xff\xd9"


def jpeg_segment(marker: int, data: bytes) -> bytes:
    """Return one JPEG segment with its marker and length."""
    return struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data


def jpeg_scan(blocks: int) -> bytes:
    """Return the scan of so many grey blocks: two zero bits each, ones to fill the last byte."""
    whole, over = divmod(blocks * 2, 8)
    return bytes(whole) + (bytes([0xFF >> over]) if over else b"")


# ---- WebP, GIF, SVG ---------------------------------------------------------------------------


def webp(width: int, height: int, flavour: str = "VP8L") -> bytes:
    """Return a WebP whose first chunk is VP8 (lossy, always one colour), VP8L or VP8X."""
    chunks = {
        "VP8": [(b"VP8 ", vp8(width, height))],
        "VP8L": [(b"VP8L", vp8l(width, height))],
        "VP8X": [(b"VP8X", vp8x(width, height)), (b"VP8L", vp8l(width, height))],
    }[flavour]
    body = b"WEBP" + b"".join(riff_chunk(kind, data) for kind, data in chunks)
    return riff_chunk(b"RIFF", body)


def riff_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one RIFF chunk, padded to an even length."""
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def vp8(width: int, height: int) -> bytes:
    """Return a VP8 key frame of zeros, which every macroblock reads as "nothing to add".

    A macroblock takes under 5 bits of the first partition and under 6 of the second; the header's
    flags fit well into the 256 bytes beyond that.
    """
    size = -(-width // 16) * -(-height // 16) + 256
    shown_key_frame = 1 << 4 | size << 5
    head = struct.pack("<I", shown_key_frame)[:3] + b"\x9d\x01\x2a"
    return head + struct.pack("<HH", width, height) + bytes(2 * size)


def vp8l(width: int, height: int) -> bytes:
    """Return a black VP8L stream: five codes of one symbol each, so pixels take no bits."""
    bits, at = 0, 0
    head = [(width - 1, 14), (height - 1, 14), (0, 4)]  # 0: no alpha, version 0
    plain = [(0, 3)]  # no transform, no colour cache, no meta codes
    codes = [(1 | 1 << 2 | symbol << 3, 11) for symbol in (0, 0, 0, 255)]
    for value, length in [*head, *plain, *codes, (1, 4)]:
        bits |= value << at
        at += length
    return b"\x2f" + bits.to_bytes(16, "little")


def vp8x(width: int, height: int) -> bytes:
    """Return the VP8X header with the size of the canvas and no flags."""
    return bytes(4) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]


def gif(width: int, height: int, *, frames: int = 1) -> bytes:
    """Return a GIF of that screen size whose frames paint only its first pixel."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\xff\xff\xff\0\0\0"
    control = b"\x21\xf9\4\0\x14\0\0\0"
    frame = control + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x4c\1\0"
    return b"GIF89a" + screen + frame * frames + b"\x3b"


def svg(width: int, height: int) -> bytes:
    """Return an SVG with one filled rectangle."""
    sides = f'width="{width}" height="{height}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {sides} viewBox="0 0 {width} {height}">'
    return f'{start}<rect {sides} fill="#c85028"/></svg>\n'.encode()
