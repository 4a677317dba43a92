"""Run `pipeline` and `serving`: in this process, which takes milliseconds, or as a process, which takes seconds."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pipeline.cli
import serving.cli

Cli = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: object) -> list[str]:
    """`command("pipeline", "train", …)` as an argument vector."""
    module, *rest = map(str, arguments)
    return [sys.executable, "-m", module, *rest]


def run_process(folder: Path, *arguments: object, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a process in `folder`; anything but the expected exit status fails the test with its output."""
    result = subprocess.run(
        command(*arguments), cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    return checked(result, status)


def run_command(folder: Path, *arguments: object, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """As `run_process`, but in this process, by the function that the entry point calls.

    What its child processes write to stderr is not part of the result. Use `run_process` where that matters, and where
    a variable of `env` is read when Python or a library starts.
    """
    program, *rest = map(str, arguments)
    assert not [name for name in env if name.startswith("PYTHON")], "Python reads these when it starts: run_process"
    with command_state(folder, [program, *rest], env), own_streams() as (stdout, stderr):
        returncode = exit_status(program)
    return checked(subprocess.CompletedProcess([program, *rest], returncode, text(stdout), text(stderr)), status)


def checked(result: subprocess.CompletedProcess[str], status: int) -> subprocess.CompletedProcess[str]:
    assert result.returncode == status, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


def exit_status(program: str) -> int:
    run = {"pipeline": pipeline.cli.run, "serving": serving.cli.run}[program]
    try:
        run()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    raise AssertionError(f"{program} returned instead of exiting")


@contextmanager
def command_state(folder: Path, argv: list[str], env: dict[str, str]) -> Iterator[None]:
    """What a process has of its own, for the time of a command."""
    kept_argv, kept_folder, kept_environment = sys.argv, Path.cwd(), dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    sys.argv = argv
    os.chdir(folder)
    os.environ.update(env)
    try:
        with warnings.catch_warnings():
            python_warnings()
            yield
    finally:
        if torch:
            torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(kept_environment)
        os.chdir(kept_folder)
        sys.argv = kept_argv


def python_warnings() -> None:
    """Filter warnings as a process does, in which none is an error."""
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # as convline.decoders.supported_formats does


@contextmanager
def own_streams() -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Standard streams as those of a process with pipes: what it writes to stdout and stderr; stdin is empty."""
    kept = sys.stdin, sys.stdout, sys.stderr
    stdout, stderr = io.BytesIO(), io.BytesIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(), "utf-8")
    sys.stdout = output = io.TextIOWrapper(stdout, "utf-8")
    sys.stderr = errors = io.TextIOWrapper(stderr, "utf-8", "backslashreplace", line_buffering=True)
    try:
        yield stdout, stderr
    finally:
        sys.stdin, sys.stdout, sys.stderr = kept
        for wrapper in (output, errors):
            wrapper.flush()
            wrapper.detach()


def text(stream: io.BytesIO) -> str:
    """With line ends as `subprocess` gives them."""
    return stream.getvalue().decode().replace("\r\n", "\n").replace("\r", "\n")
