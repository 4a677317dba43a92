"""Averaged weights -> one ONNX file, published only when it is proven."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from convline.cpus import usable_cpus
from convline.errors import ConvlineError
from convline.files import atomic_write, remove_leftovers
from models.served_network import ServedNetwork
from pipeline.dataset import Dataset, Split
from pipeline.exporting.float16 import to_float16
from pipeline.exporting.graph import check, float_nodes, to_onnx
from pipeline.exporting.int8 import quantize
from pipeline.exporting.timing import seconds_per_call
from pipeline.exporting.tolerances import TOLERANCES, Parity, Precision, Tolerance
from pipeline.network import Predict, load_network, predictor
from pipeline.parity import compare, prove_run, split_batches
from pipeline.run import Run
from serving.batch_size import SERVING_BATCH
from serving.model import PROBE_IMAGES, has_float16, open_model, probe_images
from serving.model_file import FORMAT, PREFIX
from serving.session import open_session

# of the largest logit: CPUs and GPUs sum in other orders, in float16 with 11 bits; integers round elsewhere (0.2% was
# seen between onnxruntime's integer kernels and the same graph computed in float)
PROBE_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int8": 2e-2}
LIBRARIES = ("convline", "torch", "onnx", "onnxscript", "numpy")

CALIBRATION_IMAGES = 512
JUDGED_IMAGES, RANKED_IMAGES = 2000, 256


@dataclass(frozen=True)
class Exported:
    """A published file, its proofs (one a provider), and the report on it (`parity.json`)."""

    path: Path
    proofs: list[Parity]
    report: dict[str, Any]

    def table(self) -> str:
        """The report for a person."""
        first, speed, size = self.proofs[0], self.report["speed"], self.report["size"]
        precision = self.report["precision"]
        lines = [*(proof.sentence() for proof in self.proofs), first.table()]
        rates = ", ".join(f"{rate:,.0f} {name}" for name, rate in speed["images_per_second"].items())
        lines.append(f"images/s        {rates} (batches of {speed['batch']}, {speed['threads']} threads)")
        if precision != "fp32":
            part = size["bytes"] / size["fp32"]
            lines.append(f"size            {size['bytes']:,} bytes, {part:.0%} of fp32")
            left = self.report.get("left_in_float", [])
            lines += [f"left in float   {', '.join(left)}"] if left else []
            ratio = speed["images_per_second"][precision] / speed["images_per_second"]["fp32"]
            lines += [f"{precision} is not faster than fp32 on this machine: {ratio:.2f} times"] if ratio <= 1 else []
        return "\n".join(lines)


def export(run: Run, dataset: Dataset, output: Path | None = None, precision: Precision = "fp32") -> Exported:
    """Export the run's newest averaged weights to `output`, by default the run's model.onnx.

    The file is written beside its destination, opened as serving opens it, compared with PyTorch, and
    renamed only then. Raises ConvlineError, with the earlier file untouched, where a proof fails.
    """
    destination = output or run.model
    if destination.exists() and not destination.is_file():
        raise ConvlineError(f"{destination} is no file that an export could replace; name a .onnx file")
    served, step = load_network(run, "averaged")
    reference = predictor(served, torch.device("cpu"))
    full = to_onnx(served, run.spec)
    model, details = in_precision(full, served, run, dataset, precision)
    described = metadata(run, dataset, step) | {"probe": probe(model, run, reference, precision)}
    describe(model, described)
    report_file, labels_file = report_path(destination, run), labels_path(destination, run)
    for path in (destination, report_file, labels_file):
        remove_leftovers(path)
    with atomic_write(destination) as file:
        _rewrite(file, model)
        proofs = prove_run(run, reference, Path(file.name), destination, dataset, precision)
        describe(model, {"evaluation": evaluation(dataset, proofs[0])})
        proof = proofs[0].to_dict() | {"precision": precision, **details}
        if proofs[1:]:
            proof["other_providers"] = [other.to_dict() for other in proofs[1:]]
        proof["sha256_without_parity"] = hashlib.sha256(_serialize(model)).hexdigest()
        describe(model, {"parity": proof})
        _rewrite(file, model)
        open_model(file.name, "cpu")  # the very bytes that are published
        # what a clock says is no part of the file: two exports are the same bytes
        whole = model.ByteSize()
        size = {"bytes": whole, "fp32": whole - model.graph.ByteSize() + full.graph.ByteSize()}  # the same metadata
        report = proof | {"size": size, "speed": speed(model, full, reference, precision, run)}
    with atomic_write(report_file, "w") as file:
        json.dump(report, file, indent=2)
    with atomic_write(labels_file, "w") as file:
        json.dump(run.classes, file, indent=2)
    return Exported(destination, proofs, report)


def report_path(destination: Path, run: Run) -> Path:
    """parity.json beside the run's own file, <name>.parity.json beside another."""
    return _beside(destination, run, "parity.json")


def labels_path(destination: Path, run: Run) -> Path:
    """labels.json beside the run's own file, <name>.labels.json beside another: the classes, for who reads no ONNX."""
    return _beside(destination, run, "labels.json")


def _beside(destination: Path, run: Run, name: str) -> Path:
    is_own = destination.resolve() == run.model.resolve()
    return run.folder / name if is_own else destination.with_suffix(f".{name}")


def in_precision(
    full: onnx.ModelProto, served: ServedNetwork, run: Run, dataset: Dataset, precision: Precision
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph in a precision, from the one in float32, and how it came about."""
    if precision == "fp32":
        return full, {}
    floats = float_nodes(full, served)
    if precision == "fp16":
        model, details = to_float16(full, floats), {}
    else:
        train = _drawn(run.split(dataset, "train"), CALIBRATION_IMAGES, seed=1)
        judged, judges_on = _judged(run, dataset)
        images = (batch.images for batch in split_batches(train))
        model, left = quantize(full, floats, images, Judge(full, judged, run))
        details = {"calibrated_on": f"{len(train)} training images", "judged_on": judges_on, "left_in_float": left}
    check(model)
    return model, details


def _judged(run: Run, dataset: Dataset) -> tuple[Split, str]:
    """Images that decide which layers stay in float: never those of test."""
    name = "validation" if run.recipe.data.validation else "train"
    split = _drawn(run.split(dataset, name), JUDGED_IMAGES, seed=2)
    return split, f"{len(split)} {'validation' if name == 'validation' else 'training'} images"


def _drawn(split: Split, count: int, seed: int) -> Split:
    """So many rows of a split, or all."""
    chosen = np.random.default_rng([seed, len(split)]).permutation(len(split))[:count]
    return Split(split.name, split.images, split.labels, split.rows[np.sort(chosen)])


class Judge:
    """Compares candidates with the model in float on a split, by a tolerance half as wide as the one to be passed."""

    def __init__(self, full: onnx.ModelProto, split: Split, run: Run) -> None:
        self._reference = _remembered(_session(full))
        self._split = split
        self._run = run

    def passes(self, model: onnx.ModelProto) -> bool:
        return self._compared(model, self._split).passed

    def cost(self, model: onnx.ModelProto) -> float:
        return self._compared(model, self._split.take(RANKED_IMAGES)).mean_probability

    def _compared(self, model: onnx.ModelProto, split: Split) -> Parity:
        final = TOLERANCES["int8"]
        parity = Parity(self._run.classes, Tolerance(share=final.share / 2, images=final.images // 2))
        compare(parity, self._reference, _session(model), split_batches(split), self._run.spec)
        return parity


def _remembered(predict: Predict) -> Predict:
    """Answers the same images from memory."""
    known: dict[bytes, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def remembering(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        key = hashlib.sha256(images.tobytes()).digest()
        if key not in known:
            known[key] = predict(images)
        return known[key]

    return remembering


def _session(model: onnx.ModelProto) -> Predict:
    session, _ = open_session(model.SerializeToString(), "cpu", has_float16=has_float16(model))

    def predict(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        probability, logit = session.run(["probability", "logit"], {"image": images})
        return probability, logit

    return predict


def metadata(run: Run, dataset: Dataset, step: int) -> dict[str, Any]:
    """What the file says of itself, except its probe, its evaluation and its proof."""
    return {
        "format": FORMAT,
        "classes": run.classes,
        "image": run.spec.to_dict(),
        "recipe": run.recipe.to_dict(),
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint, "source": dataset.meta["source"]},
        "weights": "averaged",
        "run": {"id": run.info["id"], "name": run.name, "seed": run.recipe.train.seed, "step": step},
        "versions": {name: version(name) for name in LIBRARIES} | {"onnxruntime": _onnxruntime_version()},
    }


def probe(model: onnx.ModelProto, run: Run, reference: Predict, precision: Precision) -> dict[str, Any]:
    """What serving tests itself by: PyTorch's logits, or in a lower precision those of the file."""
    _, logits = (reference if precision == "fp32" else _session(model))(probe_images(run.spec))
    if not np.isfinite(logits).all():
        raise ConvlineError(
            f"{run.folder} gives logits in {precision} that are not finite; there is nothing to publish"
        )
    return {
        "images": PROBE_IMAGES,
        "logits": [[float(str(value)) for value in row] for row in logits],
        "tolerance": PROBE_TOLERANCE[precision] * max(1.0, float(np.abs(logits).max())),
    }


def evaluation(dataset: Dataset, parity: Parity) -> dict[str, Any]:
    """precision@1 on the test split, named by its fingerprint."""
    return {
        "split": "test",
        "fingerprint": dataset.meta["fingerprints"]["test"],
        "count": parity.candidate.count,
        "precision_at_1": parity.candidate.precision_at(1),
    }


def speed(
    model: onnx.ModelProto, full: onnx.ModelProto, reference: Predict, precision: Precision, run: Run
) -> dict[str, Any]:
    """Images/s of the file, of the one in float32 and of PyTorch, in turns on all CPUs."""
    few = probe_images(run.spec)
    images = np.resize(few, (SERVING_BATCH, *few.shape[1:]))
    sides = {precision: _session(model), "fp32": _session(full), "PyTorch": reference}
    calls = {name: partial(predict, images) for name, predict in sides.items()}
    rates = {name: round(SERVING_BATCH / seconds, 1) for name, seconds in seconds_per_call(calls, 0.1, 5).items()}
    return {"batch": SERVING_BATCH, "threads": usable_cpus(), "images_per_second": rates}


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
