"""Classifying folders against other ways, in one call, on the same files, model and threads.

    python benchmarks/classify.py RUN --jpegs FOLDER [--threads N] [--rounds 5]

RUN is a trained and exported run (`runs/cifar10`), FOLDER holds small JPEGs; the first 10,000 are taken. 2,000
photographs of 500 x 375 are made of scikit-learn's two, cropped and varied. The contenders take turns, each a process
of its own; the time of a one-file run is taken off, so what is compared is the work:
    convline      `serving classify`, with its journal and all
    plain loop    Pillow, NumPy and onnxruntime in one loop (contenders/plain_loop.py)
    PyTorch       timm's way: DataLoader workers and the eager network (contenders/pytorch_inference.py)
    bound         1 / (1 / decode + 1 / infer), both measured alone on all threads: decode as the faster of threads and
                  processes, infer as the faster of one session on all threads and one thread of it a CPU
Then one image, cold: the whole process, its time and its memory.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from machine import hardware, versions
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from convline.cpus import usable_cpus
from convline.images import ImageSpec, decode
from convline.inputs.input_file import InputFile, OnDisk
from convline.inputs.listing import find
from serving.model import OnnxModel, open_model

CONTENDERS = Path(__file__).parent / "contenders"
BATCH = 64
JPEGS, PHOTOGRAPHS = 10_000, 2_000


def main(
    run: Annotated[Path, typer.Argument(help="A trained and exported run.")],
    jpegs: Annotated[Path, typer.Option(help="A folder of small JPEGs.")],
    threads: int | None = None,
    rounds: int = 5,
) -> None:
    threads = threads or usable_cpus()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    print(f"{hardware(threads)}; {versions('onnxruntime-gpu', 'onnxruntime', 'pillow', 'torch', 'convline')}")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        take(jpegs, scratch / "jpegs")
        make_photographs(scratch / "photographs")
        for folder in (scratch / "jpegs", scratch / "photographs"):
            compare(run, folder, threads, rounds)
        cold(run, next((scratch / "jpegs").iterdir()), rounds)


def take(source: Path, target: Path) -> None:
    """Links to the first JPEGs of a folder."""
    target.mkdir()
    paths = [file.location.file for file in find([str(source)]) if isinstance(file.location, OnDisk)][:JPEGS]
    for number, path in enumerate(paths):
        (target / f"{number:05}.jpg").symlink_to(Path(path).resolve())


def make_photographs(target: Path) -> None:
    target.mkdir()
    rng = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(PHOTOGRAPHS):
        image = sources[number % len(sources)]
        scale = rng.uniform(0.5, 1)
        width, height = int(image.width * scale), int(image.height * scale)
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        image = image.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))
        image.save(target / f"{number:04}.jpg", quality=90)


def compare(run: Path, folder: Path, threads: int, rounds: int) -> None:
    files = list(find([str(folder)]))
    model = open_model(run / "model.onnx", "cpu", 1)
    measures: dict[str, Callable[[], float]] = {
        "convline": lambda: len(files) / job(convline(run, threads), folder),
        "plain loop": lambda: len(files) / job(script("plain_loop.py", run / "model.onnx", threads), folder),
        "PyTorch": lambda: len(files) / job(script("pytorch_inference.py", run, threads), folder),
        "decode": lambda: decode_rate(files, model.spec, threads),
        "infer": lambda: infer_rate(run, model.spec, threads),
    }
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            rates[name].append(measure())
    rates["bound"] = [1 / (1 / d + 1 / i) for d, i in zip(rates["decode"], rates["infer"], strict=True)]
    print(
        f"\n{len(files):,} {folder.name}, {threads} threads: medians of {rounds} rounds, and of the ratios within them"
    )
    print(f"{'':12}{'images/s':>10}{'lowest':>9}{'highest':>9}{'convline is':>13}")
    for name, values in rates.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["convline"], values, strict=True))
        print(
            f"{name:12}{statistics.median(values):10,.0f}{min(values):9,.0f}{max(values):9,.0f}{ratio:12.2f}×",
            flush=True,
        )


Command = Callable[[Path, Path], list[str]]


def convline(run: Path, threads: int) -> Command:
    options = ["--model", str(run / "model.onnx"), "--threads", str(threads), "--overwrite"]
    return lambda source, output: [
        *(sys.executable, "-m", "serving", "classify", str(source)),
        *("--output", str(output), *options),
    ]


def script(name: str, model: Path, threads: int) -> Command:
    return lambda source, output: [
        *(sys.executable, str(CONTENDERS / name), str(source), str(model), str(output), str(threads))
    ]


def job(command: Command, folder: Path) -> float:
    """Seconds for all files of a folder, without what one file alone takes."""
    with tempfile.TemporaryDirectory() as name:
        one = Path(name, "one")
        one.mkdir()
        first = next(folder.iterdir())
        (one / first.name).symlink_to(first.resolve())
        started = seconds(command(one, Path(name, "one.csv")))
        return seconds(command(folder, Path(name, "all.csv"))) - started


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - began


def decode_rate(files: list[InputFile], spec: ImageSpec, threads: int) -> float:
    """Files/s: the faster of threads and processes, each with its share of the files."""

    def share(index: int) -> None:
        for file in files[index::threads]:
            decode(file.read(), spec)

    with ThreadPoolExecutor(threads) as pool:
        on_threads = timed(lambda: list(pool.map(share, range(threads))))
    with started_processes(threads, share) as begin:
        on_processes = timed(begin)
    return len(files) / min(on_threads, on_processes)


@contextmanager
def started_processes(count: int, share: Callable[[int], None]) -> Iterator[Callable[[], None]]:
    """What lets processes that wait begin, and returns when they are done."""
    context = get_context("fork")
    barrier = context.Barrier(count + 1)

    def work(index: int) -> None:
        barrier.wait()
        share(index)
        barrier.wait()

    processes = [context.Process(target=work, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()

    def run() -> None:
        barrier.wait()
        barrier.wait()

    yield run
    for process in processes:
        process.join()


def infer_rate(run: Path, spec: ImageSpec, threads: int, batches: int = 60) -> float:
    """Images/s: the faster of one session on all threads, and one on one thread that all of them run at once."""
    images = np.zeros((BATCH, spec.height or 0, spec.width or 0, spec.channels), np.uint8)
    best = float("inf")
    for concurrent in (1, threads):
        model = open_model(run / "model.onnx", "cpu", threads // concurrent)
        work = partial(repeat, model, images, batches // concurrent)
        repeat(model, images, 3)
        with ThreadPoolExecutor(concurrent) as pool:
            took = timed(partial(wait, [work] * concurrent, pool))
        best = min(best, took / (batches // concurrent * concurrent))
        del model, work
        time.sleep(0.05)  # its threads spin on for a while
    return BATCH / best


def repeat(model: OnnxModel, images: NDArray[np.uint8], count: int) -> None:
    for _ in range(count):
        model.run(images)


def wait(tasks: list[Callable[[], None]], pool: ThreadPoolExecutor) -> None:
    for future in [pool.submit(task) for task in tasks]:
        future.result()


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


COLD = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, capture_output=True)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def cold(run: Path, image: Path, rounds: int) -> None:
    """One image, the whole process, started by a small one: a child's peak counts what its parent had."""
    command = [sys.executable, "-m", "serving", "classify", str(image), "--model", str(run / "model.onnx")]
    told = [subprocess.check_output([sys.executable, "-c", COLD, *command], text=True) for _ in range(2 * rounds)]
    times, sizes = zip(*(map(float, line.split()) for line in told), strict=True)
    print(f"\none image, cold: {statistics.median(times):.2f} s (at most {max(times):.2f}), {max(sizes) / 1e6:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
