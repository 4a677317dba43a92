"""The time limit for decoding one image, in worker processes that may be ended for it.

A C library that hangs never returns to Python, so the system ends the process (SIGALRM). Reading a file, from a slow
disk or a URL, does not count.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 60.0  # for one image: 179 megapixels of JPEG 2000 decode within it, beside other work

_seconds = 0.0  # 0: no limit, as in every process that is not a worker
_decoding = 0  # threads that decode now
_lock = threading.Lock()


def end_this_process_after(seconds: float) -> None:
    """End this process when it has been decoding for `seconds` without finishing an image; 0 switches the limit off.

    Only for forked processes: not every system has SIGALRM.
    """
    global _seconds, _decoding
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _seconds, _decoding = seconds, 0


@contextmanager
def time_limited() -> Iterator[None]:
    """Count the time spent in the block; several threads may be in it at once."""
    if not _seconds:
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    """Restart the timer, or stop it if no thread is decoding."""
    global _decoding
    with _lock:
        _decoding += change
        signal.setitimer(signal.ITIMER_REAL, _seconds if _decoding else 0)
