"""Opens an ONNX file and refuses what cannot be trusted.

A convline file says in its metadata what it is, and carries the logits of eight images made by a fixed
formula. They are computed again by the session that was just opened, on the provider it really took: a
broken driver, a wrong library or a damaged file is found before the first image.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serving.errors import ConvlineError, ModelError
from serving.images import ImageSpec
from serving.machine import usable_cpus

FORMAT = 1
PREFIX = "convline."
REQUIRED = {"format": int, "classes": list, "image": dict, "weights": str, "probe": dict}

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# TF32 keeps 10 bits of mantissa: its logits differ from PyTorch's in the third digit
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cuda": {"use_tf32": "0"}}

PROBE_IMAGES = 8


@dataclass(frozen=True)
class Model:
    """An opened, validated and self-tested ONNX classifier; `run` may be called from several threads."""

    session: onnxruntime.InferenceSession = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)
    classes: tuple[str, ...]
    spec: ImageSpec
    provider: str

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


def open_model(path: Path | str, provider: Provider = "auto", threads: int | None = None) -> Model:
    """Open, validate and self-test a convline ONNX file.

    Raises ModelError for a file that is missing, foreign, damaged, of a newer format or inconsistent,
    and for a provider that was asked for and did not load.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no model at {path}; `pipeline export` makes one")
    session, taken = open_session(path, provider, threads)
    metadata = read_metadata(session, path)
    try:
        spec = ImageSpec.from_dict(metadata["image"])
    except ConvlineError as error:
        raise ModelError(f"{path}: {error}") from error
    model = Model(session, metadata, tuple(metadata["classes"]), spec, taken)
    _check_graph(model, path)
    _self_test(model, path)
    return model


def open_session(
    source: Path | bytes, provider: Provider = "auto", threads: int | None = None
) -> tuple[onnxruntime.InferenceSession, str]:
    """A session as serving runs it, and the provider it really took ("cpu", "cuda" or "tensorrt")."""
    name = provider
    if name == "auto":
        name = "cuda" if provider_problem("cuda") is None else "cpu"
    elif problem := provider_problem(name):
        raise ModelError(f"the provider {name} did not load: {problem}; use --provider cpu, or mend it")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or usable_cpus()
    options.log_severity_level = 4
    providers = [(PROVIDERS[name], PROVIDER_OPTIONS.get(name, {}))]
    where = "the exported bytes" if isinstance(source, bytes) else str(source)
    try:
        session = onnxruntime.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=providers
        )
    # onnxruntime's exceptions have no common base of their own
    except Exception as error:
        raise ModelError(f"onnxruntime cannot load {where}: {error}; export it again") from error
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDERS[name]:
        raise ModelError(f"the provider {name} did not load: onnxruntime took {session.get_providers()[0]} instead")
    return session, name


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


def read_metadata(session: onnxruntime.InferenceSession, path: Path | str) -> dict[str, Any]:
    """The `convline.` metadata, parsed. Raises ModelError where it is missing, damaged or newer."""
    stored = session.get_modelmeta().custom_metadata_map
    try:
        metadata = {k.removeprefix(PREFIX): json.loads(v) for k, v in stored.items() if k.startswith(PREFIX)}
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} has damaged metadata ({error}); export it again") from error
    if not metadata:
        raise ModelError(f"{path} was not exported by convline: it has no convline metadata")
    if wrong := [key for key, kind in REQUIRED.items() if not isinstance(metadata.get(key), kind)]:
        raise ModelError(f"{path} lacks the metadata {', '.join(wrong)}, or they are damaged; export it again")
    if metadata["format"] > FORMAT:
        raise ModelError(f"{path} has format {metadata['format']}, this convline reads {FORMAT}; upgrade convline")
    return metadata


def probe_images(spec: ImageSpec) -> NDArray[np.uint8]:
    """Eight images by formula, uint8 [8, height, width, channels]: ramps, products and noise of all contrasts."""
    assert spec.height and spec.width
    i, y, x, c = np.ogrid[:PROBE_IMAGES, : spec.height, : spec.width, : spec.channels]
    ramp = (i + 1) * 17 * y + (2 * i + 3) * 13 * x + 71 * c + 31 * i * i
    noise = (x * y * (i + 5) + 7 * x * x + 3 * y * (c + 1)) % 97
    return ((ramp + noise) % 256).astype(np.uint8)


def _check_graph(model: Model, path: Path) -> None:
    """Metadata and graph must tell the same story."""
    spec = model.spec
    inputs = {node.name: (node.type, node.shape[1:]) for node in model.session.get_inputs()}
    outputs = {node.name: (node.type, node.shape[1:]) for node in model.session.get_outputs()}
    told_inputs = {"image": ("tensor(uint8)", [spec.height, spec.width, spec.channels])}
    told_outputs = {name: ("tensor(float)", [len(model.classes)]) for name in ("probability", "logit")}
    for what, found, told in (("inputs", inputs, told_inputs), ("outputs", outputs, told_outputs)):
        if found != told:
            raise ModelError(f"{path}: its metadata promises the {what} {told}, its graph has {found}; export it again")


def _self_test(model: Model, path: Path) -> None:
    probe = model.metadata["probe"]
    try:
        expected, tolerance = np.asarray(probe["logits"], np.float32), float(probe["tolerance"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} has a damaged probe ({error}); export it again") from error
    _, logits = model.run(probe_images(model.spec))
    if expected.shape != logits.shape:
        raise ModelError(f"{path}: its probe holds {expected.shape} logits, its graph gives {logits.shape}")
    worst = float(np.abs(logits - expected).max())
    if not worst <= tolerance:  # NaN fails
        raise ModelError(
            f"{path} failed its self-test on {model.provider}: logits differ by {worst:.3g} from those proven at "
            f"export (at most {tolerance:.3g}); the file is damaged or this machine computes wrongly"
        )
