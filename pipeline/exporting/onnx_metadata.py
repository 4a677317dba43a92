"""The metadata of an exported ONNX file: classes, image format, recipe, versions, probe (self-test), evaluation."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx

from convline.errors import ConvlineError
from pipeline.dataset import Dataset
from pipeline.exporting.onnx_predictor import onnx_predictor
from pipeline.exporting.parity_result import Parity
from pipeline.exporting.tolerances import Precision
from pipeline.network import Predict
from pipeline.run import Run
from serving.model import PROBE_IMAGES, probe_images
from serving.model_file import FORMAT, PREFIX
from serving.session import UNFAMILIAR

# how far logits may be from the probe's, as a share of its largest logit: CPUs and GPUs sum in different orders, in
# float16 with 11 bits; int8 rounds differently (0.2% was seen between onnxruntime's integer kernels and the same graph
# computed in float)
PROBE_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int8": 2e-2}
LIBRARIES = ("convline", "torch", "onnx", "onnxscript", "numpy")


def run_metadata(run: Run, dataset: Dataset, step: int) -> dict[str, Any]:
    """All metadata that follow from the run, without probe, evaluation and parity."""
    recipe, weights = run.recipe.to_dict(), run.info.get("weights")
    if weights:
        recipe["model"]["weights"] = weights["name"]  # the recipe may have a path of this machine
    return {
        "format": FORMAT,
        "classes": run.classes,
        "image": run.spec.to_dict(),
        "recipe": recipe,
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "source": dataset.meta["source"],
            **({"leaks": dataset.leaks} if dataset.leaks else {}),
        },
        "weights": "averaged",
        "run": {"id": run.info["id"], "name": run.name, "seed": run.recipe.train.seed, "step": step},
        "versions": {name: version(name) for name in LIBRARIES} | {"onnxruntime": _onnxruntime_version()},
        **({"pretrained": weights} if weights else {}),
    }


def probe_metadata(model: onnx.ModelProto, run: Run, reference: Predict, precision: Precision) -> dict[str, Any]:
    """The logits that serving's self-test must reproduce, and how unfamiliar the images are, where the model tells it:
    PyTorch's in fp32, the file's own in a lower precision."""
    outputs = (reference if precision == "fp32" else onnx_predictor(model))(probe_images(run.spec))
    if not all(np.isfinite(values).all() for values in outputs[1:]):
        raise ConvlineError(
            f"{run.folder} gives outputs in {precision} that are not finite; there is nothing to publish"
        )
    _, logits, *unfamiliar = outputs
    return {
        "images": PROBE_IMAGES,
        "logits": [[float(str(value)) for value in row] for row in logits],
        **({UNFAMILIAR: [float(str(value)) for value in unfamiliar[0]]} if unfamiliar else {}),
        "tolerance": PROBE_TOLERANCE[precision] * max(1.0, float(np.abs(logits).max())),
    }


def evaluation_metadata(dataset: Dataset, parity: Parity) -> dict[str, Any]:
    """precision @ 1 of the file on the test split, and the fingerprint of that split."""
    return {
        "split": "test",
        "fingerprint": dataset.meta["fingerprints"]["test"],
        "count": parity.candidate_evaluation.count,
        "precision_at_1": parity.candidate_evaluation.precision_at(1),
    }


def add_metadata(model: onnx.ModelProto, values: dict[str, Any]) -> None:
    """Add entries to the model, as JSON, their keys prefixed with `convline.`."""
    for key, value in values.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = PREFIX + key, json.dumps(value, sort_keys=True, allow_nan=False)


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
