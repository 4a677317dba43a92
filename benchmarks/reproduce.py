"""Reproduce the published figures: train, evaluate and export each recipe, and write docs/reproduction.md.

    python benchmarks/reproduce.py                         # everything that is not done yet
    python benchmarks/reproduce.py mlp cifar10 --folder /scratch

It can be killed and started again: trainings go on from their checkpoints, finished ones are not repeated.
MNIST is downloaded (--mirror), CIFAR-10 given as an archive of images (--cifar). A result is a file of
benchmarks/results/reproduction; the page is made of all of them, whenever and wherever they were measured, and
of findings.md beside them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import hardware, versions
from matplotlib.figure import Figure

from convline.files import atomic_write
from pipeline import checkpoint
from pipeline.dataset import Split
from pipeline.device import choose_device
from pipeline.metrics import evaluate
from pipeline.network import network_from_checkpoint, predictor
from pipeline.recipe import Recipe, differences, load, names, parse
from pipeline.run import Run
from pipeline.tracking.points import read_points

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/reproduction"
FINDINGS = RESULTS / "findings.md"
PAGE = ROOT / "docs/reproduction.md"

SHORT = ("train.steps=23437", "train.average_decay=0.9996", "train.evaluate_every=1000")
JPEG = "trained and tested on a JPEG copy of CIFAR-10 (quality 75, 4:2:0), not on the official lossless images"
SHORTENED = (
    f"{JPEG}; 23,437 steps (60 epochs) instead of 100,000 (256 epochs), as the machine has no GPU. The average spans "
    "the same share of the training, a tenth (0.9996 instead of 0.9999); the learning rate stays at 0.1, as it does in "
    "the published steps, whose schedule would lower it after 350 epochs"
)
UNRUN = {"svhn": "its archives could not be had where the others were run; its reader is tested on small ones"}


@dataclass(frozen=True)
class Planned:
    """A training of `recipe`; `settings` and `dataset` where it differs from it, `note` says why."""

    recipe: str
    seed: int | None = None
    dataset: str | None = None
    settings: tuple[str, ...] = ()
    note: str = ""
    suffix: str = field(default="", kw_only=True)

    @property
    def run(self) -> str:
        return self.recipe + ("" if self.seed is None else f"-seed{self.seed}") + self.suffix

    def resolved(self) -> Recipe:
        """The recipe as it is trained."""
        given = [] if self.seed is None else [f"train.seed={self.seed}"]
        given += [] if self.dataset is None else [f"data.dataset={self.dataset}"]
        return load(self.recipe, [*self.settings, *given])

    @property
    def options(self) -> list[str]:
        given = ["--run", self.run, *(word for setting in self.settings for word in ("--set", setting))]
        given += [] if self.seed is None else ["--seed", str(self.seed)]
        return given + ([] if self.dataset is None else ["--dataset", self.dataset])


PLAN = [
    Planned("digits"),
    Planned("softmax-regression"),
    Planned("softmax-regression-1000"),
    Planned("mlp"),
    *(Planned("simple-convnet", seed) for seed in range(5)),
    Planned("slides-convnet"),
    Planned("deep-mnist"),
    Planned("deep-mnist", seed=1),
    Planned("cifar10", dataset="cifar10-jpg", settings=SHORT, note=SHORTENED),
    Planned("cifar10-local", dataset="cifar10-jpg", settings=SHORT, note=SHORTENED),
]
FULL = [Planned(recipe, dataset="cifar10-jpg", note=JPEG, suffix="-full") for recipe in ("cifar10", "cifar10-local")]


def main(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipes; default: all.")] = None,
    folder: Annotated[Path, typer.Option(help="Where data and runs are kept.")] = Path("reproduction"),
    mirror: Annotated[str | None, typer.Option(help="Where MNIST is downloaded from first.")] = None,
    cifar: Annotated[
        Path | None, typer.Option(help="Archive or folder of CIFAR-10's images, train/ and test/.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="CIFAR-10 in full length: 100,000 steps.")] = False,
) -> None:
    if unknown := set(recipes or ()) - set(names()):
        raise typer.BadParameter(f"there is no recipe {sorted(unknown)[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    for planned in FULL if full else PLAN:
        if recipes and planned.recipe not in recipes:
            continue
        result = RESULTS / f"{planned.run}.json"
        if not is_current(result, planned):
            prepare(planned, folder, mirror, cifar)
            measured = measure(planned, folder)
            RESULTS.mkdir(parents=True, exist_ok=True)
            with atomic_write(result, "w") as file:
                json.dump(measured, file, indent=2)
        write_page()


def is_current(result: Path, planned: Planned) -> bool:
    """Whether a result is there, and of the recipe as it is now."""
    if not result.exists():
        return False
    measured = parse(json.loads(result.read_text())["recipe"], str(result))
    return not differences(measured, planned.resolved())


def pipeline(folder: Path, *words: object, output: bool = False) -> str:
    """Run a command of the pipeline in `folder`; its standard output where `output` asks for it."""
    command = [sys.executable, "-m", "pipeline", *map(str, words)]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE if output else None, text=True)
    return done.stdout or ""


def prepare(planned: Planned, folder: Path, mirror: str | None, cifar: Path | None) -> None:
    dataset = planned.dataset or load(planned.recipe).data.dataset
    if (folder / "data" / dataset).exists():
        return
    source: list[object] = ["--mirror", mirror] if mirror else []
    if dataset == "cifar10-jpg":
        if cifar is None:
            raise typer.BadParameter("CIFAR-10 as images: give --cifar ARCHIVE")
        source = ["--source", cifar.resolve()]
    pipeline(folder, "preprocess", dataset, *source)


def measure(planned: Planned, folder: Path) -> dict[str, Any]:
    """Train (or go on; anew where it was another recipe), evaluate both weights on test, export."""
    there = folder / "runs" / planned.run
    is_other = there.exists() and differences(Run.open(there).recipe, planned.resolved())
    resumed = "--overwrite" if is_other else "--resume"
    raw = train(planned, folder, resumed)
    pipeline(folder, "export", planned.run)
    figures = {
        weights: json.loads(pipeline(folder, "evaluate", planned.run, "--weights", weights, "--json", output=True))
        for weights in ("averaged", "raw")
    }
    run = Run.open(folder / "runs" / planned.run)
    points = list(read_points(run.metrics))
    state = checkpoint.load_newest(run.folder / "checkpoints")
    assert state is not None
    return {
        "plan": asdict(planned),
        "recipe": run.recipe.to_dict(),
        "steps": run.recipe.train.steps,
        "seed": run.recipe.train.seed,
        "precision_at_1": {weights: figure["precision_at_1"] for weights, figure in figures.items()},
        "test_images": figures["raw"]["count"],
        "seconds": next(point.values["training_seconds"] for point in points if "training_seconds" in point.values),
        "parity": json.loads((run.folder / "parity.json").read_text())["probability_difference"]["largest"],
        "hardware": hardware(state["threads"]),
        "versions": f"Python {platform.python_version()}, {versions('torch', 'convline')}",
        "curve": {
            name: thinned([(point.step, point.values[name]) for point in points if name in point.values])
            for name in ("smoothed_loss", "precision_at_1")
        }
        | ({"raw_precision_at_1": raw} if raw else {}),
    }


def train(planned: Planned, folder: Path, resumed: str) -> list[tuple[int, float]]:
    """Train. Where the plan is of full length, also the precision @ 1 of the raw weights at those steps of this call at
    which the averaged ones are evaluated: a training keeps its newest checkpoints alone, so all are kept beside it."""
    there, kept = folder / "runs" / planned.run / "checkpoints", folder / "kept" / planned.run
    kept.mkdir(parents=True, exist_ok=True)
    words = ["train", planned.recipe, resumed, "--tracking", "none", *planned.options]
    process = subprocess.Popen([sys.executable, "-m", "pipeline", *words], cwd=folder)
    recipe = planned.resolved()
    running = planned in FULL
    while running:
        running = process.poll() is None  # and once more after its end
        for path in checkpoint.paths(there):
            is_evaluated = checkpoint.step_of(path) % recipe.train.evaluate_every == 0
            if is_evaluated and not (kept / path.name).exists():
                os.link(path, kept / path.name)
        time.sleep(0.2)
    if process.wait():
        raise SystemExit(f"pipeline {' '.join(words)} ended with {process.returncode}")
    run = Run.open(there.parent)
    split = run.dataset(folder / "data").split("test")
    saved = [(checkpoint.step_of(path), checkpoint.load(path)) for path in checkpoint.paths(kept)]
    return [(step, precision(run, state, "raw", split)) for step, state in saved if state is not None]


def precision(run: Run, state: dict[str, Any], weights: str, split: Split) -> float:
    device = choose_device("auto")
    network = network_from_checkpoint(run, state, weights).to(device)
    return evaluate(predictor(network, device), split, run.classes).precision_at(1)


def thinned(points: list[tuple[int, float]], most: int = 200) -> list[tuple[int, float]]:
    return [*points[: -1 : max(1, len(points) // most)], *points[-1:]]


def write_page() -> None:
    """docs/reproduction.md and its pictures, from every result there is."""
    planned = {plan.run: number for number, plan in enumerate([*PLAN, *FULL])}
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    results.sort(key=lambda result: planned.get(Planned(**result["plan"]).run, len(planned)))
    recipes = list(dict.fromkeys(result["plan"]["recipe"] for result in results))
    for recipe in recipes:
        draw(recipe, [result for result in results if result["plan"]["recipe"] == recipe])
    with atomic_write(PAGE, "w") as file:
        file.write("\n".join(page(results, recipes)) + "\n")


def page(results: list[dict[str, Any]], recipes: list[str]) -> list[str]:
    notes = list(dict.fromkeys(result["plan"]["note"] for result in results if result["plan"]["note"]))
    lines = [
        "# Reproduction",
        "",
        "Each system of the sources, trained by its recipe: precision @ 1 on the whole test split, of the averaged and",
        "of the raw weights. Written by `benchmarks/reproduce.py` from the files of `benchmarks/results/reproduction`.",
        "Times are of the whole training, evaluations in between included, on a machine that had other work besides;",
        "the published ones are of other machines.",
        "",
        "| recipe | published | published time | averaged | raw | time | steps | seed | run on |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        plan, figures, published = result["plan"], result["precision_at_1"], load(result["plan"]["recipe"]).published
        mark = f" [{notes.index(plan['note']) + 1}]" if plan["note"] else ""
        cells = [
            f"`{plan['recipe']}`{mark}",
            "–" if published.precision_at_1 is None else f"{published.precision_at_1:.2%}",
            "–" if published.seconds is None else duration(published.seconds),
            f"{figures['averaged']:.2%}",
            f"{figures['raw']:.2%}",
            duration(result["seconds"]),
            f"{result['steps']:,}",
            str(result["seed"]),
            f"{result['hardware']}; {result['versions']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n[{number}] {note}." for number, note in enumerate(notes, 1)]
    lines += [f"\n`{name}` was not run: {why}." for name, why in UNRUN.items() if name not in recipes]
    lines += [""]
    if FINDINGS.exists():
        lines += FINDINGS.read_text(encoding="utf-8").splitlines()
    lines += [
        "",
        "## Learning curves",
        "",
        "The loss (moving average 0.9), and precision @ 1 of the averaged weights on test; on the first images of test",
        "where the recipe has an `evaluate_limit`.",
    ]
    for recipe in recipes:
        lines += ["", f"![{recipe}](reproduction/{recipe}.png)"]
    return lines


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def draw(recipe: str, results: list[dict[str, Any]]) -> None:
    """The curves of one recipe, one line a seed."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result in results:
        label = Planned(**result["plan"]).run
        left.plot(*zip(*result["curve"]["smoothed_loss"], strict=True), label=label, linewidth=1)
        if result["curve"]["precision_at_1"]:
            right.plot(*zip(*result["curve"]["precision_at_1"], strict=True), label=label, marker=".", linewidth=1)
        if raw := result["curve"].get("raw_precision_at_1"):
            right.plot(*zip(*raw, strict=True), label=f"{label}, raw", marker=".", linewidth=1)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    right.set(xlabel="step", ylabel="precision @ 1")
    if len(results) > 1:
        right.legend(fontsize="small")
    figure.suptitle(recipe)
    path = PAGE.parent / "reproduction" / f"{recipe}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    typer.run(main)
