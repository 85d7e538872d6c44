"""Locks on files and folders, by which processes know of each other. A kill drops them, a fork shares them.

There are two kinds, which know nothing of each other. flock(2) can only be asked for by being taken, for
microseconds; a lock of the open file description (fcntl(2), OFD) can be looked at.
"""

import fcntl
import os
import struct

_LOCK = struct.Struct("hhqqi4x")  # struct flock


def take(fd: int) -> bool:
    """Take the lock of what `fd` is open on; return False if another has it. Raises OSError."""
    return _flock(fd, fcntl.LOCK_EX)


def is_taken(fd: int) -> bool:
    """Say whether another has the lock of what `fd` is open on. Raises OSError."""
    return not _flock(fd, fcntl.LOCK_SH)


def folder_is_taken(folder: str) -> bool:
    """Say whether another has the lock of a folder; False if that cannot be looked at. Raises OSError."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return is_taken(fd)
    finally:
        os.close(fd)


def _flock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ofd_take(fd: int, at: int | None = None) -> bool:
    """Take the lock of the open file description; return False if another has it.

    Of the whole file, or of the byte `at`, whether the file has it or not. Raises OSError.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(at))
    except (BlockingIOError, PermissionError):
        return False
    return True


def ofd_give(fd: int, at: int) -> None:
    """Give the lock of the open file description on the byte `at` back. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(at, fcntl.F_UNLCK))


def ofd_is_taken(fd: int, at: int | None = None) -> bool:
    """Say whether another has the lock of its open file description; `at` as above. Raises OSError."""
    kind: int = _LOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(at)))[0]
    return kind != fcntl.F_UNLCK


def _lock(at: int | None, kind: int = fcntl.F_WRLCK) -> bytes:
    start, length = (0, 0) if at is None else (at, 1)
    return _LOCK.pack(kind, os.SEEK_SET, start, length, 0)


def stands_at(fd: int, path: str, *, folder: int | None = None, follow: bool = False) -> bool:
    """Say whether `path` is still what `fd` was opened from: what was removed or replaced locks nothing.

    `path` is relative to `folder`, a descriptor, if that is given. `follow`: a link at its end is followed.
    Raises OSError.
    """
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, dir_fd=folder, follow_symlinks=follow))
    except (FileNotFoundError, NotADirectoryError):
        return False
