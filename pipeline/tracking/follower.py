"""Starts and ends `pipeline sync --follow`, a child process of a training: training itself never talks to a server."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from convline.console import log
from convline.files import open_in_place
from pipeline.run import Run
from pipeline.tracking.cursor import has_failed
from pipeline.training.rank_environment import environment_without_rank

# seconds that a finished training waits for the follower, which gives up earlier if the server is slow
FINISH_SECONDS = 60
STARTS = 3  # a follower that is killed is started again


class Follower:
    """Runs `pipeline sync --follow` on a run, which ends by itself when no process holds the run's lock."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._log = run.folder / "sync.log"
        self._began = time.time()
        self._is_abandoned = False
        self._status: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def _supervise(self) -> None:
        command = [sys.executable, "-m", "pipeline", "sync", str(self._run.folder.resolve()), "--follow"]
        for _ in range(STARTS):
            with open_in_place(self._log, "ab") as output:
                # in a session of its own: Ctrl-C stops only the training, and the follower sends what was written
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env=environment_without_rank(),
                )
            self._status = self._process.wait()
            if self._status >= 0 or self._is_abandoned:  # a negative status means that a signal killed it
                return

    def finish(self) -> None:
        """Wait, after the training has ended, until the rest is sent, unless the server is known to fail."""
        if self._supervisor.is_alive():
            log("sending the last metrics to MLflow")
        deadline = time.monotonic() + FINISH_SECONDS
        while self._supervisor.is_alive() and time.monotonic() < deadline and not has_failed(self._run, self._began):
            self._supervisor.join(0.1)
        is_late = self._supervisor.is_alive() and time.monotonic() >= deadline
        if is_late and self._process is not None:  # its cursor is on disk: nothing is lost or sent twice
            self._is_abandoned = True
            self._process.kill()
        if self._supervisor.is_alive() or self._status != 0:
            log(f"warning: tracking is incomplete (see {self._log}); `pipeline sync` sends the rest")
