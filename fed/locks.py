"""Locks that keep two processes from working in one directory at the same time."""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fed.errors import FedError

LOCK = ".lock"
READS = 20
# What file systems without locks say.
_WITHOUT = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_held: dict[tuple[int, int], int] = {}  # the locks of this process: device and inode, and the thread that holds it


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Within the context, hold a directory, which must exist, against other processes and threads.

    It may be held again within the context, and renamed. The lock ends with the process, however that ends. Raises
    FedError, naming the process, if another one holds the directory, or if the lock's file cannot be written.
    """
    with ExitStack() as stack:
        # The lock's file is found by its folder's descriptor at the end, when the folder may have another name.
        folder = stack.enter_context(_opened(directory, directory, os.O_RDONLY | os.O_DIRECTORY))
        lock = stack.enter_context(_opened(directory, directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW))
        key = _identity(os.fstat(lock))
        if _held.get(key) == threading.get_ident():
            yield
            return
        if key in _held:
            raise FedError(f"{str(directory)!r} is in use by another thread of this process")
        if not _take(lock, directory):
            raise FedError(f"{str(directory)!r} is in use by process {_holder(lock)}; wait until it ends, or end it")
        if not _is_there(lock, folder):  # the process that held it has removed it at its end
            raise FedError(f"{str(directory)!r} was in use by another process until now; try again")
        _held[key] = threading.get_ident()
        try:
            with suppress(OSError):  # a full disk, on which the number is not known to others
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
            yield
        finally:
            del _held[key]
            if _is_there(lock, folder):
                os.unlink(LOCK, dir_fd=folder)


def is_held(directory: Path) -> bool:
    """Return whether a process holds the directory.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, held(Path(folder)):
    ...     is_held(Path(folder))
    True
    """
    if not (directory / LOCK).is_file():
        return False
    with _opened(directory, directory / LOCK, os.O_RDWR | os.O_NOFOLLOW) as lock:
        return not _take(lock, directory)


@contextmanager
def _opened(directory: Path, path: Path, flags: int) -> Iterator[int]:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise FedError(f"{str(directory)!r} cannot be written: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _holder(lock: int) -> str:
    """Return the number of the process that holds a lock, or "(unknown)".

    A process writes it just after it took the lock, so for a second a number that is not there yet, or is that of a
    process that was killed, is read again.
    """
    number = ""
    for _ in range(READS):
        number = os.pread(lock, 20, 0).decode(errors="replace").strip("\0 ")
        if number.isdigit() and _lives(int(number)):
            break
        time.sleep(1 / READS)
    return number or "(unknown)"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _identity(there: os.stat_result) -> tuple[int, int]:
    return there.st_dev, there.st_ino


def _is_there(lock: int, folder: int) -> bool:
    """Return whether an open lock's file is still the one in the folder."""
    try:
        return _identity(os.stat(LOCK, dir_fd=folder, follow_symlinks=False)) == _identity(os.fstat(lock))
    except FileNotFoundError:
        return False


def _take(lock: int, directory: Path) -> bool:
    """Lock an open file until it is closed; return False if another process has locked it."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise FedError(f"{str(directory)!r} cannot be locked: {error.strerror}") from None
        warnings.warn(f"{str(directory)!r} cannot be locked here: let one process alone work in it", stacklevel=4)
    return True
