"""Checkpoints: whole or absent, the newest few kept, loaded without running any code they hold.

A file ends with the SHA-256 of all its bytes before: a flip of any bit is found before anything is read into memory.
(PyTorch does not look at the checksums of its own format, nor does it bound what a damaged file makes it do.)
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import IO, Any

import torch

from convline.console import log
from convline.errors import ConvlineError
from convline.files import atomic_write, sha256

FORMAT = 1
KEPT = 3
SEAL = b"sha256:"  # then 64 hexadecimal digits; torch.load reads past them, and older checkpoints have none
SEALED = len(SEAL) + 64  # bytes
PARTS = {"step": int, "raw": dict, "averaged": dict, "optimizer": dict}


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as step-<step>.pt below `folder`, synced and renamed; older ones beyond `KEPT` go.

    Raises ConvlineError where it cannot be written; the earlier ones are as they were.
    """
    path = folder / f"step-{step}.pt"
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            file.write(SEAL + sha256(Path(file.name)).encode())  # 1 ms for a megabyte
    except (OSError, RuntimeError) as error:
        if (refused := _refusal(error)) is None:
            raise
        kept = paths(folder)
        last = f"{kept[-1].name} is whole" if kept else "there is none before it"
        raise ConvlineError(
            f"{path} could not be saved: {refused.strerror}; {last}. Free some space, then --resume"
        ) from error
    # newer ones are damaged, or this training would have begun at them
    for old in [kept for kept in paths(folder) if step_of(kept) <= step][:-KEPT]:
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
    """A checkpoint, on the CPU; None for one that is torn or damaged, with a warning, or gone.

    Raises ConvlineError for one of a newer format.
    """
    try:
        with path.open("rb") as file:
            _check_seal(file)
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        _check_parts(state)
    except FileNotFoundError:
        return None
    # torch.load raises whatever a damaged file leads it to: KeyError, UnicodeDecodeError, MemoryError, …
    except Exception as error:
        told = re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__
        log(f"warning: {path} is damaged and skipped ({told})")
        return None
    if state["format"] != FORMAT:
        raise ConvlineError(f"{path} has format {state['format']}, this convline reads {FORMAT}; upgrade convline")
    return state


def _check_seal(file: IO[bytes]) -> None:
    """Raises ValueError where the bytes are not those that were saved; leaves the file at its beginning."""
    size = file.seek(0, 2)
    file.seek(max(0, size - SEALED))
    if (seal := file.read()).startswith(SEAL):
        digest, left = hashlib.sha256(), size - SEALED
        file.seek(0)
        while left and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        if digest.hexdigest().encode() != seal.removeprefix(SEAL):
            raise ValueError("its bytes are not those that were saved")
    file.seek(0)


def _check_parts(state: Any) -> None:
    """Raises ValueError for what is no checkpoint: older ones, without a seal, may be damaged as well."""
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise ValueError("it is no checkpoint")
    if state["format"] == FORMAT and not all(isinstance(state.get(part), kind) for part, kind in PARTS.items()):
        raise ValueError("a part of it is missing")


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, with a warning where it is not the newest of all; None where there is none.
    Raises ConvlineError as `load` does."""
    skipped: list[Path] = []
    for path in reversed(paths(folder)):
        if (state := load(path)) is not None:
            if lost := [step_of(one) for one in skipped if one.exists()]:
                log(
                    f"warning: the newest checkpoint in {folder}, of step {lost[0]}, is lost: that of step "
                    f"{state['step']} is taken instead; `pipeline train --resume` trains the steps between them again"
                )
            return state
        skipped.append(path)
    return None


def tidy(folder: Path) -> None:
    """Remove what was being written when a process was killed; for who holds the run's lock."""
    for left in folder.glob(".step-*.tmp"):
        left.unlink()
