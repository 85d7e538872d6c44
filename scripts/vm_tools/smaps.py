"""What the kernel says of a server's memory: /proc/PID/smaps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mapping:
    """One mapping of a process; in bytes."""

    start: int
    end: int
    readable: bool
    rss: int
    pss: int


def mappings(smaps: str) -> Iterator[Mapping]:
    """Yield the process's mappings in the order of their addresses."""
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
        head, *lines = part.splitlines()
        place, rights = head.split()[:2]
        start, end = (int(word, 16) for word in place.split("-"))
        sizes = {words[0]: int(words[1]) * 1024 for line in lines if (words := line.split())[-1] == "kB"}
        yield Mapping(start, end, rights[0] == "r", sizes["Rss:"], sizes["Pss:"])


def arena(smaps: str) -> Mapping:
    """Return the mapping that has the pool's pages.

    The pool has by far the largest address space, of which only the beginning, its pages, can be read.
    Where pages are anonymous, tables that lie next to it may have become one mapping with it.
    """
    found = list(mappings(smaps))
    unused = max((each for each in found if not each.readable), key=lambda each: each.end - each.start)
    (used,) = (each for each in found if each.end == unused.start)
    return used
