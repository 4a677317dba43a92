"""Training on photographs without pretrained weights: the recipe `photos-scratch` against a script of torchvision's
parts, in the same time on the same machine, in turns.

    python benchmarks/photos_scratch.py SOURCE [--minutes 5] [--seeds 3] [--size 64] [--threads 2]

SOURCE is a .tar, or a folder, that holds train/<class>/… and test/<class>/…. Each side is a process of its own:
    convline       `pipeline preprocess`, then `pipeline train photos-scratch`
    torchvision    contenders/torchvision_script.py: ImageFolder, resized crops, flips, colour jitter, AdamW,
                   OneCycleLR, label smoothing, resnet18

A training has so many minutes, from the start of its process to its last step; of convline's, preparing the images is a
part. A short training of each side beforehand tells how many epochs that is, so that the learning rates fall to their
end in time. Both train on all training images, and evaluate once, at the end, which is not counted. Printed are the
seconds that it took after all, and the accuracy on test with its 95% interval (Wilson's).

It takes 2 × seeds × minutes, and 2 minutes: 32 minutes by default.
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

import typer
from image_folders import finish, pipeline, right, share_of, unpack
from machine import hardware, versions

from convline.cpus import usable_cpus
from pipeline.tracking.points import read_points

SCRIPT = Path(__file__).parent / "contenders/torchvision_script.py"
RECIPE, DATASET = "photos-scratch", "photographs"
CALIBRATED = 4  # epochs of the short training


@dataclass(frozen=True)
class Training:
    """`begun`: seconds up to the first step, preparing included. `seconds`: of all steps."""

    begun: float
    seconds: float
    right: int
    count: int


Side = Callable[[int, int], Training]  # of epochs and a seed


def main(
    source: Annotated[Path, typer.Argument(help="A .tar or a folder of photographs, with train and test.")],
    minutes: Annotated[float, typer.Option(help="Of each training.")] = 5.0,
    seeds: int = 3,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 64,
    threads: int | None = None,
) -> None:
    threads = threads or usable_cpus()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    print(f"{hardware(threads)}; {versions('torch', 'torchvision', 'timm', 'pillow', 'convline')}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = unpack(source.resolve(), folder / "unpacked")
        sides: dict[str, Side] = {
            "convline": lambda epochs, seed: convline(folder, source.resolve(), size, epochs, seed, threads),
            "torchvision": lambda epochs, seed: torchvision(folder, images, size, epochs, seed, threads),
        }
        epochs = {name: affordable(side, 60 * minutes) for name, side in sides.items()}
        print(f"\n{minutes:g} minutes for each training, images of {size}x{size}")
        print(f"{'':13}{'seed':>5}{'epochs':>8}{'seconds':>9}{'test accuracy, 95% interval':>32}")
        trained: dict[str, list[Training]] = {name: [] for name in sides}
        for seed in range(seeds):
            for name, side in sides.items():
                done = side(epochs[name], seed)
                trained[name].append(done)
                seconds, shown = done.begun + done.seconds, share_of(done.right, done.count)
                print(f"{name:13}{seed:5}{epochs[name]:8,}{seconds:9.0f}{shown:>32}", flush=True)
    print(f"\nmeans of {seeds} seeds")
    for name, results in trained.items():
        shares = [each.right / each.count for each in results]
        print(f"{name:13}{statistics.mean(shares):8.1%} ({min(shares):.1%} to {max(shares):.1%})")


def affordable(side: Side, seconds: float) -> int:
    """How many epochs a side can train in so many seconds."""
    short = side(CALIBRATED, 0)
    return max(1, int((seconds - short.begun) * CALIBRATED / short.seconds))


def convline(folder: Path, source: Path, size: int, epochs: int, seed: int, threads: int) -> Training:
    prepared = pipeline(folder, "preprocess", DATASET, "--source", source, "--image-size", size, "--overwrite")
    settings = ["data.validation=0", "train.evaluate_every=0", f"train.epochs={epochs}", f"train.seed={seed}"]
    words = [word for setting in settings for word in ("--set", setting)]
    options = ["--dataset", DATASET, "--overwrite", "--tracking", "none", "--threads", threads]
    trained = pipeline(folder, "train", RECIPE, *options, *words)
    points = [point for point in read_points(folder / f"runs/{RECIPE}/metrics.jsonl") if "elapsed" in point.values]
    last = points[-1]
    seconds = last.values["elapsed"]
    evaluated = pipeline(folder, "evaluate", RECIPE, "--json")
    begun = prepared.seconds + last.seconds - seconds - trained.began
    return Training(begun, seconds, *right(json.loads(evaluated.output)))


def torchvision(folder: Path, images: Path, size: int, epochs: int, seed: int, threads: int) -> Training:
    words = ["--epochs", epochs, "--size", size, "--seed", seed, "--threads", threads]
    told = finish(folder, SCRIPT, images, *words).last_line()
    return Training(told["seconds_to_begin"], told["seconds"], told["right"], told["count"])


if __name__ == "__main__":
    typer.run(main)
