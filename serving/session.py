"""onnxruntime: choose a provider (CPU, CUDA, TensorRT), open a session, and limit the time that a graph may take."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Sequence
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
UNFAMILIAR = "unfamiliar"  # a third output, of files exported with --unfamiliar

# seconds for loading a file and for its first run, as a graph may hold a loop that never ends; none for TensorRT, which
# builds its engines in that time
LIMIT = 60.0
# a forked process must not collect a session that its parent no longer uses: it would wait for threads that it does not
# have. Frozen before the fork, because other hooks may collect in the child before a hook of ours runs there
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)
LOG_FATAL_ONLY = 4  # severity of onnxruntime's log: errors are raised as exceptions anyway
# how long a thread spins for work before it sleeps. With onnxruntime's default of 1 s, a session runs at 0.7 of this
# speed while other programs run; without them both are as fast (benchmarks/beside_others.py)
SPIN_MICROSECONDS = 20


def open_session(
    data: bytes,
    provider: Provider = "auto",
    threads: int | None = None,
    name: Path | str = "the exported model",
    has_float16: bool = False,
) -> tuple[onnxruntime.InferenceSession, str]:
    """A session as serving runs it, and the provider it uses ("cpu", "cuda" or "tensorrt").

    Raises ModelError for a provider that does not load, and for a file that onnxruntime does not load, or not in time.
    """
    wanted = provider
    if wanted == "auto":
        wanted = "cuda" if provider_problem("cuda") is None else "cpu"
    elif problem := provider_problem(wanted):
        raise ModelError(f"the provider {wanted} did not load: {problem}; use --provider cpu, or repair it")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or usable_cpus()
    options.log_severity_level = LOG_FATAL_ONLY
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    session = _load_session(
        data,
        name,
        _limit(wanted),
        sess_options=options,
        providers=[(PROVIDERS[wanted], PROVIDER_OPTIONS.get(wanted, {}))],
        # onnxruntime 1.31 crashes when it fuses float16 products with transposes (vision transformers)
        disabled_optimizers=["MatmulTransposeFusion"] if has_float16 else [],
    )
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDERS[wanted]:
        raise ModelError(f"the provider {wanted} did not load: onnxruntime took {session.get_providers()[0]} instead")
    return session, wanted


def _load_session(data: bytes, name: Path | str, limit: float | None, **options: Any) -> onnxruntime.InferenceSession:
    """Create a session on another thread, which is abandoned if it takes too long.

    onnxruntime's optimiser computes the parts of a graph that depend on no input, and that cannot be stopped.
    """
    results: list[onnxruntime.InferenceSession | Exception] = []

    def load() -> None:
        try:
            results.append(onnxruntime.InferenceSession(data, **options))
        # onnxruntime's exceptions have no common base class
        except Exception as error:
            results.append(error)

    thread = Thread(target=load, daemon=True)
    thread.start()
    thread.join(limit)
    if not results:
        raise ModelError(
            f"onnxruntime did not load {name} within {limit:g} s; its graph computes too much to be served"
        )
    if isinstance(results[0], Exception):
        raise ModelError(f"onnxruntime cannot load {name}: {one_line_message(results[0])}") from results[0]
    return results[0]


def first_run(
    session: onnxruntime.InferenceSession, images: NDArray[np.uint8], provider: str, outputs: Sequence[str] = OUTPUTS
) -> list[NDArray[np.float32]]:
    """The outputs of a session for its first images: probability and logit, unless others are named.

    Raises RuntimeError, with a message of one line, if the graph does not run on them, or not in time.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    limit = _limit(provider)
    is_late = False

    def stop() -> None:
        nonlocal is_late
        is_late = True
        options.terminate = True  # takes effect after the current node, also inside a loop

    timer = Timer(limit, stop) if limit else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        return session.run(outputs, {"image": images}, options)
    # onnxruntime's exceptions have no common base class
    except Exception as error:
        raise RuntimeError(f"it took more than {limit:g} s" if is_late else one_line_message(error)) from error
    finally:
        if timer is not None:
            timer.cancel()


def _limit(provider: str) -> float | None:
    return None if provider == "tensorrt" else LIMIT


# "[ONNXRuntimeError] : 1 : FAIL : ", and the source file, line and signature of the function that raised it
SOURCE_POSITION = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+\.\w+:\d+ .*?\)(?: const)?(?: \[with .*?\])? ")
LONGEST_MESSAGE = 300  # characters


def one_line_message(error: Exception) -> str:
    """The message of onnxruntime's exception on one line, without its position in onnxruntime's source."""
    text = SOURCE_POSITION.sub("", " ".join(str(error).split())).strip() or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"


def provider_problem(name: str) -> str | None:
    """Why a provider cannot load here; None if it can. onnxruntime's own list includes providers it cannot load."""
    if name == "cpu":
        return None
    if PROVIDERS[name] not in onnxruntime.get_available_providers():
        return "this onnxruntime was built without it (install onnxruntime-gpu)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1 is missing)"
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # from the packages of torch or of the extra `cuda`, if they are installed
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"))
    except OSError as error:
        return f"{error} (the extra `cuda` brings CUDA and cuDNN)"
    return None
