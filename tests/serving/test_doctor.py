"""`serving doctor` says what the machine offers and what is wrong with it."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import onnxruntime
import PIL
import pytest

from serving.session import provider_problem
from tests.conftest import Cli


@pytest.fixture
def overlaid(tmp_path: Path) -> str:
    """A PYTHONPATH on which both onnxruntime and onnxruntime-gpu are installed."""
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"site/{name}-0.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.0\n")
    return str(tmp_path / "site")


def test_doctor_reports_libraries_cpus_and_providers(cli: Cli) -> None:
    report = json.loads(cli("serving", "doctor", "--json").stdout)
    assert report["python"] == platform.python_version()
    assert report["libraries"]["pillow"] == PIL.__version__
    assert onnxruntime.__version__ in (report["libraries"].get(name) for name in ("onnxruntime", "onnxruntime-gpu"))
    assert report["cpus"]["machine"] == os.cpu_count()
    assert 1 <= report["cpus"]["usable"] <= len(os.sched_getaffinity(0))
    assert report["problems"] == []


def test_doctor_says_what_a_provider_lacks(cli: Cli) -> None:
    providers = json.loads(cli("serving", "doctor", "--json").stdout)["providers"]
    assert providers == {name: provider_problem(name) or "ok" for name in ("cpu", "cuda", "tensorrt")}
    assert providers["cpu"] == "ok"


def test_doctor_prints_for_people_too(cli: Cli) -> None:
    lines = cli("serving", "doctor").stdout.splitlines()
    assert any(line.split() == ["pillow", PIL.__version__] for line in lines)
    assert any(line.split() == ["cpu", "ok"] for line in lines)
    assert lines[-1].split() == ["problems", "none"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_two_onnxruntimes_over_each_other_are_found(cli_process: Cli, overlaid: str, options: list[str]) -> None:
    result = cli_process("serving", "doctor", *options, status=1, PYTHONPATH=overlaid)
    assert "installed over each other" in result.stdout and "pip uninstall" in result.stdout


def test_doctor_uses_no_more_cpus_than_it_may(cli: Cli) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        report = json.loads(cli("serving", "doctor", "--json").stdout)
    finally:
        os.sched_setaffinity(0, allowed)
    assert report["cpus"]["usable"] == 1
