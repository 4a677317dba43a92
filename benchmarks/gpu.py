"""What a CUDA device makes of the recipes: images/s and how busy it is, and how soon cifar10 is good.

    python benchmarks/gpu.py [RECIPE…] [--way float32 --way bfloat16 …] [--cifar cifar10-jpg.tar.gz --goal 0.86]

Every recipe in each precision and by torch.compile, on noise of its dataset's size; where a recipe begins with a frozen
backbone, the steps in which all layers learn. With --cifar, an archive of CIFAR-10's images, also the seconds of the
cifar10 recipe, start-up included, until the averaged weights reach the goal on test.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from machine import hardware, versions
from noise import make_noise, timed

from pipeline.preparing.official_datasets import known_datasets
from pipeline.recipe import load, names
from pipeline.tracking.points import read_points

WAYS = {
    "float32": (),
    "bfloat16": ("--set", "train.precision=bfloat16"),
    "float16": ("--set", "train.precision=float16"),
    "compiled, float32": ("--set", "train.compile=true"),
    "compiled, bfloat16": ("--set", "train.compile=true", "--set", "train.precision=bfloat16"),
}


def main(
    recipes: Annotated[list[str] | None, typer.Argument(help="Default: all.")] = None,
    way: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(WAYS)}. Default: all.")] = None,
    seconds: Annotated[float, typer.Option(help="That are timed of each.")] = 10.0,
    cifar: Annotated[Path | None, typer.Option(help="Archive or folder of CIFAR-10's images.")] = None,
    goal: float = 0.86,
    device: Annotated[str, typer.Option(help="cpu: to try this script.")] = "cuda",
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here")
    print(f"{hardware(torch.get_num_threads())}; {versions('torch', 'convline')}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        print(f"\n{'recipe':25}{'':20}{'images/s':>10}{'µs/step':>9}{'busy':>6}")
        for recipe in recipes or names():
            measure(folder, recipe, way or list(WAYS), seconds, device)
        if cifar is not None:
            print(f"\ncifar10 to {goal:.1%} on test, averaged weights")
            run_pipeline(folder, "preprocess", "cifar10-jpg", "--source", str(cifar.resolve()))
            for name in way or WAYS:
                print(f"{name:20} {reach(folder, goal, device, WAYS[name])}", flush=True)


def measure(folder: Path, recipe: str, ways: list[str], seconds: float, device: str) -> None:
    loaded = load(recipe)
    known = known_datasets().get(loaded.data.dataset)
    height, _, channels = known.image if known else (loaded.data.image_size or 224, None, 3)
    noise = f"noise-{height}-{channels}"
    if not (folder / "data" / noise).exists():
        make_noise(folder, noise, height, "L" if channels == 1 else "RGB", each=500 if height < 100 else 50)
    options = ["--device", device, "--set", "train.epochs=0"]
    if loaded.train.freeze != "none":
        options += ["--set", "train.freeze=none", "--set", "train.freeze_steps=0"]
    trial = timed(folder, recipe, noise, 50, *options)
    steps = max(50, round(seconds / trial.seconds))
    for way in ways:
        with busy() as samples:
            timing = timed(folder, recipe, noise, steps, *options, *WAYS[way])
        within = [share for when, share in samples if timing.began <= when <= timing.ended]
        share = f"{statistics.mean(within):4.0f} %" if within else "     –"
        rate = loaded.train.batch_size / timing.seconds
        print(f"{recipe:25}{way:20}{rate:10,.0f}{1e6 * timing.seconds:9.0f}{share}", flush=True)


@contextmanager
def busy() -> Iterator[list[tuple[float, float]]]:
    """While the block runs, when (seconds since the epoch), and percent of the time before it in which a kernel was
    running. Empty where there is no nvidia-smi, or it does not know."""
    samples: list[tuple[float, float]] = []
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield samples
        return
    query = [tool, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100", "--id=0"]
    sampler = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    assert sampler.stdout is not None
    lines = sampler.stdout
    reader = threading.Thread(target=lambda: samples.extend((time.time(), float(x)) for x in lines if x[0].isdigit()))
    reader.start()
    try:
        yield samples
    finally:
        sampler.terminate()
        reader.join()


def reach(folder: Path, goal: float, device: str, options: tuple[str, ...]) -> str:
    """Train cifar10 until it is good enough, or to its end."""
    words = ["--dataset", "cifar10-jpg", "--tracking", "none", "--device", device]
    words += ["--set", "train.evaluate_every=1000", *options]
    shutil.rmtree(folder / "runs/cifar10", ignore_errors=True)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", "cifar10", *words], cwd=folder, stderr=subprocess.DEVNULL
    )
    metrics = folder / "runs/cifar10/metrics.jsonl"
    best, step = 0.0, 0
    while process.poll() is None:
        time.sleep(0.2)
        for point in read_points(metrics):
            if point.values.get("precision_at_1", 0) > best:
                best, step = point.values["precision_at_1"], point.step
        if best >= goal:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return f"{best:.2%} after {step:,} steps, {time.perf_counter() - began:.1f} s"
    return f"not reached: {best:.2%} at best, after {step:,} steps; {time.perf_counter() - began:.1f} s in all"


def run_pipeline(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "pipeline", *words], cwd=folder, check=True)


if __name__ == "__main__":
    typer.run(main)
