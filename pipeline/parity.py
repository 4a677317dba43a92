"""PyTorch against onnxruntime, as serving runs it, on real and hostile images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from convline.console import log
from convline.cpus import usable_cpus
from convline.errors import ConvlineError, ImageError
from convline.images import ImageSpec
from convline.inputs.listing import find
from pipeline.dataset import Dataset, Split
from pipeline.exporting.boundary_images import BoundaryImages
from pipeline.exporting.tolerances import PRECISIONS, TOLERANCES, Batch, Parity, Precision, Tolerance
from pipeline.network import Predict, load_network, predictor
from pipeline.run import Run
from serving.batch_size import SERVING_BATCH
from serving.classifier import try_decode
from serving.model import OnnxModel, open_model
from serving.session import Provider, provider_problem

HOSTILE_BATCHES = (1, 2, 3, 17)
REAL_BESIDE_HOSTILE = 64
NOISE_SEED = 20151109


@dataclass(frozen=True)
class Claim:
    """What is to be proven: that a file gives what the reference does."""

    reference: Predict
    tolerance: Tolerance
    sides: tuple[str, str] = ("pytorch", "onnx")


def prove(claim: Claim, model: OnnxModel, real: Iterator[Batch]) -> Parity:
    """Compare a file, opened as serving opens it, with its reference."""
    parity = Parity(list(model.classes), claim.tolerance, model.provider, usable_cpus(), claim.sides)
    compare(parity, claim.reference, model.run, real, model.spec)
    return parity


def require(parity: Parity, name: Path) -> None:
    """Raises ConvlineError for a proof that failed, after its table was told."""
    if not parity.passed:
        log(parity.table())
        of = "the model that was trained" if parity.sides[0] == "pytorch" else f"the same model as {parity.sides[0]}"
        raise ConvlineError(f"{parity.sentence()}: {name} is not {of}")


def prove_run(
    run: Run, reference: Predict, path: Path, name: Path, dataset: Dataset, precision: Precision
) -> list[Parity]:
    """Compare a run's file, which is to be published as `name`, with its reference on the test split, by every provider
    that serving would take here. Raises ConvlineError where they differ.
    """
    claim = Claim(reference, TOLERANCES[precision])
    proofs = []
    for provider in providers():
        model = open_model(path, provider, is_proven=False)
        _check_is_of(model, run, name)
        proofs.append(prove(claim, model, split_batches(dataset.split("test"))))
        require(proofs[-1], name)
    return proofs


def _check_is_of(model: OnnxModel, run: Run, name: Path) -> None:
    if list(model.classes) != run.classes or model.spec != run.spec:
        raise ConvlineError(f"{name} has other classes or images than {run.folder}; it is not this run's model")


def providers() -> list[Provider]:
    """The CPU, and the GPU where `--provider auto` would take it."""
    return ["cpu"] if provider_problem("cuda") else ["cpu", "cuda"]


def prove_again(
    name: str | None, runs_dir: Path, data_dir: Path, images: Path | None = None, against: Path | None = None
) -> tuple[Path, Parity]:
    """Compare a published file, named by its run or its path, with the checkpoint it came from or another file.

    On the test split it was proven on, or on the image files in `images`. Raises ConvlineError where the run is not
    there or has trained on since; the caller asks whether the proof failed.
    """
    path, run = _subject(name, runs_dir)
    model = open_model(path, "cpu")
    precision = precision_of(model)
    if against is not None:
        other = open_model(against, "cpu")
        if (other.classes, other.spec) != (model.classes, model.spec):
            raise ConvlineError(f"{against} has other classes or images than {path}: they cannot be compared")
        looser = max(precision, precision_of(other), key=PRECISIONS.index)
        claim = Claim(other.run, TOLERANCES[looser], (str(against), str(path)))
    else:
        run = run or _run_of(model, path, runs_dir)
        claim = Claim(_trained(run, model, path), TOLERANCES[precision])
    if images is not None:
        real = file_batches(images, model.spec)
    else:
        real = split_batches(_tested_on(model, path, data_dir).split("test"))
    return path, prove(claim, model, real)


def precision_of(model: OnnxModel) -> Precision:
    """The precision that a file was exported in."""
    told = model.metadata.get("parity", {}).get("precision", "fp32")
    if told not in PRECISIONS:
        raise ConvlineError(f"its precision {told!r} is not known here; a newer convline may prove it")
    return told


def _subject(name: str | None, runs_dir: Path) -> tuple[Path, Run | None]:
    if name is not None and name.endswith(".onnx"):
        return Path(name), None
    run = Run.find(runs_dir, name)
    return run.model, run


def _trained(run: Run, model: OnnxModel, path: Path) -> Predict:
    """The network of the checkpoint that the file holds."""
    served, step = load_network(run)
    if (exported := model.metadata["run"]["step"]) != step:
        raise ConvlineError(
            f"{path} holds step {exported}, the newest checkpoint of {run.folder} is step {step}; export again"
        )
    _check_is_of(model, run, path)
    return predictor(served, torch.device("cpu"))


def _tested_on(model: OnnxModel, path: Path, data_dir: Path) -> Dataset:
    """The dataset whose test split the file was proven on."""
    told = model.metadata["dataset"]
    dataset = Dataset.open(data_dir, told["name"])
    if dataset.fingerprint != told["fingerprint"]:
        raise ConvlineError(
            f"{dataset.folder} is not the dataset that {path} was made from (its fingerprint differs); "
            "prepare that one again, or give --images"
        )
    return dataset


def _run_of(model: OnnxModel, path: Path, runs_dir: Path) -> Run:
    for folder in (path.parent, *sorted(file.parent for file in runs_dir.glob("[!.]*/run.json"))):
        with suppress(OSError, ValueError, AttributeError):  # others may be damaged
            if json.loads((folder / "run.json").read_text(encoding="utf-8")).get("id") == model.metadata["run"]["id"]:
                return Run.open(folder)
    raise ConvlineError(
        f"the run that {path} was exported from is not in {runs_dir}; give its --runs-dir, or prove it --against a file"
    )


def compare(parity: Parity, reference: Predict, candidate: Predict, real: Iterator[Batch], spec: ImageSpec) -> None:
    """Take in both models over the real images, as batched, and the first 64 of them with hostile ones in batches of
    1, 2, 3 and 17; where logits are gated, blends near the decision boundary, too."""
    first: list[Batch] = []
    blends = BoundaryImages(len(parity.classes))
    for batch in real:
        mine = reference(batch.images)
        parity.add(batch, mine, candidate(batch.images))
        blends.take(batch.images, mine[1].argmax(1))
        if sum(len(kept.images) for kept in first) < REAL_BESIDE_HOSTILE:
            first.append(batch)
    names = [name for batch in first for name in batch.names][:REAL_BESIDE_HOSTILE] + list(HOSTILE)
    images = np.concatenate([batch.images for batch in first])[:REAL_BESIDE_HOSTILE]
    mixed = np.concatenate([images, hostile_images(spec)])
    for size in HOSTILE_BATCHES:
        for start in range(0, len(mixed), size):
            batch = Batch(names[start : start + size], mixed[start : start + size])
            parity.add(batch, reference(batch.images), candidate(batch.images), is_real=False)
    if parity.tolerance.logit is not None:
        near = blends.near_boundary(reference)
        for start in range(0, len(near), SERVING_BATCH):
            part = near[start : start + SERVING_BATCH]
            parity.add_blends(reference(part)[1], candidate(part)[1])


def split_batches(split: Split) -> Iterator[Batch]:
    """A split at the serving batch, the last one as short as it comes."""
    start = 0
    for images, labels in split.batches(SERVING_BATCH):
        yield Batch([f"{split.name} {start + i}" for i in range(len(images))], images, labels)
        start += len(images)


def file_batches(folder: Path, spec: ImageSpec) -> Iterator[Batch]:
    """The image files in a folder or archive, as serving reads them. Raises ConvlineError where there are none."""
    names: list[str] = []
    pixels: list[NDArray[np.uint8]] = []
    is_empty = True
    for file in find([str(folder)]):
        decoded = try_decode(file, spec)
        if isinstance(decoded, ImageError):
            log(f"warning: {file.path} is left out: {decoded}")
            continue
        names.append(file.path)
        pixels.append(decoded)
        if len(names) == SERVING_BATCH:
            yield Batch(names, np.stack(pixels))
            names, pixels, is_empty = [], [], False
    if names:
        yield Batch(names, np.stack(pixels))
    elif is_empty:
        raise ConvlineError(f"{folder} holds no image that could be compared")


HOSTILE = ("black", "white", "noise", "one hot pixel")


def hostile_images(spec: ImageSpec) -> NDArray[np.uint8]:
    """Black, white, noise and one hot pixel, uint8 [4, height, width, channels]."""
    assert spec.height and spec.width
    images = np.zeros((4, spec.height, spec.width, spec.channels), np.uint8)
    images[1] = 255
    images[2] = np.random.default_rng(NOISE_SEED).integers(0, 256, images[2].shape)
    images[3, spec.height // 2, spec.width // 2] = 255
    return images
