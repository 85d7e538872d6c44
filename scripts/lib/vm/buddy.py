"""A machine's free memory by the length of its blocks, and what the kernel does to lengthen them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vm.guest import Guest

PAGE = 4096
SMALL = 64 << 10  # what network cards, stacks and slabs ask for at most
HUGE = 2 << 20  # a huge page, where pages have 4096 bytes
# What the kernel counts while it moves pages together.
MOVED, NOT_MOVED = "pgmigrate_success", "pgmigrate_fail"


@dataclass(frozen=True)
class FreeBlocks:
    """Free memory, of all zones; blocks of order n are 2**n of the kernel's pages."""

    blocks: tuple[int, ...]  # of each order, from 0 on
    free: int  # bytes in all of them
    small: float  # percent of it in blocks of SMALL bytes and longer
    huge: float  # percent of it in blocks of HUGE bytes and longer
    huge_pages: int  # how many pieces of HUGE bytes there are in them


def parse(buddyinfo: str, page: int = PAGE) -> FreeBlocks:
    """Return what /proc/buddyinfo says; `page` is the kernel's, in bytes."""
    zones = [map(int, line.split()[4:]) for line in buddyinfo.splitlines()]
    blocks = tuple(map(sum, zip(*zones, strict=True)))
    sizes = [page << order for order in range(len(blocks))]
    # Bytes in blocks that are at least so long.
    free, small, huge = (
        sum(size * count for size, count in zip(sizes, blocks, strict=True) if size >= least)
        for least in (page, SMALL, HUGE)
    )
    return FreeBlocks(
        blocks,
        free,
        round(100 * small / max(free, 1), 1),
        round(100 * huge / max(free, 1), 1),
        huge // HUGE,
    )


def free_blocks(guest: Guest) -> FreeBlocks:
    """Return how the guest's free memory is cut."""
    return parse(guest.run("cat /proc/buddyinfo"), guest.machine.kernel.flavour.page)


def compact_memory(guest: Guest) -> dict[str, Any]:
    """Let the guest's kernel move pages together; return how many it has moved, and how many it could not."""
    before = _counts(guest)
    guest.run("echo 1 >/proc/sys/vm/compact_memory", 120)
    after = _counts(guest)
    return {
        "pages_moved": after[MOVED] - before[MOVED],
        "not_moved": after[NOT_MOVED] - before[NOT_MOVED],
        # Whether locked pages may be moved; where not, a machine's own zramd stands in the way.
        "compact_unevictable_allowed": int(guest.run("cat /proc/sys/vm/compact_unevictable_allowed")),
    }


def _counts(guest: Guest) -> dict[str, int]:
    lines = guest.run(f"grep -E '^({MOVED}|{NOT_MOVED}) ' /proc/vmstat").splitlines()
    return {name: int(count) for name, count in map(str.split, lines)}
