"""The follower: a child process that sends what training writes. Training never talks to a server itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from serving.console import log

PATIENCE = 60  # seconds that a finished training waits for the rest to be sent


class Follower:
    """`pipeline sync --follow` on a run. It ends by itself when nobody holds the run's lock any more."""

    def __init__(self, run_folder: Path) -> None:
        self._log = run_folder / "sync.log"
        command = [sys.executable, "-m", "pipeline", "sync", str(run_folder.resolve()), "--follow"]
        with open(self._log, "ab") as output:
            # in a session of its own: Ctrl-C stops the training, and the follower sends what there is
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def finish(self) -> None:
        """After the training has ended: give it time to send the rest."""
        if self._process.poll() is None:
            log("sending the last metrics to MLflow")
        try:
            failed = self._process.wait(PATIENCE) != 0
        except subprocess.TimeoutExpired:
            self._process.terminate()
            failed = True
        if failed:
            log(f"warning: tracking is incomplete (see {self._log}); `pipeline sync` sends the rest")
