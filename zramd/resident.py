"""Small files whose pages must stay in memory.

/run is a tmpfs, and the kernel swaps pages of its files out as it does those of programs. While nobody serves
the swap, whoever reads or writes such a page waits for the next server. A keeper and a server on standby,
which are to bring that about, must not: in a guest at its limit a keeper stood still for good in a write to
its record, and the server that was to take over in a read of it.
"""

import mmap
import os

Held = mmap.mmap | None


def hold(fd: int, size: int = 0) -> Held:
    """Map the first `size` bytes of the file of `fd`, 0: all, and touch the pages.

    They stay in memory while what this returns lives, in a process that has locked its memory or does so
    later. None: there is nothing to hold, or it cannot be mapped. The locks of `fd` are not kept by it.
    """
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        held = mmap.mmap(own, size, mmap.MAP_SHARED, mmap.PROT_READ)
        for at in range(0, len(held), mmap.PAGESIZE):
            held[at]
    except (OSError, ValueError):  # it is empty, or shorter
        return None
    finally:
        os.close(own)
    return held


def hold_file(name: str, folder: int | None = None) -> Held:
    """As `hold`, of the file with that name; `folder` is a descriptor."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    try:
        return hold(fd)
    finally:
        os.close(fd)
