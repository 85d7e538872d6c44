"""How memory stands, and whether it is a time to bring something into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from . import files
from .files import MIB, PAGE, read, read_or

# Of memory so much must stay available beside what comes back. No more: where the pool is in this memory,
# what is dead is what makes it short (38 of 384 MiB were available, and 230 dead).
MARGIN = 0.05
LEAST_MARGIN = 16 * MIB
# Percent of the last 10 s in which all programs waited for memory (PSI's `full`). Not `some`: a page fault
# that reads from swap counts there, and daemons that bring their pages back after the pressure make 5 to
# 20 % of it.
QUIET = 10.0
# With so much of memory available that is the past: the average remembers 20 s and more after programs ended.
PLENTY = 0.3
STALLS = 4  # programs that had to wait for memory between two looks: enough to give up


class Memory(NamedTuple):
    """How memory stands: bytes, PSI's `full avg10` in percent (None: not known), reclaims by programs.

    `cached` is what is in swap and in memory too: MemAvailable does not count it.
    """

    total: int
    available: int
    cached: int
    waiting: float | None
    stalls: int


def memory() -> Memory:
    """Return how memory stands now. Raises OSError."""
    meminfo = dict(re.findall(r"(\w+): +(\d+)", read(f"{files.PROC}/meminfo")))
    full = re.search(r"full avg10=([0-9.]+)", read_or(f"{files.PROC}/pressure/memory"))
    stalls = re.findall(r"^allocstall_\w+ (\d+)$", read(f"{files.PROC}/vmstat"), re.MULTILINE)
    return Memory(
        int(meminfo["MemTotal"]) * 1024,
        int(meminfo["MemAvailable"]) * 1024,
        int(meminfo.get("SwapCached", 0)) * 1024,
        float(full[1]) if full else None,
        sum(map(int, stalls)),
    )


def zswap_is_on() -> bool:
    """Say whether the kernel keeps pages in memory before swap: what is swapped out need not be written."""
    return read_or(f"{files.SYS}/module/zswap/parameters/enabled") == "Y"


def margin(now: Memory) -> int:
    """Return the bytes of memory that a refresh leaves available."""
    return max(int(now.total * MARGIN), LEAST_MARGIN)


def hindrance(now: Memory, pages: int) -> str:
    """Return why this is no time to bring so many pages into memory, '' if it is."""
    if now.waiting is not None and now.waiting >= QUIET and now.available < now.total * PLENTY:
        return f"programs wait for memory ({now.waiting:g} % of the last 10 s)"
    if now.available - pages * PAGE < margin(now):
        return (
            f"{pages * PAGE / MIB:.1f} MiB of memory are needed, and of {now.available / MIB:.1f} MiB "
            f"available {margin(now) / MIB:.1f} stay so"
        )
    return ""


class Watch:
    """Says when memory has become so short that a step must be given up."""

    def __init__(self, wanted: Callable[[], str]) -> None:
        """Begin to watch; `wanted` returns what else is a reason, '' for nothing."""
        self._before = memory()
        self._cached = self._before.cached
        self._wanted = wanted

    def reason(self) -> str:
        """Return why the step under way must be given up, '' if it need not be."""
        before, now = self._before, memory()
        self._before = now
        # What has been wiped stays in memory until the kernel needs it: it is written already.
        available = now.available + max(0, now.cached - self._cached)
        if available < margin(now) // 2:
            return f"only {available // MIB} MiB of memory are available"
        if now.stalls - before.stalls >= STALLS:
            return "programs wait for memory"
        return self._wanted()
