"""What averaging the weights is worth: raw against averaged, on test, along the training of each recipe.

    python benchmarks/averaging.py [RECIPE…] --folder reproduction

Trains the plan of reproduce.py again (CIFAR-10 half as long), and evaluates both weights of every checkpoint on the
whole test split; the training is held meanwhile. Results go to benchmarks/results/averaging, and from there the
table and the picture of docs/averaging.md. Data is prepared by reproduce.py.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import hardware, versions
from matplotlib.figure import Figure
from reproduce import PLAN, ROOT, Planned, precision

from convline.files import atomic_write
from pipeline import checkpoint
from pipeline.run import Run

RESULTS = ROOT / "benchmarks/results/averaging"
PAGE = ROOT / "docs/averaging.md"
BEGIN, END = "<!-- written by benchmarks/averaging.py -->", "<!-- end -->"
POINTS = 20
HALF = ("train.steps=11718", "train.average_decay=0.9992")
KINDS = ("averaged", "raw")


def main(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipes; default: those without a result.")] = None,
    folder: Annotated[Path, typer.Option(help="Where reproduce.py keeps data and runs.")] = Path("reproduction"),
) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for planned in plan():
        result = RESULTS / f"{planned.recipe}.json"
        if planned.recipe in recipes if recipes else not result.exists():
            measured = measure(planned, folder)
            with atomic_write(result, "w") as file:
                json.dump(measured, file, indent=2)
        write_page()


def plan() -> list[Planned]:
    """One training a recipe, as in reproduce.py."""
    first = {planned.recipe: planned for planned in reversed(PLAN)}
    shortened = {"cifar10": HALF, "cifar10-local": HALF}
    return [
        replace(planned, settings=shortened.get(recipe, planned.settings), suffix="-averaging")
        for recipe, planned in reversed(first.items())
    ]


def measure(planned: Planned, folder: Path) -> dict[str, Any]:
    """Train anew; precision @ 1 of both weights at POINTS steps, evenly spaced."""
    recipe = planned.resolved()
    settings = [f"train.checkpoint_every={max(1, recipe.train.steps // POINTS)}", "train.evaluate_every=0"]
    words = [word for setting in settings for word in ("--set", setting)]
    options = ["--overwrite", "--tracking", "none", *planned.options, *words]
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "train", planned.recipe, *options], cwd=folder)
    seen: dict[int, dict[str, float]] = {}
    while process.poll() is None:
        take(folder / "runs" / planned.run, process, seen)
        time.sleep(0.05)
    assert process.returncode == 0
    take(folder / "runs" / planned.run, None, seen)
    state = checkpoint.load_newest(folder / "runs" / planned.run / "checkpoints")
    assert state is not None
    return {
        "recipe": planned.recipe,
        "steps": recipe.train.steps,
        "decay": recipe.train.average_decay,
        "points": [{"step": step, **values} for step, values in sorted(seen.items())],
        "hardware": hardware(state["threads"]),
        "versions": versions("torch", "convline"),
    }


def take(run: Path, process: subprocess.Popen[bytes] | None, seen: dict[int, dict[str, float]]) -> None:
    """Evaluate the checkpoints that are new, with the training held: it keeps only the newest few."""
    if not (new := [path for path in checkpoint.paths(run / "checkpoints") if checkpoint.step_of(path) not in seen]):
        return
    if process is not None:
        process.send_signal(signal.SIGSTOP)
    opened = Run.open(run)
    split = opened.dataset(run.parent.parent / "data").split("test")
    for path in new:
        if (state := checkpoint.load(path)) is not None:
            seen[state["step"]] = {kind: precision(opened, state, kind, split) for kind in KINDS}
            print(f"{run.name}, step {state['step']}: {seen[state['step']]}", flush=True)
    if process is not None:
        process.send_signal(signal.SIGCONT)


def write_page() -> None:
    """The table of docs/averaging.md, between its marks, and the picture."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    order = [planned.recipe for planned in plan()]
    results.sort(key=lambda result: order.index(result["recipe"]))
    draw(results)
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    with atomic_write(PAGE, "w", encoding="utf-8") as file:
        file.write("\n".join([before + BEGIN, "", *table(results), "", END + rest.partition(END)[2]]))


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| recipe | decay | steps | a quarter in | half-way | averaged, at the end | raw | worth in the last half "
        "| raw moves by | averaged moves by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        points = result["points"]
        late = points[len(points) // 2 :]
        gains = [point["averaged"] - point["raw"] for point in points]
        cells = [
            f"`{result['recipe']}`",
            f"{result['decay']:g}",
            f"{result['steps']:,}",
            f"{100 * gains[len(points) // 4 - 1]:+.2f}",
            f"{100 * gains[len(points) // 2 - 1]:+.2f}",
            f"{points[-1]['averaged']:.2%}",
            f"{points[-1]['raw']:.2%}",
            f"{100 * statistics.mean(gains[len(points) // 2 :]):+.2f}",
            *(f"{100 * jitter([point[kind] for point in late]):.2f}" for kind in ("raw", "averaged")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machines = sorted({f"{result['hardware']}; {result['versions']}" for result in results})
    return [*lines, "", *machines]


def jitter(values: list[float]) -> float:
    """How much the figure changes from one checkpoint to the next, at the median."""
    return statistics.median(abs(after - before) for before, after in pairwise(values))


def draw(results: list[dict[str, Any]]) -> None:
    """Precision @ 1 of both weights along each training."""
    columns = 4
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    for place, result in enumerate(results, 1):
        axes = figure.add_subplot(rows, columns, place)
        steps = [point["step"] for point in result["points"]]
        for kind in reversed(KINDS):
            axes.plot(steps, [point[kind] for point in result["points"]], label=kind, marker=".", linewidth=1)
        late = [point[kind] for point in result["points"][2:] for kind in KINDS]
        axes.set_ylim(min(late) - 0.002, max(late) + 0.002)  # the rise of the first points would flatten the rest
        axes.set_title(result["recipe"], fontsize="medium")
        axes.tick_params(labelsize="small")
        if place == 1:
            axes.legend(fontsize="small")
    figure.savefig(PAGE.with_suffix(".png"), dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    typer.run(main)
