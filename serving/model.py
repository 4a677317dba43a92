"""Opens an ONNX file and refuses what cannot be trusted.

A convline file says in its metadata what it is, and carries the logits of eight images made by a fixed
formula. They are computed again by the session that was just opened, on the provider it really took: a
broken driver, a wrong library or a damaged file is found before the first image. Files made elsewhere say nothing
of the kind; they are opened with what their user says of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from convline.errors import ConvlineError, ModelError
from convline.images import ImageSpec
from convline.mlflow_client import SCHEME
from serving.external_model import ExternalModel, adapt
from serving.model_file import (
    PREFIX,
    PROOF,
    check_has_no_external_data,
    load_external_data,
    parse_model,
    problem_with_proof,
    read_metadata,
    read_model,
)
from serving.score_output import check_scores
from serving.session import OUTPUTS, Provider, first_run, open_session

PROBE_IMAGES = 8
LARGEST_TOLERANCE = 2e-2  # of a probe, times its largest logit: what 8-bit integers need on other processors
MAX_PIXELS = 2**24  # of an image that a model takes; larger ones are decoded to its size


@dataclass(frozen=True)
class Model:
    """An opened, validated and self-tested ONNX classifier; `run` may be called from several threads.

    `sha256` is of the file's bytes; `batch` the one size that an external file takes, None where any will do.
    """

    session: onnxruntime.InferenceSession = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)
    classes: tuple[str, ...]
    spec: ImageSpec
    provider: str
    sha256: str
    batch: int | None = None

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Probability and logit, float32 [batch, classes], of uint8 [batch, height, width, channels]."""
        probability, logit = self.session.run(OUTPUTS, {"image": images})
        return probability, logit

    def run_padded(self, images: NDArray[np.uint8], batch_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `run`, for up to `batch_size` images, through a batch of exactly that many.

        One shape means one set of kernels: an image's result does not depend on its company.
        """
        count = len(images)
        if count < batch_size:
            padding = np.zeros((batch_size - count, *images.shape[1:]), np.uint8)
            images = np.concatenate([images, padding])
        probability, logit = self.run(images)
        return probability[:count], logit[:count]


def open_model(
    name: Path | str,
    provider: Provider = "auto",
    threads: int | None = None,
    external: ExternalModel | None = None,
    is_proven: bool = True,
) -> Model:
    """Open, validate and self-test an ONNX file of convline, or `models:/NAME@ALIAS`, `models:/NAME/VERSION` in MLflow.

    `external` says what a file made elsewhere does not say of itself; there is no self-test then. `is_proven` is False
    for a file that is still to be proven. Raises ModelError for a file that is missing, damaged, too large, of a newer
    format, inconsistent, not the one that was proven, or has weights in other files (beside it they may be, of a
    external one), and for a provider that was asked for and did not load.
    """
    return load_model(read_model(name), name, provider, threads, external, is_proven)


def load_model(
    data: bytes,
    name: Path | str,
    provider: Provider,
    threads: int | None = None,
    external: ExternalModel | None = None,
    is_proven: bool = True,
) -> Model:
    """As `open_model`, of bytes that were read already; `name` is what errors call them."""
    if external is not None:
        return _open_external(data, name, provider, threads, external)
    told = read_described(data, name, is_proven)
    digest = hashlib.sha256(data).hexdigest()
    session, taken = open_session(data, provider, threads, name, told.has_halves)
    model = Model(session, told.metadata, told.classes, told.spec, taken, digest)
    _self_test(model, told.probe, name)
    if told.unproven is not None:  # last: what else is wrong says more
        raise ModelError(told.unproven)
    return model


@dataclass(frozen=True)
class Probe:
    """The logits of the eight images, float32 [8, classes], and how far others may be from them."""

    logits: NDArray[np.float32]
    tolerance: float


@dataclass(frozen=True)
class Described:
    """What a convline file says of itself, checked against its graph, which has not been run. `unproven` says why it is
    not the file that its proof is about, None where it is.
    """

    metadata: dict[str, Any]
    classes: tuple[str, ...]
    spec: ImageSpec
    probe: Probe
    has_halves: bool
    unproven: str | None


def read_described(data: bytes, name: Path | str, is_proven: bool = True) -> Described:
    """Raises ModelError as `open_model` does, but for what only a run can tell, and for a proof of another file."""
    proto = parse_model(data, name)
    metadata = read_metadata(proto, name, () if is_proven else PROOF)
    check_has_no_external_data(proto, name)
    try:
        spec = ImageSpec.from_dict(metadata["image"])
    except ConvlineError as error:
        raise ModelError(f"{name}: {error}") from error
    if spec.height is None or spec.width is None or spec.height * spec.width > MAX_PIXELS:
        raise ModelError(f"{name} does not say how large its images are, or too large; export it again")
    classes = tuple(metadata["classes"])
    _check_graph(proto.graph, spec, len(classes), name)
    probe = _read_probe(metadata["probe"], len(classes), name)
    unproven = problem_with_proof(proto, metadata) if is_proven else None
    return Described(
        metadata, classes, spec, probe, has_halves(proto), unproven and f"{name} {unproven}; export it again"
    )


def _open_external(
    data: bytes, name: Path | str, provider: Provider, threads: int | None, external: ExternalModel
) -> Model:
    proto = parse_model(data, name)
    if any(entry.key.startswith(PREFIX) for entry in proto.metadata_props):
        raise ModelError(f"{name} was exported by convline and says itself how it is used; leave out --classes")
    if not str(name).startswith(SCHEME):
        load_external_data(proto, Path(name))
    check_has_no_external_data(proto, name)
    adapted = adapt(proto, external, name)
    spec, halves = adapted.spec, has_halves(adapted.model)
    assert spec.height and spec.width
    if spec.height * spec.width > MAX_PIXELS:
        raise ModelError(f"{name} takes images of {spec.height}x{spec.width}; the limit is {MAX_PIXELS} pixels")
    session, taken = open_session(adapted.model.SerializeToString(), provider, threads, name, halves)
    digest = hashlib.sha256(data).hexdigest()
    model = Model(session, {}, external.classes, spec, taken, digest, adapted.batch)
    # what a graph promises may differ from what it gives
    few = probe_images(spec)
    images = np.resize(few, (model.batch or len(few), *few.shape[1:]))
    try:
        probability, logit = first_run(session, images, taken)
    except RuntimeError as error:
        size = f"{spec.height}x{spec.width}"
        raise ModelError(f"{name} does not run on {len(images)} images of {size}: {error}") from error
    if probability.shape[0] != len(images):
        raise ModelError(
            f"{name} gives {len(probability)} rows of scores where it is given {len(images)} images; one each is needed"
        )
    if probability.shape[1:] != (len(model.classes),):
        count = probability.shape[1]
        raise ModelError(
            f"{name} gives {count} {'score' if count == 1 else 'scores'} an image, {external.count}; name as many "
            "classes, or by --preprocess output=NAME another output"
        )
    check_scores(adapted.scores, probability, logit, name)
    return model


def has_halves(model: onnx.ModelProto) -> bool:
    """Whether weights are float16."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def probe_images(spec: ImageSpec) -> NDArray[np.uint8]:
    """Eight images by formula, uint8 [8, height, width, channels]: ramps, products and noise of all contrasts."""
    assert spec.height and spec.width
    grid = np.ogrid[:PROBE_IMAGES, : spec.height, : spec.width, : spec.channels]
    i, y, x, c = (axis.astype(np.int32) for axis in grid)
    ramp = (i + 1) * 17 * y + (2 * i + 3) * 13 * x + 71 * c + 31 * i * i
    noise = (x * y * (i + 5) + 7 * x * x + 3 * y * (c + 1)) % 97
    return ((ramp + noise) % 256).astype(np.uint8)


def _check_graph(graph: onnx.GraphProto, spec: ImageSpec, classes: int, path: Path | str) -> None:
    """Metadata and graph must tell the same story."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: _type(value) for value in graph.input if value.name not in weights}
    outputs = {value.name: _type(value) for value in graph.output}
    told_inputs = {"image": ("UINT8", [spec.height, spec.width, spec.channels])}
    told_outputs = {name: ("FLOAT", [classes]) for name in OUTPUTS}
    for what, found, told in (("inputs", inputs, told_inputs), ("outputs", outputs, told_outputs)):
        if found != told:
            raise ModelError(f"{path}: its metadata promises the {what} {told}, its graph has {found}; export it again")


def _type(value: onnx.ValueInfoProto) -> tuple[str, list[int | str]]:
    """The type of its elements, and its shape without the batch."""
    tensor = value.type.tensor_type
    shape: list[int | str] = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return onnx.TensorProto.DataType.Name(tensor.elem_type), shape[1:]


def _read_probe(told: dict[str, Any], classes: int, path: Path | str) -> Probe:
    """Raises ModelError for a probe that could not fail."""
    try:
        logits, tolerance = np.asarray(told["logits"], np.float32), float(told["tolerance"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} has a damaged probe ({error}); export it again") from error
    if told.get("images") != PROBE_IMAGES or logits.shape != (PROBE_IMAGES, classes) or not np.isfinite(logits).all():
        raise ModelError(f"{path} has a damaged probe (not the logits of {PROBE_IMAGES} images); export it again")
    if not 0 <= tolerance <= LARGEST_TOLERANCE * max(1.0, float(np.abs(logits).max())):
        raise ModelError(f"{path} has a probe that proves nothing (its tolerance is {tolerance:g}); export it again")
    return Probe(logits, tolerance)


def _self_test(model: Model, probe: Probe, path: Path | str) -> None:
    try:
        _, logits = first_run(model.session, probe_images(model.spec), model.provider)
    except RuntimeError as error:
        raise ModelError(f"{path} does not run on {PROBE_IMAGES} images: {error}; export it again") from error
    if probe.logits.shape != logits.shape:
        raise ModelError(f"{path}: its probe holds {probe.logits.shape} logits, its graph gives {logits.shape}")
    worst = float(np.abs(logits - probe.logits).max())
    if not worst <= probe.tolerance:  # NaN fails
        raise ModelError(
            f"{path} failed its self-test on {model.provider}: logits differ by {worst:.3g} from those proven at "
            f"export (at most {probe.tolerance:.3g}); the file is damaged or this machine computes wrongly"
        )
