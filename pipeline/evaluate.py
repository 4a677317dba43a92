"""precision@k, and what lies behind it: figures for each class and the confusion matrix."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.dataset import Split
from pipeline.engine import checkpoint
from pipeline.engine.counts import Evaluation
from pipeline.engine.network import Predict, choose_device, load_served, predictor, restored
from pipeline.engine.points import append_point, read_points
from pipeline.engine.run import Run
from pipeline.sync import Sender
from serving.console import log
from serving.errors import ConvlineError
from serving.files import atomic_write
from serving.model import open_model
from serving.page import elided
from serving.registry import tracking_uri
from serving.session import Provider

BATCH_SIZE = 256
CLASS_WIDTH = 24  # characters of a class's name in a table


@dataclass(frozen=True)
class Question:
    """What to evaluate: which split, weights and how many images (`limit`: the first N), on what."""

    split: str = "test"
    weights: str = "averaged"
    onnx: bool = False
    limit: int | None = None
    device: str = "auto"
    batch_size: int = BATCH_SIZE
    top_k: int = 1

    @property
    def metric(self) -> str:
        """What the answer is called among the points of a run that is watched."""
        which = [
            self.weights if self.weights != "averaged" else "",
            self.split if self.split != "test" else "",
            f"first_{self.limit}" if self.limit else "",
        ]
        return "_".join(filter(None, ["watched", *which, "precision_at_1"]))


def evaluate_run(run: Run, data_dir: Path, question: Question) -> dict[str, Any]:
    """Answer a question about a run; a whole split's answer about averaged weights is kept as evaluation.json.

    Raises ConvlineError where the run has no such weights, file or split.
    """
    check_top_k(run, question)
    split = run.split(run.dataset(data_dir), question.split)
    predict, origin = _subject(run, question)
    evaluation = evaluate(predict, split, run.classes, question.limit, question.batch_size)
    report = {"run": run.name, "split": question.split, **origin, **evaluation.to_dict(question.top_k)}
    if question.limit is None and question.split == "test" and origin["weights"] == "averaged":
        with atomic_write(run.folder / "evaluation.json", "w") as file:
            json.dump(report, file, indent=2)
    return report


def check_top_k(run: Run, question: Question) -> None:
    """Raises ConvlineError for more classes than the run knows."""
    if question.top_k > len(run.classes):
        raise ConvlineError(f"--top-k {question.top_k}: {run.folder} knows {len(run.classes)} classes; ask for fewer")


def watch(run: Run, data_dir: Path, question: Question, interval: float, tracking: bool) -> Iterator[dict[str, Any]]:
    """Answer the question for each checkpoint of a training as it appears, until the training has ended.

    The answers are kept as points of watched.jsonl, and sent to MLflow where `tracking` asks for it. It takes one
    thread of the CPU (unless another device is asked for), and of one that is busy a tenth.
    """
    check_top_k(run, question)
    os.nice(10)
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
            predict = predictor(restored(run, state, question.weights).to(device), device)
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


def _unwatched(run: Run, question: Question) -> list[Path]:
    """The checkpoints that there is no answer for yet, oldest first."""
    answered = {point.step for point in read_points(run.watched) if question.metric in point.values}
    there = checkpoint.paths(run.folder / "checkpoints")
    return [path for path in there if checkpoint.step_of(path) not in answered]


def _subject(run: Run, question: Question) -> tuple[Predict, dict[str, Any]]:
    """What is evaluated, as a function, and what it is."""
    if question.onnx:
        if question.weights == "raw":
            raise ConvlineError("the ONNX file holds averaged weights; leave out --weights raw")
        choose_device(question.device)
        provider: Provider = "auto" if question.device == "auto" else "cpu" if question.device == "cpu" else "cuda"
        model = open_model(run.model, provider)
        return model.run, {
            "weights": model.metadata["weights"],
            "step": model.metadata["run"]["step"],
            "engine": f"onnxruntime, {model.provider}",
        }
    served, step = load_served(run, question.weights)
    device = choose_device(question.device)
    origin = {"weights": question.weights, "step": step, "engine": f"PyTorch, {device}"}
    return predictor(served.to(device), device), origin


def table(report: dict[str, Any]) -> str:
    """A report for a person."""
    lines = [
        f"{report['run']}: {report['split']}, {report['weights']} weights of step {report['step']}, {report['engine']}"
    ]
    lines += [
        f"precision @ {key.rpartition('_')[2]} = {value:.3f}"
        for key, value in report.items()
        if key.startswith("precision_at_")
    ]
    lines.append(f"{'class':{CLASS_WIDTH}}{'images':>8}{'precision':>11}{'recall':>8}")
    for name, figures in report["classes"].items():
        precision, recall = (f"{v:.3f}" if v is not None else "-" for v in (figures["precision"], figures["recall"]))
        lines.append(f"{elided(name, CLASS_WIDTH - 1):{CLASS_WIDTH}}{figures['count']:>8}{precision:>11}{recall:>8}")
    return "\n".join(lines)


def evaluate(
    predict: Predict, split: Split, classes: Sequence[str], limit: int | None = None, batch_size: int = BATCH_SIZE
) -> Evaluation:
    """Run the first `limit` images of a split, every one once, through `predict`."""
    evaluation = Evaluation(classes)
    for images, labels in batches(split.first(limit), batch_size):
        evaluation.add(predict(images)[1], labels)
    return evaluation


def batches(split: Split, size: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """A split in order, the last batch as short as it comes."""
    for start in range(0, len(split), size):
        yield split.batch(start, size)
        split.forget()
