"""Checkpoints: whole or absent, the newest few kept, loaded without running any code they hold."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from serving.console import log
from serving.errors import ConvlineError
from serving.files import atomic_write

FORMAT = 1
KEPT = 3


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as step-<step>.pt below `folder`, synced and renamed; older ones beyond `KEPT` go."""
    path = folder / f"step-{step}.pt"
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "step": step, **state}, file)
    for old in paths(folder)[:-KEPT]:
        old.unlink()
    return path


def paths(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    found = {path: re.fullmatch(r"step-(\d+)\.pt", path.name) for path in folder.glob("step-*.pt")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(path.stem[5:]))


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU; None where there is none. A torn one is skipped.

    Raises ConvlineError for one of a newer format.
    """
    for path in reversed(paths(folder)):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            log(f"warning: {path} is damaged and skipped ({error})")
            continue
        if state.get("format") != FORMAT:
            raise ConvlineError(f"{path} has format {state.get('format')}, this convline reads {FORMAT}")
        return state
    return None
