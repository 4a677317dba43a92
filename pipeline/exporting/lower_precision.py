"""Convert the float32 graph to the precision of `export --precision`: fp16 or int8.

Draws the training images that calibrate int8, and the images that decide which layers it leaves in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from models.served_network import ServedNetwork
from pipeline.dataset import Dataset, Split
from pipeline.exporting.blends import blended_batches
from pipeline.exporting.comparison import split_batches
from pipeline.exporting.float16 import to_float16
from pipeline.exporting.graph import check, float32_nodes
from pipeline.exporting.int8_layers import AccuracyOnImages, quantize_layers
from pipeline.exporting.tolerances import TOLERANCES, Precision, Tolerance
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
        calibrating = draw(run.split(dataset, "train"), CALIBRATION_IMAGES, seed=1)
        accuracy, judged_on = accuracy_check(full, run, dataset)
        model, float_layers = quantize_layers(full, float32, lambda: _images(calibrating), accuracy)
        details = {
            "calibrated_on": f"{len(calibrating)} training images",
            "judged_on": judged_on,
            "left_in_float": float_layers,
        }
    check(model)
    return model, details


def accuracy_check(full: onnx.ModelProto, run: Run, dataset: Dataset) -> tuple[AccuracyOnImages, str]:
    """The check that decides which layers stay in float, and what it looks at, in words: validation images, or blends
    of training images where none are held out, never test images.

    On validation images its tolerance is half of the one that the exported file must meet. On blends it is the whole:
    more of these lie where the prediction changes.
    """
    final = TOLERANCES["int8"]
    if dataset.has_validation(run.recipe.data.validation):
        held_out = draw(run.split(dataset, "validation"), ACCURACY_IMAGES, seed=2)
        tolerance = Tolerance(lost_share=final.lost_share / 2, lost_images=final.lost_images // 2)
        check = AccuracyOnImages(full, lambda: split_batches(held_out), tolerance, run)
        return check, f"{len(held_out)} validation images"
    train = run.split(dataset, "train")
    check = AccuracyOnImages(full, lambda: blended_batches(train, ACCURACY_IMAGES), final, run)
    return check, f"{ACCURACY_IMAGES} blends of two training images"


def _images(split: Split) -> Iterator[NDArray[np.uint8]]:
    return (batch.images for batch in split_batches(split))


def draw(split: Split, count: int, seed: int) -> Split:
    """`count` random rows of a split, or all if it has fewer."""
    drawn = np.random.default_rng([seed, len(split)]).permutation(len(split))[:count]
    return Split(split.name, split.images, split.labels, split.rows[np.sort(drawn)])
