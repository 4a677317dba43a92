"""Run an ONNX model that is in memory, on the CPU, with the session that serving uses."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.network import Predict
from serving.model import has_float16
from serving.session import open_session


def onnx_predictor(model: onnx.ModelProto) -> Predict:
    """The model as a function on NumPy arrays."""
    session, _ = open_session(model.SerializeToString(), "cpu", has_float16=has_float16(model))
    outputs = [value.name for value in model.graph.output]

    def predict(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
        return tuple(session.run(outputs, {"image": images}))

    return predict
