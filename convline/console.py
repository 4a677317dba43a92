"""What both command lines share: exit statuses, error sentences, progress, log lines.

Exit statuses: 0 done, 1 failed, 2 wrong usage, 3 finished but `--strict` found rejected images,
130 interrupted, 143 terminated. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

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
from convline.secrets import scrubbed_stream

if TYPE_CHECKING:
    import typer

_is_muted = False


def main(app: typer.Typer) -> NoReturn:
    """Run a Typer app and exit: a `ConvlineError` becomes one sentence, `--debug` shows tracebacks."""
    debug = "--debug" in sys.argv
    _replace_missing_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class may have a name that the terminal cannot show
    sys.stderr = scrubbed_stream(sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
        sys.stdout.flush()
        sys.exit(0)
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            # the reader of our stdout has left: nothing to say, and nobody to say it to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif debug:
            raise
        else:
            print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # while the interpreter ends, an exception has nowhere to go


def _replace_missing_streams() -> None:
    """Have nowhere to write to where the caller closed a stream: the next file that is opened would take its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # open as long as the process


def sentence(error: Exception) -> str:
    """One sentence for any exception: ours as they stand, the system's with the file they name."""
    if isinstance(error, ConvlineError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        advice = {
            errno.ENOSPC: "; free some space and run the command again",
            errno.EDQUOT: "; free some space and run the command again",
            errno.EACCES: "; check its permissions",
        }.get(error.errno, "")
        return f"{os.strerror(error.errno)}{where}{advice}"
    if isinstance(error, ImportError):
        return _missing(error)
    kind = type(error).__name__
    return f"this should not have happened: {kind}: {error} (run the command again with --debug to see where)"


# the extra that brings each package which serving alone does not need
EXTRAS = {"mlflow": "mlflow", "pyarrow": "parquet", "ray": "cluster", "fsspec": "remote"}
OWN = ("convline", "serving", "pipeline", "models")
NEEDED = ("numpy", "PIL", "typer", "rich", "onnx", "onnxruntime", "google")


def _missing(error: ImportError) -> str:
    """What to install where a package is missing."""
    name = (error.name or "").partition(".")[0]
    if name in OWN or name in NEEDED:
        return f"convline is not whole ({error}): install it again"
    return f"a package is missing ({error}): pip install 'convline[{EXTRAS.get(name, 'train')}]'"


def as_json(report: Any, indent: int | None = None) -> str:
    """A report as JSON (RFC 8259); numbers that it does not have, NaN and infinities, are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(report), indent=indent, allow_nan=False)


def mute(muted: bool) -> None:
    """Whether this process leaves results, log lines and progress to another one; errors it always tells."""
    global _is_muted
    _is_muted = muted
    sys.stdout = open(os.devnull, "w") if muted else sys.__stdout__  # noqa: SIM115  # open as long as the process


def log(message: str) -> None:
    """One line on stderr, if anybody is there to read it."""
    if not _is_muted:
        with suppress(OSError):
            print(message, file=sys.stderr, flush=True)


class Bar(Protocol):
    """What is used of rich's Progress."""

    disable: bool

    @property
    def task_ids(self) -> Sequence[Any]: ...

    def update(self, task_id: Any, **changes: Any) -> None: ...

    def advance(self, task_id: Any, advance: float = 1) -> None: ...


class _NoBar:
    """Where nobody looks: rich takes 50 ms to import, in which a job would stand still."""

    disable = True
    task_ids = (0,)

    def update(self, task_id: Any, **changes: Any) -> None: ...

    def advance(self, task_id: Any, advance: float = 1) -> None: ...


@contextmanager
def progress(description: str, total: int | None, unit: str = "images") -> Iterator[Bar]:
    """A rich progress bar on stderr with one task, off when stderr is not a terminal.

    What the task's field `below` is updated to stands in a line of its own.
    """
    if _is_muted or not sys.stderr.isatty():
        yield _NoBar()
        return
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TwoLines(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                yield Text(task.fields["below"], no_wrap=True, overflow="ellipsis")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with TwoLines(*columns, console=Console(stderr=True)) as bar:
        bar.add_task(description, total=total, below="")
        yield bar
