"""Processes by their descriptors, see pidfd_open(2).

A number may be another process's by the time that it is used. A descriptor stays the process that it was.
"""

import os
import select


def has_ended(process: int, seconds: float | None = 0) -> bool:
    """Say whether a process has ended; wait for that at most so many seconds, None: as long as it takes.

    That counts as soon as it has ended, even while its parent has not asked for its status.
    """
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def open_number(pid: int) -> int | None:
    """Return a descriptor of the process that has this number now, None if none has it. Raises OSError."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
