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
    """Write `state` as step-<step>.pt below `folder`, synced and renamed; older ones beyond `KEPT` go.

    Raises ConvlineError where it cannot be written; the earlier ones are as they were.
    """
    path = folder / f"step-{step}.pt"
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
    except (OSError, RuntimeError) as error:
        if (refused := _refusal(error)) is None:
            raise
        kept = paths(folder)
        last = f"{kept[-1].name} is whole" if kept else "there is none before it"
        raise ConvlineError(
            f"{path} could not be saved: {refused.strerror}; {last}. Free some space, then --resume"
        ) from error
    for old in paths(folder)[:-KEPT]:
        old.unlink()
    return path


def _refusal(error: BaseException | None) -> OSError | None:
    """The system's refusal to write, which torch covers by an exception of its own."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__context__
    return error


def paths(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    found = {path: re.fullmatch(r"step-(\d+)\.pt", path.name) for path in folder.glob("step-*.pt")}
    return sorted((path for path, match in found.items() if match), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.stem.removeprefix("step-"))


def load(path: Path) -> dict[str, Any] | None:
    """A checkpoint, on the CPU; None for one that is torn, with a warning, or gone.

    Raises ConvlineError for one of a newer format.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        log(f"warning: {path} is damaged and skipped ({error})")
        return None
    if state.get("format") != FORMAT:
        raise ConvlineError(f"{path} has format {state.get('format')}, this convline reads {FORMAT}")
    return state


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole; None where there is none. Raises ConvlineError as `load` does."""
    return next((state for path in reversed(paths(folder)) if (state := load(path)) is not None), None)


def tidy(folder: Path) -> None:
    """Remove what was being written when a process was killed; for who holds the run's lock."""
    for left in folder.glob(".step-*.tmp"):
        left.unlink()
