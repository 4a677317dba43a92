"""How fast `pipeline preprocess` prepares many photographs, and what memory and disk it takes.

    python benchmarks/prepare.py SOURCE [--images 5000 --images 20000] [--size 224]

SOURCE is an archive or a folder of JPEGs, with train/ and test/. Each count of images is a folder of hard links to its
files, in the classes.
Memory: the largest sum over all processes of what each holds for itself and its part of what is shared (PSS), mapped
images included, which the system takes back when it needs memory. Disk: the largest size of the folder of datasets
while they are written, against that of the finished one. Last, what a million photographs would take, computed from
the two largest counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from image_folders import unpack
from machine import hardware, versions

from convline.cpus import usable_cpus


@dataclass(frozen=True)
class Preparation:
    """`disk` and `finished` in bytes of the dataset's folder: at most, and at the end."""

    images: int
    seconds: float
    memory: int
    disk: int
    finished: int


def main(
    source: Annotated[Path, typer.Argument(help="An archive or a folder of JPEGs.")],
    images: Annotated[list[int] | None, typer.Option(help="Default: 5000 and 20000.")] = None,
    size: int = 224,
) -> None:
    print(f"{hardware(usable_cpus())}; {versions('pillow', 'convline')}; stored at {size}x{size}")
    measured = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = sorted(unpack(source, folder / "unpacked").rglob("*.jpg"))
        for count in images or [5000, 20000]:
            measured.append(prepare(folder, linked(folder / f"photographs-{count}", files, count), count, size))
            print(line(measured[-1]), flush=True)
    if len(measured) > 1:
        small, large = sorted(measured, key=lambda each: each.images)[-2:]
        more = large.images - small.images
        seconds = large.seconds + (10**6 - large.images) * (large.seconds - small.seconds) / more
        print(
            f"a million, computed: {seconds / 60:.0f} min, {10**6 * large.finished / large.images / 1e9:.0f} GB on disk"
        )


def linked(folder: Path, files: list[Path], count: int) -> Path:
    for number in range(count):
        original = files[number % len(files)]
        link = folder / original.parent.name / f"{number:07}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(original, link)
    return folder


def prepare(folder: Path, source: Path, count: int, size: int) -> Preparation:
    words = ["preprocess", f"prepared-{count}", "--source", source.name, "--image-size", str(size), "--allow-leaks"]
    began, data = time.perf_counter(), folder / "data"
    output = subprocess.DEVNULL
    process = psutil.Popen([sys.executable, "-m", "pipeline", *words], cwd=folder, stdout=output, stderr=output)
    before, memory, disk = taken(data), 0, 0
    while process.poll() is None:
        memory, disk = max(memory, held(process)), max(disk, taken(data))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"pipeline {' '.join(words)} ended with {process.returncode}")
    return Preparation(count, time.perf_counter() - began, memory, disk - before, taken(data) - before)


def held(process: psutil.Process) -> int:
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


def taken(folder: Path) -> int:
    """Bytes on disk."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 512 * path.stat().st_blocks
        except FileNotFoundError:
            continue
    return total


def line(measured: Preparation) -> str:
    return (
        f"{measured.images:7,} images: {measured.seconds:6.1f} s, {measured.images / measured.seconds:5.0f} images/s, "
        f"memory {measured.memory / 1e6:,.0f} MB, disk at most {measured.disk / 1e6:,.0f} MB, "
        f"{measured.disk / measured.finished:.2f} times the dataset"
    )


if __name__ == "__main__":
    typer.run(main)
