"""onnxruntime: its providers, its sessions, how long they may take, and what its messages say."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path
from threading import Thread, Timer
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from convline.cpus import usable_cpus
from convline.errors import ModelError

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# TF32 keeps 10 bits of mantissa: its logits differ from PyTorch's in the third digit
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cuda": {"use_tf32": "0"}}
OUTPUTS = ["probability", "logit"]

# that loading a file, and its first run, may take: a graph may hold a loop that never ends. TensorRT, which builds its
# engines meanwhile, may take as long as it likes
LIMIT = 60.0
# a forked process must not collect a session that its parent had done with: it would wait for threads that it lacks
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)
QUIET = 4  # onnxruntime's log: what matters comes as an exception
# that a thread looks for work before it sleeps: with onnxruntime's own second, sessions beside other work run at 0.7 of
# the speed that they have with this one, which costs nothing alone (benchmarks/beside_others.py)
SPIN_MICROSECONDS = 20


def open_session(
    data: bytes,
    provider: Provider = "auto",
    threads: int | None = None,
    name: Path | str = "the exported model",
    has_halves: bool = False,
) -> tuple[onnxruntime.InferenceSession, str]:
    """A session as serving runs it, and the provider it really took ("cpu", "cuda" or "tensorrt").

    Raises ModelError for a provider that does not load, and for a file that onnxruntime does not load, or not in time.
    """
    wanted = provider
    if wanted == "auto":
        wanted = "cuda" if provider_problem("cuda") is None else "cpu"
    elif problem := provider_problem(wanted):
        raise ModelError(f"the provider {wanted} did not load: {problem}; use --provider cpu, or mend it")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or usable_cpus()
    options.log_severity_level = QUIET
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    session = _loaded(
        data,
        name,
        _limit(wanted),
        sess_options=options,
        providers=[(PROVIDERS[wanted], PROVIDER_OPTIONS.get(wanted, {}))],
        # onnxruntime 1.31 crashes where it fuses float16 products with transposes (vision transformers)
        disabled_optimizers=["MatmulTransposeFusion"] if has_halves else [],
    )
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDERS[wanted]:
        raise ModelError(f"the provider {wanted} did not load: onnxruntime took {session.get_providers()[0]} instead")
    return session, wanted


def _loaded(data: bytes, name: Path | str, limit: float | None, **options: Any) -> onnxruntime.InferenceSession:
    """A session, made on a thread that is left to itself where it takes too long.

    While a graph is optimised, what depends on no input is computed, and nothing can stop that.
    """
    made: list[onnxruntime.InferenceSession | Exception] = []

    def load() -> None:
        try:
            made.append(onnxruntime.InferenceSession(data, **options))
        # onnxruntime's exceptions have no common base of their own
        except Exception as error:
            made.append(error)

    thread = Thread(target=load, daemon=True)
    thread.start()
    thread.join(limit)
    if not made:
        raise ModelError(
            f"onnxruntime did not load {name} within {limit:g} s; its graph computes too much to be served"
        )
    if isinstance(made[0], Exception):
        raise ModelError(f"onnxruntime cannot load {name}: {message(made[0])}") from made[0]
    return made[0]


def first_run(
    session: onnxruntime.InferenceSession, images: NDArray[np.uint8], provider: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probability and logit of a session's first images.

    Raises RuntimeError, with one line that says why, where the graph does not run on them, or not in time.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = QUIET
    limit = _limit(provider)
    is_late = False

    def stop() -> None:
        nonlocal is_late
        is_late = True
        options.terminate = True  # between two nodes, those within a loop's body included

    timer = Timer(limit, stop) if limit else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        probability, logit = session.run(OUTPUTS, {"image": images}, options)
    # onnxruntime's exceptions have no common base of their own
    except Exception as error:
        raise RuntimeError(f"it took more than {limit:g} s" if is_late else message(error)) from error
    finally:
        if timer is not None:
            timer.cancel()
    return probability, logit


def _limit(provider: str) -> float | None:
    return None if provider == "tensorrt" else LIMIT


# "[ONNXRuntimeError] : 1 : FAIL : ", and the file, line and signature of the function that says it
NOISE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+\.\w+:\d+ .*?\)(?: const)?(?: \[with .*?\])? ")
LONGEST = 300  # characters of a message


def message(error: Exception) -> str:
    """What onnxruntime says, on one line, without where in its sources it says so."""
    told = NOISE.sub("", " ".join(str(error).split())).strip() or type(error).__name__
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}…"


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
