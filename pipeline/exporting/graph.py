"""Export the served module (preprocessing, network, softmax) from PyTorch to a float32 ONNX graph, and check it.

Nodes are named after their module ("network.conv1/Conv"), weights as in PyTorch. Constants that are not trained are
named `constant.…`. Nothing in the graph names the machine that exported it.
"""

from __future__ import annotations

import ast
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import onnx
import torch
from torch import nn

from convline.errors import ConvlineError
from convline.images import ImageSpec
from models.layers import LocalResponseNorm
from models.served_network import ServedNetwork, Temperature
from models.unfamiliarity import ImageFeatures, Unfamiliarity
from serving.model import probe_images
from serving.model_file import CONSTANT_PREFIX, MAX_PROTOBUF_BYTES
from serving.session import OUTPUTS, UNFAMILIAR

OPSET = 20
# these stay in float32 in every precision
FLOAT32_MODULES = (LocalResponseNorm, Temperature, Unfamiliarity, ImageFeatures)
FLOAT32_OPERATORS = ("Softmax",)


def to_onnx(served: ServedNetwork, spec: ImageSpec) -> onnx.ModelProto:
    """The module as a checked ONNX model: uint8 `image` in; `probability` and `logit` out, and `unfamiliar`
    where the module tells it; batch dynamic.

    Raises ConvlineError where the exporter uses another opset, or the file would be too large.
    """
    shapes = {"image": {0: torch.export.Dim("batch")}}
    program = torch.export.export(served, (torch.from_numpy(probe_images(spec)),), dynamic_shapes=shapes)
    _pool_by_mean(program)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")  # the exporter's own deprecation warnings
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=OUTPUTS if served.unfamiliarity is None else [*OUTPUTS, UNFAMILIAR],
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    model: onnx.ModelProto = exported.model_proto
    _rename(model, served)
    _strip(model)
    check(model)
    return model


def check(model: onnx.ModelProto) -> None:
    """Raises ConvlineError for another opset, or a model that does not fit into one file."""
    opset = {entry.domain: entry.version for entry in model.opset_import}
    if opset != {"": OPSET}:
        raise ConvlineError(
            f"the exporter wrote the opsets {opset} instead of {OPSET}; use the versions of constraints.txt"
        )
    if (size := model.ByteSize()) > MAX_PROTOBUF_BYTES:
        raise ConvlineError(
            f"the network takes {size} bytes, an ONNX file holds at most {MAX_PROTOBUF_BYTES}; choose a smaller network"
        )
    onnx.checker.check_model(model, full_check=True)


def float32_nodes(model: onnx.ModelProto, served: ServedNetwork) -> set[str]:
    """The nodes that stay in float32 in every precision: standardisation, local response normalisation,
    temperature, softmax, and what tells how unfamiliar an image is."""
    modules = ["preprocessing", *(name for name, m in served.named_modules() if isinstance(m, FLOAT32_MODULES))]
    return {node.name for node in model.graph.node if _module_of(node) in modules or node.op_type in FLOAT32_OPERATORS}


def _module_of(node: onnx.NodeProto) -> str:
    return str(node.name).rpartition("/")[0]


def _pool_by_mean(program: torch.export.ExportedProgram) -> None:
    """Make a pool to a size of 1x1 a mean; the exporter adds a gather over computed indices."""
    for node in program.graph.nodes:
        if node.target == torch.ops.aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], [2, 3], True)


def _rename(model: onnx.ModelProto, served: nn.Module) -> None:
    """Name nodes after their modules, and constants `constant.…`."""
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "['', '']")
        module = ast.literal_eval(scopes)[-2]
        name = f"{module}/{node.op_type}" if module else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
    trained = served.state_dict().keys()
    constants = {name for name, _ in served.named_buffers()} - trained
    renamed = {name: CONSTANT_PREFIX + name for name in constants}
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces and module paths: they contain file names of the exporting machine."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
