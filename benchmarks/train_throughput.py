"""Training throughput of this project against other ways, in one call, the contenders taking turns.

    python benchmarks/train_throughput.py --tensorflow /tmp/tensorflow/bin/python [--threads N] [--rounds 5]

The cifar10 network on batches of 128, each contender a process of its own:
    convline      `pipeline train cifar10` with all that it does: data, distortions, averages, guard, log lines
                  (without MLflow, whose part is another process)
    streamed      the same, its images read from disk
    PyTorch       the usual loop: DataLoader, torchvision transforms, eager layers (contenders/pytorch_loop.py)
    TensorFlow    bare steps in graph mode, without distortion (contenders/tensorflow_steps.py; needs --tensorflow, a
                  Python that has it)
    two ranks     `pipeline train cifar10 --devices 2`, 64 images on each rank
    limit         what the machine's matrix product allows for the network's multiplications, done one by one
                  (Winograd's algorithm, by which the second convolution trains, needs fewer)
Then two networks with tiny steps: what a step of `pipeline train` costs beside that of a bare loop.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from machine import hardware, versions
from noise import Timing, make_noise, timed

from convline.cpus import usable_cpus
from models import build
from pipeline.network import multiply_adds

CONTENDERS = Path(__file__).parent / "contenders"
BATCH = 128
TINY = ("mlp", "softmax-regression")


def main(
    tensorflow: Annotated[str | None, typer.Option(help="A Python that has TensorFlow.")] = None,
    threads: int | None = None,
    rounds: int = 5,
    steps: Annotated[int, typer.Option(help="Of cifar10, that are timed in a round.")] = 60,
    tiny_steps: int = 5000,
) -> None:
    threads = threads or usable_cpus()
    print(f"{hardware(threads)}; {versions('torch', 'convline')}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_noise(folder, "colour", 32, "RGB")
        make_noise(folder, "grey", 28, "L")
        compare_cifar10(folder, tensorflow, threads, rounds, steps)
        compare_tiny(folder, threads, rounds, tiny_steps)


def compare_cifar10(folder: Path, tensorflow: str | None, threads: int, rounds: int, steps: int) -> None:
    images, labels = (folder / f"data/colour/train.{kind}.npy" for kind in ("images", "labels"))
    seconds: dict[str, list[float]] = {}
    memory = 0
    for _ in range(rounds):
        mine = convline(folder, "cifar10", "colour", steps, threads)
        memory = max(memory, mine.memory)
        told = {
            "convline": mine.seconds,
            "streamed": convline(folder, "cifar10", "colour", steps, threads, "--memory-limit", "0").seconds,
            "PyTorch": script("pytorch_loop.py", threads, images, labels, BATCH, threads, steps),
            "limit": arithmetic_limit(threads),
        }
        if threads > 1:
            told["two ranks"] = convline(folder, "cifar10", "colour", steps, threads, "--devices", "2").seconds
        if tensorflow:
            told["TensorFlow"] = script("tensorflow_steps.py", threads, BATCH, threads, steps, python=tensorflow)
        for contender, value in told.items():
            seconds.setdefault(contender, []).append(value)
    print(f"\ncifar10, batches of {BATCH}: medians of {rounds} rounds of {steps} steps")
    print(f"{'':14}{'images/s':>10}{'lowest':>9}{'highest':>9}{'convline is':>14}")
    medians = {contender: statistics.median(values) for contender, values in seconds.items()}
    for contender, values in seconds.items():
        ratio = medians[contender] / medians["convline"]
        print(
            f"{contender:14}{BATCH / medians[contender]:10,.0f}{BATCH / max(values):9,.0f}{BATCH / min(values):9,.0f}"
            f"{ratio:13.2f}×"
        )
    print(f"convline held {memory / 1e6:,.0f} MB of memory at most")


def compare_tiny(folder: Path, threads: int, rounds: int, steps: int) -> None:
    print(f"\ntiny steps, in µs: medians of {rounds} rounds of {steps} steps")
    print(f"{'':22}{'convline':>10}{'bare loop':>11}{'more':>7}{'lowest of each, more':>22}")
    for recipe in TINY:
        pairs = [
            (
                convline(folder, recipe, "grey", steps, threads).seconds,
                script("bare_loop.py", threads, recipe, 28, 28, 1, threads, steps),
            )
            for _ in range(rounds)
        ]
        sides = [[1e6 * seconds for seconds in side] for side in zip(*pairs, strict=True)]
        (mine, bare), (fastest, barest) = map(statistics.median, sides), map(min, sides)
        print(f"{recipe:22}{mine:10.0f}{bare:11.0f}{mine - bare:7.0f}{fastest - barest:22.0f}")


def pinned(threads: int) -> list[str]:
    """To begin a command with, so that it has as many CPUs as the others."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    return ["taskset", "--cpu-list", ",".join(map(str, cpus))]


def convline(folder: Path, recipe: str, dataset: str, steps: int, threads: int, *options: str) -> Timing:
    return timed(folder, recipe, dataset, steps, *options, prefix=pinned(threads))


def script(name: str, cpus: int, *arguments: object, python: str = sys.executable) -> float:
    """What one of the contenders prints."""
    command = [*pinned(cpus), python, str(CONTENDERS / name), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def arithmetic_limit(threads: int, side: int = 2048, seconds: float = 3.0) -> float:
    """Seconds a step, if it were nothing but its multiplications at the best rate of float32 matrix products: forward
    once, backward twice, but for the gradient of the images, which nobody needs."""
    torch.set_num_threads(threads)
    a, b = torch.rand(side, side), torch.rand(side, side)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    network = build("cifar10", (3, 24, 24), 10)
    first = 24 * 24 * network.get_parameter("conv1.weight").numel()
    return BATCH * (3 * multiply_adds(network, (3, 24, 24)) - first) * best / side**3


if __name__ == "__main__":
    typer.run(main)
