"""What `pipeline export --calibrate --wanted-precision` gains on test, for a run that held out validation images.

    pipeline train cifar10 --dataset cifar10-jpg --set data.validation=5000 --steps 3000
    python benchmarks/calibration.py runs/cifar10 [--data-dir data] [--wanted-precision 0.95] [--precision fp32]

The run is exported twice, without and with these options, and both files classify the test split as serving does.
Printed: the images that are right and the expected calibration error (15 bins) of both; how many images have another
label; precision and coverage from the threshold on. Intervals are 95%. Nothing is trained, the run is not changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import hardware, versions
from numpy.typing import NDArray

from convline.cpus import usable_cpus
from pipeline.calibration import error_metadata
from pipeline.export import ExportOptions, export
from pipeline.exporting.confidence import with_interval
from pipeline.exporting.decision import decision_figures
from pipeline.run import Run
from serving.classifier import Classifier


def main(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    data_dir: Path = Path("data"),
    wanted_precision: float = 0.95,
    precision: Annotated[Any, typer.Option(help="fp32, fp16 or int8.", parser=str)] = "fp32",
) -> None:
    opened = Run.open(run)
    dataset = opened.dataset(data_dir)
    test = opened.split(dataset, "test")
    images, labels = test.images[test.rows], test.labels[test.rows]
    print(f"{hardware(usable_cpus())}; {versions('onnxruntime-gpu', 'onnxruntime', 'torch', 'convline')}")
    found: dict[str, Any] = {}
    plain = ExportOptions(precision)
    options = ExportOptions(precision, calibrate=True, wanted_precision=wanted_precision)
    with tempfile.TemporaryDirectory() as folder:
        for name, given in (("before", plain), ("after", options)):
            path = Path(folder, f"{name}.onnx")
            export(opened, dataset, path, given)
            with Classifier(path, "cpu") as classifier:
                found[name] = classifier.classify_arrays(images)
                metadata = classifier.model.metadata
    print(f"{opened.name}: {len(labels):,} test images, {precision}, step {metadata['run']['step']:,}")
    print(f"temperature {metadata['calibration']['temperature']:.4f}")
    for name, probability in found.items():
        print(f"{name:12}{outcome(probability, labels)}")
    print(f"other label {(found['before'].argmax(1) != found['after'].argmax(1)).sum()} images")
    print(decision(found["after"], labels, metadata["decision"]))


def outcome(probability: NDArray[np.float32], labels: NDArray[np.int64]) -> str:
    is_right = probability.argmax(1) == labels
    error = error_metadata(probability.max(1), is_right)
    return f"{is_right.sum():,} right, ECE {with_interval(error['error'], error['interval'])}"


def decision(probability: NDArray[np.float32], labels: NDArray[np.int64], stored: dict[str, Any]) -> str:
    figures = decision_figures(probability.max(1), probability.argmax(1) == labels, stored["threshold"])
    precision, coverage = (with_interval(figures[key], figures[f"{key}_interval"]) for key in ("precision", "coverage"))
    wanted, threshold = stored["wanted_precision"], stored["threshold"]
    return f"wanted {wanted:g}, threshold {threshold:.4f}: precision {precision}, coverage {coverage}"


if __name__ == "__main__":
    typer.run(main)
