"""The terminal output of commands."""

from __future__ import annotations

import json
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
