"""`pipeline evaluate`: precision @ k of a run or its ONNX file, precision and recall of each class, evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from convline.errors import ConvlineError
from convline.files import atomic_write
from convline.html import elide_middle
from pipeline.dataset import Split
from pipeline.device import choose_device
from pipeline.network import Predict, load_network, predictor
from pipeline.preparing.image_folder import decode_labelled
from pipeline.reporting.mistakes_table import write_mistakes
from pipeline.reporting.paired_comparison import packed_bits
from pipeline.reporting.predictions import SplitPredictions
from pipeline.run import Run
from serving.model import open_model
from serving.session import Provider

CLASS_COLUMN = 24  # characters for the names of classes in the table


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate and how.

    `split` is "train", "validation" or "test"; `images`, a folder or archive <class>/<image>, takes its place;
    `weights` are "averaged" or "raw"; `onnx` evaluates the exported file; `limit` takes only the first images;
    precision is measured at 1 to `top_k`.
    """

    split: str = "test"
    weights: str = "averaged"
    onnx: bool = False
    limit: int | None = None
    device: str = "auto"
    batch_size: int | None = None
    top_k: int = 1
    images: Path | None = None

    @property
    def metric(self) -> str:
        """The name of precision @ 1 in watched.jsonl."""
        parts = [
            self.weights if self.weights != "averaged" else "",
            self.split if self.split != "test" else "",
            f"first_{self.limit}" if self.limit else "",
        ]
        return "_".join(filter(None, ["watched", *parts, "precision_at_1"]))


def evaluate_run(run: Run, data_dir: Path, options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate a run and return the report. That of averaged weights on the whole test split is also written to the
    run's evaluation.json, and its mistakes to mistakes.csv.

    Raises ConvlineError if the run does not have the weights, the file or the split, and for images of other classes.
    """
    check_top_k(run, options)
    with _images(run, data_dir, options) as (split, name):
        predict, origin = _predictor(run, options)
        predictions = SplitPredictions.compute(predict, split.take(options.limit), run.classes, options.batch_size)
    evaluation = predictions.evaluation
    report = {"run": run.name, "split": name, **origin, **evaluation.to_dict(options.top_k)}
    is_test_split = options.images is None and options.split == "test"
    if options.limit is None and is_test_split and origin["weights"] == "averaged":
        with atomic_write(run.folder / "evaluation.json", "w") as file:
            json.dump(report | {"hits": packed_bits(evaluation.hits)}, file, indent=2)
        write_mistakes(run, predictions, run.dataset(data_dir).paths(predictions.split))
    return report


@contextmanager
def _images(run: Run, data_dir: Path, options: EvaluationOptions) -> Iterator[tuple[Split, str]]:
    """The images to evaluate, and their name for the report."""
    if options.images is None:
        yield run.split(run.dataset(data_dir), options.split), options.split
        return
    with TemporaryDirectory() as folder:
        decoded = decode_labelled(options.images, Path(folder), run.classes, run.spec)
        yield Split("test", decoded.images, decoded.labels, decoded.rows["test"]), str(options.images)


def check_top_k(run: Run, options: EvaluationOptions) -> None:
    """Raises ConvlineError if `top_k` is larger than the run's number of classes."""
    if options.top_k > len(run.classes):
        count = len(run.classes)
        raise ConvlineError(f"--top-k {options.top_k}: {run.folder} has only {count} classes; choose a smaller K")


def _predictor(run: Run, options: EvaluationOptions) -> tuple[Predict, dict[str, Any]]:
    """The network or ONNX file to evaluate, as a function, and for the report its weights, step and engine."""
    if options.onnx:
        if options.weights == "raw":
            raise ConvlineError("the ONNX file holds averaged weights; leave out --weights raw")
        choose_device(options.device)  # raises ConvlineError for a device that does not exist
        provider: Provider = "auto" if options.device == "auto" else "cpu" if options.device == "cpu" else "cuda"
        model = open_model(run.model, provider)
        return model.run, {
            "weights": model.metadata["weights"],
            "step": model.metadata["run"]["step"],
            "engine": f"onnxruntime, {model.provider}",
        }
    served, step = load_network(run, options.weights)
    device = choose_device(options.device)
    origin = {"weights": options.weights, "step": step, "engine": f"PyTorch, {device}"}
    return predictor(served.to(device), device), origin


def table(report: dict[str, Any]) -> str:
    """A report as text for the terminal."""
    lines = [
        f"{report['run']}: {report['split']}, {report['weights']} weights of step {report['step']}, {report['engine']}"
    ]
    lines += [
        f"precision @ {key.rpartition('_')[2]} = {value:.3f}"
        for key, value in report.items()
        if key.startswith("precision_at_")
    ]
    intervals = report["intervals"]
    lines.append(f"95% interval of precision @ 1: {_range(intervals['precision_at_1'])} ({report['count']:,} images)")
    lines.append(f"{'class':{CLASS_COLUMN}}{'images':>8}{'precision':>12}{'':16}{'recall':>8}")
    for name, figures in report["classes"].items():
        cells = [
            f"{'-':>11}{'':16}" if figures[key] is None else f"{figures[key]:11.3f} {_range(interval):15}"
            for key, interval in intervals["classes"][name].items()
        ]
        line = f"{elide_middle(name, CLASS_COLUMN - 1):{CLASS_COLUMN}}{figures['count']:>8}{''.join(cells)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _range(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"
