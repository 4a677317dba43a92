"""Batches of files on forked processes, in order, a few ahead of whoever takes the results.

Threads would share Python's lock: two of them decode small JPEGs slower than one, two processes 1.9 times as fast.
A process that dies takes no job with it: the file that killed it, or that it decoded for too long, is found and told,
the rest of its batch done again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from PIL import Image

from convline.errors import ConvlineError, ImageError
from convline.inputs.archives import close_archives
from convline.inputs.input_file import InMemory, InputFile, Rejected
from convline.time_limit import SECONDS, end_this_process_after

Work = Callable[[list[InputFile], int], Any]
Finish = Callable[[list[InputFile], Any, int], Any]

AHEAD = 4  # batches a worker that may be finished before an earlier one is
NAMES = 2**14  # characters of names that surely fit into a pipe, both as a batch and in its results
HELD = 2**27  # bytes of files out of compressed streams: from there on no further batch is begun
SIGNALS = {signal.SIGINT, signal.SIGTERM}
MODEL_DIED = "while the model ran; give it more memory, fewer --threads or a smaller --batch-size"


def can_fork() -> bool:
    """Elsewhere than on Linux, what is forked may not use the system's libraries."""
    return os.uname().sysname == "Linux"


@dataclass
class _Task:
    """A batch, the buffer that it may use, and what came of it."""

    files: list[InputFile]
    buffer: int = 0
    result: Any = None
    content: int = field(init=False)  # bytes of files that are sent with it
    is_small: bool = field(init=False)  # little more than short names

    def __post_init__(self) -> None:
        self.content = sum(len(file.location.data) for file in self.files if isinstance(file.location, InMemory))
        self.is_small = not self.content and sum(len(file.path) for file in self.files) < NAMES


@dataclass
class _Worker:
    """A process, this end of its pipe, and what it was given, the oldest first."""

    process: ForkProcess
    pipe: Connection
    buffers: tuple[int, int]
    tasks: deque[_Task] = field(default_factory=deque)


class ProcessPool:
    """`work(files, buffer)` on `count` processes, which are copies of this one, its open model included.

    `try_out(files)` is what may kill a process (decoding), or hang: for longer than `limit` seconds an image. `work`
    gets the index of one of 2 * count buffers to leave its pixels in; it stays untouched until `finish` (see `map`)
    returns. `advice` says where a process died that no file kills, and what to do.
    """

    def __init__(
        self,
        count: int,
        work: Work,
        try_out: Callable[[list[InputFile]], object],
        limit: float = SECONDS,
        advice: str = MODEL_DIED,
    ) -> None:
        self._work = work
        self._try_out = try_out
        self._limit = limit
        self._advice = advice
        self._workers: list[_Worker] = []
        Image.init()  # Pillow's readers, once rather than in each copy
        for number in range(count):
            process, pipe = self._fork()
            self._workers.append(_Worker(process, pipe, (2 * number, 2 * number + 1)))

    def map(self, batches: Iterator[list[InputFile]], finish: Finish) -> Iterator[Any]:
        """What `finish(files, result, buffer)`, run in this process, makes of each batch's result, in order.

        Raises ConvlineError where a process dies of something else than a file, or raised one.
        """
        window: deque[_Task] = deque()
        tasks = (_Task(files) for files in batches)
        upcoming = next(tasks, None)
        while window or upcoming is not None:
            while upcoming is not None and (worker := self._taker(upcoming, len(window))) is not None:
                self._give(worker, upcoming)
                window.append(upcoming)
                upcoming = next(tasks, None)
            while window and window[0].result is not None:
                yield window.popleft().result
            busy = {worker.pipe: worker for worker in self._workers if worker.tasks}
            ready = wait(list(busy)) if busy else []
            for worker in [worker for pipe, worker in busy.items() if pipe in ready]:
                result = self._receive(worker)
                task = worker.tasks.popleft()
                task.result = finish(task.files, result, task.buffer)

    def _taker(self, task: _Task, waiting: int) -> _Worker | None:
        """Who takes the next batch: whoever has none, else whoever has but one, so that none waits for the next."""
        held = sum(given.content for worker in self._workers for given in worker.tasks)
        if waiting >= AHEAD * len(self._workers) or held > HELD:
            return None
        worker = min(self._workers, key=lambda worker: len(worker.tasks))
        # what lies in a pipe must fit: while both ends wait for room in it, nobody reads
        limit = 2 if task.is_small else 1
        return worker if len(worker.tasks) < limit else None

    def _give(self, worker: _Worker, task: _Task) -> None:
        used = worker.tasks[0].buffer if worker.tasks else None
        task.buffer = next(buffer for buffer in worker.buffers if buffer != used)
        worker.tasks.append(task)
        self._send(worker, "work", task.files, task.buffer)

    def _receive(self, worker: _Worker) -> Any:
        """What became of a worker's oldest task."""
        try:
            return self._answer(worker)
        except (EOFError, OSError):
            task, *later = worker.tasks
            result = self._again(worker, task)
            for other in later:
                self._send(worker, "work", other.files, other.buffer)
            return result

    def _again(self, worker: _Worker, task: _Task) -> Any:
        """Do a batch that killed its worker again, without the files that did it."""
        self._replace(worker)
        harmless = [self._harmless(worker, file) for file in task.files]
        try:
            self._send(worker, "again", harmless, task.buffer)
            return self._answer(worker)
        except (EOFError, OSError) as error:
            how = self._replace(worker)
            raise ConvlineError(f"a process of this job ended twice ({how}) {self._advice}") from error

    def _harmless(self, worker: _Worker, file: InputFile) -> InputFile:
        try:
            self._send(worker, "try out", [file])
            self._answer(worker)
            return file
        except (EOFError, OSError):
            how = self._replace(worker)
            if how == signal.SIGALRM.name:
                problem = ImageError("timeout", f"decoding it took more than {self._limit:g} s")
            else:
                problem = ImageError("unreadable", f"the process that decoded it ended ({how})")
            return replace(file, location=Rejected(problem))

    @staticmethod
    def _send(worker: _Worker, what: str, files: list[InputFile], buffer: int = 0) -> None:
        """Give a worker something to do; that it is dead is told by its answer."""
        with suppress(OSError):
            worker.pipe.send((what, files, buffer))

    @staticmethod
    def _answer(worker: _Worker) -> Any:
        """Raises EOFError or OSError where the worker died, and what it raised."""
        result, error = worker.pipe.recv()
        if error is not None:
            raise error
        return result

    def _replace(self, worker: _Worker) -> str:
        """Put a new process in a dead one's place; returns how that ended."""
        worker.pipe.close()
        worker.process.kill()  # it is dead, or has closed its pipe
        worker.process.join()
        code = worker.process.exitcode or 0
        worker.process, worker.pipe = self._fork()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def _fork(self) -> tuple[ForkProcess, Connection]:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=self._serve, args=(there,), daemon=True)
        with _signals_held_back(), warnings.catch_warnings():
            # other threads (BLAS, a progress bar) hold nothing that the copy uses
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        there.close()
        return process, here

    def _serve(self, pipe: Connection) -> None:
        """What a worker does until its parent closes the pipe, or dies."""
        close_archives()  # the parent's are closed below
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
                # no limit for files that were tried out: a machine may sleep, or be busier than it was
                end_this_process_after(0 if what == "again" else self._limit)
                answer: tuple[object, Exception | None]
                try:
                    answer = (self._try_out(files) if what == "try out" else self._work(files, buffer)), None
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

    def __enter__(self) -> ProcessPool:
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
