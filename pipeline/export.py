"""Averaged weights -> one ONNX file, published only when it is proven."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import torch

from models.served import Served
from pipeline.dataset import Dataset
from pipeline.engine.network import Predict, load_served, predictor
from pipeline.engine.run import Run
from pipeline.parity import Parity, prove
from serving.errors import ConvlineError
from serving.files import atomic_write
from serving.images import ImageSpec
from serving.model import FORMAT, PREFIX, PROBE_IMAGES, open_model, probe_images

OPSET = 20
PROBE_TOLERANCE = 1e-4  # of the largest logit: CPUs and GPUs sum in other orders
LIBRARIES = ("convline", "torch", "onnx", "onnxscript", "numpy")


@dataclass(frozen=True)
class Exported:
    """A published file and its proof."""

    path: Path
    parity: Parity


def export(run: Run, dataset: Dataset, output: Path | None = None) -> Exported:
    """Export the run's newest averaged weights to `output`, by default the run's model.onnx.

    The file is written beside its destination, opened as serving opens it, compared with PyTorch, and
    renamed only then. Raises ConvlineError, with the earlier file untouched, where a proof fails.
    """
    destination = output or run.model
    if destination.exists() and not destination.is_file():
        raise ConvlineError(f"{destination} is no file that an export could replace; name a .onnx file")
    served, step = load_served(run, "averaged")
    reference = predictor(served, torch.device("cpu"))
    model = to_onnx(served, run.spec)
    describe(model, metadata(run, dataset, step, reference))
    with atomic_write(destination) as file:
        _rewrite(file, model)
        parity = prove(reference, Path(file.name), run, dataset)
        describe(model, {"evaluation": evaluation(dataset, parity)})
        proof = parity.to_dict() | {"sha256_without_parity": hashlib.sha256(_serialize(model)).hexdigest()}
        describe(model, {"parity": proof})
        _rewrite(file, model)
        open_model(file.name, "cpu")  # the very bytes that are published
    if output is None:
        with atomic_write(run.folder / "parity.json", "w") as file:
            json.dump(proof, file, indent=2)
    return Exported(destination, parity)


def to_onnx(served: Served, spec: ImageSpec) -> onnx.ModelProto:
    """The module as a checked ONNX model: uint8 `image` in; `probability` and `logit` out; batch dynamic."""
    example = torch.from_numpy(probe_images(spec))
    noise = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(noise), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            served,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["probability", "logit"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    opset = {entry.domain: entry.version for entry in model.opset_import}
    if opset != {"": OPSET}:
        raise ConvlineError(
            f"the exporter wrote the opsets {opset} instead of {OPSET}; use the versions of constraints.txt"
        )
    onnx.checker.check_model(model, full_check=True)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces and module paths: they name the exporting machine's files."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


def metadata(run: Run, dataset: Dataset, step: int, reference: Predict) -> dict[str, Any]:
    """What the file says of itself, except its evaluation and its proof."""
    _, logits = reference(probe_images(run.spec))
    return {
        "format": FORMAT,
        "classes": run.classes,
        "image": run.spec.to_dict(),
        "recipe": run.recipe.to_dict(),
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint, "source": dataset.meta["source"]},
        "weights": "averaged",
        "run": {"id": run.info["id"], "name": run.name, "seed": run.recipe.train.seed, "step": step},
        "probe": {
            "images": PROBE_IMAGES,
            "logits": [[float(str(value)) for value in row] for row in logits],
            "tolerance": PROBE_TOLERANCE * max(1.0, float(np.abs(logits).max())),
        },
        "versions": {name: version(name) for name in LIBRARIES} | {"onnxruntime": _onnxruntime_version()},
    }


def evaluation(dataset: Dataset, parity: Parity) -> dict[str, Any]:
    """precision@1 on the test split, named by its fingerprint."""
    return {
        "split": "test",
        "fingerprint": dataset.meta["fingerprints"]["test"],
        "count": parity.candidate.count,
        "precision_at_1": parity.candidate.precision_at(1),
    }


def describe(model: onnx.ModelProto, values: dict[str, Any]) -> None:
    """Add `convline.` metadata, as JSON."""
    for key, value in values.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = PREFIX + key, json.dumps(value, sort_keys=True, allow_nan=False)


def _rewrite(file: IO[bytes], model: onnx.ModelProto) -> None:
    file.seek(0)
    file.truncate()
    file.write(_serialize(model))
    file.flush()


def _serialize(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


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
