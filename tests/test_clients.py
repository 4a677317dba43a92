"""docs/clients.md: programs without this project get the answers that serving gives, from pixels of any size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.register import register
from pipeline.run import Run
from tests.commands import command_state
from tests.conftest import ROOT, run_command
from tests.serving.helpers import csv_rows
from tests.test_documents import FENCED
from tests.tracking_server import scoring_server

PROGRAMS = dict(FENCED.findall((ROOT / "docs/clients.md").read_text(encoding="utf-8")))
PHOTOGRAPHS = {"a.png": (300, 451), "b.jpg": (90, 40), "c.png": (1, 7), "d.png": (24, 24)}  # height, width


@pytest.fixture(scope="module")
def folder(insects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with any-size.onnx, which takes RGB images, its names, photographs, and serving's table of these."""
    folder = tmp_path_factory.mktemp("clients")
    for name in ("any-size.onnx", "any-size.labels.json"):
        shutil.copy(insects / name, folder)
    rng = np.random.default_rng(0)
    for name, (height, width) in PHOTOGRAPHS.items():
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / name)
    run_command(folder, "serving", "classify", *PHOTOGRAPHS, "--model", "any-size.onnx", "--output", "table.csv")
    return folder


def assert_same_answers(printed: str, folder: Path) -> None:
    rows = {row["path"]: row for row in csv_rows(folder / "table.csv")}
    answers = [line.split() for line in printed.splitlines()]
    assert [path for path, _, _ in answers] == list(rows) == list(PHOTOGRAPHS)
    for path, label, probability in answers:
        assert label == rows[path]["label"]
        # of the same pixels: by another version of onnxruntime, or in batches of another size
        assert float(probability) == pytest.approx(float(rows[path]["probability"]), abs=1e-5)


def test_the_python_client_gives_servings_answers_without_this_project(folder: Path) -> None:
    program = PROGRAMS["python"].replace('["a.png", "b.jpg"]', str(list(PHOTOGRAPHS)))
    program += "import sys\nassert not {'convline', 'serving', 'pipeline', 'torch', 'onnx'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_answers(done.stdout, folder)


# of the program on the page: how onnxruntime-web, which runs in WebAssembly, is imported, and given a file
WEB = {
    'import ort from "onnxruntime-node"': 'import * as ort from "onnxruntime-web"',
    'create("any-size.onnx")': 'create(new Uint8Array(fs.readFileSync("any-size.onnx")))',
}


@pytest.mark.all
@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_the_javascript_client_gives_servings_answers(folder: Path, tmp_path: Path, package: str) -> None:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    # the decoders of JPEG may differ, so this one gets the pixels of Pillow's
    Image.open(folder / "b.jpg").save(tmp_path / "b.png")
    names = ["b.png" if name == "b.jpg" else name for name in PHOTOGRAPHS]
    program = PROGRAMS["js"].replace('["a.png", "b.jpg"]', str(names))
    for line, of_web in WEB.items() if package == "onnxruntime-web" else ():
        assert line in program
        program = program.replace(line, of_web)
    (tmp_path / "client.mjs").write_text(program)
    environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    install = ["npm", "install", "--no-audit", "--no-fund", package, "sharp"]
    installed = subprocess.run(install, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"npm cannot install {package}: {installed.stderr.splitlines()[-1:]}")
    done = subprocess.run(["node", "client.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_answers(done.stdout.replace("b.png", "b.jpg"), folder)


@pytest.mark.all
def test_mlflows_own_server_gives_servings_answers_for_images_of_any_size(
    insects: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(insects / "runs", tmp_path / "runs")  # what is sent to MLflow is noted in the run
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = Run.find(tmp_path / "runs", None)
    with command_state(tmp_path, [], {"MLFLOW_TRACKING_URI": uri}):  # MLflow sets other variables besides
        register(folder / "any-size.onnx", run, "insects")
    printed = []
    with scoring_server(tmp_path, "models:/insects/1", uri) as score:
        for name in PHOTOGRAPHS:  # each has a size of its own, so each is a request
            pixels = np.asarray(Image.open(folder / name))[None]
            (probability,) = score(pixels)["probability"]
            printed.append(f"{name} {run.classes[int(np.argmax(probability))]} {max(probability)}")
    assert_same_answers("\n".join(printed), folder)
