"""Time limits for loading and running a graph that never ends."""

from __future__ import annotations

import gc
import multiprocessing
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

import serving.session
from convline.errors import ModelError
from serving import Classifier
from serving.external_model import ExternalModel, ExternalPreprocessing
from serving.inspect import inspect
from tests.serving.helpers import resealed

EXTERNAL = ExternalModel(("cat", "dog", "horse"), ExternalPreprocessing())


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.session, "LIMIT", 2.0)


def endless(value: str, output: str) -> list[onnx.NodeProto]:
    """2^62 times the same."""
    body = helper.make_graph(
        [make_node("Identity", ["going"], ["on"]), make_node("Identity", ["v"], ["w"])],
        "body",
        [
            make_tensor_value_info("i", TensorProto.INT64, []),
            make_tensor_value_info("going", TensorProto.BOOL, []),
            make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [make_tensor_value_info("on", TensorProto.BOOL, []), make_tensor_value_info("w", TensorProto.FLOAT, None)],
    )
    times = make_node("Constant", [], ["times"], value=numpy_helper.from_array(np.array(2**62), "times"))
    true = make_node("Constant", [], ["true"], value=numpy_helper.from_array(np.array(True), "true"))
    return [times, true, make_node("Loop", ["times", "true", value], [output], body=body)]


def folded(value: str, output: str) -> list[onnx.NodeProto]:
    """The product of many matrices that depend on no input: onnxruntime computes it while it loads the graph."""
    size = numpy_helper.from_array(np.array([1500, 1500]), "size")
    one = numpy_helper.from_array(np.array([1e-4], np.float32), "one")
    nodes = [make_node("Constant", [], ["size"], value=size), make_node("ConstantOfShape", ["size"], ["m0"], value=one)]
    nodes += [make_node("MatMul", [f"m{number}", "m0"], [f"m{number + 1}"]) for number in range(12)]
    return [*nodes, make_node("ReduceMean", ["m12"], ["mean"], keepdims=0), make_node("Add", [value, "mean"], [output])]


def saved(path: Path, nodes: list[onnx.NodeProto]) -> Path:
    pooled = [make_node("GlobalAveragePool", ["x"], ["p"]), make_node("Flatten", ["p"], ["f"], axis=1)]
    images = make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])
    scores = make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([*pooled, *nodes], "slow", [images], [scores])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_loop_that_never_ends_is_ended(tmp_path: Path) -> None:
    path = saved(tmp_path / "loop.onnx", endless("f", "y"))
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"loop\.onnx does not run on 8 images of 4x4: it took more than 2 s"):
        Classifier(path, "cpu", threads=1, external=EXTERNAL)
    assert time.monotonic() - began < 20


def test_a_graph_that_is_not_loaded_in_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.session, "LIMIT", 0.1)
    path = saved(tmp_path / "folded.onnx", folded("f", "y"))
    with pytest.raises(ModelError, match=r"did not load .*folded\.onnx within 0\.1 s"):
        Classifier(path, "cpu", threads=1, external=EXTERNAL)


def test_the_self_test_ends_and_inspect_runs_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with the metadata of convline, whose logits go through an endless loop."""

    def edit(proto: onnx.ModelProto) -> None:
        (last,) = (node for node in proto.graph.node if "logit" in node.output)
        last.output[list(last.output).index("logit")] = "early"
        for node in proto.graph.node:
            node.input[:] = ["early" if name == "logit" else name for name in node.input]
        proto.graph.node.extend(endless("early", "logit"))

    path = resealed(model, tmp_path / "model.onnx", edit)
    with pytest.raises(ModelError, match=r"does not run on 8 images: it took more than 2 s; export it again"):
        Classifier(path, "cpu", threads=1)
    monkeypatch.setattr(serving.session, "LIMIT", None)  # it would hang
    told = inspect(path)
    assert told["graph"]["operators"]["Loop"] == 1 and told["self_test"] == "not run"


def test_a_forked_process_waits_for_no_threads_of_its_parents_sessions(model: Path) -> None:
    session, _ = serving.session.open_session(model.read_bytes(), "cpu", threads=4)
    cycle: list[object] = [session]
    cycle.append(cycle)
    gc.disable()
    try:
        del session, cycle
        process = multiprocessing.get_context("fork").Process(target=gc.collect)
        process.start()
        process.join(60)
        assert process.exitcode == 0
    finally:
        gc.enable()
        process.kill()
