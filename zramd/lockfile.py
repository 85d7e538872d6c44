"""Locks on files and folders, by which processes know of each other. A kill drops them, a fork shares them.

There are two kinds, which know nothing of each other. flock(2) can only be asked for by being taken, for
microseconds; a lock of the open file description (fcntl(2), OFD) can be looked at.
"""

import fcntl
import os
import struct

_WHOLE = struct.Struct("hhqqi4x")  # struct flock


def take(fd: int) -> bool:
    """Take the lock of what `fd` is open on; return False if another has it. Raises OSError."""
    return _flock(fd, fcntl.LOCK_EX)


def is_taken(fd: int) -> bool:
    """Say whether another has the lock of what `fd` is open on. Raises OSError."""
    return not _flock(fd, fcntl.LOCK_SH)


def _flock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ofd_take(fd: int) -> bool:
    """Take the lock of the open file description; return False if another has it. Raises OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def ofd_is_taken(fd: int) -> bool:
    """Say whether another has the lock of its open file description. Raises OSError."""
    asked = _WHOLE.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind: int = _WHOLE.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK


def stands_at(fd: int, path: str, *, folder: int | None = None, follow: bool = False) -> bool:
    """Say whether `path` is still what `fd` was opened from: what was removed or replaced locks nothing.

    `path` is relative to `folder`, a descriptor, if that is given. `follow`: a link at its end is followed.
    Raises OSError.
    """
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, dir_fd=folder, follow_symlinks=follow))
    except (FileNotFoundError, NotADirectoryError):
        return False
