"""Batches of files on forked processes, in order, a few ahead of whoever takes the results.

Threads would share Python's lock: two of them decode small JPEGs slower than one, two processes 1.9 times as fast.
A process that dies takes no job with it: the file that killed it is found and told, the rest of its batch done again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from serving.errors import ConvlineError, ImageError
from serving.found import Found, InMemory, Unusable

Work = Callable[[list[Found], int], Any]
Finish = Callable[[list[Found], Any, int], Any]

AHEAD = 4  # batches a worker that may be finished before an earlier one is
HELD = 2**27  # bytes of files out of compressed streams: from there on no further batch is begun
SIGNALS = {signal.SIGINT, signal.SIGTERM}


def can_fork() -> bool:
    """Elsewhere than on Linux, what is forked may not use the system's libraries."""
    return os.uname().sysname == "Linux"


@dataclass
class _Task:
    files: list[Found]
    result: Any = None


@dataclass
class _Worker:
    """A process, this end of its pipe, and what it is doing; `slot` alternates between 0 and 1 from task to task."""

    number: int
    process: ForkProcess
    pipe: Connection
    slot: int = 0
    task: _Task | None = None


class Workers:
    """`work(files, buffer)` on `count` processes, which are copies of this one, its open model included.

    `try_out(files)` is what may kill a process (decoding). `work` gets the index of one of 2 * count buffers to leave
    its pixels in; it stays untouched until `finish` (see `map`) returns.
    """

    def __init__(self, count: int, work: Work, try_out: Callable[[list[Found]], None]) -> None:
        self._work = work
        self._try_out = try_out
        self._workers: list[_Worker] = []
        for number in range(count):
            self._workers.append(self._fork(number))

    def map(self, batches: Iterator[list[Found]], finish: Finish) -> Iterator[Any]:
        """What `finish(files, result, buffer)`, run in this process, makes of each batch's result, in order.

        Raises ConvlineError where a process dies of something else than a file, or raised one.
        """
        window: deque[_Task] = deque()
        finished: list[_Worker] = []
        idle = list(self._workers)
        is_over = False
        while window or not is_over:
            received = [(worker, *self._receive(worker)) for worker in finished]
            idle += finished
            while idle and not is_over and len(window) < AHEAD * len(self._workers) and self._held() < HELD:
                files = next(batches, None)
                if files is None:
                    is_over = True
                    break
                worker = idle.pop()
                worker.task = _Task(files)
                worker.slot = 1 - worker.slot
                window.append(worker.task)
                self._send(worker, "work", files)
            for worker, task, result, slot in received:  # while the workers are busy again
                task.result = finish(task.files, result, self._buffer(worker, slot))
            while window and window[0].result is not None:
                yield window.popleft().result
            busy = {worker.pipe: worker for worker in self._workers if worker.task is not None}
            ready = wait(list(busy)) if busy else []
            finished = [worker for pipe, worker in busy.items() if pipe in ready]

    def _held(self) -> int:
        """Bytes of files that were sent with their content and are not done yet."""
        tasks = (worker.task for worker in self._workers if worker.task)
        return sum(
            len(file.content.data) for task in tasks for file in task.files if isinstance(file.content, InMemory)
        )

    def _receive(self, worker: _Worker) -> tuple[_Task, Any, int]:
        task, worker.task = worker.task, None
        assert task is not None
        try:
            return task, self._answer(worker), worker.slot
        except (EOFError, OSError):
            return task, self._again(worker, task.files), worker.slot

    def _again(self, worker: _Worker, files: list[Found]) -> Any:
        """Do a batch that killed its worker again, without the files that did it."""
        self._replace(worker)
        harmless = [self._harmless(worker, file) for file in files]
        try:
            self._send(worker, "work", harmless)
            return self._answer(worker)
        except (EOFError, OSError) as error:
            raise ConvlineError(
                f"a process of this job ended twice ({self._replace(worker)}) while the model ran; "
                "give it more memory, fewer --threads or a smaller --batch-size"
            ) from error

    def _harmless(self, worker: _Worker, file: Found) -> Found:
        try:
            self._send(worker, "try out", [file])
            self._answer(worker)
            return file
        except (EOFError, OSError):
            problem = ImageError("unreadable", f"the process that decoded it ended ({self._replace(worker)})")
            return replace(file, content=Unusable(problem))

    def _send(self, worker: _Worker, what: str, files: list[Found]) -> None:
        """Give a worker something to do; that it is dead is told by its answer."""
        with suppress(OSError):
            worker.pipe.send((what, files, self._buffer(worker, worker.slot)))

    @staticmethod
    def _answer(worker: _Worker) -> Any:
        """Raises EOFError or OSError where the worker died, and what it raised."""
        result, error = worker.pipe.recv()
        if error is not None:
            raise error
        return result

    @staticmethod
    def _buffer(worker: _Worker, slot: int) -> int:
        return 2 * worker.number + slot

    def _replace(self, worker: _Worker) -> str:
        """Put a new process in a dead one's place; returns how that ended."""
        worker.pipe.close()
        worker.process.kill()  # it is dead, or has closed its pipe
        worker.process.join()
        code = worker.process.exitcode or 0
        fresh = self._fork(worker.number)
        worker.process, worker.pipe = fresh.process, fresh.pipe
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def _fork(self, number: int) -> _Worker:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=self._serve, args=(there,), daemon=True)
        with _signals_held_back(), warnings.catch_warnings():
            # other threads (BLAS, a progress bar) hold nothing that the copy uses
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        there.close()
        return _Worker(number, process, here)

    def _serve(self, pipe: Connection) -> None:
        """What a worker does until its parent closes the pipe, or dies."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the parent decides
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        # libtiff, for one, talks of each damaged file; what goes wrong is told through the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # else the other workers would not see the parent's end, and its journal would stay locked
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        try:
            while True:
                what, files, buffer = pipe.recv()
                answer: tuple[object, Exception | None]
                try:
                    answer = (self._work(files, buffer) if what == "work" else self._try_out(files)), None
                except Exception as error:
                    answer = None, _portable(error)
                pipe.send(answer)
        except (EOFError, OSError):
            os._exit(0)

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.process.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A copy must not run the parent's handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _portable(error: Exception) -> Exception:
    """What another process can raise: onnxruntime's exceptions, for one, cannot be sent."""
    return error if isinstance(error, ConvlineError) else RuntimeError(f"{type(error).__name__}: {error}")
