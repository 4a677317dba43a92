"""What watching costs a training: bare, with summaries of its layers, and with MLflow (on SQLite), taking turns.

    python benchmarks/tracking.py [--rounds 3] [--steps 1200]

The cifar10 recipe on noise. Summaries are a part of the training's own time, which it records. MLflow's part is another
process, the follower, which reads what training writes: how much CPU time it takes in all (imports and a new database
first), and what share of a CPU in the last third.
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

from convline.cpus import usable_cpus
from pipeline.tracking.points import read_points

BATCH = 128


def main(rounds: int = 3, steps: Annotated[int, typer.Option(help="That are timed in a round.")] = 1200) -> None:
    print(f"{hardware(usable_cpus())}; {versions('torch', 'mlflow', 'convline')}")
    rates: dict[str, list[float]] = {"bare": [], "summaries": [], "summaries and MLflow": []}
    summaries, totals, lates = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_noise(folder, "colour", 32, "RGB")
        for _ in range(rounds):
            bare = timed(folder, "cifar10", "colour", steps, "--set", "train.summary_every=0")
            summarized = timed(folder, "cifar10", "colour", steps)
            summaries.append(summary_share(folder))
            tracked, samples = watched(folder, steps)
            for side, timing in zip(rates.values(), (bare, summarized, tracked), strict=True):
                side.append(BATCH / timing.seconds)
            last_third = tracked.ended - (tracked.ended - tracked.began) / 3
            late = [sample for sample in samples if last_third <= sample[0] <= tracked.ended]
            totals.append(samples[-1][1])
            lates.append((late[-1][1] - late[0][1]) / (late[-1][0] - late[0][0]))
    for kind, values in rates.items():
        extent = f"({min(values):,.0f} to {max(values):,.0f})"
        ratio = statistics.median(value / bare for value, bare in zip(values, rates["bare"], strict=True))
        print(f"{kind:24}{statistics.median(values):8,.0f} images/s {extent:18} {ratio:.3f} of bare")
    print(f"summaries: {statistics.median(summaries):.2%} of the training's time, at most {max(summaries):.2%}")
    in_all, late_share = statistics.median(totals), statistics.median(lates)
    print(f"the follower's CPU time: {in_all:.1f} s in all, in the last third {late_share:.1%} of a CPU")


def summary_share(folder: Path) -> float:
    """What summaries took of the training that has ended, by its own record."""
    points = [point.values for point in read_points(folder / "runs/cifar10/metrics.jsonl")]
    values = {name: value for point in points for name, value in point.items()}
    return values["summary_seconds"] / values["elapsed"]


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
