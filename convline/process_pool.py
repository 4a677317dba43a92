"""Worker pool: batches of files on forked processes, or on threads where processes cannot be forked; results in order.

Threads share Python's lock: two of them decode small JPEGs slower than one, two processes 1.9 times as fast. A process
that dies does not end the job: the pool finds the file that killed it, or whose decoding took too long, reports that
file, and processes the rest of the batch again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from PIL import Image

from convline.errors import ConvlineError, ImageError
from convline.inputs.archives import close_archives
from convline.inputs.input_file import InMemory, InputFile, Rejected
from convline.malloc import KEPT_FOR_DECODING, keep_freed_memory
from convline.time_limit import SECONDS, end_this_process_after

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess  # which Windows lacks

Work = Callable[[list[InputFile], int], Any]
Finish = Callable[[list[InputFile], Any, int], Any]

BATCHES_AHEAD = 4  # per worker, that may be finished before an earlier one is
MAX_NAMES = 2**14  # characters of file names that fit into a pipe, both with the task and in its result
MAX_CONTENT = 2**27  # bytes of files from compressed streams; beyond that no further batch is sent
SIGNALS = {signal.SIGINT, signal.SIGTERM}
MODEL_DIED = "while the model ran; give it more memory, fewer --threads or a smaller --batch-size"


def can_fork() -> bool:
    """True on Linux; on macOS a forked process may not use the system's libraries."""
    return sys.platform == "linux" and hasattr(os, "fork")


def open_pool(
    count: int,
    work: Work,
    try_out: Callable[[list[InputFile]], object],
    limit: float = SECONDS,
    advice: str = MODEL_DIED,
) -> Pool:
    """`count` processes that call `work`, or as many threads where processes cannot be forked.

    Threads, not spawned processes: those could not inherit the open model and the shared pixels, and each would import
    everything again. Results are the same, but a file that kills or hangs its decoder kills or hangs the whole job.
    """
    return ProcessPool(count, work, try_out, limit, advice) if can_fork() else ThreadPool(count, work)


@dataclass
class _Task:
    """A batch, the index of the buffer it may use, and its result."""

    files: list[InputFile]
    buffer: int = 0
    result: Any = None
    content: int = field(init=False)  # bytes of file contents that are sent with the batch
    is_small: bool = field(init=False)  # it fits into a pipe

    def __post_init__(self) -> None:
        self.content = sum(len(file.location.data) for file in self.files if isinstance(file.location, InMemory))
        self.is_small = not self.content and sum(len(file.path) for file in self.files) < MAX_NAMES


@dataclass
class _Worker:
    """A process, the parent's end of its pipe, and its tasks, the oldest first."""

    process: ForkProcess
    pipe: Connection
    buffers: tuple[int, int]
    tasks: deque[_Task] = field(default_factory=deque)


class ProcessPool:
    """`work(files, buffer)` on `count` processes, which are copies of this one, its open model included.

    `try_out(files)` is the part of the work that may kill a process or hang (decoding); `limit` is in seconds per
    image. `buffer` is the index, below 2 * count, of a buffer for the pixels of the batch: no other batch uses it until
    `finish` (see `map`) has returned. `advice` ends the message about a process that died without a file that kills it.
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
        """`finish(files, result, buffer)` for the result of each batch, called in this process; yielded in order.

        Raises ConvlineError if a process dies and no file is the reason, and what `work` raises.
        """
        window: deque[_Task] = deque()
        tasks = (_Task(files) for files in batches)
        upcoming = next(tasks, None)
        while window or upcoming is not None:
            while upcoming is not None and (worker := self._free_worker(upcoming, len(window))) is not None:
                self._assign(worker, upcoming)
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
                task.files = []  # they may hold their contents, and an earlier batch may take long

    def _free_worker(self, task: _Task, n_waiting: int) -> _Worker | None:
        """The worker for the next batch: one without tasks, or with a single one, so that it need not wait."""
        content = sum(pending.content for worker in self._workers for pending in worker.tasks)
        if n_waiting >= BATCHES_AHEAD * len(self._workers) or content > MAX_CONTENT:
            return None
        worker = min(self._workers, key=lambda worker: len(worker.tasks))
        # two tasks must fit into the pipe: if both ends wait for room in it, neither reads
        limit = 2 if task.is_small else 1
        return worker if len(worker.tasks) < limit else None

    def _assign(self, worker: _Worker, task: _Task) -> None:
        used = worker.tasks[0].buffer if worker.tasks else None
        task.buffer = next(buffer for buffer in worker.buffers if buffer != used)
        worker.tasks.append(task)
        self._send(worker, "work", task.files, task.buffer)

    def _receive(self, worker: _Worker) -> Any:
        """The result of a worker's oldest task."""
        try:
            return self._answer(worker)
        except (EOFError, OSError):
            task, *later = worker.tasks
            result = self._repeat(worker, task)
            for other in later:
                self._send(worker, "work", other.files, other.buffer)
            return result

    def _repeat(self, worker: _Worker, task: _Task) -> Any:
        """The result of a batch that killed its worker, without the files that did it."""
        self._restart(worker)
        tested = [self._tested(worker, file) for file in task.files]
        try:
            self._send(worker, "repeat", tested, task.buffer)
            return self._answer(worker)
        except (EOFError, OSError) as error:
            ending = self._restart(worker)
            raise ConvlineError(f"a process of this job ended twice ({ending}) {self._advice}") from error

    def _tested(self, worker: _Worker, file: InputFile) -> InputFile:
        """The file, or an unusable one if it kills the worker."""
        try:
            self._send(worker, "try out", [file])
            self._answer(worker)
            return file
        except (EOFError, OSError):
            ending = self._restart(worker)
            if ending == signal.SIGALRM.name:
                problem = ImageError("timeout", f"decoding it took more than {self._limit:g} s")
            else:
                problem = ImageError("unreadable", f"the process that decoded it ended ({ending})")
            return replace(file, location=Rejected(problem))

    @staticmethod
    def _send(worker: _Worker, command: str, files: list[InputFile], buffer: int = 0) -> None:
        """Send a command; if the worker is dead, `_answer` will notice."""
        with suppress(OSError):
            worker.pipe.send((command, files, buffer))

    @staticmethod
    def _answer(worker: _Worker) -> Any:
        """The worker's next result. Raises EOFError or OSError if it died, and what it raised."""
        result, error = worker.pipe.recv()
        if error is not None:
            raise error
        return result

    def _restart(self, worker: _Worker) -> str:
        """Replace a dead process; returns how it ended: the name of a signal, or an exit status."""
        worker.pipe.close()
        worker.process.kill()  # it is dead, or has closed its pipe
        worker.process.join()
        code = worker.process.exitcode or 0
        worker.process, worker.pipe = self._fork()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def _fork(self) -> tuple[ForkProcess, Connection]:
        context = multiprocessing.get_context("fork")
        parent_end, child_end = context.Pipe()
        process = context.Process(target=self._serve, args=(child_end,), daemon=True)
        with _signals_blocked(), warnings.catch_warnings():
            # other threads (BLAS, a progress bar) hold no lock that the copy needs
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        child_end.close()
        return process, parent_end

    def _serve(self, pipe: Connection) -> None:
        """The worker's loop, until its parent closes the pipe or dies."""
        close_archives()  # the parent's files are closed below
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the parent decides
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        # libtiff, for one, prints a line for each damaged file; problems are reported through the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # otherwise the other workers would not notice the parent's end, and its journal would stay locked
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        keep_freed_memory(KEPT_FOR_DECODING)
        try:
            while True:
                command, files, buffer = pipe.recv()
                # no limit for files that were tried out: a machine may sleep, or be busier than it was
                end_this_process_after(0 if command == "repeat" else self._limit)
                answer: tuple[object, Exception | None]
                try:
                    answer = (self._try_out(files) if command == "try out" else self._work(files, buffer)), None
                except Exception as error:
                    answer = None, _picklable(error)
                pipe.send(answer)
        except (EOFError, OSError):
            os._exit(0)

    def close(self) -> None:
        """End the processes."""
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


class ThreadPool:
    """`work(files, buffer)` on `count` threads of this process; the arguments are those of ProcessPool."""

    def __init__(self, count: int, work: Work) -> None:
        self._work = work
        self._n_buffers = 2 * count
        self._threads = ThreadPoolExecutor(count)

    def map(self, batches: Iterator[list[InputFile]], finish: Finish) -> Iterator[Any]:
        """As ProcessPool.map."""
        window: deque[tuple[list[InputFile], int, Future[Any]]] = deque()
        for files, buffer in zip(batches, cycle(range(self._n_buffers)), strict=False):
            window.append((files, buffer, self._threads.submit(self._work, files, buffer)))
            if len(window) == self._n_buffers:
                yield self._oldest(window, finish)
        while window:
            yield self._oldest(window, finish)

    @staticmethod
    def _oldest(window: deque[tuple[list[InputFile], int, Future[Any]]], finish: Finish) -> Any:
        files, buffer, future = window.popleft()
        return finish(files, future.result(), buffer)

    def __enter__(self) -> ThreadPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)


Pool = ProcessPool | ThreadPool


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A forked process must not run the parent's handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _picklable(error: Exception) -> Exception:
    """An exception that can be sent to another process; onnxruntime's, for one, cannot."""
    return error if isinstance(error, ConvlineError) else RuntimeError(f"{type(error).__name__}: {error}")
