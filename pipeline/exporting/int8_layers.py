"""Choose which layers int8 leaves in float: those whose quantization costs too much accuracy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from convline.console import log, progress
from convline.errors import ConvlineError
from pipeline.exporting.comparison import compare_models
from pipeline.exporting.int8 import Images, Quantizer
from pipeline.exporting.onnx_predictor import onnx_predictor
from pipeline.exporting.parity_result import NamedBatch, Parity
from pipeline.exporting.tolerances import Tolerance
from pipeline.network import Predict
from pipeline.run import Run

RANKING_BATCHES = 4  # of images, on which the layers are ranked


class AccuracyCheck(Protocol):
    """Compares int8 candidates with the model in float."""

    def passes(self, candidate: onnx.ModelProto) -> bool:
        """Whether the candidate is accurate enough."""
        ...

    def probability_change(self, candidate: onnx.ModelProto) -> float:
        """The mean |Δprobability|; may be measured on a few images."""
        ...


def quantize_layers(
    model: onnx.ModelProto,
    float32_nodes: Collection[str],
    images: Callable[[], Iterator[Images]],
    accuracy: AccuracyCheck,
) -> tuple[onnx.ModelProto, list[str]]:
    """The model in int8, and the names of the layers left in float: the fewest with which `accuracy` passes.

    `images` calibrate (see Quantizer). If not all layers can be quantized, each is quantized alone, and those
    that change probabilities most are left in float. Raises ConvlineError where even one quantized layer costs too much
    accuracy.
    """
    quantizer = Quantizer(model, float32_nodes, images)
    layers = quantizer.layers
    candidate = quantizer.quantize()
    if accuracy.passes(candidate):
        return candidate, []
    log(f"int8 costs too much accuracy: choosing which of {len(layers)} layers stay in float")
    changes = {}
    with progress("layers", len(layers), "layers") as bar:
        for layer in layers:
            changes[layer] = accuracy.probability_change(quantizer.quantize(set(layers) - {layer}))
            bar.advance(bar.task_ids[0])
    ranked = sorted(layers, key=lambda layer: -changes[layer])
    best: tuple[onnx.ModelProto, list[str]] | None = None
    fewest, most = 1, len(layers) - 1
    while fewest <= most:  # binary search for the smallest number of layers in float
        count = (fewest + most) // 2
        candidate = quantizer.quantize(ranked[:count])
        if accuracy.passes(candidate):
            best, most = (candidate, sorted(ranked[:count], key=layers.index)), count - 1
        else:
            fewest = count + 1
    if best is None:
        raise ConvlineError("int8 costs this network too much accuracy, whichever layers stay in float; use fp16")
    return best


class AccuracyOnImages:
    """The AccuracyCheck on the batches of images that `images` begins to read."""

    def __init__(
        self, full: onnx.ModelProto, images: Callable[[], Iterator[NamedBatch]], tolerance: Tolerance, run: Run
    ) -> None:
        self._reference = _cached(onnx_predictor(full))
        self._images = images
        self._tolerance = tolerance
        self._run = run

    def passes(self, candidate: onnx.ModelProto) -> bool:
        return self._compare(candidate, self._images()).passed

    def probability_change(self, candidate: onnx.ModelProto) -> float:
        return self._compare(candidate, islice(self._images(), RANKING_BATCHES)).mean_probability_difference

    def _compare(self, candidate: onnx.ModelProto, images: Iterator[NamedBatch]) -> Parity:
        parity = Parity(self._run.classes, self._tolerance)
        compare_models(parity, self._reference, onnx_predictor(candidate), images, self._run.spec)
        return parity


def _cached(predict: Predict) -> Predict:
    """`predict`, with the outputs of batches that it has seen before from memory."""
    outputs: dict[bytes, tuple[NDArray[np.float32], ...]] = {}

    def cached(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
        key = hashlib.sha256(images.tobytes()).digest()
        if key not in outputs:
            outputs[key] = predict(images)
        return outputs[key]

    return cached
