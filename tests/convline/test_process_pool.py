"""Worker pools: results in order, a few batches ahead, and no file is lost when a process dies."""

from __future__ import annotations

import faulthandler
import mmap
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convline.errors import ConvlineError, ImageError
from convline.images import ImageSpec
from convline.inputs.input_file import InMemory, InputFile, OnDisk
from convline.inputs.listing import find
from convline.process_pool import BATCHES_AHEAD, Pool, ProcessPool, ThreadPool, Work
from convline.time_limit import time_limited
from serving.classifier import Classifier, batched, try_decode
from serving.predict import batch_predictor
from serving.records import Prediction, Reject
from tests.serving.helpers import encode, noise, slow_jpeg, write

ROOT = Path(__file__).parents[2]


def files(*names: str) -> list[InputFile]:
    return [InputFile(name, InMemory(name.encode())) for name in names]


def content_or_problem(file: InputFile) -> str:
    """A file's content, in capitals, or why it cannot be read."""
    try:
        return file.read().decode().upper()
    except ImageError as error:
        return f"{error.reason}: {error.detail}"


def work(batch: list[InputFile], _: int) -> list[str]:
    try_out(batch)
    return [content_or_problem(file) for file in batch]


def try_out(batch: list[InputFile]) -> None:
    """Decoding that kills its process, as a defect in a C library would."""
    for file in batch:
        if content_or_problem(file).startswith("SIG"):
            faulthandler.disable()  # of pytest, which would print a traceback
            os.kill(os.getpid(), signal.Signals[file.path])


def unchanged(_files: object, result: object, _buffer: object) -> object:
    return result


def run(batches: list[list[InputFile]], processes: int = 2) -> list[list[str]]:
    with ProcessPool(processes, work, try_out) as workers:
        return list(workers.map(iter(batches), unchanged))


@pytest.fixture(params=["processes", "threads"])
def open_pool(request: pytest.FixtureRequest) -> Callable[[Work], Pool]:
    """Opens a pool of either kind with two workers."""
    return lambda work: ProcessPool(2, work, try_out) if request.param == "processes" else ThreadPool(2, work)


def test_results_come_in_the_order_of_their_batches(open_pool: Callable[[Work], Pool]) -> None:
    def slow_first(batch: list[InputFile], _: int) -> list[str]:
        time.sleep(0.2 if batch[0].path == "0" else 0)
        return work(batch, 0)

    batches = [files(str(number), "x") for number in range(20)]
    with open_pool(slow_first) as workers:
        assert list(workers.map(iter(batches), unchanged)) == [[str(number), "X"] for number in range(20)]


def test_only_a_few_batches_are_taken_ahead(open_pool: Callable[[Work], Pool]) -> None:
    taken = count()

    def endless() -> Iterator[list[InputFile]]:
        while True:
            yield files(str(next(taken)))

    with open_pool(work) as workers:
        results = workers.map(endless(), unchanged)
        for _ in range(5):
            next(results)
        time.sleep(0.1)
    assert next(taken) <= 5 + BATCHES_AHEAD * 2


@pytest.mark.timeout(60)  # both ends would wait for room in the pipe
def test_names_longer_than_a_pipe_holds() -> None:
    batches = [[InputFile(f"{number}" * 9000, OnDisk("nowhere")) for _ in range(64)] for number in range(20)]
    with ProcessPool(2, lambda batch, _: [file.path for file in batch], try_out) as workers:
        results = list(workers.map(iter(batches), unchanged))
    assert results == [[file.path for file in batch] for batch in batches]


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_file_that_kills_its_process_is_reported_and_its_neighbours_are_done(name: str) -> None:
    batches = [files("a", "b"), files("c", name, "d"), files("e"), files(name)]
    killed = f"unreadable: the process that decoded it ended ({name})"
    assert run(batches) == [["A", "B"], ["C", killed, "D"], ["E"], [killed]]
    assert run(batches, processes=1) == run(batches)


def test_a_process_that_dies_without_a_file_that_kills_it_ends_the_job_with_an_error() -> None:
    def out_of_memory(_: list[InputFile], __: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        ProcessPool(1, out_of_memory, try_out) as workers,
        pytest.raises(ConvlineError, match=r"ended twice \(SIGKILL\) while the model ran; give it more memory"),
    ):
        list(workers.map(iter([files("a")]), unchanged))


def test_a_process_that_was_killed_between_two_batches_is_replaced() -> None:
    with ProcessPool(1, lambda batch, _: (os.getpid(), work(batch, 0)), try_out) as workers:
        ((first, _),) = workers.map(iter([files("a")]), unchanged)
        os.kill(first, signal.SIGKILL)
        ((second, result),) = workers.map(iter([files("b")]), unchanged)
    assert first != second and result == ["B"]


def test_two_batches_never_use_one_buffer(open_pool: Callable[[Work], Pool]) -> None:
    def use(batch: list[InputFile], buffer: int) -> int:
        pixels[buffer] = int(batch[0].path)
        time.sleep(0.01 * (int(batch[0].path) % 3))
        return buffer

    pixels = np.frombuffer(mmap.mmap(-1, 4 * 8), np.int64)  # shared by processes
    batches = [files(str(number)) for number in range(30)]
    with open_pool(use) as workers:
        results = workers.map(iter(batches), lambda _files, buffer, _: int(pixels[buffer]))
        assert list(results) == list(range(30))


def test_what_a_thread_raises_is_raised_here() -> None:
    def fail(_: list[InputFile], __: int) -> None:
        raise ConvlineError("not enough memory")

    with ThreadPool(1, fail) as workers, pytest.raises(ConvlineError, match="not enough memory"):
        list(workers.map(iter([files("a"), files("b")]), unchanged))


@pytest.mark.parametrize("error", [ConvlineError("not enough memory"), ValueError("a defect")])
def test_what_a_process_raises_is_raised_here(error: Exception) -> None:
    def fail(_: list[InputFile], __: int) -> None:
        raise error

    with (
        ProcessPool(1, fail, try_out) as workers,
        pytest.raises(type(error) if isinstance(error, ConvlineError) else RuntimeError, match=str(error)),
    ):
        list(workers.map(iter([files("a")]), unchanged))


# --- files that take too long

LIMIT = 0.5  # seconds
TOO_LONG = f"timeout: decoding it took more than {LIMIT} s"


def outcome(file: InputFile) -> str:
    decoded = try_decode(file, ImageSpec(2, 2, 1))
    return f"{decoded.reason}: {decoded.detail}" if isinstance(decoded, ImageError) else "decoded"


def run_limited(
    batches: list[list[InputFile]], decode: Callable[[InputFile], str], processes: int = 2
) -> list[list[str]]:
    def work(batch: list[InputFile], _: int = 0) -> list[str]:
        return [decode(file) for file in batch]

    with ProcessPool(processes, work, work, LIMIT) as workers:
        return list(workers.map(iter(batches), unchanged))


def test_a_file_that_takes_too_long_is_reported_and_its_neighbours_are_done() -> None:
    quick, slow = (InputFile("", InMemory(data)) for data in (encode(noise(8, 8), "PNG"), slow_jpeg()))
    assert run_limited([[quick, slow, quick], [quick], [slow]], outcome) == [
        ["decoded", TOO_LONG, "decoded"],
        ["decoded"],
        [TOO_LONG],
    ]


def test_a_decoder_that_holds_pythons_lock_is_ended() -> None:
    def hang(file: InputFile) -> str:
        content = content_or_problem(file)
        with time_limited():
            re.fullmatch("(A+)+", 40 * content + "b")  # takes years on many As, and holds Python's lock
        return content

    assert run_limited([files("x", "a", "y")], hang) == [["X", TOO_LONG, "Y"]]


@dataclass(frozen=True)
class SlowlyRead(InMemory):
    def read(self) -> bytes:
        time.sleep(1.5 * LIMIT)
        return self.data


def test_neither_a_slow_read_nor_many_files_count_as_a_decoder_that_hangs() -> None:
    slow = InputFile("slow", SlowlyRead(encode(noise(8, 8), "PNG")))

    def decode(file: InputFile) -> str:
        with time_limited():
            time.sleep(LIMIT / 5)
        return outcome(file)

    many = [InputFile("quick", InMemory(slow.location.read()))] * 8
    assert run_limited([[slow], many], decode) == [["decoded"], ["decoded"] * 8]


def test_one_thread_that_hangs_while_others_go_on_is_ended() -> None:
    def decode(file: InputFile) -> str:
        content = content_or_problem(file)
        with time_limited():
            time.sleep(600 if content == "HANG" else LIMIT / 10)
        return content

    def work(batch: list[InputFile], _: int = 0) -> list[str]:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(decode, batch))

    with ProcessPool(1, work, work, LIMIT) as workers:
        assert list(workers.map(iter([files("a", "hang", "b", "c", "d")]), unchanged)) == [
            ["A", TOO_LONG, "B", "C", "D"]
        ]


ORPHANS = """
import os, sys, time
from convline.inputs.input_file import InputFile, InMemory
from convline.process_pool import ProcessPool

with ProcessPool(2, lambda files, _: os.getpid(), lambda files: None) as workers:
    batches = ([InputFile("x", InMemory(b"x"))] for _ in range(20))
    print(*set(workers.map(batches, lambda files, pid, buffer: pid)), flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("all_cpus")
def test_processes_end_when_the_job_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert pids
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- classification


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(30):
        write(folder / f"{number:02}.png", encode(noise(8, 8), "PNG") if number % 7 else b"garbage")
    return folder


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("on_accelerator", [False, True])
def test_every_way_of_dividing_the_work_gives_the_same_entries(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, on_accelerator: bool, forks: bool
) -> None:
    monkeypatch.setattr("convline.process_pool.can_fork", lambda: forks)
    found = [InputFile(path.name, OnDisk(str(path))) for path in sorted(folder.iterdir())]
    with Classifier(model, "cpu", 1, batch_size=4) as classifier:
        if on_accelerator:  # the processes leave pixels in shared memory, the model runs here
            classifier.model = replace(classifier.model, provider="cuda")
        expected = [entry for batch in classifier.classify_batches(batched(found, 4), 3) for entry in batch]
        with batch_predictor(classifier, 3, processes=2) as predict:
            entries = [entry for _, entries in predict(batched(found, 4)) for entry in entries]
    assert entries == expected
    assert [type(entry) for entry in entries] == [Prediction if number % 7 else Reject for number in range(30)]


@dataclass(frozen=True)
class Deadly(InMemory):
    def read(self) -> bytes:
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)
        return b""


@pytest.mark.parametrize("shares_batches", [False, True])
def test_files_that_kill_or_hang_their_decoder_are_rejects_in_small_jobs_and_large_ones(
    model: Path, shares_batches: bool
) -> None:
    quick = InMemory(encode(noise(8, 8), "PNG"))
    contents = [quick, Deadly(b""), quick, InMemory(slow_jpeg()), InMemory(b"text"), quick]
    found = [InputFile(str(number), content) for number, content in enumerate(contents)]
    with (
        Classifier(model, "cpu", 1, batch_size=4) as classifier,
        batch_predictor(classifier, 1, 2, shares_batches, LIMIT) as predict,
    ):
        entries = [entry for _, entries in predict(batched(found, 4)) for entry in entries]
        (expected,) = next(classifier.classify_batches([found[:1]]))
    assert [entry.path for entry in entries] == ["0", "1", "2", "3", "4", "5"]
    assert [entry.reason if isinstance(entry, Reject) else "classified" for entry in entries] == [
        "classified",
        "unreadable",
        "classified",
        "timeout",
        "not-an-image",
        "classified",
    ]
    assert entries[0] == expected


def test_an_archive_that_the_parent_holds_open_is_read_by_restarted_processes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a", "SIGKILL", "b", "c"):
            archive.writestr(name, name)
    found = list(find([str(tmp_path / "a.zip")]))
    assert found[0].read() == b"a"  # as for a thumbnail
    first, died, *rest = [entry for batch in run([[file] for file in found], processes=1) for entry in batch]
    assert (first, rest) == ("A", ["B", "C"]) and "SIGKILL" in died


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how other C libraries keep memory is theirs to say")
def test_the_memory_of_large_photographs_is_kept_for_the_next_one() -> None:
    """Each page that the system takes back is fetched again with a page fault: 12,000 for 12 megapixels."""

    def page_faults(_files: list[InputFile], _buffer: int) -> int:
        Image.new("RGB", (4032, 3024), "white")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        Image.new("RGB", (4032, 3024), "white")
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with ProcessPool(1, page_faults, try_out) as pool:
        (faults,) = pool.map(iter([files("a")]), lambda _files, result, _buffer: result)
    assert faults < 1000
