"""The follower: a child process that sends what training writes. Training never talks to a server itself."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from convline.console import log
from convline.files import open_in_place
from pipeline.run import Run
from pipeline.tracking.sender import has_failed
from pipeline.training.rank_environment import environment_without_rank

# seconds that a finished training waits for the rest to be sent; the follower itself gives up on a server that is slow
PATIENCE = 60
LIVES = 3  # a follower that is killed is started again


class Follower:
    """`pipeline sync --follow` on a run. It ends by itself when nobody holds the run's lock any more."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._log = run.folder / "sync.log"
        self._began = time.time()
        self._is_over = False
        self._status: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread(target=self._keep_alive, daemon=True)
        self._keeper.start()

    def _keep_alive(self) -> None:
        command = [sys.executable, "-m", "pipeline", "sync", str(self._run.folder.resolve()), "--follow"]
        for _ in range(LIVES):
            with open_in_place(self._log, "ab") as output:
                # in a session of its own: Ctrl-C stops the training, and the follower sends what there is
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env=environment_without_rank(),
                )
            self._status = self._process.wait()
            if self._status >= 0 or self._is_over:  # else a signal ended it
                return

    def finish(self) -> None:
        """After the training has ended: give it time to send the rest, unless the server is known to fail."""
        if self._keeper.is_alive():
            log("sending the last metrics to MLflow")
        until = time.monotonic() + PATIENCE
        while self._keeper.is_alive() and time.monotonic() < until and not has_failed(self._run, self._began):
            self._keeper.join(0.1)
        is_late = self._keeper.is_alive() and time.monotonic() >= until
        if is_late and self._process is not None:  # its cursor is on the disk: nothing is lost, or sent twice
            self._is_over = True
            self._process.kill()
        if self._keeper.is_alive() or self._status != 0:
            log(f"warning: tracking is incomplete (see {self._log}); `pipeline sync` sends the rest")
