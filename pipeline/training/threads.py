"""The number of threads that a training computes with on the CPU: --threads, OMP_NUM_THREADS, or an even share."""

from __future__ import annotations

import os

import torch

from convline.console import log
from convline.cpus import usable_cpus
from pipeline.training.rank_environment import is_rank, meeting_file


def set_threads(requested: int | None, local_size: int, of_checkpoint: int | None) -> None:
    """Set torch's number of threads: `requested` by --threads; else `of_checkpoint`, if the training is resumed,
    because sums depend on the number of threads in their last bits; else `default_threads`."""
    count = requested or of_checkpoint or default_threads(local_size)
    if of_checkpoint is not None and count != of_checkpoint:
        log(
            f"--threads {count}: the checkpoint was trained with {of_checkpoint}; from here on the last bits of the "
            "weights may differ"
        )
    torch.set_num_threads(count)


def default_threads(local_size: int) -> int:
    """OMP_NUM_THREADS where the user has set it, else an even share of the CPUs for each of `local_size` ranks on this
    machine."""
    omp = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # in "4,2" the 2 is for nested regions
    # torchrun sets OMP_NUM_THREADS=1 for several ranks where the user has not set it
    is_set_by_torchrun = omp == "1" and local_size > 1 and is_rank() and meeting_file() is None
    if omp.isdecimal() and int(omp) > 0 and not is_set_by_torchrun:
        return int(omp)
    return max(1, usable_cpus() // local_size)
