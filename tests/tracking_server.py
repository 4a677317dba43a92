"""A real MLflow server on loopback, that tests start late, kill, freeze and start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """Keeps its store in `folder`; its address is known before it is started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Returns when it listens."""
        options = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        self._process = start([sys.executable, "-m", "mlflow", "server", *options, *store], self._folder, self._port)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()
            self._process = None

    def close(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)


def start(command: list[str], folder: Path, port: int, **env: str) -> subprocess.Popen[bytes]:
    """A server in a process group of its own, when it listens; its log is in `folder`."""
    path = folder / f"server-{port}.log"
    with path.open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **env},  # a dozen processes besides
            start_new_session=True,
        )
    while True:
        assert process.poll() is None, path.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
