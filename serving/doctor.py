"""`serving doctor`: check the installed libraries, CPUs and onnxruntime providers of this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from convline.cpus import usable_cpus

LIBRARIES = (
    "convline",
    "numpy",
    "pillow",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "mlflow",
    "pyarrow",
    "ray",
)


def examine() -> dict[str, Any]:
    """Python, libraries, CPUs, providers (each with None or the reason why it does not load), and problems found."""
    libraries = {name: installed for name in LIBRARIES if (installed := _version(name))}
    problems = []
    runtimes = [name for name in ("onnxruntime", "onnxruntime-gpu") if name in libraries]
    if len(runtimes) == 2:
        problems.append(
            "onnxruntime and onnxruntime-gpu are installed over each other, and either may be imported: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you want"
        )
    providers: dict[str, str | None] = {}
    try:
        from serving.session import PROVIDERS, provider_problem

        providers = {name: provider_problem(name) for name in PROVIDERS}
    except ImportError as error:
        problems.append(f"onnxruntime does not import ({error}): install convline again")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": libraries,
        "cpus": {"machine": os.cpu_count(), "usable": usable_cpus()},
        "providers": providers,
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
