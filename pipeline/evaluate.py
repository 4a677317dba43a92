"""precision@k, and what lies behind it: figures for each class and the confusion matrix."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convline.errors import ConvlineError
from convline.files import atomic_write
from convline.html import elide_middle
from pipeline.device import choose_device
from pipeline.metrics import BATCH_SIZE, evaluate
from pipeline.network import Predict, load_network, predictor
from pipeline.run import Run
from serving.model import open_model
from serving.session import Provider

CLASS_WIDTH = 24  # characters of a class's name in a table


@dataclass(frozen=True)
class EvaluationOptions:
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


def evaluate_run(run: Run, data_dir: Path, question: EvaluationOptions) -> dict[str, Any]:
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


def check_top_k(run: Run, question: EvaluationOptions) -> None:
    """Raises ConvlineError for more classes than the run knows."""
    if question.top_k > len(run.classes):
        raise ConvlineError(f"--top-k {question.top_k}: {run.folder} knows {len(run.classes)} classes; ask for fewer")


def _subject(run: Run, question: EvaluationOptions) -> tuple[Predict, dict[str, Any]]:
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
    served, step = load_network(run, question.weights)
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
        lines.append(
            f"{elide_middle(name, CLASS_WIDTH - 1):{CLASS_WIDTH}}{figures['count']:>8}{precision:>11}{recall:>8}"
        )
    return "\n".join(lines)
