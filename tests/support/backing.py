"""Backings for servers."""

import os
from pathlib import Path


def preallocated(folder: Path, size: int = 16 << 20) -> Path:
    """Make a file that can be a backing; the folder's file system has direct I/O, see disk_folder."""
    path = folder / "out"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)
    return path
