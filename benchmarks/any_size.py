"""What `export --any-size` costs: runs exported with and without it, on images of the stored size and on larger ones.

    python benchmarks/any_size.py digits cifar10 --runs-dir runs --data-dir data

The two files run call by call, in batches of 64 and of 1 of the stored size, which are not resized; the default file
takes part twice, which shows what chance does. Then the any-size file takes one photograph of each size of its proof.
The output is kept in benchmarks/results/any_size.txt.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import hardware, versions

from convline.cpus import usable_cpus
from pipeline.export import ExportOptions, export
from pipeline.exporting.timing import seconds_per_call
from pipeline.run import Run
from serving.model import OnnxModel, open_model, probe_images

SECONDS = 12.0  # for each batch size


def main(
    runs: Annotated[list[str], typer.Argument(help="Names of runs.")],
    runs_dir: Annotated[Path, typer.Option(help="Where runs are.")] = Path("runs"),
    data_dir: Annotated[Path, typer.Option(help="Where datasets are.")] = Path("data"),
) -> None:
    print(f"{hardware(usable_cpus())}; {versions('onnxruntime-gpu', 'onnxruntime', 'pillow', 'convline')}")
    for name in runs:
        run = Run.find(runs_dir, name)
        with tempfile.TemporaryDirectory() as there:
            paths = {kind: Path(there, f"{kind}.onnx") for kind in ("default", "any-size")}
            reports = {
                kind: export(run, run.dataset(data_dir), path, ExportOptions(any_size=kind == "any-size")).report
                for kind, path in paths.items()
            }
            models = {kind: open_model(path, "cpu") for kind, path in paths.items()}
        spec = models["default"].spec
        print(f"\n{name}, images of {spec.height}x{spec.width}x{spec.channels}", flush=True)
        for batch in (64, 1):
            print(stored_size(models, batch), flush=True)
        for size in reports["any-size"]["any_size"]["sizes"]:
            print(other_size(models["any-size"], size), flush=True)


def stored_size(models: dict[str, OnnxModel], batch: int) -> str:
    """The medians of both files in milliseconds, and their ratios."""
    default, any_size = models["default"], models["any-size"]
    probe = probe_images(default.spec)
    images = np.resize(probe, (batch, *probe.shape[1:]))
    contenders = {"default": default, "any-size": any_size, "default again": default}
    calls = {kind: partial(model.run, images) for kind, model in contenders.items()}
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:  # call by call, in random order, as other programs may run
        for kind in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[kind]()
            times[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(measured) for kind, measured in times.items()}
    figures = ", ".join(f"{kind} {seconds * 1000:.3f} ms" for kind, seconds in medians.items())
    ratios = (medians[kind] / medians["default"] for kind in ("any-size", "default again"))
    return f"batch {batch:2}: {figures}; ratios {' and '.join(f'{ratio:.3f}' for ratio in ratios)}"


def other_size(model: OnnxModel, size: dict[str, Any]) -> str:
    """Milliseconds of one image of another size, and the differences of the proof."""
    image = np.resize(probe_images(model.spec)[:1], (1, size["height"], size["width"], model.spec.channels))
    seconds = seconds_per_call({"any-size": partial(model.run, image)}, 0.2, 3)["any-size"]
    return (
        f"{size['height']:4}x{size['width']:<4} {seconds * 1000:8.2f} ms; pixels differ by at most {size['pixels']} of "
        f"255 in {size['share']:.2%} of the values, |Δprobability| {size['probability']:.1e}"
    )


if __name__ == "__main__":
    typer.run(main)
