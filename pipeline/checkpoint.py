"""Checkpoints: what they hold; saved atomically, verified by a checksum, loaded without running code, the newest kept.

A checkpoint holds, as `TrainingState.save` writes it: "format", "step", "raw" and "averaged" weights, "optimizer",
"threads", "ranks", "monitor" (of the progress log), "provenance" (of the run), "best" (the step and precision of the
best weights on validation, and the evaluations since then, if the recipe asks for them) and, with float16, "scaler".

The file ends with the SHA-256 of all bytes before, so that any damage is found before torch reads the file: torch does
not verify the checksums of its own format, and damaged files make it raise anything.
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
KEEP = 3  # checkpoints
# the checksum is written as this prefix and 64 hexadecimal digits; torch.load ignores both. Older checkpoints have none
CHECKSUM_PREFIX = b"sha256:"
CHECKSUM_LENGTH = len(CHECKSUM_PREFIX) + 64
REQUIRED = {"step": int, "raw": dict, "averaged": dict, "optimizer": dict}


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Save `state` as step-<step>.pt in `folder`, durably and atomically, and delete all but the newest KEEP and the
    best one, where `state` names it.

    Raises ConvlineError where it cannot be written; the earlier checkpoints are not changed then.
    """
    path = folder / f"step-{step}.pt"
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            file.write(CHECKSUM_PREFIX + sha256(Path(file.name)).encode())  # takes 1 ms per megabyte
    except (OSError, RuntimeError) as error:
        if (system_error := _system_error(error)) is None:
            raise
        existing = paths(folder)
        last = f"{existing[-1].name} is intact" if existing else "there is none before it"
        raise ConvlineError(
            f"{path} could not be saved: {system_error.strerror}; {last}. Free some space, then --resume"
        ) from error
    # checkpoints of later steps are damaged (else this training would have continued from them) and do not count
    best = best_step(state)
    for old in [saved for saved in paths(folder) if step_of(saved) <= step][:-KEEP]:
        if step_of(old) != best:
            old.unlink()
    return path


def best_step(state: dict[str, Any]) -> int | None:
    """The step whose checkpoint counts in the end, where that is not the newest."""
    best = state.get("best")
    return best["step"] if best and best["keep"] == "best" else None


def _system_error(error: BaseException | None) -> OSError | None:
    """The OSError that caused `error`, if any: torch raises its own exception on top of it."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__context__
    return error


def paths(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its file name."""
    return int(path.stem.removeprefix("step-"))


def load(path: Path) -> dict[str, Any] | None:
    """A checkpoint, on the CPU; None if it is missing, or (with a warning) damaged.

    Raises ConvlineError for a checkpoint of a newer format.
    """
    try:
        with path.open("rb") as file:
            _verify_checksum(file)
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        _check_content(state)
    except FileNotFoundError:
        return None
    # for a damaged file torch.load raises anything: KeyError, UnicodeDecodeError, MemoryError, …
    except Exception as error:
        details = re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__
        log(f"warning: {path} is damaged and skipped ({details})")
        return None
    if state["format"] != FORMAT:
        raise ConvlineError(f"{path} has format {state['format']}, this convline reads {FORMAT}; upgrade convline")
    return state


def _verify_checksum(file: IO[bytes]) -> None:
    """Raises ValueError where the checksum does not match; leaves the file at its beginning."""
    size = file.seek(0, 2)
    file.seek(max(0, size - CHECKSUM_LENGTH))
    if (checksum := file.read()).startswith(CHECKSUM_PREFIX):
        digest, remaining = hashlib.sha256(), size - CHECKSUM_LENGTH
        file.seek(0)
        while remaining and (chunk := file.read(min(remaining, 2**20))):
            digest.update(chunk)
            remaining -= len(chunk)
        if digest.hexdigest().encode() != checksum.removeprefix(CHECKSUM_PREFIX):
            raise ValueError("its checksum does not match")
    file.seek(0)


def _check_content(state: Any) -> None:
    """Raises ValueError for what is not a checkpoint: damage to older ones, without a checksum, may show only here."""
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise ValueError("it is not a checkpoint")
    if state["format"] == FORMAT and not all(isinstance(state.get(key), kind) for key, kind in REQUIRED.items()):
        raise ValueError("a part of it is missing")


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint, with a warning where newer ones are damaged; None where there is none.
    Raises ConvlineError as `load` does."""
    skipped: list[Path] = []
    for path in reversed(paths(folder)):
        if (state := load(path)) is not None:
            if damaged := [step_of(path) for path in skipped if path.exists()]:
                log(
                    f"warning: the newest checkpoint in {folder}, of step {damaged[0]}, is lost; using the one of step "
                    f"{state['step']} instead: `pipeline train --resume` trains the steps between them again"
                )
            return state
        skipped.append(path)
    return None


def load_kept(folder: Path) -> dict[str, Any] | None:
    """The checkpoint that counts: the best, where the newest names one, else the newest. Raises ConvlineError as `load`
    does."""
    newest = load_newest(folder)
    best = None if newest is None else best_step(newest)
    if newest is None or best is None or best == newest["step"]:
        return newest
    kept = load(folder / f"step-{best}.pt")
    if kept is None:
        log(f"warning: the best checkpoint in {folder}, of step {best}, is lost; using that of step {newest['step']}")
    return kept or newest


def remove_unfinished(folder: Path) -> None:
    """Remove files that a killed process was writing. The caller must hold the run's lock."""
    for path in folder.glob(".step-*.tmp"):
        path.unlink()
