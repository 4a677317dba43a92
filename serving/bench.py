"""`serving bench`: measure the speed of decoding, of a model and of a whole job on this machine."""

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
from serving.auto_batch_size import batch_rates, choose_batch_size
from serving.classifier import Classifier, batched, pack
from serving.predict import decode_files
from serving.session import Provider

GENERATED_IMAGES = 2_000  # where the user gives none
MAX_IMAGES = 20_000  # of the user's
MODEL_SECONDS = 1.0  # how long the model alone is measured


def bench(model: str, images: Path | None = None, provider: Provider = "auto") -> dict[str, Any]:
    """Measure images/s of decoding alone, of the model alone and of a whole job, on all usable CPUs; also the fastest
    batch size, the time for one image from a cold start, and memory.

    Raises ConvlineError for a folder without files, and as `open_model` does.
    """
    with tempfile.TemporaryDirectory() as name, Classifier(model, provider, threads=1) as classifier:
        scratch = Path(name)
        paths = list(islice(_paths(images or _generate_images(scratch / "images", classifier.spec)), MAX_IMAGES))
        if not paths:
            raise ConvlineError(f"{images} holds no file; give a folder of images")
        (scratch / "all").write_text("\0".join(paths), "utf-8", "surrogateescape")
        (scratch / "one").write_text(paths[0] + "\0", "utf-8", "surrogateescape")
        options = ["--model", model, "--provider", provider, "--output", str(scratch / "out.csv"), "--overwrite"]
        stage_rates = {"decode": _decode_rate(classifier, paths), "model": _model_rate(classifier)}
        rates = batch_rates(classifier.model)
        cold_start = _run_job([f"@{scratch / 'one'}", *options], poll_seconds=0.02)
        whole_job = _run_job([f"@{scratch / 'all'}", *options], poll_seconds=0.2)
        provider_used = classifier.provider
    shares_cpus = provider_used == "cpu"  # decoding and the model take turns on the same CPUs
    seconds = {stage: 1 / rate for stage, rate in stage_rates.items()}
    bound = 1 / (sum if shares_cpus else max)(seconds.values())
    slower = max(seconds, key=lambda stage: seconds[stage])
    share = f"{seconds[slower] / sum(seconds.values()):.0%} of the work"
    generated = f"{len(paths)} generated JPEGs of twice the model's size"
    return {
        "provider": provider_used,
        "cpus": usable_cpus(),
        "images": f"{len(paths)} of {images}" if images else generated,
        "images_per_second": {
            "decode alone": round(stage_rates["decode"], 1),
            "model alone": round(stage_rates["model"], 1),
            "bound": round(bound, 1),
            "whole job": whole_job["images_per_second"],
            "of the bound": round(whole_job["images_per_second"] / bound, 3),
        },
        "bounded_by": f"{slower} ({share})" if shares_cpus else slower,
        "batch": {
            "fastest_batch_size": choose_batch_size(rates),
            "threads": 1,
            "images_per_second": {str(size): round(rate, 1) for size, rate in rates.items()},
        },
        "cold_start": {"seconds": round(cold_start["wall"], 3), "memory_mb": cold_start["memory_mb"]},
        "memory_mb": whole_job["memory_mb"],
    }


def _paths(folder: Path) -> Iterator[str]:
    for file in find([str(folder)]):
        if isinstance(file.location, OnDisk) and file.location.size is None:
            yield str(Path(file.location.file).absolute())


def _generate_images(folder: Path, spec: ImageSpec) -> Path:
    """JPEGs of smooth noise, which take a decoder as long as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    width, height = 2 * (spec.width or 0), 2 * (spec.height or 0)
    for number in range(GENERATED_IMAGES):
        coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05}.jpg", quality=90)
    return folder


def _decode_rate(classifier: Classifier, paths: list[str]) -> float:
    """Files/s on all usable CPUs."""

    def work(files: list[InputFile], _: int) -> int:
        pack(decode_files(files, classifier.spec), classifier.buffer())
        return len(files)

    files = (InputFile(path, OnDisk(path)) for path in paths)
    return _rate(work, batched(files, classifier.batch_size))


def _model_rate(classifier: Classifier) -> float:
    """Images/s of the model alone: on a CPU in one process per CPU, each on one thread, else in this process."""
    pixels = classifier.buffer()

    def work(_: list[InputFile], __: int) -> int:
        classifier.model.run(pixels)
        return classifier.batch_size

    if classifier.provider == "cpu":
        start = time.perf_counter()
        work([], 0)
        runs = max(4 * usable_cpus(), int(MODEL_SECONDS / (time.perf_counter() - start)) * usable_cpus())
        return _rate(work, ([] for _ in range(runs)))
    work([], 0)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < MODEL_SECONDS:
        images += work([], 0)
    return images / (time.perf_counter() - start)


def _rate(work: Any, batches: Iterable[list[InputFile]]) -> float:
    """Images/s of `work`, which returns its number of images, on all usable CPUs."""
    with open_pool(usable_cpus(), work, lambda files: work(files, 0)) as workers:
        start = time.perf_counter()
        images = sum(workers.map(iter(batches), lambda _files, count, _buffer: count))
        return images / (time.perf_counter() - start)


def _run_job(arguments: list[str], poll_seconds: float) -> dict[str, Any]:
    """Run a job in a process of its own: its summary, its time, and the peak memory of it and its workers together,
    read every `poll_seconds`.
    """
    command = [sys.executable, "-m", "serving", "classify", *arguments, "--json"]
    start = time.perf_counter()
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(poll_seconds)  # not at once: each reading delays the job by some milliseconds
        wall = time.perf_counter() - start
        assert process.stdout and process.stderr
        if process.returncode:
            raise ConvlineError(process.stderr.read().strip().removeprefix("error: "))
        return {**json.loads(process.stdout.read()), "wall": wall, "memory_mb": round(peak / 1e6, 1)}


def _memory(pid: int) -> float:
    """Bytes of memory of a process and its children, shared memory counted once; 0 on systems without /proc."""
    total = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _memory(int(child))
    except OSError:
        pass
    return total
