"""How many threads a training computes with on the CPU: the one place that decides."""

from __future__ import annotations

import os

import torch

from convline.console import log
from convline.cpus import usable_cpus
from pipeline.training.torchrun import is_rank, meeting_file


def set_threads(asked: int | None, local_size: int, kept: int | None) -> None:
    """Compute with so many threads: `asked`, by --threads; else `kept`, those of the checkpoint that the training
    goes on from, as sums depend on their number; else `usual_threads`."""
    count = asked or kept or usual_threads(local_size)
    if kept is not None and count != kept:
        log(f"--threads {count}: there were {kept} before; the weights may differ from there on in their last bits")
    torch.set_num_threads(count)


def usual_threads(local_size: int) -> int:
    """As many as OMP_NUM_THREADS says where the user has set it, else an even share of the CPUs for each of
    `local_size` ranks on this machine."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": 2 are for nested regions
    # torchrun sets it to 1 for its ranks where nobody has
    is_torchruns = told == "1" and local_size > 1 and is_rank() and meeting_file() is None
    if told.isdecimal() and int(told) > 0 and not is_torchruns:
        return int(told)
    return max(1, usable_cpus() // local_size)
