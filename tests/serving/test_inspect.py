"""`serving inspect`: the operators, the cost and the provenance of a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from convline.errors import ModelError
from serving.inspect import inspect
from tests.conftest import run_command
from tests.serving.helpers import resealed, set_metadata


def test_the_report_is_complete(model: Path) -> None:
    told = inspect(model)
    assert told["file"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert told["file"]["bytes"] == model.stat().st_size
    assert told["graph"]["opset"] == 20
    assert told["graph"]["operators"]["Conv"] == 2
    assert sum(told["graph"]["operators"].values()) == len(onnx.load(model).graph.node)
    assert told["metadata"]["dataset"]["name"] == "digits"
    assert told["metadata"]["run"]["step"] == 300
    assert told["parity"]["passed"] and told["self_test"] == "not run"


def test_parameters_and_multiply_adds_by_hand(model: Path) -> None:
    """3x3 to 32, pool, 3x3 to 64, pool, 256 to 128 to 10, on 8x8 grey images."""
    told = inspect(model)["graph"]
    assert told["parameters"] == 32 * 9 + 32 + 64 * 32 * 9 + 64 + 128 * 256 + 128 + 10 * 128 + 10
    assert told["multiply_adds"] == 64 * 32 * 9 + 16 * 64 * 32 * 9 + 256 * 128 + 128 * 10


def test_memory_by_hand(model: Path) -> None:
    """The peak is at the first ReLU: its input and its output are 32 maps of 8x8 floats each."""
    told = inspect(model)["memory_bytes"]
    for batch in (1, 64):
        assert told[f"batch_{batch}"] - told["weights"] == batch * 2 * 32 * 8 * 8 * 4


def test_it_is_printed_for_a_person_and_as_json(project: Path, model: Path) -> None:
    shown = run_command(project, "serving", "inspect", model).stdout
    for line in ("parameters", "53,002", "multiply_adds", "347,392", "precision_at_1", "sha256_without_parity"):
        assert line in shown
    assert max(map(len, shown.splitlines())) < 1000
    told = json.loads(run_command(project, "serving", "inspect", model, "--json").stdout)
    assert told["graph"] == inspect(model)["graph"]


def test_control_characters_are_not_sent_to_the_terminal(project: Path, model: Path, tmp_path: Path) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        set_metadata("versions", json.dumps({"\x1b[31mred": "\x1b]0;title\x07"}))(proto)

    shown = run_command(project, "serving", "inspect", resealed(model, tmp_path / "model.onnx", edit)).stdout
    assert "\x1b" not in shown and "\\x1b[31mred" in shown


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda proto: proto.graph.node.add(op_type="Conv"), id="no-inputs"),
        pytest.param(lambda proto: proto.graph.node[3].ClearField("output"), id="no-outputs"),
        pytest.param(lambda proto: proto.graph.initializer.pop(), id="no-weight"),
        pytest.param(lambda proto: setattr(proto.graph.initializer[0], "data_type", 29), id="unknown-type"),
    ],
)
def test_a_malformed_graph_gives_one_sentence(model: Path, tmp_path: Path, edit: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx has a malformed graph \(.*\); export it again"):
        inspect(resealed(model, tmp_path / "model.onnx", edit))
