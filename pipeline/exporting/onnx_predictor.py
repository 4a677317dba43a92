"""Run an ONNX model that is in memory, on the CPU, with the session that serving uses."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from pipeline.network import Predict, Unfamiliar
from serving.model import has_float16
from serving.session import OUTPUTS, UNFAMILIAR, open_session


def onnx_predictor(model: onnx.ModelProto) -> Predict:
    """The model as a function on NumPy arrays."""
    session = _session(model)

    def predict(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        probability, logit = session.run(OUTPUTS, {"image": images})
        return probability, logit

    return predict


def onnx_unfamiliar(model: onnx.ModelProto) -> Unfamiliar:
    """As `onnx_predictor`, for how unfamiliar images are; the model must have this output."""
    session = _session(model)

    def unfamiliar(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        (distances,) = session.run([UNFAMILIAR], {"image": images})
        return distances

    return unfamiliar


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    session, _ = open_session(model.SerializeToString(), "cpu", has_float16=has_float16(model))
    return session
