"""Time limits (timeouts) for calls to a tracking server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CALL_SECONDS = 1.0  # that every call may take
EXTRA_SECONDS = 10.0  # that a slow call may take in addition, or all slow calls together (see TimeLimitedClient)
UPLOAD_RATE = 100_000  # bytes/s that an upload must reach


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`, whatever it waits for.

    There is no limit outside the main thread, because other threads cannot be interrupted, nor on Windows, which has no
    timers.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} seconds")

    began = time.monotonic()
    previous_handler = signal.signal(signal.SIGALRM, end)
    # repeated, because a library may catch the first TimeoutError
    previous_alarm, interval = signal.setitimer(signal.ITIMER_REAL, seconds, CALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
        if previous_alarm:  # set by the caller
            signal.setitimer(signal.ITIMER_REAL, max(0.001, previous_alarm - (time.monotonic() - began)), interval)


class TimeLimitedClient:
    """MLflow's client with a time limit for every call (the timeout of `requests` restarts with every byte received).

    Each call may take CALL_SECONDS + EXTRA_SECONDS. While `in_hurry()`, the extra seconds are for all calls together. A
    call that takes longer raises the exception that MLflow turns a TimeoutError into.
    """

    def __init__(self, client: Any, in_hurry: Callable[[], bool]) -> None:
        self._client = client
        self._in_hurry = in_hurry
        self._extra_seconds = EXTRA_SECONDS

    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None:
        """As the method of MLflow's client; the time limit grows with the size of the file."""
        self._call(self._client.log_artifact, Path(path).stat().st_size / UPLOAD_RATE, run_id, path, folder)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *arguments, **named: self._call(method, 0.0, *arguments, **named)

    def _call(self, method: Callable[..., Any], upload_seconds: float, *arguments: Any, **named: Any) -> Any:
        if not self._in_hurry():
            self._extra_seconds = EXTRA_SECONDS
        expected = CALL_SECONDS + upload_seconds
        began = time.monotonic()
        try:
            with time_limit(expected + self._extra_seconds):
                return method(*arguments, **named)
        finally:
            late = time.monotonic() - began - expected
            self._extra_seconds = max(0.0, self._extra_seconds - max(0.0, late))
