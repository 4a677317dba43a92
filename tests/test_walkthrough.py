"""The commands of README and docs, run one after the other in one folder as a user runs them, with small steps."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import command_state, run_command
from tests.conftest import CPUS, ROOT
from tests.pipeline.helpers import image_folder
from tests.serving.page_files import runtime_folder
from tests.test_documents import FENCED, TEXTS, code_lines, quoted
from tests.trainings import points

pytestmark = [pytest.mark.all, pytest.mark.usefixtures("all_cpus")]

# what needs other machines, serves until it is stopped, is the tests themselves, or is done by another line as well:
# test_documents parses these
ELSEWHERE = re.compile(r"torchrun|--address|^make (ui|test|check|fix|report)")
RUN = re.compile(r"(find .*\| )?(pipeline|serving|make) ")
# what needs no shell, starts no ranks (their output is not captured) and does not lower its priority, as --watch does
PLAIN = re.compile(r"(pipeline|serving) (?!.*--(watch|devices))[\w ./:=,@+-]+(# .*)?")
INCOMPLETE = re.compile(r" [A-Z]{3,}|^(pipeline|serving) \w+$")  # quoted, without what it needs
SMALL = (
    (r"make train export RECIPE=(\S+)$", r"pipeline train \1 && pipeline export \1"),  # once through make is enough
    (r"make train export( report)?", r"\g<0> STEPS=20"),
    (r" --steps \d+", ""),
    (r"pipeline train \S+", r"\g<0> --steps 2 --overwrite --tracking none"),
    (r"train (softmax-regression-1000|deep-mnist) ", r"\g<0>--set data.validation=32 "),  # of 5,000
    (r"train my\.toml ", r"\g<0>--set schedule.warmup=1 "),  # of 250: no longer than the training
    (r"--devices \d", f"--devices {min(2, len(CPUS))}"),
    (r"--interval \d+", "--interval 0.1"),
    (r"/models/|/shared/(?=model)", ""),
    (r"(?<![\w~])/shared", "shared"),
    (r"s3://", ""),
)
SCHEDULERS = {"I": "3", "SLURM_ARRAY_TASK_ID": "3", "JOB_COMPLETION_INDEX": "2"}  # array jobs tell tasks their number
# by the text around Python blocks
NAMED_ELSEWHERE = """
import numpy, pathlib
from PIL import Image
images = numpy.zeros((2, 8, 8, 1), numpy.uint8)
array, pillow_image, jpeg_bytes = images[0], Image.open("b.jpg"), pathlib.Path("b.jpg").read_bytes()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    """A user's folder: a checkout with its environment, photographs of pets, the datasets that would be downloaded
    (made from digits), and the README's recipe."""
    folder = tmp_path_factory.mktemp("home")
    image_folder(folder / "pets", {"cat": 15, "dog": 15, "fish": 15}, size=(70, 90))
    for name in ("new-photos", "photos", "shared/photos"):
        shutil.copytree(folder / "pets/cat", folder / name)
    for name in ("a.png", "b.jpg"):
        Image.new("L", (8, 8)).save(folder / name)
    (folder / "last-run").touch()
    os.utime(folder / "last-run", (0, 0))
    shutil.copytree(project / "data", folder / "data")
    runtime_folder(folder / "node_modules/onnxruntime-web")
    for name in ("m.onnx", "model.onnx"):
        shutil.copy(project / "runs/digits/model.onnx", folder / name)
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
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv/.installed").touch()
    return folder


def lines() -> Iterator[str]:
    """What is shown in code blocks, and then what the texts mention."""
    for line in (line for text in TEXTS for line in code_lines(text)):
        command = line.removeprefix("$ ").strip()
        if RUN.match(command) and not ELSEWHERE.search(command):
            yield command
    for command in (command for text in TEXTS for command in quoted(text)):
        if RUN.match(command) and not ELSEWHERE.search(command) and not INCOMPLETE.search(command):
            yield command


@pytest.mark.timeout(1800)  # four minutes, where nothing else runs
def test_the_commands_work_one_after_the_other(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, value in {**SCHEDULERS, "HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    printed: dict[str, str] = {}
    for line in lines():
        for pattern, small in SMALL:
            line = re.sub(pattern, small, line)
        words = shlex.split(line, comments=True)
        command = " ".join(words)
        if command in printed:
            continue
        if PLAIN.fullmatch(line):
            printed[command] = run_command(home, *words).stdout
            continue
        result = subprocess.run(
            ["bash", "-c", line], cwd=home, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        printed[command] = result.stdout
    assert len(printed) >= 45 and "parity passed" in printed["pipeline export mine"]
    assert any("validation_precision_at_1" in point for point in points(home / "runs/mine"))
    made = ("sorted", "seen.html", "part-3.csv", "shared/out/3.jsonl", "results/2.jsonl", "runs/digits/report.html")
    assert [name for name in made if not (home / name).exists()] == []

    programs = [block for text in TEXTS for language, block in FENCED.findall(text) if language == "python"]
    for program in programs:
        program = re.sub(r"\bsteps=\d+", "steps=2", program)
        program = program.replace('train("digits", run', 'train("digits", steps=2, tracking="none", run')
        with command_state(home, ["program.py"], {}):
            exec(NAMED_ELSEWHERE + program, {})
    assert len(programs) >= 8
