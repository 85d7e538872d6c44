"""Where the kernel tells and is told, and what can go wrong."""

from __future__ import annotations

import os

PROC, SYS, RUN = "/proc", "/sys", "/run/zramd-guest"
PAGE = os.sysconf("SC_PAGE_SIZE")
SECTOR = 512
MIB = 1 << 20


class GuestError(Exception):
    """What cannot be done; the text is one sentence that says why, and what to do."""


class NotForSwap(GuestError):
    """A disk that is used for something else, or holds something."""


class GivenUp(Exception):
    """A step that was ended in the middle, without harm; the text says why."""


def read(path: str) -> str:
    """Return what is in a file of the kernel's, whatever bytes it has. Raises OSError."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def read_or(path: str, otherwise: str = "") -> str:
    """Return what is in a file without the blanks around it, `otherwise` if it cannot be read."""
    try:
        return read(path).strip()
    except OSError:
        return otherwise
