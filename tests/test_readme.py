"""The README's commands, run one after the other in one folder as a user runs them, with small steps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command
from tests.pipeline.helpers import image_folder
from tests.test_documents import TEXTS, code_lines
from tests.trainings import points

# what needs other machines, more devices, or an hour; test_documents parses them, and other tests run what is behind
ELSEWHERE = re.compile(r"torchrun|--devices|--address|^make test")
RUN = re.compile(r"(find .*\| )?(pipeline|serving|make) ")
SMALL = (
    (r"make train export RECIPE=(\S+)", r"pipeline train \1 && pipeline export \1"),
    (r"pipeline train \S+", r"\g<0> --steps 2 --overwrite --tracking none"),
    (r"make train export", r"make -n train export"),  # it would set up an environment of its own
    (r"(?<![\w~])/shared", "shared"),
    (r"--shard \$I/16", "--shard 3/16"),
    (r"part-\$I", "part-3"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    """A user's folder: photographs of pets, the datasets that would be downloaded (from others), and the README's
    recipe."""
    folder = tmp_path_factory.mktemp("home")
    image_folder(folder / "pets", {"cat": 15, "dog": 15, "fish": 15}, size=(70, 90))
    for name in ("new-photos", "photos", "shared/photos"):
        shutil.copytree(folder / "pets/cat", folder / name)
    (folder / "last-run").touch()
    os.utime(folder / "last-run", (0, 0))
    shutil.copytree(project / "data", folder / "data")
    shutil.copytree(project / "runs", folder / "runs")
    shutil.copy(project / "runs/digits/model.onnx", folder / "m.onnx")
    run_command(folder, "pipeline", "samples", "digits", "--split", "train", "--count", 400, "--output", "like")
    for name, size, channels in (("mnist", 28, 1), ("cifar10", 32, 3)):
        options = ("--image-size", size, "--channels", channels)
        run_command(folder, "pipeline", "preprocess", f"{name}-like", "--source", "like", *options)
        meta = folder / f"data/{name}-like/meta.json"
        meta.write_text(meta.read_text().replace(f"{name}-like", name))
        meta.parent.rename(folder / "data" / name)
    (folder / "my.toml").write_text(re.search(r"```toml\n(.*?)```", TEXTS[0], re.DOTALL).group(1))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def lines() -> Iterator[str]:
    for line in code_lines(TEXTS[0]):
        command = line.removeprefix("$ ").strip()
        if RUN.match(command) and not ELSEWHERE.search(command):
            yield command
        if command.startswith("pipeline preprocess pets"):
            yield "pipeline train my.toml --run mine"  # which the text mentions
            yield "pipeline export mine"


def test_the_commands_of_the_readme_work_one_after_the_other(home: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)}
    printed = {}
    for line in lines():
        for pattern, small in SMALL:
            line = re.sub(pattern, small, line)
        result = subprocess.run(
            ["bash", "-c", line], cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        printed[line] = result.stdout
    assert len(printed) >= 25 and "parity passed" in printed["pipeline export mine"]
    assert any("validation_precision_at_1" in point for point in points(home / "runs/mine"))
    assert (home / "sorted").is_dir() and (home / "seen.html").exists() and (home / "part-3.csv").exists()
