"""`--devices N`: the ranks of one training as processes of this machine.

torchrun's store would listen on every interface and unpickle what anyone sends it. These ranks meet in a file that only
this user can open, and talk over the loopback interface.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from convline.cpus import usable_cpus
from convline.errors import ConvlineError
from pipeline.training.interrupts import StopRequest, stop_request
from pipeline.training.torchrun import environment_of_rank

LOOK_EVERY = 0.05  # seconds between two looks at the ranks
TOGETHER = 0.5  # seconds in which the others notice that a rank has died, and end too
PATIENCE = 30.0  # seconds that ranks may take to save and end

Rank = subprocess.Popen[bytes]


def launch(devices: int, max_restarts: int, device: str, arguments: Sequence[str]) -> int:
    """Run `pipeline` with these arguments on several devices of this machine; the exit status.

    Raises ConvlineError for more devices than there are, and where a signal ended a rank.
    """
    _check_devices(devices, device)
    with TemporaryDirectory(prefix="convline-") as folder, stop_request() as stop:
        for restart in range(max_restarts + 1):
            with _started(devices, restart, Path(folder) / f"ranks-{restart}", arguments) as ranks:
                _wait(ranks, stop)
                statuses = [rank.returncode for rank in ranks]
            if statuses == devices * [0]:
                return 0
            if stop.status is not None:
                return stop.status
    first = first_to_end(statuses)
    if (status := statuses[first]) < 0:
        name = signal.Signals(-status).name
        raise ConvlineError(f"rank {first} was ended by {name}; --resume goes on from the last checkpoint")
    return status


def first_to_end(statuses: Sequence[int | None]) -> int:
    """By the exit statuses of the ranks (None: it runs), the one that took the others with it.

    One that a signal ends is gone at once. The others notice, and say so.
    """
    failed = [rank for rank, status in enumerate(statuses) if status]
    return next((rank for rank in failed if (statuses[rank] or 0) < 0), failed[0])


def _check_devices(devices: int, device: str) -> None:
    there, kind = usable_cpus(), "CPUs"
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            there, kind = torch.cuda.device_count(), "CUDA devices"
    if devices > there:
        raise ConvlineError(f"--devices {devices}: there are {there} {kind} here")


@contextmanager
def _started(count: int, restart: int, meeting: Path, arguments: Sequence[str]) -> Iterator[list[Rank]]:
    """The ranks; those that run at the end of the block are ended."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    command = [sys.executable, "-m", "pipeline", *arguments]
    ranks: list[Rank] = []
    try:
        for number in range(count):
            told = environment_of_rank(number, count, restart, str(meeting))
            told |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback)
            # in a session of its own: Ctrl-C reaches it once, from here. Its input ends with this process.
            ranks.append(subprocess.Popen(command, env=told, stdin=subprocess.PIPE, start_new_session=True))
        yield ranks
    finally:
        _end(ranks)


def _wait(ranks: Sequence[Rank], stop: StopRequest) -> None:
    """Until all ranks have ended, or one has failed, or none has obeyed a request to stop."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        if stop.status is not None and deadline is None:
            deadline = time.monotonic() + PATIENCE
            for rank in ranks:
                rank.send_signal(stop.status - 128)
        elif deadline is not None and time.monotonic() > deadline:
            return
        elif deadline is None and any(rank.returncode for rank in ranks):
            time.sleep(TOGETHER)
            for rank in ranks:
                rank.poll()
            return
        time.sleep(LOOK_EVERY)


def _end(ranks: Sequence[Rank]) -> None:
    """Ask them to end; those that don't are killed."""
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + PATIENCE
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
        if rank.stdin is not None:
            rank.stdin.close()
