"""How long a tracking server may take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUICK = 1.0  # seconds that every call may take
SLOW = 10.0  # seconds that calls may take beyond that
UPLOAD = 100_000  # bytes a second that an upload must reach


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`, whatever it waits for.

    There is no limit outside of the main thread, as no other can be interrupted, nor on Windows, which has no timers.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} seconds")

    began = time.monotonic()
    earlier = signal.signal(signal.SIGALRM, end)
    # repeatedly: a library may catch the first one
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, QUICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
        if left:  # the caller's own alarm
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)


class PatientClient:
    """MLflow's client, of which each call may take QUICK + SLOW seconds in all (the time limit of requests begins
    again with every byte that arrives); in a hurry, all calls together may be late by SLOW seconds. A call that takes
    longer raises what MLflow makes of a TimeoutError."""

    def __init__(self, client: Any, in_hurry: Callable[[], bool]) -> None:
        self._client = client
        self._in_hurry = in_hurry
        self._left = SLOW

    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None:
        """As MLflow's; a large file may take longer."""
        self._call(self._client.log_artifact, Path(path).stat().st_size / UPLOAD, run_id, path, folder)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *arguments, **named: self._call(method, 0.0, *arguments, **named)

    def _call(self, method: Callable[..., Any], longer: float, *arguments: Any, **named: Any) -> Any:
        if not self._in_hurry():
            self._left = SLOW
        began = time.monotonic()
        try:
            with time_limit(QUICK + longer + self._left):
                return method(*arguments, **named)
        finally:
            late = time.monotonic() - began - QUICK - longer
            self._left = max(0.0, self._left - max(0.0, late))
