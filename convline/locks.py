"""File locks that end with their process, even by SIGKILL: `flock` on Unix, `msvcrt.locking` on Windows.

A lock belongs to an open file: closing the file releases it, and a second open file in the same process is refused as
one of another process is. Folders can be locked on Unix only.

The library filelock has such a lock, `lock_descriptor`, which does not fit here: on Windows it locks the first byte of
the file, and no other handle can read a locked byte there, but a job reads its journal while it is locked; it has no
shared locks, so two processes that only ask whether a file is locked would each see the other's lock; and where Python
has no `fcntl` it raises.
"""

from __future__ import annotations

import os
import time
from typing import Any

fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

INTERVAL = 0.02  # seconds between two attempts
LAST_BYTE = 2**31 - 2  # of those that `msvcrt.locking` can reach; the locked byte may lie beyond the end of the file


def are_supported() -> bool:
    """Whether Python has locks here. Without them every lock succeeds, and nothing is locked."""
    return fcntl is not None or msvcrt is not None


def acquire(descriptor: int, patience: float = 0.0) -> bool:
    """Lock an open file until it is closed. False if another process holds the lock for more than `patience` seconds.

    Raises OSError on a file system without locks.
    """
    deadline = time.monotonic() + patience
    while not _try_lock(descriptor):
        if time.monotonic() >= deadline:
            return False
        time.sleep(INTERVAL)
    return True


def release(descriptor: int) -> None:
    """Unlock an open file that stays open, or in the memory map of some process."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    elif msvcrt is not None:
        _at_last_byte(descriptor, msvcrt.LK_UNLCK)


def is_held(descriptor: int) -> bool:
    """Whether another process holds the lock of an open file, which should be closed after the question.

    On Windows, two processes that ask at the same moment may both get True.
    """
    return not _try_lock(descriptor, shared=True)


def _try_lock(descriptor: int, shared: bool = False) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
        except BlockingIOError:
            return False
    elif msvcrt is not None:
        return _try_lock_byte(descriptor)
    return True


def _try_lock_byte(descriptor: int) -> bool:
    try:
        _at_last_byte(descriptor, msvcrt.LK_NBLCK)
    except PermissionError:
        return False
    return True


def _at_last_byte(descriptor: int, operation: int) -> None:
    """Lock or unlock the byte at LAST_BYTE: `msvcrt.locking` starts at the file's position, which is put back."""
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, LAST_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, operation, 1)
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)
