"""Real MLflow servers on loopback: one that tests start late, kill, freeze and start again, and one that scores."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


Score = Callable[[NDArray[np.uint8]], dict[str, list[Any]]]


@contextmanager
def scoring_server(folder: Path, model: str, uri: str) -> Iterator[Score]:
    """`mlflow models serve` of a model that is registered in the store at `uri`: a function from pixels, uint8 [batch,
    height, width, channels], to the model's outputs by name, as the server answers them."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    options = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]

    def score(images: NDArray[np.uint8]) -> dict[str, list[Any]]:
        body = json.dumps({"inputs": {"image": images.tolist()}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            predictions: dict[str, list[Any]] = json.load(response)["predictions"]
        return predictions

    process = start([*command, *options], folder, port, PATH=path, MLFLOW_TRACKING_URI=uri)
    try:
        yield score
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
