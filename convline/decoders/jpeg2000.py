"""JPEG 2000 where Pillow takes samples for what they are not.

Pillow shifts samples to 8 bits, so that 4 bits end at 240 and the brightest of 16 wrap around to black; it takes
components in their order, whatever the file says of them, and drops colours that a palette holds twice.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convline.decoders.sample_depth import to_8_bits, with_alpha
from convline.errors import ImageError

SIGNATURES = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
SIZ, QCD, QCC, SOT = 0xFF51, 0xFF5C, 0xFF5D, 0xFF90  # markers of the codestream
BILEVEL, CMYK, BILEVEL_2, SRGB, GREY, SYCC, ROMM = 0, 12, 15, 16, 17, 18, 21  # colour spaces, as files number them
COLOURS = {BILEVEL: 1, BILEVEL_2: 1, GREY: 1, SRGB: 3, SYCC: 3, ROMM: 3, CMYK: 4}
PROFILES = {b"GRAY": GREY, b"RGB ": SRGB, b"CMYK": CMYK}  # what an ICC profile says that it is of
COLOUR, OPACITY, PREMULTIPLIED = 0, 1, 2  # what a channel definition calls a channel


@dataclass
class Component:
    """`at`: where the codestream states its depth."""

    bits: int
    is_subsampled: bool
    at: int


@dataclass
class Header:
    """`space`: the colour space's number, None where the file has none, -1 for a profile of another. `channels`: what
    palette and mapping make of the components, (component, column of the palette or None); `definitions`: (channel,
    what it is, of which colour from 1 on, or 0 for all)."""

    components: list[Component]
    quantization: list[tuple[int, int]]  # where each statement begins and ends
    space: int | None = None
    palette: NDArray[np.uint8] | None = None  # [entries, columns]
    channels: list[tuple[int, int | None]] | None = None
    definitions: list[tuple[int, int, int]] | None = None


def load(image: Image.Image, data: bytes) -> Image.Image:
    """The decoded pixels of `image`, which Pillow opened from `data`: mode L or RGB, with alpha where there is some.

    Raises ImageError ("unsupported") for colours and depths that are not read.
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
    return _arranged(samples, header)


def unread_kind(data: bytes) -> str | None:
    """Why such a file's pixels are not given; None where they are, or where its header is damaged."""
    try:
        return _unsupported(_read_header(data))
    except Exception:
        return None


def is_cut(data: bytes) -> bool:
    """Whether a file that cannot be decoded ends before its codestream does."""
    try:
        end = len(data) if data.startswith(SIGNATURES[1]) else dict(_boxes(data, 0, len(data)))[b"jp2c"][1]
    except (KeyError, ValueError, struct.error):
        return True
    return data[end - 2 : end] != b"\xff\xd9"


def _unsupported(header: Header) -> str | None:
    """Why such a file's pixels are not given; None where they are."""
    depths = {component.bits for component in header.components}
    kind = "a JPEG 2000"
    if len(header.components) > 4:
        return f"{kind} of {len(header.components)} components; save it as RGB"
    if max(depths) > 16:
        return f"{kind} of {max(depths)} bits a sample; save it with 8 or 16"
    if any(component.is_subsampled for component in header.components):
        return f"{kind} with subsampled components; save it as RGB, without subsampling"
    if header.space is not None and header.space not in COLOURS:
        return f"{kind} of another colour space than grey, RGB, sYCC or CMYK; save it as RGB"
    if header.space == SYCC and (depths != {8} or header.definitions):
        return f"{kind} of sYCC with other than 8 bits, or with channel definitions; save it as RGB"
    if header.palette is not None and depths != {8} and max(depths) > 8:
        return f"{kind} with a palette of {max(depths)} bits; save it as RGB"
    return None


def _samples(image: Image.Image, header: Header, data: bytes) -> list[NDArray[np.uint8]]:
    """Each component scaled to 8 bits: uint8 [height, width]; indices into a palette as they are."""
    stored = np.atleast_3d(np.asarray(image))
    deep = [component.bits > 8 for component in header.components]
    halved = _halved(header, data) if any(deep) and image.mode != "I;16" else None
    samples = []
    for index, component in enumerate(header.components):
        values, bits = stored[..., index], component.bits
        if image.mode == "I;16":
            samples.append(to_8_bits(bits)[values >> (16 - bits)])
        elif bits > 8 and halved is not None:
            samples.append(_unwrapped(values, halved[..., index], bits))
        elif header.palette is not None:
            samples.append(values >> (8 - bits))
        else:
            samples.append(to_8_bits(bits)[values >> (8 - bits)])
    return samples


def _unwrapped(values: NDArray[np.uint8], halved: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Samples of so many bits that were rounded to 8 and may have become 256, which is 0 in a byte; `halved` are the
    same in the middle half of the range, from 64 to 192, to within 1."""
    expected = 64 + (values >> 1)
    halved = np.clip(halved, 64, 192)  # what compression added beyond black and white
    is_top = halved >= 191
    if ((np.abs(expected.astype(np.int16) - halved) > 2) & ~((values == 0) & is_top)).any():
        raise ImageError("unsupported", f"a JPEG 2000 of colours of {bits} bits; save it with 8 bits a sample")
    # the middle of what each was rounded from
    table = np.rint(np.arange(256) * 2 ** (bits - 8) * 255 / (2**bits - 1)).astype(np.uint8)
    return np.where(is_top & ((values == 0) | (halved >= 192)), np.uint8(255), table[values])


def _halved(header: Header, data: bytes) -> NDArray[np.uint8]:
    """As Pillow decodes the file when samples are told to have twice their range: uint8 [height, width, components].

    Without quantization the depth is one bit more; with it, each step is half as large (and its bits are as many).
    """
    patched = bytearray(data)
    for begin, end in header.quantization:
        style, guard_bits = data[begin] & 31, data[begin] >> 5
        if style == 0:
            continue
        steps = [step + (1 << 11) for (step,) in struct.iter_unpack(">H", data[begin + 1 : end])]
        if guard_bits == 0 or max(steps) >= 1 << 16:
            raise ImageError("unsupported", "a JPEG 2000 of deep colours in an unusual range; save it with 8 bits")
        patched[begin] -= 1 << 5
        patched[begin + 1 : end] = struct.pack(f">{len(steps)}H", *steps)
    for component in header.components:
        if data[header.quantization[0][0]] & 31 == 0:
            patched[component.at] += 1
    again = Image.open(BytesIO(patched), formats=["JPEG2000"])
    return np.atleast_3d(np.asarray(again))


def _arranged(samples: list[NDArray[np.uint8]], header: Header) -> Image.Image:
    """Channels put where their definitions say that they belong."""
    definitions = header.definitions
    count = COLOURS[header.space] if header.space is not None else (1 if len(samples) < 3 else 3)
    if definitions is None:
        definitions = [(index, COLOUR, index + 1) for index in range(count)]
        definitions += [(count, OPACITY, 0)] if len(samples) > count else []  # as Pillow takes it
    colours = {which: channel for channel, kind, which in definitions if kind == COLOUR}
    alpha = [(channel, kind) for channel, kind, _ in definitions if kind in (OPACITY, PREMULTIPLIED)]
    if set(colours) != set(range(1, count + 1)) or max(*colours.values(), *(c for c, _ in alpha), 0) >= len(samples):
        raise ImageError("unsupported", "a JPEG 2000 that does not define its colours; save it as RGB")
    bands = [Image.fromarray(np.ascontiguousarray(samples[colours[which]])) for which in range(1, count + 1)]
    image = Image.merge({1: "L", 3: "RGB", 4: "CMYK"}[count], bands)
    image = image.convert("RGB") if count == 4 else image
    if not alpha:
        return image
    return with_alpha(image, np.ascontiguousarray(samples[alpha[0][0]]), is_associated=alpha[0][1] == PREMULTIPLIED)


def _read_header(data: bytes) -> Header:
    """Raises ValueError, IndexError or struct.error where it is malformed."""
    if data.startswith(SIGNATURES[1]):
        return _codestream(data, 0)
    boxes = dict(reversed([*_boxes(data, 0, len(data))]))  # of two of a kind the first
    header = _codestream(data, boxes[b"jp2c"][0])
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
    """The boxes between two places: their kinds, and where their contents begin and end."""
    while begin + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, begin)
        start = begin + 8
        if length == 1:
            (length,), start = struct.unpack_from(">Q", data, start), begin + 16
        after = end if length == 0 else begin + length
        if after < start:
            raise ValueError("a box of JPEG 2000 that ends before it begins")
        yield kind, (start, min(after, end))
        begin = after


def _codestream(data: bytes, begin: int) -> Header:
    """What its main header says of components."""
    header = Header([], [])
    at = begin + 2
    while (marker := int.from_bytes(data[at : at + 2], "big")) not in (SOT, 0):
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker == SIZ:
            (count,) = struct.unpack_from(">H", data, at + 38)
            for place in range(at + 40, at + 40 + 3 * min(count, 16384), 3):
                depth, dx, dy = data[place : place + 3]
                header.components.append(Component((depth & 127) + 1, (dx, dy) != (1, 1), place))
        elif marker in (QCD, QCC):
            header.quantization.append((at + (4 if marker == QCD else 5), at + 2 + length))
        at += 2 + length
    return header


def _palette(body: bytes) -> NDArray[np.uint8]:
    """Its colours, scaled to 8 bits: [entries, columns]."""
    entries, columns = struct.unpack_from(">HB", body)
    depths = [(depth & 127) + 1 for depth in body[3 : 3 + columns]]
    row = np.dtype([(str(column), ">u2" if depth > 8 else "u1") for column, depth in enumerate(depths)])
    table = np.frombuffer(body, row, entries, 3 + columns)
    scaled = [to_8_bits(depth).take(table[str(column)], mode="clip") for column, depth in enumerate(depths)]
    return np.stack(scaled, 1)
