"""Decodes JPEG 2000 files whose bit depth, channel order, palette or colour space Pillow gets wrong.

Pillow shifts samples to 8 bits, so that white ends at 240 for 4 bits, and the brightest 16-bit samples wrap around to
black; it takes components in file order, whatever their definitions say, and drops duplicate colours of a palette.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convline.decoders.bit_depth import to_8_bits, with_alpha
from convline.errors import ImageError

SIGNATURES = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
SIZ, QCD, QCC, SOT = 0xFF51, 0xFF5C, 0xFF5D, 0xFF90  # markers of the codestream
BILEVEL, CMYK, BILEVEL_2, SRGB, GREY, SYCC, ROMM = 0, 12, 15, 16, 17, 18, 21  # enumerated colour spaces
COLOUR_COUNTS = {BILEVEL: 1, BILEVEL_2: 1, GREY: 1, SRGB: 3, SYCC: 3, ROMM: 3, CMYK: 4}
PROFILES = {b"GRAY": GREY, b"RGB ": SRGB, b"CMYK": CMYK}  # colour spaces of ICC profiles
COLOUR, OPACITY, PREMULTIPLIED = 0, 1, 2  # channel types in channel definitions


@dataclass
class Component:
    """`depth_offset`: where the file states the component's bit depth."""

    bits: int
    is_subsampled: bool
    depth_offset: int


@dataclass
class Jpeg2000Header:
    """What the boxes and the codestream's main header say about the pixels.

    `quantization`: (start, end) of each quantization marker's values in the file;
    `space`: the enumerated colour space, None if the file has none, -1 for an ICC profile of an unknown space;
    `palette`: uint8 [entries, columns];
    `channels`: the component mapping, (component, column of the palette or None) for each channel;
    `definitions`: (channel, type, colour it belongs to: from 1 on, 0 for all).
    """

    components: list[Component]
    quantization: list[tuple[int, int]]
    space: int | None = None
    palette: NDArray[np.uint8] | None = None
    channels: list[tuple[int, int | None]] | None = None
    definitions: list[tuple[int, int, int]] | None = None


def load(image: Image.Image, data: bytes) -> Image.Image:
    """Decode `image`, which Pillow opened from `data`: mode L or RGB, or LA or RGBA if it has alpha.

    Raises ImageError ("unsupported") for colour spaces and bit depths that are not supported.
    """
    header = _read_header(data)
    if problem := _unsupported(header):
        raise ImageError("unsupported", problem)
    image.load()
    is_plain = header.palette is None and not header.definitions and header.space != CMYK
    if is_plain and all(component.bits == 8 for component in header.components) and image.mode != "I;16":
        return image
    samples = _samples(image, header, data)
    if (palette := header.palette) is not None:
        channels = header.channels or [(0, column) for column in range(palette.shape[1])]
        samples = [
            samples[component] if column is None else palette[:, column].take(samples[component], mode="clip")
            for component, column in channels
        ]
    return _in_rgb_order(samples, header)


def unsupported(data: bytes) -> str | None:
    """What about a file is not supported, with advice; None if it is supported or its header is damaged."""
    try:
        return _unsupported(_read_header(data))
    except Exception:
        return None


def is_truncated(data: bytes) -> bool:
    """Whether a file that cannot be decoded ends before its codestream does."""
    try:
        end = len(data) if data.startswith(SIGNATURES[1]) else dict(_boxes(data, 0, len(data)))[b"jp2c"][1]
    except (KeyError, ValueError, struct.error):
        return True
    return data[end - 2 : end] != b"\xff\xd9"


def _unsupported(header: Jpeg2000Header) -> str | None:
    """What is not supported, with advice; None if the file is supported."""
    depths = {component.bits for component in header.components}
    if len(header.components) > 4:
        return f"a JPEG 2000 of {len(header.components)} components; save it as RGB"
    if max(depths) > 16:
        return f"a JPEG 2000 of {max(depths)} bits per sample; save it with 8 or 16"
    if any(component.is_subsampled for component in header.components):
        return "a JPEG 2000 with subsampled components; save it as RGB, without subsampling"
    if header.space is not None and header.space not in COLOUR_COUNTS:
        return "a JPEG 2000 whose colour space is not grey, RGB, sYCC or CMYK; save it as RGB"
    if header.space == SYCC and (depths != {8} or header.definitions):
        return "a JPEG 2000 in sYCC that has not 8 bits, or has channel definitions; save it as RGB"
    if header.palette is not None and depths != {8} and max(depths) > 8:
        return f"a JPEG 2000 with a palette of {max(depths)} bits; save it as RGB"
    return None


def _samples(image: Image.Image, header: Jpeg2000Header, data: bytes) -> list[NDArray[np.uint8]]:
    """Each component scaled to 8 bits, uint8 [height, width]; palette indices unchanged."""
    stored = np.atleast_3d(np.asarray(image))
    is_deep = any(component.bits > 8 for component in header.components)
    halved = _decode_halved(header, data) if is_deep and image.mode != "I;16" else None
    samples = []
    for index, component in enumerate(header.components):
        values, bits = stored[..., index], component.bits
        if image.mode == "I;16":
            samples.append(to_8_bits(bits)[values >> (16 - bits)])
        elif bits > 8 and halved is not None:
            samples.append(_without_wraparound(values, halved[..., index], bits))
        elif header.palette is not None:
            samples.append(values >> (8 - bits))
        else:
            samples.append(to_8_bits(bits)[values >> (8 - bits)])
    return samples


def _without_wraparound(values: NDArray[np.uint8], halved: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Samples of `bits` bits that Pillow rounded to 8, where 256 became 0. `halved` tells such a 0 from black.

    `halved` holds the same samples scaled to half the range, from 64 to 192, accurate to within 1.
    """
    expected = 64 + (values >> 1)
    halved = np.clip(halved, 64, 192)  # lossy compression overshoots black and white
    is_top = halved >= 191
    if ((np.abs(expected.astype(np.int16) - halved) > 2) & ~((values == 0) & is_top)).any():
        raise ImageError("unsupported", f"a JPEG 2000 of {bits}-bit colours; save it with 8 bits per sample")
    # the centre of the values that were rounded to each
    table = np.rint(np.arange(256) * 2 ** (bits - 8) * 255 / (2**bits - 1)).astype(np.uint8)
    return np.where(is_top & ((values == 0) | (halved >= 192)), np.uint8(255), table[values])


def _decode_halved(header: Jpeg2000Header, data: bytes) -> NDArray[np.uint8]:
    """Decode the file again, patched to say that its samples have twice their range: uint8 [height, width, components].

    Without quantization, one bit is added to the depth; with quantization, each step size is halved instead, and one
    guard bit is taken away, so that the number of bits stays the same.
    """
    patched = bytearray(data)
    for start, end in header.quantization:
        style, guard_bits = data[start] & 31, data[start] >> 5
        if style == 0:
            continue
        steps = [step + (1 << 11) for (step,) in struct.iter_unpack(">H", data[start + 1 : end])]
        if guard_bits == 0 or max(steps) >= 1 << 16:
            raise ImageError("unsupported", "a JPEG 2000 of an unusual quantization; save it with 8 bits per sample")
        patched[start] -= 1 << 5
        patched[start + 1 : end] = struct.pack(f">{len(steps)}H", *steps)
    for component in header.components:
        if data[header.quantization[0][0]] & 31 == 0:
            patched[component.depth_offset] += 1
    halved = Image.open(BytesIO(patched), formats=["JPEG2000"])
    return np.atleast_3d(np.asarray(halved))


def _in_rgb_order(samples: list[NDArray[np.uint8]], header: Jpeg2000Header) -> Image.Image:
    """Arrange the channels by their definitions."""
    definitions = header.definitions
    count = COLOUR_COUNTS[header.space] if header.space is not None else (1 if len(samples) < 3 else 3)
    if definitions is None:
        definitions = [(index, COLOUR, index + 1) for index in range(count)]
        definitions += [(count, OPACITY, 0)] if len(samples) > count else []  # as Pillow does
    channel_of_colour = {colour: channel for channel, kind, colour in definitions if kind == COLOUR}
    alpha = [(channel, kind) for channel, kind, _ in definitions if kind in (OPACITY, PREMULTIPLIED)]
    used = [*channel_of_colour.values(), *(channel for channel, _ in alpha)]
    if set(channel_of_colour) != set(range(1, count + 1)) or max(used) >= len(samples):
        raise ImageError("unsupported", "a JPEG 2000 that does not define its colours; save it as RGB")
    in_order = [samples[channel_of_colour[colour]] for colour in range(1, count + 1)]
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in in_order]
    image = Image.merge({1: "L", 3: "RGB", 4: "CMYK"}[count], bands)
    image = image.convert("RGB") if count == 4 else image
    if not alpha:
        return image
    return with_alpha(image, np.ascontiguousarray(samples[alpha[0][0]]), is_premultiplied=alpha[0][1] == PREMULTIPLIED)


def _read_header(data: bytes) -> Jpeg2000Header:
    """Raises ValueError, KeyError, IndexError or struct.error if it is malformed."""
    if data.startswith(SIGNATURES[1]):
        return _read_codestream(data, 0)
    boxes = dict(reversed([*_boxes(data, 0, len(data))]))  # reversed: the first of two equal boxes counts
    header = _read_codestream(data, boxes[b"jp2c"][0])
    for kind, (begin, end) in reversed([*_boxes(data, *boxes[b"jp2h"])]):
        body = data[begin:end]
        if kind == b"colr" and body[0] == 1:
            header.space = int.from_bytes(body[3:7], "big")
        elif kind == b"colr" and body[0] == 2:
            header.space = PROFILES.get(body[19:23], -1)
        elif kind == b"pclr":
            header.palette = _palette(body)
        elif kind == b"cmap":
            entries = struct.iter_unpack(">HBB", body)
            header.channels = [(component, column if is_mapped else None) for component, is_mapped, column in entries]
        elif kind == b"cdef":
            header.definitions = [*struct.iter_unpack(">HHH", body[2:])]
    return header


def _boxes(data: bytes, begin: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The boxes between two offsets: the type of each, and where its contents begin and end."""
    while begin + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, begin)
        start = begin + 8
        if length == 1:
            (length,), start = struct.unpack_from(">Q", data, start), begin + 16
        after = end if length == 0 else begin + length
        if after < start:
            raise ValueError("a JPEG 2000 box ends before it begins")
        yield kind, (start, min(after, end))
        begin = after


def _read_codestream(data: bytes, begin: int) -> Jpeg2000Header:
    """The components and quantization in the main header of the codestream at `begin`."""
    header = Jpeg2000Header([], [])
    position = begin + 2
    while (marker := int.from_bytes(data[position : position + 2], "big")) not in (SOT, 0):
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == SIZ:
            (count,) = struct.unpack_from(">H", data, position + 38)
            first = position + 40
            for offset in range(first, first + 3 * min(count, 16384), 3):
                depth, dx, dy = data[offset : offset + 3]
                header.components.append(Component((depth & 127) + 1, (dx, dy) != (1, 1), offset))
        elif marker in (QCD, QCC):
            header.quantization.append((position + (4 if marker == QCD else 5), position + 2 + length))
        position += 2 + length
    return header


def _palette(body: bytes) -> NDArray[np.uint8]:
    """The colours of a palette box, scaled to 8 bits: uint8 [entries, columns]."""
    entries, columns = struct.unpack_from(">HB", body)
    depths = [(depth & 127) + 1 for depth in body[3 : 3 + columns]]
    row = np.dtype([(str(column), ">u2" if depth > 8 else "u1") for column, depth in enumerate(depths)])
    table = np.frombuffer(body, row, entries, 3 + columns)
    scaled = [to_8_bits(depth).take(table[str(column)], mode="clip") for column, depth in enumerate(depths)]
    return np.stack(scaled, 1)
