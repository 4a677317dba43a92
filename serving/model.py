"""Opens an ONNX file and refuses what cannot be trusted.

A convline file says in its metadata what it is, and carries the logits of eight images made by a fixed
formula. They are computed again by the session that was just opened, on the provider it really took: a
broken driver, a wrong library or a damaged file is found before the first image. Files made elsewhere say nothing
of the kind; they are opened with what their user says of them.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from serving.errors import ConvlineError, ModelError
from serving.foreign import Foreign, adapt
from serving.images import ImageSpec
from serving.machine import usable_cpus
from serving.registry import SCHEME
from serving.source import (
    PREFIX,
    PROOF,
    check_has_no_external_data,
    load_external_data,
    parse_model,
    problem_with_proof,
    read_metadata,
    read_model,
)

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# TF32 keeps 10 bits of mantissa: its logits differ from PyTorch's in the third digit
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cuda": {"use_tf32": "0"}}

PROBE_IMAGES = 8
MAX_PIXELS = 2**24  # of an image that a model takes; larger ones are decoded to its size


@dataclass(frozen=True)
class Model:
    """An opened, validated and self-tested ONNX classifier; `run` may be called from several threads.

    `sha256` is of the file's bytes; `batch` the one size that a foreign file takes, None where any will do.
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
        probability, logit = self.session.run(["probability", "logit"], {"image": images})
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
    foreign: Foreign | None = None,
    is_proven: bool = True,
) -> Model:
    """Open, validate and self-test an ONNX file of convline, or `models:/NAME@ALIAS`, `models:/NAME/VERSION` in MLflow.

    `foreign` says what a file made elsewhere does not say of itself; there is no self-test then. `is_proven` is False
    for a file that is still to be proven. Raises ModelError for a file that is missing, damaged, too large, of a newer
    format, inconsistent, not the one that was proven, or has weights in other files (beside it they may be, of a
    foreign one), and for a provider that was asked for and did not load.
    """
    return load_model(read_model(name), name, provider, threads, foreign, is_proven)


def load_model(
    data: bytes,
    name: Path | str,
    provider: Provider,
    threads: int | None = None,
    foreign: Foreign | None = None,
    is_proven: bool = True,
) -> Model:
    """As `open_model`, of bytes that were read already; `name` is what errors call them."""
    proto = parse_model(data, name)
    if foreign is not None:
        return _open_foreign(proto, data, name, provider, threads, foreign)
    metadata = read_metadata(proto, name, () if is_proven else PROOF)
    check_has_no_external_data(proto, name)
    try:
        spec = ImageSpec.from_dict(metadata["image"])
    except ConvlineError as error:
        raise ModelError(f"{name}: {error}") from error
    if spec.height is None or spec.width is None or spec.height * spec.width > MAX_PIXELS:
        raise ModelError(f"{name} does not say how large its images are, or too large; export it again")
    halves, unproven = has_halves(proto), problem_with_proof(proto, metadata) if is_proven else None
    del proto  # before the session takes as much again
    session, taken = open_session(data, provider, threads, name, halves)
    digest = hashlib.sha256(data).hexdigest()
    model = Model(session, metadata, tuple(metadata["classes"]), spec, taken, digest)
    _check_graph(model, name)
    _self_test(model, name)
    if unproven is not None:  # last: what else is wrong says more
        raise ModelError(f"{name} {unproven}; export it again")
    return model


def _open_foreign(
    proto: onnx.ModelProto, data: bytes, name: Path | str, provider: Provider, threads: int | None, foreign: Foreign
) -> Model:
    if any(entry.key.startswith(PREFIX) for entry in proto.metadata_props):
        raise ModelError(f"{name} was exported by convline and says itself how it is used; leave out --classes")
    if not str(name).startswith(SCHEME):
        load_external_data(proto, Path(name))
    check_has_no_external_data(proto, name)
    adapted = adapt(proto, foreign, name)
    halves = has_halves(adapted.model)
    session, taken = open_session(adapted.model.SerializeToString(), provider, threads, name, halves)
    digest = hashlib.sha256(data).hexdigest()
    model = Model(session, {}, foreign.classes, adapted.spec, taken, digest, adapted.batch)
    # what a graph promises may differ from what it gives
    probability, logit = _first_run(model, probe_images(model.spec)[: model.batch], name)
    is_guessed = foreign.preprocessing.scores is None
    if is_guessed and np.all((logit >= 0) & (logit <= 1)):
        raise ModelError(
            f"{name} gives numbers from 0 to 1: say by --preprocess scores=probabilities or scores=logits what they are"
        )
    if probability.shape[1:] != (len(model.classes),):
        told = f"{len(model.classes)} classes were named"
        raise ModelError(f"{name} gives {probability.shape[1]} scores an image, {told}; mend the file of classes")
    return model


def has_halves(model: onnx.ModelProto) -> bool:
    """Whether weights are float16."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def open_session(
    data: bytes,
    provider: Provider = "auto",
    threads: int | None = None,
    name: Path | str = "the exported model",
    has_halves: bool = False,
) -> tuple[onnxruntime.InferenceSession, str]:
    """A session as serving runs it, and the provider it really took ("cpu", "cuda" or "tensorrt")."""
    wanted = provider
    if wanted == "auto":
        wanted = "cuda" if provider_problem("cuda") is None else "cpu"
    elif problem := provider_problem(wanted):
        raise ModelError(f"the provider {wanted} did not load: {problem}; use --provider cpu, or mend it")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or usable_cpus()
    options.log_severity_level = 4
    providers = [(PROVIDERS[wanted], PROVIDER_OPTIONS.get(wanted, {}))]
    try:
        session = onnxruntime.InferenceSession(
            # onnxruntime 1.31 crashes where it fuses float16 products with transposes (vision transformers)
            data,
            options,
            providers=providers,
            disabled_optimizers=["MatmulTransposeFusion"] if has_halves else [],
        )
    # onnxruntime's exceptions have no common base of their own
    except Exception as error:
        raise ModelError(f"onnxruntime cannot load {name}: {error}; export it again") from error
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDERS[wanted]:
        raise ModelError(f"the provider {wanted} did not load: onnxruntime took {session.get_providers()[0]} instead")
    return session, wanted


def provider_problem(name: str) -> str | None:
    """Why a provider cannot load here, None where it can. onnxruntime lists providers it cannot load."""
    if name == "cpu":
        return None
    if PROVIDERS[name] not in onnxruntime.get_available_providers():
        return "this onnxruntime was built without it (install onnxruntime-gpu)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1 is missing)"
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # from torch's or the `cuda` extra's packages, if they are there
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"))
    except OSError as error:
        return f"{error} (the extra `cuda` brings CUDA and cuDNN)"
    return None


def probe_images(spec: ImageSpec) -> NDArray[np.uint8]:
    """Eight images by formula, uint8 [8, height, width, channels]: ramps, products and noise of all contrasts."""
    assert spec.height and spec.width
    grid = np.ogrid[:PROBE_IMAGES, : spec.height, : spec.width, : spec.channels]
    i, y, x, c = (axis.astype(np.int32) for axis in grid)
    ramp = (i + 1) * 17 * y + (2 * i + 3) * 13 * x + 71 * c + 31 * i * i
    noise = (x * y * (i + 5) + 7 * x * x + 3 * y * (c + 1)) % 97
    return ((ramp + noise) % 256).astype(np.uint8)


def _check_graph(model: Model, path: Path | str) -> None:
    """Metadata and graph must tell the same story."""
    spec = model.spec
    inputs = {node.name: (node.type, node.shape[1:]) for node in model.session.get_inputs()}
    outputs = {node.name: (node.type, node.shape[1:]) for node in model.session.get_outputs()}
    told_inputs = {"image": ("tensor(uint8)", [spec.height, spec.width, spec.channels])}
    told_outputs = {name: ("tensor(float)", [len(model.classes)]) for name in ("probability", "logit")}
    for what, found, told in (("inputs", inputs, told_inputs), ("outputs", outputs, told_outputs)):
        if found != told:
            raise ModelError(f"{path}: its metadata promises the {what} {told}, its graph has {found}; export it again")


def _first_run(
    model: Model, images: NDArray[np.uint8], name: Path | str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a graph that was only looked at gives. Raises ModelError where it does not run."""
    try:
        return model.run(images)
    # onnxruntime's exceptions have no common base of their own
    except Exception as error:
        told = str(error).partition("\n")[0]
        raise ModelError(
            f"{name} does not run on {len(images)} images: {told}; export it with a dynamic batch"
        ) from error


def _self_test(model: Model, path: Path | str) -> None:
    probe = model.metadata["probe"]
    try:
        expected, tolerance = np.asarray(probe["logits"], np.float32), float(probe["tolerance"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} has a damaged probe ({error}); export it again") from error
    _, logits = _first_run(model, probe_images(model.spec), path)
    if expected.shape != logits.shape:
        raise ModelError(f"{path}: its probe holds {expected.shape} logits, its graph gives {logits.shape}")
    worst = float(np.abs(logits - expected).max())
    if not worst <= tolerance:  # NaN fails
        raise ModelError(
            f"{path} failed its self-test on {model.provider}: logits differ by {worst:.3g} from those proven at "
            f"export (at most {tolerance:.3g}); the file is damaged or this machine computes wrongly"
        )
