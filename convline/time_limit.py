"""A limit on the time that one image takes to decode, in the processes that may be ended for it.

A C library that hangs returns to no Python code, so the system ends the process (SIGALRM). Reading a file, from a slow
disk or from behind a URL, does not count.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 60.0  # that one image may take: 179 megapixels of JPEG 2000 decode within it, beside other work

_seconds = 0.0  # 0: no limit, as in a process that does other things as well
_running = 0
_lock = threading.Lock()


def end_this_process_after(seconds: float) -> None:
    """Have this process end where decoding goes on for `seconds` without one image being done; 0: never."""
    global _seconds, _running
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _seconds, _running = seconds, 0


@contextmanager
def time_limited() -> Iterator[None]:
    """The time spent in here is limited; several threads may be in here at once."""
    if not _seconds:
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    """Set the timer anew, or stop it when nobody is decoding."""
    global _running
    with _lock:
        _running += change
        signal.setitimer(signal.ITIMER_REAL, _seconds if _running else 0)
