"""Models and runtimes for the tests of `serving page`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from convline.images import ImageSpec
from pipeline.exporting.onnx_metadata import add_metadata
from pipeline.exporting.resize_graph import add_resize
from serving.page import SCRIPT, WASM
from tests.pipeline.helpers import write_files
from tests.serving.helpers import resealed


def any_size(model: Path, target: Path, **metadata: Any) -> Path:
    """The file that `export --any-size` writes where `export` wrote `model`, without its proof of sizes; `metadata`
    replaces entries."""

    def edit(proto: onnx.ModelProto) -> None:
        stored = {entry.key.removeprefix("convline."): json.loads(entry.value) for entry in proto.metadata_props}
        proto.CopyFrom(add_resize(proto, ImageSpec.from_dict(stored["image"])))
        del proto.metadata_props[:]
        add_metadata(proto, stored | {"any_size": True} | metadata)

    return resealed(model, target, edit)


def with_many_classes(model: Path, target: Path, times: int) -> Path:
    """A file of any size whose classes come `times` as often, under names that are hard to show; threshold 0.5."""

    def edit(proto: onnx.ModelProto) -> None:
        stored = {entry.key.removeprefix("convline."): json.loads(entry.value) for entry in proto.metadata_props}
        graph = proto.graph
        for node in graph.node:
            node.input[:] = [f"single_{name}" if name in ("logit", "probability") else name for name in node.input]
            node.output[:] = [f"single_{name}" if name in ("logit", "probability") else name for name in node.output]
        graph.node.append(onnx.helper.make_node("Concat", ["single_logit"] * times, ["logit"], axis=1))
        graph.node.append(onnx.helper.make_node("Softmax", ["logit"], ["probability"], axis=1))
        for value in graph.output:
            value.type.tensor_type.shape.dim[1].dim_value *= times
        count = len(stored["classes"]) * times
        odd = ["<b>ant</b> & \"bee\" 'x'", "</script><script>alert(1)</script>", "חיפושית", "W" * 200, "a\u202eb"]
        probe = stored["probe"] | {"logits": [row * times for row in stored["probe"]["logits"]]}
        classes = [f"{odd[i % len(odd)]} {i}" for i in range(count)]
        del proto.metadata_props[:]
        add_metadata(proto, stored | {"classes": classes, "probe": probe, "decision": {"threshold": 0.5}})

    return resealed(model, target, edit)


def runtime_folder(folder: Path, version: str = "1.30.0", **package: str) -> Path:
    """A folder with the files of the npm package onnxruntime-web, without their contents."""
    described: Mapping[str, str] = {"name": "onnxruntime-web", "version": version, "license": "MIT", **package}
    contents = {"package.json": json.dumps(described), SCRIPT: "export {};", WASM: "\0asm"}
    return write_files(folder, {name: content.encode() for name, content in contents.items()})
