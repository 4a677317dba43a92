"""What torchrun tells the ranks that it starts, by their environment."""

from __future__ import annotations

import os

RANK = "TORCHELASTIC_RUN_ID"


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return RANK in os.environ


def restarts() -> int:
    """How often torchrun has started the ranks again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def environment_of_no_rank() -> dict[str, str]:
    """For a process that a rank starts, and that is none itself."""
    return {name: value for name, value in os.environ.items() if name != RANK}
