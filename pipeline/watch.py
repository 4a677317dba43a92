"""`pipeline evaluate --watch`: an answer for each checkpoint of a training, as it appears."""

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
    run: Run, data_dir: Path, question: EvaluationOptions, interval: float, tracking: bool
) -> Iterator[dict[str, Any]]:
    """Answer the question for each checkpoint of a training as it appears, until the training has ended.

    The answers are kept as points of watched.jsonl, and sent to MLflow where `tracking` asks for it. It takes one
    thread of the CPU (unless another device is asked for), and of one that is busy a tenth.
    """
    check_top_k(run, question)
    lower_priority()
    torch.set_num_threads(1)
    device = choose_device("cpu" if question.device == "auto" else question.device)
    split = run.split(run.dataset(data_dir), question.split)
    sender = Sender(run, tracking_uri()) if tracking else None
    idle = 0
    while idle < 2:  # a training that begins again after a rank died is idle for a moment
        # asked first: a checkpoint that comes after the answer is seen next time
        idle = 0 if run.is_training() else idle + 1
        for path in _unwatched(run, question):
            if (state := checkpoint.load(path)) is None:
                continue
            predict = predictor(network_from_checkpoint(run, state, question.weights).to(device), device)
            evaluation = evaluate(predict, split, run.classes, question.limit, question.batch_size)
            point = {"step": state["step"], "time": round(time.time(), 3), question.metric: evaluation.precision_at(1)}
            append_point(run.watched, point)
            yield {"run": run.name, "step": state["step"], **evaluation.to_dict(question.top_k)}
            if sender is not None:
                with suppress(BlockingIOError):  # else it is being sent already
                    _attempt(partial(sender.send_points, wait=False))
        if idle < 2:
            time.sleep(interval)
    if sender is not None:
        _attempt(sender.send_points)
        _attempt(sender.finish)


def _attempt(send: Callable[[], object]) -> None:
    try:
        send()
    except ConvlineError as error:
        log(f"warning: {error}")


def _unwatched(run: Run, question: EvaluationOptions) -> list[Path]:
    """The checkpoints that there is no answer for yet, oldest first."""
    answered = {point.step for point in read_points(run.watched) if question.metric in point.values}
    there = checkpoint.paths(run.folder / "checkpoints")
    return [path for path in there if checkpoint.step_of(path) not in answered]
