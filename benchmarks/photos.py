"""Fine-tuning on photographs: this project's recipe `photos` against a loop of timm's parts, in one call, in turns.

    python benchmarks/photos.py SOURCE [--rounds 3] [--steps 40] [--trainings 1] [--threads 2]

SOURCE is a .tar, or a folder, that holds train/<class>/… and test/<class>/…. Both sides start from the same pretrained
weights, with the same image size, batch, number of steps, optimiser, label smoothing, frozen statistics and moving
average, all as the recipe has them, each as a process of its own:
    convline    `pipeline preprocess`, then `pipeline train photos`
    timm        contenders/timm_loop.py: timm's dataset, loader (a worker for each CPU), optimiser, schedule, average

Measured:
    fine-tuning      images/s with all layers learning, decoding and augmentation included, after the first steps
    frozen phase     images/s while only the head learns. convline computes the backbone's outputs once for each image,
                     unaugmented, and then trains the head on them: the rate is that of the whole phase, the first
                     computation included. timm's users compute the frozen backbone at every step, on augmented images
    whole training   seconds from SOURCE to a trained model: preparing or unpacking, start-up, all steps of the recipe;
                     the accuracy on test, by the average; the most memory (see image_folders.py)
Both train on all training images and evaluate once, at the end, which is not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from image_folders import Finished, finish, pipeline, right, share_of, unpack
from machine import hardware, versions

from convline.cpus import usable_cpus
from models import TIMM
from pipeline.dataset import Dataset
from pipeline.pretrained.packages import packaged_weights
from pipeline.pretrained.weight_names import PACKAGE
from pipeline.recipe import Recipe, load
from pipeline.recipe_sections import AugmentSection, ColorJitter
from pipeline.tracking.points import read_points

LOOP = Path(__file__).parent / "contenders/timm_loop.py"
WARM_UP = 10  # steps of each phase that are not counted
# train on all images, without evaluations in between
SETTINGS = ["data.validation=0", "train.evaluate_every=0", "train.keep=last", "train.patience=0"]


@dataclass(frozen=True)
class Rates:
    """Images/s of the two phases."""

    frozen: float
    fine_tuning: float


@dataclass(frozen=True)
class Whole:
    """A whole training: see the top of this file."""

    seconds: float
    right: int
    count: int
    memory: int


def main(
    source: Annotated[Path, typer.Argument(help="A .tar or a folder of photographs, with train and test.")],
    rounds: int = 3,
    steps: Annotated[int, typer.Option(help="Of each phase, that are timed in a round.")] = 40,
    trainings: Annotated[int, typer.Option(help="Whole trainings of each side.")] = 1,
    threads: int | None = None,
) -> None:
    threads = threads or usable_cpus()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    print(f"{hardware(threads)}; {versions('torch', 'torchvision', 'timm', 'pillow', 'convline')}")
    recipe = load("photos", SETTINGS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = unpack(source.resolve(), folder / "unpacked")
        prepare(folder, source, recipe)
        count = len(Dataset.open(folder / "data", recipe.data.dataset).split("train"))
        recipe = recipe.model_copy(update={"train": recipe.train.with_steps(count)})
        compare_rates(folder, images, recipe, rounds, steps, threads)
        if trainings:
            compare_trainings(folder, source.resolve(), recipe, trainings, threads)


def compare_rates(folder: Path, images: Path, recipe: Recipe, rounds: int, steps: int, threads: int) -> None:
    pairs = [
        (convline_rates(folder, recipe, steps, threads), timm_rates(folder, images, recipe, steps, threads))
        for _ in range(rounds)
    ]
    print(f"\nimages/s, batches of {recipe.train.batch_size}: medians of {rounds} rounds of {steps} steps")
    print(f"{'':16}{'convline':>22}{'timm':>22}{'ratio':>9}")
    for what in ("frozen", "fine_tuning"):
        sides = [[getattr(rates, what) for rates in side] for side in zip(*pairs, strict=True)]
        ratio = statistics.median(ours / theirs for ours, theirs in zip(*sides, strict=True))
        cells = "".join(f"{spread(side):>22}" for side in sides)
        print(f"{what.replace('_', '-'):16}{cells}{ratio:8.2f}×", flush=True)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.1f} ({min(values):,.1f}–{max(values):,.1f})"


def compare_trainings(folder: Path, source: Path, recipe: Recipe, trainings: int, threads: int) -> None:
    settings = recipe.train
    print(f"\nwhole trainings, {settings.frozen_steps} frozen steps of {settings.steps}")
    print(f"{'':10}{'seconds':>9}{'test accuracy, 95% interval':>32}{'memory':>12}")
    ratios = []
    for number in range(trainings):
        sides = {
            "convline": convline_whole(folder / f"whole-{number}", source, recipe, threads, number),
            "timm": timm_whole(folder / f"timm-{number}", source, recipe, threads, number),
        }
        for side, whole in sides.items():
            shown = share_of(whole.right, whole.count)
            print(f"{side:10}{whole.seconds:9.0f}{shown:>32}{whole.memory / 1e6:9,.0f} MB", flush=True)
        ours, theirs = sides.values()
        ratios.append((theirs.seconds / ours.seconds, theirs.memory / ours.memory))
    faster, smaller = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"convline is {faster:.2f}× as fast, and timm holds {smaller:.2f}× the memory")


def prepare(folder: Path, source: Path, recipe: Recipe) -> Finished:
    size: list[object] = ["--image-size", recipe.data.image_size] if recipe.data.image_size else []
    return pipeline(folder, "preprocess", recipe.data.dataset, "--source", source.resolve(), *size)


def train(folder: Path, recipe: Recipe, steps: int, threads: int, seed: int = 0) -> Finished:
    settings = [*SETTINGS, f"train.steps={steps}", f"train.seed={seed}"]
    words = [word for setting in settings for word in ("--set", setting)]
    return pipeline(
        folder, "train", recipe.name, "--overwrite", "--tracking", "none", "--threads", str(threads), *words
    )


def convline_rates(folder: Path, recipe: Recipe, steps: int, threads: int) -> Rates:
    """The frozen phase in full, because its beginning costs more than its steps."""
    frozen, every = recipe.train.frozen_steps, recipe.train.log_every
    warm_up = every * -(-WARM_UP // every)
    train(folder, recipe, frozen + warm_up + steps + every, threads)
    logged = [point for point in read_points(folder / f"runs/{recipe.name}/metrics.jsonl") if "loss" in point.values]
    batch = recipe.train.batch_size
    in_frozen = [point for point in logged if point.step < frozen]
    after = [point for point in logged if point.step >= frozen + warm_up]
    tuned = (after[-1].step - after[0].step) * batch
    seconds = after[-1].values["elapsed"] - after[0].values["elapsed"]
    rate = (in_frozen[-1].step + 1) * batch / in_frozen[-1].values["elapsed"] if in_frozen else float("nan")
    return Rates(rate, tuned / seconds)


def timm_rates(folder: Path, images: Path, recipe: Recipe, steps: int, threads: int) -> Rates:
    """As many steps in each phase: every step costs the same."""
    each = WARM_UP + steps
    frozen = each if recipe.train.frozen_steps else 0
    ended = timm(folder, images, recipe, frozen, frozen + each, threads).last_line()["ended"]

    def rate(first: int, last: int) -> float:
        return (last - first) * recipe.train.batch_size / (ended[last] - ended[first])

    return Rates(
        rate(WARM_UP - 1, frozen - 1) if frozen else float("nan"), rate(frozen + WARM_UP - 1, frozen + each - 1)
    )


def timm(folder: Path, images: Path, recipe: Recipe, frozen: int, steps: int, threads: int, seed: int = 0) -> Finished:
    settings = folder / "settings.json"
    settings.write_text(json.dumps(timm_settings(recipe, frozen, steps, threads, seed)))
    return finish(folder, LOOP, images, settings)


def timm_settings(recipe: Recipe, frozen: int, steps: int, threads: int, seed: int) -> dict[str, Any]:
    """The recipe for timm's loop. Refuses what that loop does not do."""
    weights = packaged_weights()[recipe.model.weights.removeprefix(PACKAGE)]
    augment, optimizer = recipe.augment, recipe.optimizer
    crop, jitter = augment.resized_crop, augment.color_jitter
    known = {"resized_crop", "flip", "color_jitter", "erasing", "mixup", "cutmix", "while_frozen"}
    rest = augment.model_copy(update={field: getattr(AugmentSection(), field) for field in known})
    if rest != AugmentSection() or crop is None or (optimizer.name, recipe.schedule.name) != ("adamw", "cosine"):
        raise typer.BadParameter(f"timm_loop.py does not know all that {recipe.name} does; teach it")
    warmup = recipe.schedule.warmup
    return {
        "network": recipe.model.name.removeprefix(TIMM),
        "weights": str(weights.path()),
        "threads": threads,
        "workers": threads,
        "size": recipe.data.image_size or weights.image_size,
        "mean": weights.mean,
        "std": weights.std,
        "crop_pct": weights.crop_pct,
        "interpolation": weights.interpolation,
        "scale": crop.scale,
        "ratio": crop.ratio,
        "flip": 0.5 if augment.flip else 0.0,
        "color_jitter": None if jitter == ColorJitter() else list(jitter.model_dump().values()),
        "erasing": augment.erasing,
        "mixup": augment.mixup,
        "cutmix": augment.cutmix,
        "batch": recipe.train.batch_size,
        "frozen_steps": frozen,
        "steps": steps,
        "learning_rate": optimizer.learning_rate,
        "head_multiplier": optimizer.head_multiplier,
        "layer_decay": optimizer.layer_decay if optimizer.layer_decay < 1 else None,
        "weight_decay": optimizer.weight_decay,
        "warmup": warmup if isinstance(warmup, float) else warmup / steps,
        "label_smoothing": recipe.train.label_smoothing,
        "average_decay": recipe.train.average_decay,
        "freeze_statistics": recipe.train.freeze_statistics,
        "seed": seed,
    }


def convline_whole(folder: Path, source: Path, recipe: Recipe, threads: int, seed: int) -> Whole:
    folder.mkdir()
    prepared = prepare(folder, source, recipe)
    trained = train(folder, recipe, recipe.train.steps, threads, seed)
    evaluated = pipeline(folder, "evaluate", recipe.name, "--json")
    memory = max(prepared.memory, trained.memory)
    return Whole(prepared.seconds + trained.seconds, *right(json.loads(evaluated.output)), memory)


def timm_whole(folder: Path, source: Path, recipe: Recipe, threads: int, seed: int) -> Whole:
    folder.mkdir()
    began = time.perf_counter()
    images = unpack(source, folder / "unpacked")
    unpacked = time.perf_counter() - began
    done = timm(folder, images, recipe, recipe.train.frozen_steps, recipe.train.steps, threads, seed)
    told = done.last_line()
    return Whole(unpacked + told["ended"][-1], told["right"], told["count"], done.memory)


if __name__ == "__main__":
    typer.run(main)
