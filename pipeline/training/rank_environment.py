"""The environment variables that torchrun, or `--devices`, sets for the ranks of a training."""

from __future__ import annotations

import os
from collections.abc import Mapping

RUN_ID = "TORCHELASTIC_RUN_ID"
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"
MEETING_FILE = "CONVLINE_MEETING_FILE"


def is_rank() -> bool:
    """Whether torchrun or `--devices` started this process."""
    return RUN_ID in os.environ


def restart_count() -> int:
    """How often the ranks have been started again after a failure."""
    return int(os.environ.get(RESTART_COUNT, "0"))


def meeting_file() -> str | None:
    """The file by which the ranks of `--devices` find each other; None for ranks of torchrun."""
    return os.environ.get(MEETING_FILE)


def environment_of_rank(rank: int, size: int, restarts: int, meeting: str) -> dict[str, str]:
    """The environment of the process that is `rank` of `size`, all on this machine, after `restarts` restarts."""
    variables: Mapping[str, object] = {
        RUN_ID: "devices",
        RESTART_COUNT: restarts,
        MEETING_FILE: meeting,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
    }
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}


def environment_without_rank() -> dict[str, str]:
    """The environment of a process that a rank starts and that is not a rank itself."""
    return {name: value for name, value in os.environ.items() if name not in (RUN_ID, MEETING_FILE)}
