"""`pipeline parity`: compare an exported file with PyTorch, or with another file, in the session that serving uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from convline.console import log
from convline.cpus import usable_cpus
from convline.errors import ConvlineError, ImageError
from convline.images import ImageSpec
from convline.inputs.listing import find
from models.served_network import ServedNetwork, Temperature
from pipeline.dataset import Dataset
from pipeline.exporting.any_size_proof import prove_any_size
from pipeline.exporting.comparison import compare_models, split_batches
from pipeline.exporting.parity_result import NamedBatch, Parity
from pipeline.exporting.tolerances import PRECISIONS, TOLERANCES, Precision, Tolerance
from pipeline.exporting.unfamiliar_fit import from_graph
from pipeline.exporting.unfamiliar_proof import UnfamiliarProof
from pipeline.network import Predict, load_network, predictor
from pipeline.run import Run
from serving.batch_size import SERVING_BATCH
from serving.classifier import try_decode
from serving.model import OnnxModel, open_model
from serving.session import Provider, provider_problem


@dataclass(frozen=True)
class Reference:
    """What a file is compared with. `tells_unfamiliar`: how unfamiliar images are, as well. `model_names` name the
    reference and the file in the result.
    """

    predict: Predict
    tolerance: Tolerance
    tells_unfamiliar: bool = False
    model_names: tuple[str, str] = ("pytorch", "onnx")


def prove(reference: Reference, path: Path, model: OnnxModel, real: Iterator[NamedBatch]) -> Parity:
    """Compare the file at `path`, opened as serving opens it, with a reference, on batches of real images and on
    hostile ones. If it takes images of any size, its resizing is compared with serving's; if both tell how unfamiliar
    images are, that is compared as well.
    """
    parity = Parity(
        list(model.classes), reference.tolerance, model.provider, usable_cpus(), model_names=reference.model_names
    )
    if reference.tells_unfamiliar and model.tells_unfamiliar:
        parity.unfamiliar = UnfamiliarProof(reference.tolerance)
    compare_models(parity, reference.predict, model.run_all, real, model.spec)
    if model.any_size:
        parity.any_size = prove_any_size(path, model)
    return parity


def require_passed(parity: Parity, path: Path) -> None:
    """Raises ConvlineError for a parity check that failed, after logging its table."""
    if not parity.passed:
        log(parity.table())
        first = parity.model_names[0]
        expected = "the model that was trained" if first == "pytorch" else f"the same model as {first}"
        raise ConvlineError(f"{parity.sentence()}: {path} is not {expected}")


def prove_run(run: Run, reference: Reference, path: Path, destination: Path, dataset: Dataset) -> list[Parity]:
    """Compare the file at `path` with `reference` on the test split, with every provider that serving could choose.

    Errors name the file as `destination`, where it will be published. Raises ConvlineError where outputs differ.
    """
    proofs = []
    for provider in available_providers():
        model = open_model(path, provider, is_proven=False)
        _check_belongs_to(model, run, destination)
        test_batches = split_batches(dataset.split("test"))
        proofs.append(prove(reference, path, model, test_batches))
        require_passed(proofs[-1], destination)
    return proofs


def _check_belongs_to(model: OnnxModel, run: Run, path: Path) -> None:
    if list(model.classes) != run.classes or model.spec != run.spec:
        raise ConvlineError(f"{path} has other classes or images than {run.folder}; it is not this run's model")


def available_providers() -> list[Provider]:
    """The CPU, and the GPU where `--provider auto` would choose it."""
    return ["cpu"] if provider_problem("cuda") else ["cpu", "cuda"]


def prove_again(
    name: str | None, runs_dir: Path, data_dir: Path, images: Path | None = None, against: Path | None = None
) -> tuple[Path, Parity]:
    """Compare a published file, given by its run or its path, with its checkpoint or with the file `against`.

    Uses the test split of the export, or the image files in `images`. Returns the file's path and the result, passed or
    not. Raises ConvlineError where the run is missing or has newer checkpoints than the file.
    """
    path, run = _find_file(name, runs_dir)
    model = open_model(path, "cpu")
    precision = precision_of(model)
    if against is not None:
        other = open_model(against, "cpu")
        if (other.classes, other.spec) != (model.classes, model.spec):
            raise ConvlineError(f"{against} has other classes or images than {path}: they cannot be compared")
        lower = max(precision, precision_of(other), key=PRECISIONS.index)
        names = str(against), str(path)
        reference = Reference(other.run_all, TOLERANCES[lower], other.tells_unfamiliar, names)
    else:
        run = run or _find_run(model, path, runs_dir)
        reference = network_reference(_checkpoint_network(run, model, path), precision)
    if images is not None:
        real = image_file_batches(images, model.spec)
    else:
        real = split_batches(_export_dataset(model, path, data_dir).split("test"))
    return path, prove(reference, path, model, real)


def precision_of(model: OnnxModel) -> Precision:
    """The precision in which a file was exported."""
    precision = model.metadata.get("parity", {}).get("precision", "fp32")
    if precision not in PRECISIONS:
        raise ConvlineError(f"its precision {precision!r} is not known here; a newer convline may prove it")
    return precision


def _find_file(name: str | None, runs_dir: Path) -> tuple[Path, Run | None]:
    """The file, and its run if `name` names one (or is None: the run trained last)."""
    if name is not None and name.endswith(".onnx"):
        return Path(name), None
    run = Run.find(runs_dir, name)
    return run.model, run


def network_reference(served: ServedNetwork, precision: Precision) -> Reference:
    """PyTorch's network, on the CPU, as what a file of a precision is compared with."""
    predict = predictor(served, torch.device("cpu"))
    return Reference(predict, TOLERANCES[precision], served.unfamiliarity is not None)


def _checkpoint_network(run: Run, model: OnnxModel, path: Path) -> ServedNetwork:
    """The PyTorch network with the weights of the checkpoint that the file was exported from, and what the export added
    to it."""
    served, step = load_network(run)
    if (exported := model.metadata["run"]["step"]) != step:
        raise ConvlineError(
            f"{path} holds step {exported}, the weights of {run.folder} that count are of step {step}; export again"
        )
    _check_belongs_to(model, run, path)
    if calibration := model.metadata.get("calibration"):
        served.temperature = Temperature(calibration["temperature"])
    if model.tells_unfamiliar:
        served.unfamiliarity = from_graph(onnx.load(path), model.metadata["unfamiliar"])
    return served


def _export_dataset(model: OnnxModel, path: Path, data_dir: Path) -> Dataset:
    """The dataset on whose test split the file was proven when it was exported."""
    recorded = model.metadata["dataset"]
    dataset = Dataset.open(data_dir, recorded["name"])
    if dataset.fingerprint != recorded["fingerprint"]:
        raise ConvlineError(
            f"{dataset.folder} is not the dataset that {path} was exported with (its fingerprint differs); "
            "prepare that dataset again, or give --images"
        )
    return dataset


def _find_run(model: OnnxModel, path: Path, runs_dir: Path) -> Run:
    """The run that the file was exported from, by the run's id."""
    for folder in (path.parent, *sorted(file.parent for file in runs_dir.glob("[!.]*/run.json"))):
        with suppress(OSError, ValueError, AttributeError):  # other runs may be damaged
            if json.loads((folder / "run.json").read_text(encoding="utf-8")).get("id") == model.metadata["run"]["id"]:
                return Run.open(folder)
    raise ConvlineError(
        f"the run that {path} was exported from is not in {runs_dir}; give its --runs-dir, or prove it --against a file"
    )


def image_file_batches(folder: Path, spec: ImageSpec) -> Iterator[NamedBatch]:
    """The image files in a folder or archive, decoded as serving does. Raises ConvlineError if there are none."""
    names: list[str] = []
    images: list[NDArray[np.uint8]] = []
    is_empty = True
    for file in find([str(folder)]):
        decoded = try_decode(file, spec)
        if isinstance(decoded, ImageError):
            log(f"warning: {file.path} is skipped: {decoded}")
            continue
        names.append(file.path)
        images.append(decoded)
        if len(names) == SERVING_BATCH:
            yield NamedBatch(names, np.stack(images))
            names, images, is_empty = [], [], False
    if names:
        yield NamedBatch(names, np.stack(images))
    elif is_empty:
        raise ConvlineError(f"{folder} holds no image that could be compared")
