"""What an ONNX file says of itself: `serving inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from serving.files import sha256
from serving.model import open_model


def inspect(path: Path) -> dict[str, Any]:
    """Graph, metadata and proof of a model that passed its self-test.

    Raises ModelError as `open_model` does.
    """
    model = open_model(path, "cpu")
    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    return {
        "file": {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)},
        "classes": list(model.classes),
        "image": model.spec.to_dict(),
        "graph": {
            "opset": next(entry.version for entry in proto.opset_import if not entry.domain),
            "ir_version": proto.ir_version,
            "operators": dict(sorted(Counter(node.op_type for node in graph.node).items())),
            "parameters": sum(int(np.prod(tensor.dims)) for tensor in graph.initializer if _is_float(tensor)),
        },
        "metadata": {k: v for k, v in model.metadata.items() if k not in ("classes", "image", "probe")},
        "self_test": "passed",
    }


def _is_float(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
