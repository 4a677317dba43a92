"""`serving bench`: how fast a model classifies on this machine, and what bounds it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convline.cpus import usable_cpus
from convline.errors import ConvlineError
from convline.images import ImageSpec
from convline.inputs.input_file import InputFile, OnDisk
from convline.inputs.listing import find
from convline.process_pool import open_pool
from serving.batch_size import batch_rates, fastest_of
from serving.classifier import Classifier, batched, pack
from serving.predict import decoded
from serving.session import Provider

MADE = 2_000  # images, where none are given
MOST = 20_000  # of those given
SECONDS = 1.0  # that the model alone is measured for


def bench(model: str, images: Path | None = None, provider: Provider = "auto") -> dict[str, Any]:
    """Images/s of decoding alone, of the model alone and of a whole job, on all usable CPUs; the batch
    size beyond which it gets no faster; one image from a cold start; memory.

    Raises ConvlineError for a folder without files, and as `open_model` does.
    """
    with tempfile.TemporaryDirectory() as name, Classifier(model, provider, threads=1) as classifier:
        scratch = Path(name)
        paths = list(islice(_paths(images or _make_images(scratch / "images", classifier.spec)), MOST))
        if not paths:
            raise ConvlineError(f"{images} holds no file; give a folder of images")
        (scratch / "all").write_text("\0".join(paths), "utf-8", "surrogateescape")
        (scratch / "one").write_text(paths[0] + "\0", "utf-8", "surrogateescape")
        options = ["--model", model, "--provider", provider, "--output", str(scratch / "out.csv"), "--overwrite"]
        alone = {"decode": _decode_rate(classifier, paths), "model": _model_rate(classifier)}
        rates = batch_rates(classifier.model)
        cold = _run([f"@{scratch / 'one'}", *options], looks=0.02)
        whole = _run([f"@{scratch / 'all'}", *options], looks=0.2)
        taken = classifier.provider
    runs_beside = taken == "cpu"
    seconds = {stage: 1 / rate for stage, rate in alone.items()}
    bound = 1 / (sum if runs_beside else max)(seconds.values())
    slower = max(seconds, key=lambda stage: seconds[stage])
    share = f"{seconds[slower] / sum(seconds.values()):.0%} of the work"
    return {
        "provider": taken,
        "cpus": usable_cpus(),
        "images": f"{len(paths)} of {images}" if images else f"{len(paths)} JPEGs of twice the model's size, made here",
        "images_per_second": {
            "decode alone": round(alone["decode"], 1),
            "model alone": round(alone["model"], 1),
            "bound": round(bound, 1),
            "whole job": whole["images_per_second"],
            "of the bound": round(whole["images_per_second"] / bound, 3),
        },
        "bounded_by": f"{slower} ({share})" if runs_beside else slower,
        "batch": {
            "fastest_batch_size": fastest_of(rates),
            "threads": 1,
            "images_per_second": {str(size): round(rate, 1) for size, rate in rates.items()},
        },
        "cold_start": {"seconds": round(cold["wall"], 3), "memory_mb": cold["memory_mb"]},
        "memory_mb": whole["memory_mb"],
    }


def _paths(folder: Path) -> Iterator[str]:
    for file in find([str(folder)]):
        if isinstance(file.location, OnDisk) and file.location.size is None:
            yield str(Path(file.location.file).absolute())


def _make_images(folder: Path, spec: ImageSpec) -> Path:
    """JPEGs of soft noise, which is to a decoder what photographs are."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    width, height = 2 * (spec.width or 0), 2 * (spec.height or 0)
    for number in range(MADE):
        coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05}.jpg", quality=90)
    return folder


def _decode_rate(classifier: Classifier, paths: list[str]) -> float:
    """Files/s on all usable CPUs."""

    def work(files: list[InputFile], _: int) -> int:
        pack(decoded(files, classifier.spec), classifier.buffer())
        return len(files)

    files = (InputFile(path, OnDisk(path)) for path in paths)
    return _rate(work, batched(files, classifier.batch_size))


def _model_rate(classifier: Classifier) -> float:
    """Images/s: on a CPU of one thread a process, else of this process."""
    pixels = classifier.buffer()

    def work(_: list[InputFile], __: int) -> int:
        classifier.model.run(pixels)
        return classifier.batch_size

    if classifier.provider == "cpu":
        began = time.perf_counter()
        work([], 0)
        runs = max(4 * usable_cpus(), int(SECONDS / (time.perf_counter() - began)) * usable_cpus())
        return _rate(work, ([] for _ in range(runs)))
    work([], 0)
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        runs += work([], 0)
    return runs / (time.perf_counter() - began)


def _rate(work: Any, batches: Iterable[list[InputFile]]) -> float:
    with open_pool(usable_cpus(), work, lambda files: work(files, 0)) as workers:
        began = time.perf_counter()
        done = sum(workers.map(iter(batches), lambda _files, count, _buffer: count))
        return done / (time.perf_counter() - began)


def _run(arguments: list[str], looks: float) -> dict[str, Any]:
    """A job in a process of its own: its summary, its time, and the most memory that it and its processes held,
    looked at every so many seconds."""
    command = [sys.executable, "-m", "serving", "classify", *arguments, "--json"]
    began = time.perf_counter()
    most = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, _memory(process.pid))
            time.sleep(looks)  # a look takes the job some milliseconds
        wall = time.perf_counter() - began
        assert process.stdout and process.stderr
        if process.returncode:
            raise ConvlineError(process.stderr.read().strip().removeprefix("error: "))
        return {**json.loads(process.stdout.read()), "wall": wall, "memory_mb": round(most / 1e6, 1)}


def _memory(pid: int) -> float:
    """Bytes that a process and its children hold, what they share counted once; 0 where the system does not tell."""
    held = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                held += 1024 * int(line.split()[1])
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            held += _memory(int(child))
    except OSError:
        pass
    return held
