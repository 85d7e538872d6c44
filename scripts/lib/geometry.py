"""Densities of pool designs, computed from payload sizes."""

from __future__ import annotations

import bisect
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.density_rows import FREED, SMALL

from zramd import Zsmalloc
from zramd.core.device.codec import compress

PAGE = 4096
SMALLEST = 32


@dataclass(frozen=True)
class Design:
    """`fine` is the spacing of size classes up to `until` bytes, `coarse` above, before merging.

    `last` is what the part-filled zspage of a class costs: all of its pages (whole), those that its objects
    need (tight), or less where free chunks of classes at most `borrow` times as large take the objects of its
    last pages.
    """

    fine: int
    chain: int
    header: int = 4
    last: str = "tight"
    until: int = PAGE
    coarse: int = 0
    borrow: float = 1.0

    def __str__(self) -> str:
        spacing = f"{self.fine} to {self.until} B, then {self.coarse}" if self.coarse else str(self.fine)
        last = f"borrow {self.borrow:g}" if self.borrow > 1 else self.last
        return f"{spacing} | {self.chain} | {self.header} | {last}"

    def classes(self) -> list[tuple[int, int, int]]:
        """Return (bytes of a chunk, pages, chunks of a zspage), smallest first, as zsmalloc merges them."""
        found: list[tuple[int, int, int]] = []
        for size in self._sizes():
            pages = min(
                (n for n in range(1, self.chain + 1) if n * PAGE >= size),
                key=lambda n: (n * PAGE % size / n, n),
            )
            chunks = pages * PAGE // size
            if chunks > pages and (pages, chunks) != (found[-1][1:] if found else None):
                found.append((size, pages, chunks))
        return found[::-1]

    def _sizes(self) -> Iterator[int]:
        size = PAGE - self.fine
        while size >= SMALLEST:
            yield size
            size -= self.fine if not self.coarse or size <= self.until else self.coarse

    def pages(self, sizes: Sequence[int]) -> int:
        """Return the pages of a pool with objects of these sizes, after compaction."""
        classes = self.classes()
        chunks = [size for size, _, _ in classes]
        counts = [0] * len(classes)
        total = 0
        for size in sizes:
            index = bisect.bisect_left(chunks, size + self.header)
            if index == len(classes):
                total += 1
            else:
                counts[index] += 1
        free = [0] * len(classes)  # chunks on the pages of each class's last zspage
        for index in reversed(range(len(classes))):
            chunk, pages, objs = classes[index]
            full, rest = divmod(counts[index], objs)
            total += full * pages
            if not rest:
                continue
            needed = pages if self.last == "whole" else -(-rest * chunk // PAGE)
            while needed and self.borrow > 1:
                keep = (needed - 1) * PAGE // chunk
                if not self._lend(classes, free, index, rest - keep):
                    break
                rest, needed = keep, needed - 1
            total += needed
            free[index] = min(needed * PAGE // chunk, objs) - rest
        return total

    def left(self, sizes: Sequence[int], least: float) -> float:
        """Return the pages that are left, on average, when FREED of the objects were freed at random.

        A page goes back when no object touches it any more, where chunks are of `least` bytes or more; else
        its zspage has to be empty.
        """
        classes = self.classes()
        chunks = [size for size, _, _ in classes]
        total = 0.0
        for size in sizes:
            index = bisect.bisect_left(chunks, size + self.header)
            if index == len(classes):
                total += 1 - FREED
                continue
            chunk, pages, objs = classes[index]
            touching = [
                min(((page + 1) * PAGE - 1) // chunk, objs - 1) - page * PAGE // chunk + 1
                if chunk >= least
                else objs
                for page in range(pages)
            ]
            total += sum(1 - FREED**count for count in touching) / objs
        return total

    def _lend(
        self, classes: Sequence[tuple[int, int, int]], free: list[int], index: int, wanted: int
    ) -> bool:
        lenders = []
        for larger in range(index + 1, len(classes)):
            if wanted == 0 or classes[larger][0] > self.borrow * classes[index][0]:
                break
            taken = min(wanted, free[larger])
            wanted -= taken
            lenders.append((larger, taken))
        if wanted:
            return False
        for larger, taken in lenders:
            free[larger] -= taken
        return True


KERNEL = Design(16, 8, header=8, last="whole")
NEVER = float("inf")
MAPPED = 1024  # bytes: chunks of which a zspage has at most 64
OURS = Design(8, 16, until=768, coarse=16, borrow=1.0625)
DESIGNS = (
    KERNEL,
    Design(16, 8, last="whole"),
    Design(16, 8),
    Design(24, 8),
    Design(32, 8),
    Design(8, 8, header=8),
    Design(8, 8, last="whole"),
    Design(8, 8),
    Design(4, 8),
    Design(8, 4),
    Design(16, 16, last="whole"),
    Design(16, 16),
    Design(8, 16),
    Design(8, 32),
    Design(8, 16, until=1024, coarse=16),
    Design(8, 16, until=768, coarse=24),
    Design(8, 16, until=768, coarse=32),
    Design(8, 16, until=768, coarse=16),
    Design(8, 8, borrow=1.0625),
    Design(8, 16, borrow=1.0625),
    Design(8, 32, borrow=1.0625),
    OURS,
    Design(8, 16, until=768, coarse=16, borrow=1.125),
    Design(8, 16, until=768, coarse=16, borrow=1.5),
)


def payload(page: bytes) -> int:
    """Return the bytes that a block is stored in; 0: it is one word repeated."""
    packed = compress(page, PAGE - 1)
    if isinstance(packed, bytes):
        return len(packed)
    return 0 if page == page[:8] * (PAGE // 8) else PAGE


def traces(corpora: Sequence[str]) -> dict[str, list[int]]:
    """Return the payload sizes of each trace."""
    dice = random.Random(20)
    found = {
        "compressible": [
            payload(dice.randbytes(size) + bytes(PAGE - size))
            for size in (dice.choice(SMALL) for _ in range(45875))
        ]
    }
    for name in corpora:
        data = Path(name).read_bytes()
        sizes = [size for at in range(0, len(data), PAGE) if (size := payload(data[at : at + PAGE]))]
        found[f"{Path(name).name}, drawn"] = [dice.choice(sizes) for _ in range(21000)]
        found[Path(name).name] = sizes
    found["uniform"] = [dice.randint(1, PAGE) for _ in range(30000)]
    return found


def measure(sizes: Sequence[int]) -> int:
    """Return the pages of a real pool with objects of these sizes, after compaction."""
    pool = Zsmalloc(len(sizes))
    for size in sizes:
        pool.malloc(size)
    pool.compact()
    return pool.stats()["mem_used_total"] // PAGE


def main(corpora: Sequence[str]) -> None:
    """Print the table."""
    columns = traces(corpora)
    sums = {name: sum(sizes) for name, sizes in columns.items()}

    def cells(pages: dict[str, int]) -> str:
        return " | ".join(f"{n * 4} {100 * sums[name] / (n * PAGE):.2f}" for name, n in pages.items())

    print("| spacing | chain | header | last zspage | classes |", " | ".join(columns), "|")
    print("|---" * (5 + len(columns)) + "|")
    for design in DESIGNS:
        pages = {name: design.pages(sizes) for name, sizes in columns.items()}
        name = f"{design} (the kernel's)" if design is KERNEL else str(design)
        row = f"| {name} | {len(design.classes())} | {cells(pages)} |"
        print(row if design is not OURS else row.replace("| ", "| **").replace(" |", "** |"))
    measured = {name: measure(sizes) for name, sizes in columns.items()}
    print(f"| zramd's pool, measured | | | | | {cells(measured)} |")
    print(f"\nKiB on average when {FREED:.0%} of the objects were freed, before any compaction:\n")
    print("| pages go back by themselves |", " | ".join(columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    for name, design, least in (
        ("the kernel's zspages", KERNEL, NEVER),
        ("never", OURS, NEVER),
        *((f"where chunks have {least} bytes or more", OURS, least) for least in (3072, 2048, MAPPED, 512)),
    ):
        left = " | ".join(f"{design.left(sizes, least) * 4:.0f}" for sizes in columns.values())
        row = f"| {name} | {left} |"
        print(row if least != MAPPED else row.replace("| ", "| **").replace(" |", "** |"))


main(sys.argv[1:])
