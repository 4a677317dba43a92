"""What clients of an exported file say of images: the programs of docs/clients.md, the page of `serving page` in
Chromium, and `mlflow models serve`."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.register import register
from pipeline.run import Run
from serving.page import DEFAULT_RUNTIME_FOLDER, TESTED_RUNTIME, write_page

Answers = dict[str, dict[str, float]]  # by name of the file: probabilities by class

DOCUMENT = Path(__file__).parent.parent / "docs/clients.md"
PACKAGES = ("onnxruntime-node", "sharp", f"onnxruntime-web@{TESTED_RUNTIME}")
SECONDS = 600  # that a client may take to start, or for one image
# in the programs of the page: which images there are, and what is printed of an answer
IMAGES = '["a.png", "b.jpg"]'
PRINTED = {
    "python": (
        "print(path, classes[probability.argmax()], probability.max())",
        "print(json.dumps([path, dict(zip(classes, map(float, probability)))]))",
    ),
    "js": (
        "console.log(path, classes[best], probability.data[best]);",
        "console.log(JSON.stringify([path, Object.fromEntries(classes.map((c, i) => [c, probability.data[i]]))]));",
    ),
}


@dataclass(frozen=True)
class Exports:
    """The files of a run in a `folder`; node_modules, made by `install`, is in `npm` beside it."""

    run: Run
    folder: Path

    @property
    def default(self) -> Path:
        return self.folder / "default.onnx"

    @property
    def any_size(self) -> Path:
        return self.folder / "any-size.onnx"  # as in docs/clients.md

    @property
    def node_modules(self) -> Path:
        return self.folder.parent / "npm/node_modules"

    @property
    def classes(self) -> int:
        return len(self.run.classes)


def install(folder: Path) -> str:
    """Install the npm packages; returns the versions of all that is not of Python."""
    folder.mkdir()
    environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    command = ["npm", "install", "--no-audit", "--no-fund", *PACKAGES]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    told = [printed(["node", "--version"]), printed([chromium(), "--version"])]
    for package in PACKAGES:
        name = package.partition("@")[0]
        version = json.loads((folder / "node_modules" / name / "package.json").read_text())["version"]
        told.append(f"{name} {version}")
    return f"Node.js {', '.join(told)}"


def printed(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def chromium() -> str:
    names = ("chromium", "google-chrome", "chromium-browser")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        sys.exit("Chromium is not installed")
    return found


def of_serving(model: Path, images: Path, classes: int) -> Answers:
    """By `serving classify`; images that it refuses are left out."""
    table = model.with_suffix(".jsonl")
    options = ("--model", model, "--output", table, "--top-k", classes, "--provider", "cpu")
    command = [sys.executable, "-m", "serving", "classify", images, *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    ends = ["", *(f"_{rank}" for rank in range(2, classes + 1))]
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    return {row["path"]: {row[f"label{end}"]: row[f"probability{end}"] for end in ends} for row in rows}


def of_python(exports: Exports, files: list[Path]) -> Answers:
    """By the program in Python of docs/clients.md, without this project."""
    (exports.folder / "client.py").write_text(program("python", files))
    return _read_lines(printed_in(exports.folder, sys.executable, "-I", "client.py"))


def of_node(exports: Exports, files: list[Path]) -> Answers:
    """By the program in JavaScript of docs/clients.md, in Node.js."""
    link = exports.folder / "node_modules"
    link.symlink_to(exports.node_modules)
    (exports.folder / "client.mjs").write_text(program("js", files))
    return _read_lines(printed_in(exports.folder, "node", "client.mjs"))


def program(language: str, files: list[Path]) -> str:
    """That of docs/clients.md, for these files; it prints the probabilities of all classes."""
    text = dict(re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S))[language]
    for old, new in ((IMAGES, json.dumps(list(map(str, files)))), PRINTED[language]):
        assert text.count(old) == 1, f"{DOCUMENT}: {language} has not once {old}"
        text = text.replace(old, new)
    return str(text)


def printed_in(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def _read_lines(lines: str) -> Answers:
    return {Path(path).name: answer for path, answer in map(json.loads, lines.splitlines())}


def of_chromium(exports: Exports, files: list[Path]) -> Answers:
    """By the page of `serving page`: the five most probable classes."""
    from playwright.sync_api import expect, sync_playwright

    page_folder = exports.folder / "page"
    write_page(exports.any_size, page_folder, exports.node_modules.parent / DEFAULT_RUNTIME_FOLDER)
    with files_served(page_folder) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        expect(page.get_by_role("status")).to_contain_text("Ready", timeout=SECONDS * 1000)
        answers: Answers = {}
        for file in files:
            page.get_by_label("Choose photographs").set_input_files(file)
            expect(page.locator("#results > li")).to_have_count(1, timeout=SECONDS * 1000)
            rows: list[Any] = page.evaluate("""() => [...document.querySelectorAll("#results .classes li")].map(
                (row) => [row.querySelector(".label").textContent, Number(row.querySelector("data").value)])""")
            assert rows, f"{file.name}: {page.locator('#results').inner_text()}"
            answers[file.name] = dict(rows)
            page.get_by_role("button", name="Clear").click()
        browser.close()
    return answers


@contextmanager
def files_served(folder: Path) -> Iterator[str]:
    """The URL of a folder, on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def of_mlflow(exports: Exports, files: list[Path]) -> Answers:
    """By `mlflow models serve`, from the registry of a new store; a request for each image."""
    folder = exports.folder / "mlflow"
    shutil.copytree(exports.run.folder, folder / exports.run.name)  # what is sent is noted in it
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    register(exports.any_size, Run.open(folder / exports.run.name), "model")
    answers = {}
    with mlflow_server(folder, "models:/model/1") as url:
        for file in files:
            pixels = np.asarray(Image.open(file))[None].tolist()
            body = json.dumps({"inputs": {"image": pixels}}).encode()
            request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                (probability,) = json.load(response)["predictions"]["probability"]
            answers[file.name] = dict(zip(exports.run.classes, probability, strict=True))
    return answers


@contextmanager
def mlflow_server(folder: Path, model: str) -> Iterator[str]:
    """The URL of `mlflow models serve`, when it listens; its log is in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["-m", model, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    # by default it gives up after 60 seconds; an image of 3000x4000 as JSON may take longer
    command = [sys.executable, "-m", "mlflow", "models", "serve", *options, "--timeout", str(SECONDS)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PATH": path}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + SECONDS
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"mlflow models serve does not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
