"""Locks end with their file or process, on Unix and, with a stand-in for `msvcrt`, on Windows."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from convline import locks
from tests.conftest import ROOT


class StandIn:
    """`msvcrt`, made of Linux's locks on ranges of bytes, which belong to an open file as those of Windows do."""

    LK_NBLCK = 2

    @staticmethod
    def locking(descriptor: int, mode: int, count: int) -> None:
        assert mode == StandIn.LK_NBLCK
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, count, 0)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
        except BlockingIOError as error:
            raise PermissionError from error  # as Windows does


@pytest.fixture(params=["fcntl", "msvcrt"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to lock, by each of the systems' ways."""
    if request.param == "msvcrt":
        monkeypatch.setattr(locks, "fcntl", None)
        monkeypatch.setattr(locks, "msvcrt", StandIn)
    file = tmp_path / "file"
    file.write_bytes(b"content")
    return file


def test_a_locked_file_cannot_be_locked_again_until_it_is_closed(path: Path) -> None:
    with path.open("a+b") as first, path.open("a+b") as second:
        assert locks.acquire(first.fileno())
        assert not locks.acquire(second.fileno())
        assert not locks.acquire(second.fileno(), patience=0.05)
        first.close()
        assert locks.acquire(second.fileno())


def test_a_locked_file_can_be_read_and_written(path: Path) -> None:
    with path.open("r+b") as file:
        assert file.read(3) == b"con"
        assert locks.acquire(file.fileno())
        assert file.read() == b"tent" and path.read_bytes() == b"content"
        file.write(b"!")
    assert path.read_bytes() == b"content!"


def test_whoever_waits_gets_the_lock_when_it_is_released(path: Path) -> None:
    first, second = path.open("a+b"), path.open("a+b")
    with first, second:
        assert locks.acquire(first.fileno())
        timer = threading.Timer(0.1, first.close)
        timer.start()
        assert locks.acquire(second.fileno(), patience=math.inf)
        timer.join()


def test_a_file_is_held_while_it_is_locked(path: Path) -> None:
    with path.open("a+b") as first:
        for is_locked in (False, True):
            with path.open("rb" if locks.fcntl else "r+b") as second:
                assert locks.is_held(second.fileno()) == is_locked
            locks.acquire(first.fileno())


def test_two_processes_may_ask_at_once_whether_a_file_is_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open() as first, (tmp_path / "file").open() as second:
        assert not locks.is_held(first.fileno()) and not locks.is_held(second.fileno())


def test_a_lock_ends_when_its_process_is_killed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = """
import sys, time
from convline import locks
file = open(sys.argv[1], "a+b")
print(locks.acquire(file.fileno()), flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "True\n"
        with (tmp_path / "file").open("a+b") as file:
            assert not locks.acquire(file.fileno())
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert locks.acquire(file.fileno())


def test_without_any_locks_every_lock_succeeds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", None)
    assert not locks.are_supported()
    with path.open("a+b") as first, path.open("a+b") as second:
        assert locks.acquire(first.fileno()) and locks.acquire(second.fileno()) and not locks.is_held(first.fileno())
