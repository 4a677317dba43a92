"""Folders of photographs as both sides of a benchmark take them, and what a command on them took."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.metrics import wilson_interval

SAMPLED_EVERY = 1.0  # seconds between two looks at the memory: each takes milliseconds of a CPU


@dataclass(frozen=True)
class Finished:
    """A command that ended well: when it `began` (seconds since the epoch), its `seconds`, what it printed, and the
    most memory that it and its children held together, in bytes: the sum of their proportional set sizes, in which a
    page that several of them share counts once."""

    began: float
    seconds: float
    output: str
    memory: int

    def last_line(self) -> Any:
        return json.loads(self.output.splitlines()[-1])


def finish(folder: Path, *words: object) -> Finished:
    """Run `python words…` in `folder`, in the environment of a user."""
    printed = folder / "printed.txt"
    began, memory = time.time(), 0
    with printed.open("w") as output, (folder / "log.txt").open("w") as log:
        command = [sys.executable, *map(str, words)]
        process = psutil.Popen(command, cwd=folder, env=user_environment(), stdout=output, stderr=log)
        while True:
            try:
                status = process.wait(SAMPLED_EVERY)
                break
            except psutil.TimeoutExpired:
                memory = max(memory, held(process))
    seconds = time.time() - began
    if status:
        said = (folder / "log.txt").read_text()[-2000:]
        raise RuntimeError(f"{' '.join(map(str, words))} ended with status {status}: {said}")
    return Finished(began, seconds, printed.read_text(), memory)


def user_environment() -> dict[str, str]:
    """The environment without what this process sets for itself."""
    return {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}


def held(process: psutil.Process) -> int:
    """The memory of a process and its children now, in bytes."""
    return sum(held_by_each(process))


def held_by_each(process: psutil.Process) -> list[int]:
    """The memory of a process, and of each of its children, now, in bytes."""
    sizes = []
    with suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # ended in between
                sizes.append(each.memory_full_info().pss)
    return sizes


def pipeline(folder: Path, *words: object) -> Finished:
    return finish(folder, "-m", "pipeline", *words)


def unpack(source: Path, target: Path) -> Path:
    """The folder that holds train and test, of a folder or an archive, which is unpacked into `target`."""
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(target, filter="data")
        source = target
    for folder in [source, *source.iterdir()]:
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return folder
    raise FileNotFoundError(f"{source} has no folders train and test")


def right(evaluation: dict[str, Any]) -> tuple[int, int]:
    """How many images of how many, by what `pipeline evaluate --json` prints."""
    return round(evaluation["precision_at_1"] * evaluation["count"]), evaluation["count"]


def share_of(right: int, count: int) -> str:
    lowest, highest = wilson_interval(right, count)
    return f"{right / count:6.1%} ({lowest:.1%} to {highest:.1%})"
