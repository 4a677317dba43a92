"""Convert the float32 graph to the precision of `export --precision`: fp16 or int8.

Draws the training images that calibrate int8, and the validation images that decide which layers it leaves in float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from models.served_network import ServedNetwork
from pipeline.dataset import Dataset, Split
from pipeline.exporting.comparison import split_batches
from pipeline.exporting.float16 import to_float16
from pipeline.exporting.graph import check, float32_nodes
from pipeline.exporting.int8_layers import SplitAccuracy, quantize_layers
from pipeline.exporting.tolerances import Precision
from pipeline.run import Run

CALIBRATION_IMAGES = 512
ACCURACY_IMAGES = 2000


def to_precision(
    full: onnx.ModelProto, served: ServedNetwork, run: Run, dataset: Dataset, precision: Precision
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph in a precision, made from the float32 graph `full`, and details for the report: images, layers."""
    if precision == "fp32":
        return full, {}
    float32 = float32_nodes(full, served)
    details: dict[str, Any] = {}
    if precision == "fp16":
        model = to_float16(full, float32)
    else:
        train = _draw(run.split(dataset, "train"), CALIBRATION_IMAGES, seed=1)
        held_out, description = accuracy_split(run, dataset)
        images = (batch.images for batch in split_batches(train))
        model, float_layers = quantize_layers(full, float32, images, SplitAccuracy(full, held_out, run))
        details = {
            "calibrated_on": f"{len(train)} training images",
            "judged_on": description,
            "left_in_float": float_layers,
        }
    check(model)
    return model, details


def accuracy_split(run: Run, dataset: Dataset) -> tuple[Split, str]:
    """The images that decide which layers stay in float, never test images; and what they are, in words."""
    name = "validation" if run.recipe.data.validation else "train"
    split = _draw(run.split(dataset, name), ACCURACY_IMAGES, seed=2)
    return split, f"{len(split)} {'validation' if name == 'validation' else 'training'} images"


def _draw(split: Split, count: int, seed: int) -> Split:
    """`count` random rows of a split, or all if it has fewer."""
    drawn = np.random.default_rng([seed, len(split)]).permutation(len(split))[:count]
    return Split(split.name, split.images, split.labels, split.rows[np.sort(drawn)])
