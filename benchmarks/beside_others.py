"""What trainings and sessions keep of their speed beside other work, which keeps every CPU busy.

    python benchmarks/beside_others.py [--rounds 5] [--spins 20000]

Three recipes, from tiny steps to large ones, and the exported file of the tiniest in batches of 64; each alone, and
beside one busy process per CPU. `before` is the same with threads that spin for work as long as libgomp's and
onnxruntime's defaults let them; trainings are also timed with `--threads 1`, and with the rounds of spinning that
`--spins` asks for. Each side is a process of its own; the sides take turns within a round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from machine import hardware, versions
from noise import make_noise, timed

from convline.cpus import usable_cpus

# recipe: its dataset of noise, the steps that are timed, and the images of a batch
TRAININGS = {"digits": ("eight", 1000, 64), "mlp": ("grey", 1000, 100), "cifar10": ("colour", 20, 128)}
# how each side trains: its environment and options
SIDES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "before": ({"GOMP_SPINCOUNT": "300000"}, ()),  # libgomp's default
    "now": ({}, ()),
    "--threads 1": ({}, ("--threads", "1")),
}
BATCH = 64
SESSION = """
import sys, time
import numpy as np
import serving.session
from serving.model import open_model
threads = 1 if sys.argv[2] == "--threads 1" else None
if sys.argv[2] == "before":
    serving.session.SPIN_MICROSECONDS = 1_000_000  # onnxruntime's default
model = open_model(sys.argv[1], "cpu", threads)
images = np.zeros((64, model.spec.height, model.spec.width, model.spec.channels), np.uint8)
model.run(images)
began = time.perf_counter()
for _ in range(500):
    model.run(images)
print((time.perf_counter() - began) / 500)
"""


def main(
    rounds: int = 5,
    spins: Annotated[list[int] | None, typer.Option(help="A value of GOMP_SPINCOUNT to time as well.")] = None,
) -> None:
    sides = SIDES | {f"{count} spins": ({"GOMP_SPINCOUNT": str(count)}, ()) for count in spins or ()}
    print(f"{hardware(usable_cpus())}; {versions('torch', 'onnxruntime-gpu', 'convline')}")
    rates: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dataset, width, mode in (("eight", 8, "L"), ("grey", 28, "L"), ("colour", 32, "RGB")):
            make_noise(folder, dataset, width, mode)
        model = exported(folder)
        for _ in range(rounds):
            for where, others in (("alone", 0), ("beside", usable_cpus())):
                for side, (environment, options) in sides.items():
                    with busy(others):
                        for recipe, (dataset, steps, size) in TRAININGS.items():
                            seconds = trained(folder, recipe, dataset, steps, environment, options)
                            rates[recipe, where, side].append(size / seconds)
                        rates["session", where, side].append(BATCH / session(model, side))
    print(f"images/s, medians of {rounds} rounds; shares of the speed alone before\n")
    print(f"{'':10}" + "".join(f"{where + ', ' + side:>22}" for where in ("alone", "beside") for side in sides))
    for what in (*TRAININGS, "session"):
        base = statistics.median(rates[what, "alone", "before"])
        medians = (statistics.median(rates[what, where, side]) for where in ("alone", "beside") for side in sides)
        print(f"{what:10}" + "".join(f"{rate:15,.0f} ({rate / base:4.2f})" for rate in medians))


def exported(folder: Path) -> Path:
    """The file of a short training of digits."""
    for command in (("train", "digits", "--steps", "50", "--run", "exported"), ("export", "exported")):
        words = [sys.executable, "-m", "pipeline", *command, "--tracking", "none"]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return folder / "runs/exported/model.onnx"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def trained(
    folder: Path, recipe: str, dataset: str, steps: int, environment: dict[str, str], options: Sequence[str]
) -> float:
    """Seconds a step."""
    before = os.environ.copy()
    os.environ.pop("GOMP_SPINCOUNT", None)  # this process has it from the package
    os.environ.update(environment)
    try:
        return timed(folder, recipe, dataset, steps, *options).seconds
    finally:
        os.environ.clear()
        os.environ.update(before)


def session(model: Path, side: str) -> float:
    """Seconds a run."""
    done = subprocess.run([sys.executable, "-c", SESSION, str(model), side], check=True, capture_output=True, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    typer.run(main)
