"""`pipeline evaluate --watch`: evaluate each checkpoint of a running training as soon as it is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from convline.console import log
from convline.cpus import lower_priority
from convline.errors import ConvlineError
from convline.mlflow_client import tracking_uri
from pipeline import checkpoint
from pipeline.device import choose_device
from pipeline.evaluate import EvaluationOptions, check_top_k
from pipeline.metrics import evaluate
from pipeline.network import network_from_checkpoint, predictor
from pipeline.run import Run
from pipeline.tracking.points import append_point, read_points
from pipeline.tracking.sender import Sender


def watch(
    run: Run, data_dir: Path, options: EvaluationOptions, interval: float, tracking: bool
) -> Iterator[dict[str, Any]]:
    """Evaluate each checkpoint of a training as it is written, until the training has ended; yields the results.

    The results are added to watched.jsonl, and sent to MLflow if `tracking` is true. Unless another device is chosen,
    it uses one CPU thread, with a low priority: a tenth of a busy CPU.
    """
    check_top_k(run, options)
    lower_priority()
    torch.set_num_threads(1)
    device = choose_device("cpu" if options.device == "auto" else options.device)
    split = run.split(run.dataset(data_dir), options.split)
    sender = Sender(run, tracking_uri()) if tracking else None
    idle = 0
    while idle < 2:  # a training that restarts after a rank died is idle for a moment
        # checked before the checkpoints: one that is written in between is evaluated in the next round
        idle = 0 if run.is_training() else idle + 1
        for path in _unevaluated_checkpoints(run, options):
            if (state := checkpoint.load(path)) is None:
                continue
            predict = predictor(network_from_checkpoint(run, state, options.weights).to(device), device)
            evaluation = evaluate(predict, split, run.classes, options.limit, options.batch_size)
            point = {"step": state["step"], "time": round(time.time(), 3), options.metric: evaluation.precision_at(1)}
            append_point(run.watched, point)
            yield {"run": run.name, "step": state["step"], **evaluation.to_dict(options.top_k)}
            if sender is not None:
                with suppress(BlockingIOError):  # another process is sending
                    _log_failure(partial(sender.send_points, wait=False))
        if idle < 2:
            time.sleep(interval)
    if sender is not None:
        _log_failure(sender.send_points)
        _log_failure(sender.finish)


def _log_failure(send: Callable[[], object]) -> None:
    """Call `send`; if it raises ConvlineError, log a warning."""
    try:
        send()
    except ConvlineError as error:
        log(f"warning: {error}")


def _unevaluated_checkpoints(run: Run, options: EvaluationOptions) -> list[Path]:
    """The checkpoints that have not been evaluated with these options, oldest first."""
    evaluated = {point.step for point in read_points(run.watched) if options.metric in point.values}
    paths = checkpoint.paths(run.folder / "checkpoints")
    return [path for path in paths if checkpoint.step_of(path) not in evaluated]
