"""What torchrun, or `--devices`, tells the ranks that it starts, by their environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

RANK = "TORCHELASTIC_RUN_ID"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
MEETING = "CONVLINE_MEETING_FILE"


def is_rank() -> bool:
    """Whether torchrun or `--devices` started this process."""
    return RANK in os.environ


def restarts() -> int:
    """How often the ranks have been started again after a failure."""
    return int(os.environ.get(RESTARTS, "0"))


def meeting_file() -> str | None:
    """The file in which the ranks of `--devices` meet; None for those of torchrun."""
    return os.environ.get(MEETING)


def environment_of_rank(rank: int, size: int, restart: int, meeting: str) -> dict[str, str]:
    """For the process that is `rank` of `size`, all on this machine."""
    told: Mapping[str, object] = {
        RANK: "devices",
        RESTARTS: restart,
        MEETING: meeting,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
    }
    return {**os.environ, **{name: str(value) for name, value in told.items()}}


def environment_of_no_rank() -> dict[str, str]:
    """For a process that a rank starts, and that is none itself."""
    return {name: value for name, value in os.environ.items() if name not in (RANK, MEETING)}
