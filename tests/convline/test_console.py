"""The terminal output of commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from convline.console import as_json
from tests.conftest import ROOT


def test_reports_with_nan_and_infinities_are_valid_json() -> None:
    report = {"a": float("nan"), "b": [1.5, float("-inf"), {"c": (float("inf"), "NaN", None, True)}]}
    text = as_json(report)
    assert "NaN," not in text and "Infinity" not in text
    assert json.loads(text) == {"a": None, "b": [1.5, None, {"c": [None, "NaN", None, True]}]}


@pytest.mark.parametrize(("end", "status"), [("", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("raise ValueError", 1)])
def test_a_process_that_exits_at_once_waits_for_threads_and_runs_exit_handlers(end: str, status: int) -> None:
    script = f"""
import atexit, sys, threading, time
from convline.console import exiting_at_once

class Leftover:
    def __del__(self):
        print("finalised")

leftover = Leftover()
with exiting_at_once():
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    {end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (status, "thread\nat exit\n")
    assert done.stderr.endswith("ValueError\n") if status == 1 else not done.stderr


NO_SPACE = "No space left on device; free some space and run the command again"


@pytest.mark.parametrize(
    ("end", "message"),
    [("", NO_SPACE), ("raise typer.Exit(3)", NO_SPACE), ("raise ConvlineError('not this')", "not this")],
)
def test_output_that_cannot_be_written_is_one_sentence(end: str, message: str) -> None:
    with open("/dev/full", "w") as full:
        done = printing(end, full.fileno())
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


@pytest.mark.parametrize(("end", "message"), [("", ""), ("raise ConvlineError('not this')", "error: not this\n")])
def test_output_that_nobody_reads_is_no_error(end: str, message: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = printing(end, writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, message)


def printing(end: str, stdout: int) -> subprocess.CompletedProcess[str]:
    """A command that prints a line, which stays in Python's buffer, and ends by `end`."""
    script = f"""
import typer
from convline import console
from convline.errors import ConvlineError

app = typer.Typer()

@app.command()
def command() -> None:
    print("a line")
    {end}

with console.exiting_at_once():
    console.main(app)
"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=buffered, cwd=ROOT, check=False
    )
