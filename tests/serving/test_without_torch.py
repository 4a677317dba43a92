"""Serving needs only a few libraries, not torch, and starts fast."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convline.console import error_message
from tests.conftest import ROOT, Cli

# not pydantic: typer itself needs it
ABSENT = ("torch", "torchvision", "mlflow", "sklearn", "scipy", "pandas", "matplotlib", "onnxscript")

BLOCKER = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A PYTHONPATH on which none of ABSENT can be imported."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return str(folder)


def python(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def imported(code: str) -> set[str]:
    """The top-level modules that `code` brings along."""
    return set(
        python(f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})")
        .splitlines()[-1]
        .split()
    )


def test_the_blocker_blocks(bare: str) -> None:
    code = f"""
import importlib
for name in {ABSENT!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "not installed here" in str(error)
        print(name)
"""
    assert tuple(python(code, PYTHONPATH=bare).split()) == ABSENT


@pytest.mark.parametrize(
    "arguments",
    [("classify", "SAMPLES", "--top-k", "3"), ("classify", "SAMPLES", "--json"), ("inspect",), ("inspect", "--json")],
    ids=" ".join,
)
def test_serving_gives_the_same_bytes_without_torch(
    cli: Cli, cli_process: Cli, model: Path, samples: Path, bare: str, arguments: tuple[str, ...]
) -> None:
    name, *rest = (str(samples) if argument == "SAMPLES" else argument for argument in arguments)
    command = ["serving", name, *rest, *(["--model"] if name == "classify" else []), model]
    without = cli_process(*command, PYTHONPATH=bare).stdout
    assert without == cli(*command).stdout
    assert len(without.splitlines()) > 20


def test_doctor_works_without_torch(cli_process: Cli, bare: str) -> None:
    listed = cli_process("serving", "doctor", PYTHONPATH=bare).stdout
    assert "onnxruntime" in listed


def test_a_pipeline_without_its_packages_says_what_to_install(cli_process: Cli, bare: str) -> None:
    told = cli_process("pipeline", "recipes", status=1, PYTHONPATH=os.pathsep.join([bare, str(ROOT)])).stderr
    assert "pip install 'convline[train]'" in told and "unexpected error" not in told


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("torch.nn", r"convline\[train\]"),
        ("pyarrow", r"convline\[parquet\]"),
        ("ray", r"convline\[cluster\]"),
        ("serving.nothing", "install it again"),
        ("onnxruntime", "install it again"),
        (None, r"convline\[train\]"),
    ],
)
def test_a_missing_package_is_one_sentence(name: str | None, advice: str) -> None:
    assert re.search(advice, error_message(ModuleNotFoundError("No module named x", name=name)))


@pytest.mark.parametrize(
    "code",
    [
        "import serving",
        "import serving.classify",
        "import serving.inspect",
        "import serving.page",
        "import serving.doctor; serving.doctor.examine()",
        "from serving import Classifier",
    ],
)
def test_serving_never_imports_what_training_needs(code: str) -> None:
    modules = imported(code)
    assert "serving" in modules and not modules & {*ABSENT, "models", "pipeline"}


def test_classifying_never_imports_what_training_needs(model: Path) -> None:
    modules = imported(f"from serving import Classifier\nClassifier({str(model)!r}).classify_files(['nowhere.png'])")
    assert "onnxruntime" in modules and not modules & {*ABSENT, "models", "pipeline"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["classify", "--help"], ["page", "--help"], ["inspect", "--help"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    modules = imported(
        "import sys, runpy\n"
        f"sys.argv = ['serving', *{arguments!r}]\n"
        "try:\n    runpy.run_module('serving', run_name='__main__')\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
    )
    assert "typer" in modules and not modules & {*ABSENT, "numpy", "onnx", "onnxruntime", "PIL"}
