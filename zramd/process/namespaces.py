"""In which namespaces this process is."""

import os

PIDS = "/proc/self/ns/pid"
_FIRST = 0xEFFFFFFC  # the inode number of the machine's own PID namespace, in every kernel


def has_own_pids(path: str = PIDS) -> bool:
    """Say whether processes have other numbers here than on the machine; False if that is not known."""
    try:
        return os.stat(path).st_ino != _FIRST
    except OSError:
        return False
