"""What a figure was measured on."""

from __future__ import annotations

from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def hardware(threads: int) -> str:
    """The GPU where torch has one, else the CPU and how many threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].partition(':')[2].strip()}, {threads} thread{'s' * (threads > 1)}"


def versions(*libraries: str) -> str:
    """Of those that are installed, and today's date."""
    told = []
    for library in libraries:
        try:
            told.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*told, str(date.today())])
