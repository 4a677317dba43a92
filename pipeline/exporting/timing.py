"""Measure the speed of an exported file (images/s) against float32 and PyTorch, taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx

from convline.cpus import usable_cpus
from pipeline.exporting.onnx_predictor import onnx_predictor
from pipeline.exporting.tolerances import Precision
from pipeline.network import Predict
from pipeline.run import Run
from serving.batch_size import SERVING_BATCH
from serving.model import probe_images

# the threads of a contender spin for a while after its last call: without a pause the next one runs at two thirds of
# its speed
PAUSE = 0.05  # seconds


def measure_speed(
    model: onnx.ModelProto, full: onnx.ModelProto, reference: Predict, precision: Precision, run: Run
) -> dict[str, Any]:
    """Images/s of the file, of the float32 file `full` and of PyTorch (`reference`), on all usable CPUs."""
    probe = probe_images(run.spec)
    images = np.resize(probe, (SERVING_BATCH, *probe.shape[1:]))
    contenders = {precision: onnx_predictor(model), "fp32": onnx_predictor(full), "PyTorch": reference}
    calls = {name: partial(predict, images) for name, predict in contenders.items()}
    rates = {name: round(SERVING_BATCH / seconds, 1) for name, seconds in seconds_per_call(calls, 0.2, 3).items()}
    return {"batch": SERVING_BATCH, "threads": usable_cpus(), "images_per_second": rates}


def seconds_per_call(calls: Mapping[str, Callable[[], object]], seconds: float, rounds: int) -> dict[str, float]:
    """For each contender, the median over `rounds` rounds; in each round every contender runs for `seconds`, or once
    where that takes longer."""
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE)
            mean = _mean_seconds(call, 0)
            if mean < seconds:  # it only woke its threads up
                mean = _mean_seconds(call, seconds)
            measured[name].append(mean)
    return {name: statistics.median(values) for name, values in measured.items()}


def _mean_seconds(call: Callable[[], object], seconds: float) -> float:
    """Of as many calls as take `seconds`, at least one."""
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        call()
        count += 1
    return (time.perf_counter() - began) / count
