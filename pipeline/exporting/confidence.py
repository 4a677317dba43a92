"""`export --calibrate` and `--wanted-precision`: the temperature, the threshold, and what they do on validation and
test. Validation images alone decide; test images only show the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from convline.errors import ConvlineError
from models.served_network import ServedNetwork, Temperature
from pipeline.calibration import error_metadata, fit_temperature
from pipeline.dataset import Dataset
from pipeline.exporting.comparison import split_batches
from pipeline.exporting.decision import decision_figures, find_threshold
from pipeline.exporting.onnx_predictor import onnx_predictor
from pipeline.network import Predict, predictor
from pipeline.run import Run
from serving.records import UNSURE

SPLITS = ("validation", "test")


def check_confidence_options(
    run: Run,
    dataset: Dataset,
    *,
    calibrate: bool = False,
    wanted_precision: float | None = None,
    unfamiliar: bool = False,
) -> None:
    """Raises ConvlineError where the run has no validation images for these options, or they make no sense."""
    if wanted_precision is not None and not 0 < wanted_precision < 1:
        raise ConvlineError(f"--wanted-precision {wanted_precision:g} is not between 0 and 1, as in 0.99")
    if wanted_precision is not None and UNSURE in run.classes:
        raise ConvlineError(
            f"{run.folder} has a class named {UNSURE}, which is what serving answers below the threshold; give the "
            "class another name, or leave out --wanted-precision"
        )
    asked = {"--calibrate": calibrate, "--wanted-precision": wanted_precision is not None, "--unfamiliar": unfamiliar}
    options = [option for option, is_asked in asked.items() if is_asked]
    if options and not dataset.has_validation(run.recipe.data.validation):
        needs = f"{' and '.join(options)} need{'s' if len(options) == 1 else ''}"
        raise ConvlineError(
            f"{needs} validation images, and {run.folder} has none: train it with --set data.validation=0.1, which "
            "holds out a tenth of the training images"
        )


def calibrate_network(served: ServedNetwork, run: Run, dataset: Dataset) -> None:
    """Give the network the temperature that fits validation best."""
    predict = predictor(served, torch.device("cpu"))
    outputs = [(predict(batch.images)[1], batch.labels) for batch in split_batches(run.split(dataset, "validation"))]
    logits, labels = map(np.concatenate, zip(*outputs, strict=True))
    served.temperature = Temperature(fit_temperature(logits, labels))


@dataclass(frozen=True)
class Confidences:
    """The most probable class of each image of a split, int64 [n]: its probability, float32 [n], the one that it would
    have without a temperature, float32 [n], and whether it is the true class, bool [n]."""

    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    uncalibrated: NDArray[np.float32]
    is_right: NDArray[np.bool_]


def measure_confidence(model: onnx.ModelProto, run: Run, dataset: Dataset) -> dict[str, Confidences]:
    """On validation and test, with the exported graph on the CPU, in the batches of serving."""
    predict = onnx_predictor(model)
    return {split: _measure(predict, run, dataset, split) for split in SPLITS}


def confidence_metadata(
    measured: Mapping[str, Confidences], served: ServedNetwork, wanted_precision: float | None
) -> dict[str, Any]:
    """The metadata `calibration`, where the network has a temperature, and `decision`, where a precision is wanted."""
    metadata: dict[str, Any] = {}
    if served.temperature is not None:
        metadata["calibration"] = {
            "temperature": served.temperature.number,
            "split": "validation",
            "count": len(measured["validation"].confidence),
            "errors": {split: _errors(found) for split, found in measured.items()},
        }
    if wanted_precision is not None:
        judged = measured["validation"]
        threshold = find_threshold(judged.confidence, judged.is_right, wanted_precision)
        metadata["decision"] = {
            "wanted_precision": wanted_precision,
            "threshold": threshold,
            **{split: decision_figures(f.confidence, f.is_right, threshold) for split, f in measured.items()},
        }
    return metadata


def _measure(predict: Predict, run: Run, dataset: Dataset, split: str) -> Confidences:
    def parts() -> Iterator[tuple[NDArray[Any], ...]]:
        for batch in split_batches(run.split(dataset, split)):
            probability, logit, *_ = predict(batch.images)
            exponentials = np.exp(logit - logit.max(1, keepdims=True))
            uncalibrated = 1 / exponentials.sum(1)
            predicted = probability.argmax(1)
            yield predicted, probability.max(1), uncalibrated, predicted == batch.labels

    found = Confidences(*map(np.concatenate, zip(*parts(), strict=True)))
    if not np.isfinite(found.confidence).all():
        raise ConvlineError(
            f"{run.folder} gives probabilities on {split} that are not finite; there is nothing to publish"
        )
    return found


def _errors(found: Confidences) -> dict[str, Any]:
    return {
        "before": error_metadata(found.uncalibrated, found.is_right),
        "after": error_metadata(found.confidence, found.is_right),
    }


def confidence_lines(metadata: dict[str, Any]) -> list[str]:
    """What `confidence_metadata` found, for the terminal."""
    lines = []
    if calibration := metadata.get("calibration"):
        lines.append(f"temperature     {calibration['temperature']:.4f}, fitted on {calibration['count']} images")
        for split, errors in calibration["errors"].items():
            before, after = (with_interval(errors[k]["error"], errors[k]["interval"]) for k in ("before", "after"))
            lines.append(f"ECE, {split:11}{before} before, {after} after")
    if decision := metadata.get("decision"):
        lines.append(
            f"threshold       {decision['threshold']:.6g}, for a precision of {decision['wanted_precision']:g}"
        )
        for split in SPLITS:
            found = decision[split]
            precision = with_interval(found["precision"], found["precision_interval"])
            coverage = with_interval(found["coverage"], found["coverage_interval"])
            lines.append(f"{split:16}precision {precision}, coverage {coverage}")
    return lines


def with_interval(value: float | None, interval: list[float]) -> str:
    """A figure with its 95% interval; "-" for None."""
    return "-" if value is None else f"{value:.4f} ({interval[0]:.4f} to {interval[1]:.4f})"
