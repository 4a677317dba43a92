"""Quantize a float32 ONNX graph to 8-bit integers (int8): static QDQ, weights per channel.

The ranges of activations are the smallest and largest values seen on calibration images; on these biases are corrected,
too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from pipeline.exporting.bias_correction import Correction, bias_corrections, corrected

LAYER_OPERATORS = ("Conv", "Gemm", "MatMul")
# operators between layers that have integer kernels
OTHER_OPERATORS = ("Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat", "Reshape", "Flatten")

Images = NDArray[np.uint8]


class Quantizer:
    """Quantizes one graph several ways, with ranges and corrections of biases measured once.

    `images` begins to read the calibration images (batches, one at a time) and is called twice. `layers` are the names
    of the nodes that can be quantized; the nodes named in `float32_nodes` never are.
    """

    def __init__(
        self, model: onnx.ModelProto, float32_nodes: Collection[str], images: Callable[[], Iterator[Images]]
    ) -> None:
        self._model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        layer_nodes = [node for node in model.graph.node if node.op_type in LAYER_OPERATORS]
        self.layers = [node.name for node in layer_nodes if node.input[1] in weights and node.name not in float32_nodes]
        # products of two activations are layer operators without weights
        self._float32_nodes = {*float32_nodes, *({node.name for node in layer_nodes} - set(self.layers))}
        # onnxruntime cannot multiply a batch of matrices with a scale for each column: these weights get one scale
        batched = [name for name, tensor in weights.items() if len(tensor.dims) == 3 and name.endswith("weight")]
        self._overrides = {name: [{"quant_type": QuantType.QInt8}] for name in batched}
        self._ranges = self._calibrate(images())
        self._corrections: list[Correction] = []
        self._corrections = bias_corrections(self._model, self.quantize(), self.layers, images())

    def _calibrate(self, images: Iterator[Images]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            float_path, augmented_path = Path(folder, "float.onnx"), Path(folder, "augmented.onnx")
            onnx.save(self._model, float_path)
            calibrator = create_calibrator(
                float_path,
                [*LAYER_OPERATORS, *OTHER_OPERATORS],
                str(augmented_path),
                calibrate_method=CalibrationMethod.MinMax,
            )
            calibrator.collect_data(_Reader(images))
            return calibrator.compute_data()

    def quantize(self, float_layers: Collection[str] = ()) -> onnx.ModelProto:
        """The graph with all its layers quantized, except those named in `float_layers`."""
        quantizer = QDQQuantizer(
            corrected(self._model, self._corrections, float_layers),
            per_channel=True,
            # weights of 7 bits: sums of products of 8-bit weights overflow the 16 bits of AVX2's multiply-add, which
            # cost the cifar10 network 4 points (77.8% to 73.9%; 78.3% with 7 bits)
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=[*self._float32_nodes, *float_layers],
            op_types_to_quantize=[*LAYER_OPERATORS, *OTHER_OPERATORS],
            extra_options={"TensorQuantOverrides": self._overrides},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return _clean(quantizer.model.model)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Iterator[Images]) -> None:
        self._images = images

    def get_next(self) -> dict[str, Images] | None:
        batch = next(self._images, None)
        return None if batch is None else {"image": batch}


def _clean(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the quantizer's metadata and unused weights, and leave the logits in float32."""
    del model.opset_import[1:], model.metadata_props[:]
    model.producer_name = model.producer_version = ""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    for output in graph.output:
        dequantize = producers[output.name]
        if dequantize.op_type == "DequantizeLinear":  # the logits would have 256 different values at most
            quantize = producers[dequantize.input[0]]
            layer = producers[quantize.input[0]]
            layer.output[:] = [output.name if name == quantize.input[0] else name for name in layer.output]
            graph.node.remove(dequantize)
            graph.node.remove(quantize)
    used = {name for node in graph.node for name in node.input}
    used_weights = sorted((tensor for tensor in graph.initializer if tensor.name in used), key=lambda t: t.name)
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in used_weights]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(copies)
    return model
