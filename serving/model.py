"""Open an ONNX file, validate it, and run its self-test.

The metadata of a convline file contain the logits of eight images that a fixed formula generates. The session computes
them again when it is opened, on the provider it uses: that finds a broken driver, a wrong library or a damaged file
before the first image is classified. ONNX files of other tools have no such metadata; the user describes them by an
`ExternalModel`.
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
    PROOF,
    check_has_no_external_data,
    has_convline_metadata,
    load_external_data,
    parse_model,
    problem_with_proof,
    read_metadata,
    read_model,
)
from serving.score_output import check_scores
from serving.session import OUTPUTS, UNFAMILIAR, Provider, first_run, open_session

PROBE_IMAGES = 8
LARGEST_TOLERANCE = 2e-2  # of a probe, relative to its largest logit: 8-bit integers need it on other processors
MAX_PIXELS = 2**24  # of the images that a model may take as input; files may have larger images


@dataclass(frozen=True)
class OnnxModel:
    """An opened, validated and self-tested ONNX classifier; `run` may be called from several threads.

    `sha256` is the hash of the file; `batch` is the batch size of a model that takes only one, else None.
    """

    session: onnxruntime.InferenceSession = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)
    classes: tuple[str, ...]
    spec: ImageSpec
    provider: str
    sha256: str
    batch: int | None = None

    @property
    def threshold(self) -> float | None:
        """The probability below which an answer is not sure, where the file was exported with one."""
        decision = self.metadata.get("decision")
        return None if decision is None else float(decision["threshold"])

    @property
    def any_size(self) -> bool:
        """Whether the graph resizes images itself (`export --any-size`); `spec` still has the size it resizes to."""
        return takes_any_size(self.metadata)

    @property
    def tells_unfamiliar(self) -> bool:
        """Whether the file tells how unfamiliar images are (`export --unfamiliar`)."""
        return tells_unfamiliar(self.metadata)

    def run_all(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
        """As `run`; and, where the file tells it, how far images are from the training images, float32 [batch]."""
        outputs = [*OUTPUTS, UNFAMILIAR] if self.tells_unfamiliar else OUTPUTS
        return tuple(self.session.run(outputs, {"image": images}))

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Probability and logit, each float32 [batch, classes], of uint8 [batch, height, width, channels]."""
        probability, logit = self.session.run(OUTPUTS, {"image": images})
        return probability, logit

    def run_padded(self, images: NDArray[np.uint8], batch_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `run`, for up to `batch_size` images, padded to a batch of exactly that size.

        With one shape, onnxruntime uses one set of kernels: the result for an image does not depend on the other images
        in its batch.
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
) -> OnnxModel:
    """Open, validate and self-test an ONNX file of convline, or `models:/NAME@ALIAS`, `models:/NAME/VERSION` in MLflow.

    `external` describes a file of another tool, which is opened without a self-test. `is_proven` is False for a file
    that has no proof yet. Raises ModelError for a file that is missing, damaged, too large, of a newer format,
    inconsistent, or not the one that was proven; for one with weights in other files (an external model may have them
    in its own folder); and for a provider that does not load.
    """
    return load_model(read_model(name), name, provider, threads, external, is_proven)


def load_model(
    data: bytes,
    name: Path | str,
    provider: Provider,
    threads: int | None = None,
    external: ExternalModel | None = None,
    is_proven: bool = True,
) -> OnnxModel:
    """As `open_model`, for the bytes of a file; error messages call it `name`."""
    if external is not None:
        return _open_external(data, name, provider, threads, external)
    description = read_description(data, name, is_proven)
    digest = hashlib.sha256(data).hexdigest()
    session, provider_used = open_session(data, provider, threads, name, description.has_float16)
    model = OnnxModel(session, description.metadata, description.classes, description.spec, provider_used, digest)
    _self_test(model, description.expected, name)
    if description.proof_problem is not None:  # reported last: another error says more
        raise ModelError(description.proof_problem)
    return model


@dataclass(frozen=True)
class ExpectedLogits:
    """The logits that the self-test expects, float32 [8, classes], and the largest difference that it accepts; and how
    unfamiliar the images are, float32 [8], where the file tells it: by the same share of the largest value.
    """

    logits: NDArray[np.float32]
    tolerance: float
    unfamiliar: NDArray[np.float32] | None = None

    @property
    def unfamiliar_tolerance(self) -> float:
        assert self.unfamiliar is not None
        share = self.tolerance / max(1.0, float(np.abs(self.logits).max()))
        return share * max(1.0, float(self.unfamiliar.max()))


@dataclass(frozen=True)
class ModelDescription:
    """The metadata of a convline file, checked against its graph, which has not been run. `proof_problem` says why the
    proof does not hold for this file; None if it does.
    """

    metadata: dict[str, Any]
    classes: tuple[str, ...]
    spec: ImageSpec
    expected: ExpectedLogits
    has_float16: bool
    proof_problem: str | None


def read_description(data: bytes, name: Path | str, is_proven: bool = True) -> ModelDescription:
    """Read and check metadata and graph without running the model.

    Raises ModelError as `open_model` does; a problem with the proof is returned instead.
    """
    proto = parse_model(data, name)
    metadata = read_metadata(proto, name, () if is_proven else PROOF)
    check_has_no_external_data(proto, name)
    try:
        spec = ImageSpec.from_dict(metadata["image"])
    except ConvlineError as error:
        raise ModelError(f"{name}: {error}") from error
    if spec.height is None or spec.width is None or spec.height * spec.width > MAX_PIXELS:
        raise ModelError(f"{name} has no image size in its metadata, or too large a one; export it again")
    classes = tuple(metadata["classes"])
    _check_graph(proto.graph, spec, len(classes), metadata, name)
    expected = _read_probe(metadata["probe"], len(classes), tells_unfamiliar(metadata), name)
    problem = problem_with_proof(proto, metadata) if is_proven else None
    return ModelDescription(
        metadata, classes, spec, expected, has_float16(proto), problem and f"{name} {problem}; export it again"
    )


def _open_external(
    data: bytes, name: Path | str, provider: Provider, threads: int | None, external: ExternalModel
) -> OnnxModel:
    proto = parse_model(data, name)
    if has_convline_metadata(proto):
        raise ModelError(f"{name} was exported by convline and needs no description; leave out --classes")
    if not str(name).startswith(SCHEME):
        load_external_data(proto, Path(name))
    check_has_no_external_data(proto, name)
    adapted = adapt(proto, external, name)
    spec = adapted.spec
    assert spec.height and spec.width
    size = f"{spec.height}x{spec.width}"
    if spec.height * spec.width > MAX_PIXELS:
        raise ModelError(f"{name} takes images of {size}; the limit is {MAX_PIXELS} pixels")
    adapted_data = adapted.model.SerializeToString()
    session, provider_used = open_session(adapted_data, provider, threads, name, has_float16(adapted.model))
    digest = hashlib.sha256(data).hexdigest()
    model = OnnxModel(session, {}, external.classes, spec, provider_used, digest, adapted.batch)
    probe = probe_images(spec)
    images = np.resize(probe, (model.batch or len(probe), *probe.shape[1:]))
    try:
        probability, logit = first_run(session, images, provider_used)
    except RuntimeError as error:
        raise ModelError(f"{name} does not run on {len(images)} images of {size}: {error}") from error
    _check_score_shape(probability, len(images), external, name)
    check_scores(adapted.scores, probability, logit, name)
    return model


def _check_score_shape(
    probability: NDArray[np.float32], images: int, external: ExternalModel, name: Path | str
) -> None:
    """Raises ModelError unless there are a row per image and a column per class: shapes in a graph may be wrong."""
    if probability.shape[0] != images:
        raise ModelError(
            f"{name} gives {len(probability)} rows of scores for {images} images; it must give one row per image"
        )
    if probability.shape[1:] != (len(external.classes),):
        count = probability.shape[1]
        raise ModelError(
            f"{name} gives {count} {'score' if count == 1 else 'scores'} per image, {external.class_count}; name as "
            "many classes, or choose another output by --preprocess output=NAME"
        )


def has_float16(model: onnx.ModelProto) -> bool:
    """Whether any weights are float16."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def probe_images(spec: ImageSpec) -> NDArray[np.uint8]:
    """The eight images of the self-test, uint8 [8, height, width, channels]: ramps, products and noise of all
    contrasts."""
    assert spec.height and spec.width
    grid = np.ogrid[:PROBE_IMAGES, : spec.height, : spec.width, : spec.channels]
    i, y, x, c = (axis.astype(np.int32) for axis in grid)
    ramp = (i + 1) * 17 * y + (2 * i + 3) * 13 * x + 71 * c + 31 * i * i
    noise = (x * y * (i + 5) + 7 * x * x + 3 * y * (c + 1)) % 97
    return ((ramp + noise) % 256).astype(np.uint8)


def takes_any_size(metadata: dict[str, Any]) -> bool:
    """Whether a file's metadata say that its graph takes images of any height and width."""
    return metadata.get("any_size") is True


def tells_unfamiliar(metadata: dict[str, Any]) -> bool:
    """Whether a file's metadata say that it tells how unfamiliar images are."""
    return "unfamiliar" in metadata


def _check_graph(
    graph: onnx.GraphProto, spec: ImageSpec, classes: int, metadata: dict[str, Any], path: Path | str
) -> None:
    """Raises ModelError if the graph has other inputs or outputs than the metadata say."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: _type(value) for value in graph.input if value.name not in weights}
    outputs = {value.name: _type(value) for value in graph.output}
    size = ["height", "width"] if takes_any_size(metadata) else [spec.height, spec.width]
    expected_inputs = {"image": ("UINT8", [*size, spec.channels])}
    expected_outputs: dict[str, tuple[str, list[int]]] = {name: ("FLOAT", [classes]) for name in OUTPUTS}
    if tells_unfamiliar(metadata):
        expected_outputs[UNFAMILIAR] = ("FLOAT", [])
    for kind, found, expected in (("inputs", inputs, expected_inputs), ("outputs", outputs, expected_outputs)):
        if found != expected:
            raise ModelError(f"{path} has the {kind} {found}, its metadata say {expected}; export it again")


def _type(value: onnx.ValueInfoProto) -> tuple[str, list[int | str]]:
    """The element type, and the shape without the batch."""
    tensor = value.type.tensor_type
    shape: list[int | str] = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return onnx.TensorProto.DataType.Name(tensor.elem_type), shape[1:]


def _read_probe(probe: dict[str, Any], classes: int, has_unfamiliar: bool, path: Path | str) -> ExpectedLogits:
    """Raises ModelError for a damaged probe, and for a tolerance with which the self-test could not fail."""
    try:
        logits, tolerance = np.asarray(probe["logits"], np.float32), float(probe["tolerance"])
        unfamiliar = np.asarray(probe["unfamiliar"], np.float32) if has_unfamiliar else None
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} has a damaged probe ({error}); export it again") from error
    if probe.get("images") != PROBE_IMAGES or logits.shape != (PROBE_IMAGES, classes) or not np.isfinite(logits).all():
        raise ModelError(f"{path} has a damaged probe (not the logits of {PROBE_IMAGES} images); export it again")
    if not 0 <= tolerance <= LARGEST_TOLERANCE * max(1.0, float(np.abs(logits).max())):
        raise ModelError(f"{path} has a probe that proves nothing (its tolerance is {tolerance:g}); export it again")
    if unfamiliar is not None and not (unfamiliar.shape == (PROBE_IMAGES,) and np.isfinite(unfamiliar).all()):
        raise ModelError(f"{path} has a damaged probe (not {PROBE_IMAGES} distances); export it again")
    return ExpectedLogits(logits, tolerance, unfamiliar)


def _self_test(model: OnnxModel, expected: ExpectedLogits, path: Path | str) -> None:
    """Raises ModelError if the model does not reproduce the expected logits, and how unfamiliar the images are."""
    outputs = OUTPUTS if expected.unfamiliar is None else [*OUTPUTS, UNFAMILIAR]
    try:
        _, logits, *others = first_run(model.session, probe_images(model.spec), model.provider, outputs)
    except RuntimeError as error:
        raise ModelError(f"{path} does not run on {PROBE_IMAGES} images: {error}; export it again") from error
    _compare_with_probe("logits", logits, expected.logits, expected.tolerance, model, path)
    if expected.unfamiliar is not None:
        (unfamiliar,) = others
        _compare_with_probe(UNFAMILIAR, unfamiliar, expected.unfamiliar, expected.unfamiliar_tolerance, model, path)


def _compare_with_probe(
    output: str,
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    tolerance: float,
    model: OnnxModel,
    path: Path | str,
) -> None:
    """Raises ModelError for another shape, and for differences beyond the tolerance."""
    if expected.shape != found.shape:
        raise ModelError(
            f"{path} gives {output} of the shape {found.shape}, its probe has {expected.shape}; export it again"
        )
    largest = float(np.abs(found - expected).max())
    if not largest <= tolerance:  # NaN fails
        raise ModelError(
            f"{path} failed its self-test on {model.provider}: {output} differ by {largest:.3g} from those at export "
            f"(at most {tolerance:.3g} is accepted); the file is damaged or this machine computes wrongly"
        )
