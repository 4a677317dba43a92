"""Points of a curve in a file: JSON Lines, each with its step, time and values."""

from __future__ import annotations

import errno
import json
import os
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConvlineError
from serving.files import open_in_place


@dataclass(frozen=True)
class Point:
    """A line of a file of points, `offset` bytes into it, the `nth` (from 0) of its step in a row; `seconds` since
    the epoch."""

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
    """Appends points to a file. Raises ConvlineError where the disk is full."""

    def __init__(self, path: Path | str) -> None:
        # unbuffered: what was told is there, and a full disk is found at once
        self._file = open_in_place(Path(path), "ab", buffering=0)

    def write(self, step: int, values: dict[str, Any]) -> None:
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
        """Its size in bytes, all of which are on the disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def read_points(path: Path, after: Point | None = None) -> Iterator[Point]:
    """The whole lines; those `after` a point that was read before, if it still is where it was. None without a file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        last = after
        if after is not None:
            file.seek(after.offset)
            if not _is(file.readline(), after):  # cut back and written again
                file.seek(0)
                last = None
        offset = file.tell()
        for line in file:
            if (point := _point(line, offset, 0)) is None:
                return
            if last is not None and point.step == last.step:
                point = replace(point, nth=last.nth + 1)
            yield point
            last = point
            offset += len(line)


def _point(line: bytes, offset: int, nth: int) -> Point | None:
    """None for a line that is not whole."""
    if not line.endswith(b"\n"):
        return None
    values = json.loads(line)
    return Point(values.pop("step"), nth, values.pop("time"), values, offset)


def _is(line: bytes, point: Point) -> bool:
    try:
        return _point(line, point.offset, point.nth) == point
    except ValueError:  # it begins within another line
        return False


def last_value(points: Sequence[Point], key: str) -> Any:
    """The newest value of a metric; None where there is none."""
    return next((point.values[key] for point in reversed(points) if key in point.values), None)


def packed(images: NDArray[np.uint8]) -> dict[str, Any]:
    """Images as a value of a point."""
    return {"shape": images.shape, "bytes": b64encode(images.tobytes()).decode()}


def unpacked(value: dict[str, Any]) -> NDArray[np.uint8]:
    """The images that were packed."""
    return np.frombuffer(b64decode(value["bytes"]), np.uint8).reshape(value["shape"])


def cut_back(path: Path, size: int) -> None:
    """Forget the points after a checkpoint, so that no step stands twice."""
    if path.exists() and path.stat().st_size > size:
        with open_in_place(path, "ab") as file:
            file.truncate(size)


def append_point(path: Path, point: dict[str, float]) -> None:
    """Add a line; a torn one at the end, of a process that was killed, is cut off first."""
    with open_in_place(path) as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(point).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
