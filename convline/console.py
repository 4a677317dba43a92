"""Terminal output and exit statuses of both command lines: error messages, log lines, the progress bar, JSON.

Exit statuses: 0 done, 1 failed, 2 wrong usage, 3 finished but `--strict` found rejected images,
130 interrupted, 143 terminated. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import atexit
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from convline.errors import ConvlineError
from convline.secrets import redacting_stream

if TYPE_CHECKING:
    import typer

_is_muted = False


def main(app: typer.Typer) -> NoReturn:
    """Run a Typer app and exit: a `ConvlineError` becomes one sentence, `--debug` shows tracebacks."""
    debug = "--debug" in sys.argv
    _replace_missing_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class name may not be printable on this terminal
    sys.stderr = redacting_stream(sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        try:
            app([argument for argument in sys.argv[1:] if argument != "--debug"])
        except SystemExit:
            sys.stdout.flush()  # a full disk may show only now
            raise
        sys.exit(0)
    except Exception as error:
        if not isinstance(error, BrokenPipeError):  # whatever reads our stdout has closed it, as `head` does
            if debug:
                raise
            print(f"error: {error_message(error)}", file=sys.stderr)
        _end_stdout()
        sys.exit(1)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # the interpreter is about to exit: do not raise SystemExit again


@contextmanager
def exiting_at_once() -> Iterator[None]:
    """Spare a process whose program is this block the finalisation of the Python interpreter when it exits.

    Threads are waited for and exit handlers run as always. Only taking every module and object apart is left out: with
    PyTorch and its exporter this takes up to three seconds. And DistributedDataParallel keeps gloo's threads alive
    after `destroy_process_group`; one that releases a tensor meanwhile aborts the process (pytorch/pytorch#179291).
    """
    status = 1

    def exit_process() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(exit_process)  # the first to be registered is the last to run
    try:
        yield
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
        raise


def _end_stdout() -> None:
    """Write what stdout still holds, and drop what cannot be written: else Python reports it again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replace_missing_streams() -> None:
    """Open devnull for each closed standard stream; else the next file that is opened would take its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # stays open until the process ends


def error_message(error: Exception) -> str:
    """One sentence for any exception; for an error of the operating system it names the file."""
    if isinstance(error, ConvlineError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        file = f" ({error.filename})" if error.filename else ""
        advice = {
            errno.ENOSPC: "; free some space and run the command again",
            errno.EDQUOT: "; free some space and run the command again",
            errno.EACCES: "; check its permissions",
        }.get(error.errno, "")
        return f"{os.strerror(error.errno)}{file}{advice}"
    if isinstance(error, ImportError):
        return _missing_package_message(error)
    return f"unexpected error: {type(error).__name__}: {error} (run the command again with --debug to see where)"


# packages that only some commands need, and the extra of convline that installs each
EXTRA_OF_PACKAGE = {"mlflow": "mlflow", "pyarrow": "parquet", "ray": "cluster", "fsspec": "remote"}
OWN_PACKAGES = ("convline", "serving", "pipeline", "models")
REQUIRED_PACKAGES = ("numpy", "PIL", "typer", "rich", "onnx", "onnxruntime", "google")


def _missing_package_message(error: ImportError) -> str:
    """Says which package is missing and how to install it."""
    name = (error.name or "").partition(".")[0]
    if name in OWN_PACKAGES or name in REQUIRED_PACKAGES:
        return f"the installation of convline is incomplete ({error}): install it again"
    return f"a package is missing ({error}): pip install 'convline[{EXTRA_OF_PACKAGE.get(name, 'train')}]'"


def as_json(report: Any, indent: int | None = None) -> str:
    """`report` as JSON (RFC 8259); NaN and infinities, which JSON cannot express, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(report), indent=indent, allow_nan=False)


def mute(muted: bool) -> None:
    """Turn this process's results, log lines and progress bar off (or on again), as for all ranks but the first.

    Error messages are always printed.
    """
    global _is_muted
    _is_muted = muted
    sys.stdout = open(os.devnull, "w") if muted else sys.__stdout__  # noqa: SIM115  # stays open until the process ends


def log(message: str) -> None:
    """Print one line on stderr; a closed stderr is ignored."""
    if not _is_muted:
        with suppress(OSError):
            print(message, file=sys.stderr, flush=True)


class ProgressBar(Protocol):
    """The part of `rich.progress.Progress` that this project uses."""

    disable: bool

    @property
    def task_ids(self) -> Sequence[Any]: ...

    def update(self, task_id: Any, **changes: Any) -> None: ...

    def advance(self, task_id: Any, advance: float = 1) -> None: ...


class _HiddenProgressBar:
    """Shows nothing, and does not import rich, which takes 50 ms."""

    disable = True
    task_ids = (0,)

    def update(self, task_id: Any, **changes: Any) -> None: ...

    def advance(self, task_id: Any, advance: float = 1) -> None: ...


@contextmanager
def progress(description: str, total: int | None, unit: str = "images") -> Iterator[ProgressBar]:
    """A rich progress bar on stderr with one task, off when stderr is not a terminal.

    `update(…, status_line=text)` shows `text` in a second line, below the bar.
    """
    if _is_muted or not sys.stderr.isatty():
        yield _HiddenProgressBar()
        return
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class ProgressWithStatusLine(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                yield Text(task.fields["status_line"], no_wrap=True, overflow="ellipsis")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with ProgressWithStatusLine(*columns, console=Console(stderr=True)) as bar:
        bar.add_task(description, total=total, status_line="")
        yield bar
