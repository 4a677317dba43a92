"""A command that is watched while it runs: its memory, and how far its output has come."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from image_folders import SAMPLED_EVERY, held_by_each, user_environment

LOOKED_EVERY = 0.05  # seconds between two looks at the output


@dataclass(frozen=True)
class Memory:
    """What all processes of a command, and the largest of them, held when `done` bytes of its output were written."""

    done: int
    total: int
    largest: int


@dataclass
class Course:
    """How a command went. `growth`: the seconds since it began at which its output had another size than before, and
    that size in bytes, the first one included; `printed`: its standard output."""

    seconds: float = 0.0
    printed: str = ""
    growth: list[tuple[float, int]] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)

    @property
    def most_done(self) -> int:
        return max(size for _, size in self.growth)

    def reached(self, size: int) -> float:
        """The seconds after which the output had `size` bytes."""
        return next(seconds for seconds, done in self.growth if done >= size)

    def first_growth(self) -> float:
        """The seconds after which the output first grew; it may have been cut before."""
        least = self.growth[0][1]
        for seconds, size in self.growth:
            if size > least:
                return seconds
            least = min(least, size)
        raise ValueError("the output has not grown")

    def memory_at(self, size: int) -> int:
        """What all processes held when the output first had `size` bytes, or at the next sample."""
        return next((sample.total for sample in self.memory if sample.done >= size), self.memory[-1].total)


def watch(folder: Path, done: Callable[[], int], *words: object, kill_at: int | None = None) -> Course:
    """Run `python words…` in `folder`, as a user does, and look at it until it ends. `done` tells the size of its
    output. When that is `kill_at`, the process and all that it has started are killed.

    Raises RuntimeError if it fails, and if it ends before it could be killed.
    """
    printed, log = folder / "printed.txt", folder / "log.txt"
    course, began, next_sample = Course(), time.monotonic(), 0.0
    with printed.open("w") as output, log.open("w") as errors:
        command = [sys.executable, *map(str, words)]
        process = psutil.Popen(
            command, cwd=folder, env=user_environment(), stdout=output, stderr=errors, start_new_session=True
        )
        while process.poll() is None:
            seconds, size = time.monotonic() - began, done()
            if not course.growth or size != course.growth[-1][1]:
                course.growth.append((seconds, size))
            if kill_at is not None and size >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                course.seconds = time.monotonic() - began
                return course
            if seconds >= next_sample and (held := held_by_each(process)):
                course.memory.append(Memory(size, sum(held), max(held)))
                next_sample = time.monotonic() - began + SAMPLED_EVERY
            time.sleep(LOOKED_EVERY)
    course.seconds, course.printed = time.monotonic() - began, printed.read_text()
    if process.returncode or kill_at is not None:
        said = log.read_text()[-2000:]
        raise RuntimeError(f"{' '.join(map(str, words))} ended with status {process.returncode}: {said}")
    return course
