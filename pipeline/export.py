"""`pipeline export`: the averaged weights as one ONNX file, published only if parity with PyTorch is proven."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import onnx

from convline.errors import ConvlineError
from convline.files import atomic_write, remove_leftovers
from pipeline.dataset import Dataset
from pipeline.exporting.confidence import (
    Confidences,
    calibrate_network,
    check_confidence_options,
    confidence_lines,
    confidence_metadata,
    measure_confidence,
)
from pipeline.exporting.graph import to_onnx
from pipeline.exporting.lower_precision import to_precision
from pipeline.exporting.model_card import model_card
from pipeline.exporting.onnx_metadata import add_metadata, evaluation_metadata, probe_metadata, run_metadata
from pipeline.exporting.parity_result import Parity
from pipeline.exporting.resize_graph import add_resize, check_supported
from pipeline.exporting.timing import measure_speed
from pipeline.exporting.tolerances import Precision
from pipeline.exporting.unfamiliar_fit import fit_unfamiliarity, set_unit, unfamiliar_lines
from pipeline.network import load_network
from pipeline.parity import Reference, network_reference, prove_run
from pipeline.run import Run
from serving.model import open_model


@dataclass(frozen=True)
class Exported:
    """A published file, its parity proofs (one for each provider), and the report on it (`parity.json`)."""

    path: Path
    proofs: list[Parity]
    report: dict[str, Any]

    def table(self) -> str:
        """The report for the terminal."""
        speed, size, precision = self.report["speed"], self.report["size"], self.report["precision"]
        lines = [*(parity.sentence() for parity in self.proofs), self.proofs[0].table()]
        lines += confidence_lines(self.report) + unfamiliar_lines(self.report)
        rates = ", ".join(f"{rate:,.0f} {name}" for name, rate in speed["images_per_second"].items())
        lines.append(f"images/s        {rates} (batches of {speed['batch']}, {speed['threads']} threads)")
        if precision != "fp32":
            lines.append(f"size            {size['bytes']:,} bytes, {size['bytes'] / size['fp32']:.0%} of fp32")
            float_layers = self.report.get("left_in_float", [])
            lines += [f"left in float   {', '.join(float_layers)}"] if float_layers else []
            ratio = speed["images_per_second"][precision] / speed["images_per_second"]["fp32"]
            lines += [f"{precision} is not faster than fp32 on this machine: {ratio:.2f} times"] if ratio <= 1 else []
        return "\n".join(lines)


@dataclass(frozen=True)
class ExportOptions:
    """What a file is to be. With `any_size` it takes images of any height and width, and resizes them as serving does.
    `calibrate` puts a temperature before the softmax; `wanted_precision` adds the threshold above which answers are
    right that often; `unfamiliar` adds an output that tells how far an image is from the training images. Validation
    images decide on these three.
    """

    precision: Precision = "fp32"
    any_size: bool = False
    calibrate: bool = False
    wanted_precision: float | None = None
    unfamiliar: bool = False


@dataclass(frozen=True)
class _Unproven:
    """A model with its metadata but without its proof; the same one in float32; PyTorch's, with which it is compared.
    `details` say how its precision was reached, `found` what validation decided, `on_test` its confidence on test, if
    that was measured.
    """

    model: onnx.ModelProto
    full: onnx.ModelProto
    reference: Reference
    details: dict[str, Any]
    found: dict[str, Any]
    on_test: Confidences | None


def export(run: Run, dataset: Dataset, output: Path | None = None, options: ExportOptions | None = None) -> Exported:
    """Export the run's newest averaged weights to `output`, by default the run's model.onnx.

    The file is written under a temporary name, opened as serving opens it, compared with PyTorch, and only then
    renamed. Raises ConvlineError where parity fails, or validation cannot decide; an earlier file then stays as it was.
    """
    options = options or ExportOptions()
    destination = output or run.model
    if destination.exists() and not destination.is_file():
        raise ConvlineError(f"{destination} is not a file that an export could replace; name a .onnx file")
    unproven = _make_model(run, dataset, options)
    model, precision = unproven.model, options.precision
    report_file, labels_file = report_path(destination, run), labels_path(destination, run)
    card_file = card_path(destination, run)
    for path in (destination, report_file, labels_file, card_file):
        remove_leftovers(path)
    with atomic_write(destination) as file:
        _rewrite(file, model)
        proofs = prove_run(run, unproven.reference, Path(file.name), destination, dataset)
        report = _add_proof(model, dataset, proofs, unproven.details)
        _rewrite(file, model)
        published = open_model(file.name, "cpu")  # self-tests the very bytes that are published
        # size and speed are only in the report: with timings in the file, two exports would not be the same bytes
        speed = measure_speed(model, unproven.full, unproven.reference.predict, precision, run)
        report |= unproven.found | {"size": _sizes(model, unproven.full), "speed": speed}
    with atomic_write(report_file, "w") as file:
        json.dump(report, file, indent=2)
    with atomic_write(labels_file, "w") as file:
        json.dump(run.classes, file, indent=2)
    with atomic_write(card_file, "w", encoding="utf-8") as file:
        counts, evaluation = dataset.meta["counts"], proofs[0].candidate_evaluation
        file.write(model_card(run.name, published.metadata, counts, evaluation, unproven.on_test))
    return Exported(destination, proofs, report)


def _make_model(run: Run, dataset: Dataset, options: ExportOptions) -> _Unproven:
    calibrate, wanted_precision, unfamiliar = options.calibrate, options.wanted_precision, options.unfamiliar
    check_confidence_options(
        run, dataset, calibrate=calibrate, wanted_precision=wanted_precision, unfamiliar=unfamiliar
    )
    if options.any_size:
        check_supported(run.spec)
    served, step = load_network(run, "averaged")
    if calibrate:
        calibrate_network(served, run, dataset)
    if unfamiliar:
        served.unfamiliarity = fit_unfamiliarity(served, run, dataset)
    full = to_onnx(served, run.spec)
    model, details = to_precision(full, served, run, dataset, options.precision)
    measured = measure_confidence(model, run, dataset) if calibrate or wanted_precision is not None else {}
    found = confidence_metadata(measured, served, wanted_precision)
    if unfamiliar:
        found["unfamiliar"] = set_unit(served, (full, model), run, dataset)
    if options.any_size:
        model, full = add_resize(model, run.spec), add_resize(full, run.spec)
        add_metadata(model, {"any_size": True})
    reference = network_reference(served, options.precision)
    probe = probe_metadata(model, run, reference.predict, options.precision)
    add_metadata(model, run_metadata(run, dataset, step) | {"probe": probe} | found)
    return _Unproven(model, full, reference, {"precision": options.precision, **details}, found, measured.get("test"))


def _add_proof(
    model: onnx.ModelProto, dataset: Dataset, proofs: list[Parity], details: dict[str, Any]
) -> dict[str, Any]:
    """Add the metadata `evaluation` and `parity`, and return the latter."""
    add_metadata(model, {"evaluation": evaluation_metadata(dataset, proofs[0])})
    proof = proofs[0].to_dict() | details
    if proofs[1:]:
        proof["other_providers"] = [parity.to_dict() for parity in proofs[1:]]
    proof["sha256_without_parity"] = hashlib.sha256(_serialize(model)).hexdigest()
    add_metadata(model, {"parity": proof})
    return proof


def _sizes(model: onnx.ModelProto, full: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the file, and of a float32 file with the same metadata."""
    size = model.ByteSize()
    return {"bytes": size, "fp32": size - model.graph.ByteSize() + full.graph.ByteSize()}


def report_path(destination: Path, run: Run) -> Path:
    """parity.json beside the run's own model.onnx, <name>.parity.json beside another file."""
    return _sibling(destination, run, "parity.json")


def labels_path(destination: Path, run: Run) -> Path:
    """labels.json beside the run's own model.onnx, <name>.labels.json beside another file.

    The classes, for clients that do not read ONNX metadata.
    """
    return _sibling(destination, run, "labels.json")


def card_path(destination: Path, run: Run) -> Path:
    """model-card.md beside the run's own model.onnx, <name>.model-card.md beside another file."""
    return _sibling(destination, run, "model-card.md")


def _sibling(destination: Path, run: Run, name: str) -> Path:
    is_own = destination.resolve() == run.model.resolve()
    return run.folder / name if is_own else destination.with_suffix(f".{name}")


def _rewrite(file: IO[bytes], model: onnx.ModelProto) -> None:
    file.seek(0)
    file.truncate()
    file.write(_serialize(model))
    file.flush()


def _serialize(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)
