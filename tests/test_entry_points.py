"""The console scripts and `python -m` as processes: exit statuses, and what goes to stdout and stderr.

130 and 143, by signals, are in serving/test_classify.py and test_faults.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli, command
from tests.serving.helpers import encode, noise, write


def script(program: str) -> list[str]:
    return [str(Path(sys.executable).with_name(program))]


@pytest.mark.parametrize("program", ["pipeline", "serving"])
@pytest.mark.parametrize("entry_point", [script, command], ids=["script", "module"])
def test_every_entry_point_shows_its_commands(program: str, entry_point: Callable[..., list[str]]) -> None:
    line = [*entry_point(program), "--help"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage:" in result.stdout and {"pipeline": "train", "serving": "classify"}[program] in result.stdout


@pytest.mark.parametrize("program", ["pipeline", "serving"])
def test_a_process_exits_1_with_one_sentence_and_2_for_wrong_usage(cli_process: Cli, program: str) -> None:
    wrong = {"pipeline": ("recipes", "nothing"), "serving": ("classify", "x", "--model", "nowhere.onnx")}[program]
    result = cli_process(program, *wrong, status=1)
    assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    usage = cli_process(program, "nothing", status=2)
    assert usage.stdout == "" and "No such command" in usage.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    line = command("serving", "--debug", "classify", "x", "--model", "nowhere.onnx")
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_a_process_exits_3_where_strict_finds_rejects(cli_process: Cli, model: Path, tmp_path: Path) -> None:
    write(tmp_path / "in/1.png", encode(noise(8, 8), "PNG"))
    write(tmp_path / "in/2.png", b"garbage")
    result = cli_process("serving", "classify", "in", "--model", model, "--strict", status=3)
    assert result.stdout.startswith("path,label,probability\n1.png,")
    assert "classified 1 + rejected 1 == found 2" in result.stderr
