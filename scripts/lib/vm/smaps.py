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
    rss: int
    pss: int


def mappings(smaps: str) -> Iterator[Mapping]:
    """Yield the process's mappings in the order of their addresses."""
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
        head, *lines = part.splitlines()
        start, end = (int(word, 16) for word in head.split()[0].split("-"))
        sizes = {words[0]: int(words[1]) * 1024 for line in lines if (words := line.split())[-1] == "kB"}
        yield Mapping(start, end, sizes["Rss:"], sizes["Pss:"])


def arena(smaps: str, size: int) -> tuple[int, int]:
    """Return Rss and Pss of the pool's pages; `size` is the pool's address space in bytes.

    That is by far the largest. Where pages are anonymous, tables that lie next to it may have become one
    mapping with it: they are counted, too.
    """
    found = list(mappings(smaps))
    end = max(found, key=lambda each: each.end - each.start).end
    pool = [each for each in found if each.end > end - size and each.start < end]
    return sum(each.rss for each in pool), sum(each.pss for each in pool)
