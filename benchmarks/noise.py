"""Datasets of noise, whose speed is that of any other images, and trainings on them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from subprocess import DEVNULL

import numpy as np
from PIL import Image

from pipeline.recipe import load
from pipeline.tracking.points import read_points


def make_noise(folder: Path, name: str, side: int, mode: str, classes: int = 10, each: int = 500) -> None:
    """A prepared dataset of noise: its speed is that of any other images."""
    draw = np.random.default_rng(0)
    with tarfile.open(folder / f"{name}.tar", "w") as packed:
        for number in range(classes * each):
            pixels = draw.integers(0, 256, (side, side, 3) if mode == "RGB" else (side, side), np.uint8)
            file = BytesIO()
            Image.fromarray(pixels, mode).save(file, "PNG")
            member = tarfile.TarInfo(f"{number % classes}/{number}.png")
            member.size = file.tell()
            file.seek(0)
            packed.addfile(member, file)
    command = [sys.executable, "-m", "pipeline", "preprocess", name, "--source", f"{name}.tar"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@dataclass(frozen=True)
class Timing:
    """Of the timed steps of a training: seconds a step, when they `began` and `ended` (seconds since the epoch), and
    the most memory that the process ever held, in bytes."""

    seconds: float
    began: float
    ended: float
    memory: int


def timed(
    folder: Path,
    recipe: str,
    dataset: str,
    steps: int,
    *options: str,
    prefix: Sequence[str] = (),
    tracking: str = "none",
) -> Timing:
    """`pipeline train` by the times of its points; the first steps warm it up."""
    warm_up = 2 * max(10, load(recipe).train.log_every)
    settings = ["data.validation=0", "train.evaluate_every=0", f"train.steps={warm_up + steps + 1}"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["-m", "pipeline", "train", recipe, "--dataset", dataset, "--overwrite", "--tracking", tracking]
    process = subprocess.Popen(
        [*prefix, sys.executable, *command, *options, *words], cwd=folder, stdout=DEVNULL, stderr=DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"pipeline train {recipe} {shlex.join(options)} ended with wait status {status}")
    logged = read_points(folder / f"runs/{recipe}/metrics.jsonl")
    points = {point.step: point for point in logged if "loss" in point.values}
    first, last = points[warm_up], points[warm_up + steps]
    seconds = (last.values["elapsed"] - first.values["elapsed"]) / steps
    return Timing(seconds, first.seconds, last.seconds, usage.ru_maxrss * 1024)
