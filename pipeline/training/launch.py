"""`--devices N`: starts the ranks of one training as processes on this machine, and restarts them.

torchrun's store would listen on every network interface and unpickle whatever it receives. These ranks find each other
by a file that only this user can open, and talk over the loopback interface.
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
from pipeline.training.rank_environment import environment_of_rank

POLL_INTERVAL = 0.05  # seconds between two looks at the ranks
FAIL_TOGETHER = 0.5  # seconds in which the other ranks notice that one has died, and end too
GRACE_PERIOD = 30.0  # seconds that ranks may take to save and end

Rank = subprocess.Popen[bytes]


def launch(devices: int, max_restarts: int, device: str, arguments: Sequence[str]) -> int:
    """Run `pipeline` with these arguments on several devices of this machine; returns the exit status.

    Raises ConvlineError where there are fewer devices, and where a signal ended a rank.
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
    """The rank whose failure ended the others, found by the exit statuses of the ranks (None: still running).

    A rank that a signal killed failed first: the others fail, with an error, because they lost it.
    """
    failed = [rank for rank, status in enumerate(statuses) if status]
    return next((rank for rank in failed if (statuses[rank] or 0) < 0), failed[0])


def _check_devices(devices: int, device: str) -> None:
    available, kind = usable_cpus(), "CPUs"
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            available, kind = torch.cuda.device_count(), "CUDA devices"
    if devices > available:
        raise ConvlineError(f"--devices {devices}: there are {available} {kind} here")


@contextmanager
def _started(count: int, restart: int, meeting: Path, arguments: Sequence[str]) -> Iterator[list[Rank]]:
    """Start the ranks; those that still run at the end of the block are ended."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    command = [sys.executable, "-m", "pipeline", *arguments]
    ranks: list[Rank] = []
    try:
        for number in range(count):
            environment = environment_of_rank(number, count, restart, str(meeting))
            environment |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback)
            # in its own session, so that Ctrl-C reaches it only once, through this process; its standard input closes
            # when this process dies
            ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True))
        yield ranks
    finally:
        _end(ranks)


def _wait(ranks: Sequence[Rank], stop: StopRequest) -> None:
    """Wait until all ranks have ended, one has failed, or the ranks have not obeyed a request to stop in time."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        if stop.status is not None and deadline is None:
            deadline = time.monotonic() + GRACE_PERIOD
            for rank in ranks:
                rank.send_signal(stop.status - 128)
        elif deadline is not None and time.monotonic() > deadline:
            return
        elif deadline is None and any(rank.returncode for rank in ranks):
            time.sleep(FAIL_TOGETHER)
            for rank in ranks:
                rank.poll()
            return
        time.sleep(POLL_INTERVAL)


def _end(ranks: Sequence[Rank]) -> None:
    """Ask the ranks to end, and kill those that do not."""
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + GRACE_PERIOD
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
        if rank.stdin is not None:
            rank.stdin.close()
