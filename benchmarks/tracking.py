"""What tracking costs a training: with MLflow (on SQLite) and without, taking turns.

    python benchmarks/tracking.py [--rounds 3] [--steps 1200]

The cifar10 recipe on noise. MLflow's part is another process, the follower, which reads what training writes: how
much CPU time it takes in all (imports and a new database first), and what share of a CPU in the last third.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from machine import hardware, versions
from noise import Timing, make_noise, timed

from serving.machine import usable_cpus

BATCH = 128


def main(rounds: int = 3, steps: Annotated[int, typer.Option(help="That are timed in a round.")] = 1200) -> None:
    print(f"{hardware(usable_cpus())}; {versions('torch', 'mlflow', 'convline')}")
    rates: dict[str, list[float]] = {"none": [], "mlflow": []}
    totals, shares = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_noise(folder, "colour", 32, "RGB")
        for _ in range(rounds):
            rates["none"].append(BATCH / timed(folder, "cifar10", "colour", steps).seconds)
            timing, samples = watched(folder, steps)
            rates["mlflow"].append(BATCH / timing.seconds)
            last_third = timing.ended - (timing.ended - timing.began) / 3
            late = [sample for sample in samples if last_third <= sample[0] <= timing.ended]
            totals.append(samples[-1][1])
            shares.append((late[-1][1] - late[0][1]) / (late[-1][0] - late[0][0]))
    for tracking, values in rates.items():
        extent = f"({min(values):,.0f} to {max(values):,.0f})"
        print(f"--tracking {tracking:8}{statistics.median(values):8,.0f} images/s {extent}")
    in_all, late = statistics.median(totals), statistics.median(shares)
    print(f"the follower's CPU time: {in_all:.1f} s in all, in the last third {late:.1%} of a CPU")


def watched(folder: Path, steps: int) -> tuple[Timing, list[tuple[float, float]]]:
    """A training with tracking, and what its follower had used over time: pairs of seconds since the epoch and seconds
    of CPU time."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "mlflow.db").unlink(missing_ok=True)
    samples: list[tuple[float, float]] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(0.5):
            for process in psutil.process_iter(["cmdline", "cpu_times"]):
                words = process.info["cmdline"] or []
                if "--follow" in words and any(str(folder) in word for word in words):
                    times = process.info["cpu_times"]
                    samples.append((time.time(), times.user + times.system))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        timing = timed(folder, "cifar10", "colour", steps, tracking="mlflow")
    finally:
        is_over.set()
        sampler.join()
    return timing, samples


if __name__ == "__main__":
    typer.run(main)
