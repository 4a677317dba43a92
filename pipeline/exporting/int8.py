"""A float32 ONNX graph in 8-bit integers: static QDQ, weights per channel.

The ranges of activations are the smallest and largest values seen on training images. Layers that cost too much
accuracy stay in float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from convline.console import log, progress
from convline.errors import ConvlineError

LAYERS = ("Conv", "Gemm", "MatMul")
# what stands between layers, and has integer kernels of its own
BETWEEN = ("Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat", "Reshape", "Flatten")

Images = NDArray[np.uint8]


class Judge(Protocol):
    """How candidates do on images that decide."""

    def passes(self, model: onnx.ModelProto) -> bool:
        """Whether it would do."""
        ...

    def cost(self, model: onnx.ModelProto) -> float:
        """How far it is from the model in float; a few images are enough."""
        ...


class Quantizer:
    """Quantizes one graph with ranges measured once, by `images` (batches of them, read one at a time).

    Nodes named in `floats` stay as they are.
    """

    def __init__(self, model: onnx.ModelProto, floats: Collection[str], images: Iterator[Images]) -> None:
        self._model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.layers = [
            node.name
            for node in model.graph.node
            if node.op_type in LAYERS and node.input[1] in weights and node.name not in floats
        ]
        products = {node.name for node in model.graph.node if node.op_type in LAYERS}
        self._floats = {*floats, *(products - set(self.layers))}  # products of two activations among them
        # onnxruntime has no product of a batch of matrices with a scale for each column
        whole = [name for name, tensor in weights.items() if len(tensor.dims) == 3 and name.endswith("weight")]
        self._overrides = {name: [{"quant_type": QuantType.QInt8}] for name in whole}
        self._ranges = self._calibrated(images)

    def _calibrated(self, images: Iterator[Images]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            source, augmented = Path(folder, "float.onnx"), Path(folder, "augmented.onnx")
            onnx.save(self._model, source)
            calibrator = create_calibrator(
                source, [*LAYERS, *BETWEEN], str(augmented), calibrate_method=CalibrationMethod.MinMax
            )
            calibrator.collect_data(_Reader(images))
            return calibrator.compute_data()

    def quantized(self, left: Collection[str] = ()) -> onnx.ModelProto:
        """The graph with all its layers quantized but those `left` in float."""
        model = onnx.ModelProto.FromString(self._model.SerializeToString())
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            # weights of 7 bits: sums of products of 8-bit ones overflow the 16 bits of AVX2's multiply-add, which cost
            # the cifar10 network 4 points (77.8% to 73.9%; 78.3% with 7 bits)
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=[*self._floats, *left],
            op_types_to_quantize=[*LAYERS, *BETWEEN],
            extra_options={"TensorQuantOverrides": self._overrides},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return _tidied(quantizer.model.model)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Iterator[Images]) -> None:
        self._images = images

    def get_next(self) -> dict[str, Images] | None:
        batch = next(self._images, None)
        return None if batch is None else {"image": batch}


def quantize(
    model: onnx.ModelProto, floats: Collection[str], images: Iterator[Images], judge: Judge
) -> tuple[onnx.ModelProto, list[str]]:
    """The model in int8, with the fewest layers left in float that `judge` lets pass, and their names.

    Where not all can be quantized, each is tried alone, and those that change probabilities most are left.
    Raises ConvlineError where no layer but one may be quantized.
    """
    quantizer = Quantizer(model, floats, images)
    layers = quantizer.layers
    candidate = quantizer.quantized()
    if judge.passes(candidate):
        return candidate, []
    log(f"int8 costs too much accuracy: looking for the layers to be left in float, among {len(layers)}")
    costs = {}
    with progress("layers", len(layers), "layers") as bar:
        for one in layers:
            costs[one] = judge.cost(quantizer.quantized(set(layers) - {one}))
            bar.advance(bar.task_ids[0])
    ranked = sorted(layers, key=lambda layer: -costs[layer])
    passing: tuple[onnx.ModelProto, list[str]] | None = None
    fewest, most = 1, len(layers) - 1
    while fewest <= most:
        count = (fewest + most) // 2
        candidate = quantizer.quantized(ranked[:count])
        if judge.passes(candidate):
            passing, most = (candidate, sorted(ranked[:count], key=layers.index)), count - 1
        else:
            fewest = count + 1
    if passing is None:
        raise ConvlineError("int8 costs this network too much accuracy, whichever layers stay in float; use fp16")
    return passing


def _tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without what the quantizer leaves behind, and with the logits in float32."""
    del model.opset_import[1:], model.metadata_props[:]
    model.producer_name = model.producer_version = ""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    for output in graph.output:
        last = producers[output.name]
        if last.op_type == "DequantizeLinear":  # 256 different logits would be few
            rounded = producers[last.input[0]]
            producer = producers[rounded.input[0]]
            producer.output[:] = [output.name if name == rounded.input[0] else name for name in producer.output]
            graph.node.remove(last)
            graph.node.remove(rounded)
    used = {name for node in graph.node for name in node.input}
    kept = sorted((tensor for tensor in graph.initializer if tensor.name in used), key=lambda tensor: tensor.name)
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(copies)
    return model
