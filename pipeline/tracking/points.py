"""Read and write metrics.jsonl, summaries.jsonl and watched.jsonl: points, each with its step, time and values."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from convline.errors import ConvlineError
from convline.files import open_in_place


@dataclass(frozen=True)
class Point:
    """A line of such a file, which begins at byte `offset`.

    `nth` counts consecutive lines of the same step, from 0; `seconds` are since the epoch.
    """

    step: int
    nth: int
    seconds: float
    values: dict[str, Any]
    offset: int

    @property
    def milliseconds(self) -> int:
        """Since the epoch."""
        return round(1000 * self.seconds)


class PointWriter:
    """Appends points to a file; if `path` is None, they are discarded. Raises ConvlineError if the disk is full."""

    def __init__(self, path: Path | None) -> None:
        # unbuffered: lines are in the file once they are written, and a full disk is noticed at once
        if path is None:
            self._file: IO[bytes] = open(os.devnull, "ab", buffering=0)  # noqa: SIM115  # open as long as the training runs
        else:
            self._file = open_in_place(path, "ab", buffering=0)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write a point, without numbers that are not finite (the gradient norm of a step that overflowed in float16):
        JSON cannot hold them."""
        values = {key: value for key, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ConvlineError(
                f"{self._file.name} could not be written: {error.strerror}; free some space, then --resume goes on "
                "from the last checkpoint"
            ) from error

    def durable_size(self) -> int:
        """The size of the file in bytes, after syncing it to disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def read_points(path: Path, after: Point | None = None) -> Iterator[Point]:
    """The points of a file, empty if it does not exist; only those `after` a point that was read before, if that point
    is still at its place in the file.

    An incomplete line at the end is not read. Raises ConvlineError for a complete line that is not a point.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        last = after
        if after is not None:
            file.seek(after.offset)
            if not _is_line_of(file.readline(), after):  # the file was cut back and written again
                file.seek(0)
                last = None
        offset = file.tell()
        for line in file:
            try:
                point = _point(line, offset, 0)
            except ValueError as error:
                number = path.read_bytes()[:offset].count(b"\n") + 1
                raise ConvlineError(
                    f"line {number} of {path} is damaged ({error}); remove that line, or train with --overwrite"
                ) from error
            if point is None:
                return
            if last is not None and point.step == last.step:
                point = replace(point, nth=last.nth + 1)
            yield point
            last = point
            offset += len(line)


def _point(line: bytes, offset: int, nth: int) -> Point | None:
    """The point of a line; None if the line is incomplete. Raises ValueError if it is not a point."""
    if not line.endswith(b"\n"):
        return None
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    step, seconds = values.pop("step", None), values.pop("time", None)
    if not (type(step) is int and 0 <= step < 2**53 and _is_number(seconds) and 0 <= seconds < LATEST):
        raise ValueError("it has no step and time")
    for key, value in values.items():
        if not (_is_number(value) or (key in VALID and VALID[key](value))):
            raise ValueError(f"{key!r} has an invalid value")
    return Point(step, nth, seconds, values, offset)


def _is_line_of(line: bytes, point: Point) -> bool:
    try:
        return _point(line, point.offset, point.nth) == point
    except ValueError:  # it begins in the middle of another line
        return False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_layers(layers: Any) -> bool:
    """Whether it has the form that `summarize` returns: distributions by layer and kind of value."""
    try:
        return all(
            _is_number(kinds["activations"]["zeros"]) and all(map(_is_distribution, kinds.values()))
            for kinds in layers.values()
        )
    except (AttributeError, KeyError, TypeError):
        return False


def _is_distribution(fields: dict[str, Any]) -> bool:
    counts = fields.get("counts", [0])
    figures = (fields[key] for key in ("lowest", "highest", "mean", "std") if "counts" in fields)
    return len(counts) > 0 and all(map(_is_number, (*counts, *figures)))


def _is_packed(value: Any) -> bool:
    try:
        return unpacked(value).ndim == 4
    except (ValueError, KeyError, TypeError):
        return False


LATEST = 253402300800  # seconds from the epoch to the year 10000
VALID = {"layers": _is_layers, "images": _is_packed}  # values of summaries.jsonl; all others are numbers


def last_value(points: Sequence[Point], key: str) -> Any:
    """The newest value of a metric; None if there is none."""
    return next((point.values[key] for point in reversed(points) if key in point.values), None)


def packed(images: NDArray[np.uint8]) -> dict[str, Any]:
    """Images as a value of a point that JSON can hold; `unpacked` reverses it."""
    return {"shape": images.shape, "bytes": b64encode(images.tobytes()).decode()}


def unpacked(value: dict[str, Any]) -> NDArray[np.uint8]:
    """The images that `packed` was given."""
    return np.frombuffer(b64decode(value["bytes"]), np.uint8).reshape(value["shape"])


def cut_back(path: Path, size: int) -> None:
    """Remove the points after a checkpoint, by the size that the file had then, so that no step is logged twice."""
    if path.exists() and path.stat().st_size > size:
        with open_in_place(path, "ab") as file:
            file.truncate(size)


def append_point(path: Path, point: dict[str, float]) -> None:
    """Add a line, after removing an incomplete line that a killed process left at the end."""
    with open_in_place(path) as file:
        file.seek(0)
        complete_size = file.read().rfind(b"\n") + 1
        file.truncate(complete_size)
        file.write(json.dumps(point).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
