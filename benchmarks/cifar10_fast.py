"""cifar10-fast against airbench's own network and loop: minutes to 90% on the same images and machine, in turns.

    pip install airbench
    python benchmarks/cifar10_fast.py ARCHIVE [--seeds 3] [--airbench-epochs 9.9] [--threads 2]

ARCHIVE holds CIFAR-10's images, train/<class>/… and test/<class>/…. Each side is a process of its own:
    convline    `pipeline train cifar10-fast`, then `pipeline evaluate`
    airbench    contenders/airbench_loop.py: airbench94 of the package `airbench`

Seconds are those of the whole process for convline (start-up, checkpoints and its own evaluation at the end
included), and of the training alone for airbench. Both compute in the same precision, the faster one of this machine
unless --precision says otherwise, and classify each test image together with its mirror image. Epochs of both can be
changed, to see what fewer of them reach.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from image_folders import finish, pipeline, right, share_of
from machine import hardware, versions

from convline.cpus import usable_cpus
from pipeline.device import native_precision
from pipeline.recipe import load

SCRIPT = Path(__file__).parent / "contenders/airbench_loop.py"
RECIPE, DATASET = "cifar10-fast", "cifar10-images"
AIRBENCH_EPOCHS = 9.9  # of airbench94 itself


@dataclass(frozen=True)
class Training:
    seconds: float
    right: int
    count: int


Side = Callable[[int], Training]  # of a seed


def main(
    archive: Annotated[Path, typer.Argument(help="CIFAR-10 as images, with train and test.")],
    seeds: int = 3,
    epochs: Annotated[float | None, typer.Option(help="Of convline; default: the recipe's.")] = None,
    airbench_epochs: Annotated[float, typer.Option(help="Of airbench; 0 leaves it out.")] = AIRBENCH_EPOCHS,
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: the machine's faster one.")
    ] = None,
    threads: int | None = None,
) -> None:
    threads = threads or usable_cpus()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    precision = precision or native_precision(torch.device("cpu"))
    epochs = epochs or load(RECIPE).train.epochs
    print(f"{hardware(threads)}; {versions('torch', 'airbench', 'convline')}")
    print(f"in {precision}; convline {epochs:g} epochs, airbench {airbench_epochs:g}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = pipeline(folder, "preprocess", DATASET, "--source", archive.resolve())
        print(f"prepared in {prepared.seconds:.0f} s, which is not counted")
        settings = [f"train.epochs={epochs}", f"train.precision={precision}"]
        dataset = folder / "data" / DATASET
        sides: dict[str, Side] = {"convline": lambda seed: convline(folder, seed, threads, settings)}
        if airbench_epochs:
            sides["airbench"] = lambda seed: airbench(folder, dataset, airbench_epochs, seed, threads, precision)
        trained: dict[str, list[Training]] = {name: [] for name in sides}
        print(f"\n{'':10}{'seed':>5}{'minutes':>9}{'precision @ 1 on test, 95% interval':>40}")
        for seed in range(seeds):
            for name, side in sides.items():
                done = side(seed)
                trained[name].append(done)
                shown = share_of(done.right, done.count)
                print(f"{name:10}{seed:5}{done.seconds / 60:9.1f}{shown:>40}", flush=True)
    print(f"\nmeans of {seeds} seeds")
    minutes = {name: statistics.mean(each.seconds for each in results) / 60 for name, results in trained.items()}
    for name, results in trained.items():
        shares = [each.right / each.count for each in results]
        ratio = f"{minutes[name] / minutes['convline']:8.2f}×"
        print(f"{name:10}{minutes[name]:8.1f} min{ratio}{statistics.mean(shares):9.2%}")


def convline(folder: Path, seed: int, threads: int, settings: list[str]) -> Training:
    words = [word for setting in settings for word in ("--set", setting)]
    options = ["--dataset", DATASET, "--overwrite", "--tracking", "none", "--threads", threads, "--seed", seed]
    trained = pipeline(folder, "train", RECIPE, *options, *words)
    return Training(trained.seconds, *right(json.loads(pipeline(folder, "evaluate", RECIPE, "--json").output)))


def airbench(folder: Path, dataset: Path, epochs: float, seed: int, threads: int, precision: str) -> Training:
    told = finish(folder, SCRIPT, dataset, epochs, seed, threads, precision).last_line()
    return Training(told["seconds"], told["right"], told["count"])


if __name__ == "__main__":
    typer.run(main)
