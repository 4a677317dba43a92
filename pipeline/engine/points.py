"""Points of a curve in a file: JSON Lines, each with its step, time and values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """A line of a file of points, the `nth` (from 0) of its step in a row; `seconds` since the epoch."""

    step: int
    nth: int
    seconds: float
    values: dict[str, float]


def read_points(path: Path) -> Iterator[Point]:
    """The whole lines; none where there is no file."""
    if not path.exists():
        return
    last, nth = -1, 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                values = json.loads(line)
                step, seconds = values.pop("step"), values.pop("time")
                nth = nth + 1 if step == last else 0
                last = step
                yield Point(step, nth, seconds, values)


def append_point(path: Path, point: dict[str, float]) -> None:
    """Add a line; a torn one at the end, of a process that was killed, is cut off first."""
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(point).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
