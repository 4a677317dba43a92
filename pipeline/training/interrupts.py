"""Ctrl-C and SIGTERM as a request that the training loop answers between two steps."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """`status` is the exit status once a signal came, else None."""

    status: int | None = None

    def receive(self, number: int, _: FrameType | None) -> None:
        if self.status is not None:
            sys.exit(self.status)  # asked twice: at once
        self.status = 128 + number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM while the block runs."""
    request = StopRequest()
    earlier = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
