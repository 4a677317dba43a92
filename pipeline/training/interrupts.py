"""Ctrl-C and SIGTERM become a request to stop, which the training loop answers between two steps."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """`status`: the exit status that the signal asks for (130, 143); None until a signal arrives."""

    status: int | None = None

    def receive(self, number: int, _: FrameType | None) -> None:
        """The signal handler; a second signal exits at once."""
        if self.status is not None:
            sys.exit(self.status)
        self.status = 128 + number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
