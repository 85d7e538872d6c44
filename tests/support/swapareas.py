"""A machine whose kernel swaps to a zramd's disk: files like those of /proc and /sys, and slots behind them.

It hands out slots as Linux does: of the areas of the highest priority that have room, those first that were
never written. What it has freed it discards by whole clusters. The disk has stored what was written and not
discarded.
"""

from __future__ import annotations

import random
from heapq import heappop, heappush
from pathlib import Path

import pytest

from zramd.guest import files, notes, refresh

PAGE, SECTOR = files.PAGE, files.SECTOR
CLUSTER = 64  # pages; Linux has 512
HOLE, STORED, WIPED = 0, 1, 2  # what the disk has of a slot


class Swapped:
    """One area: which slots are used, and what the disk has of each."""

    def __init__(self, pages: int, priority: int, *, on: bool = True) -> None:
        self.pages, self.priority, self.on = pages, priority, on
        self.used: set[int] = set()
        self.disk = [HOLE] * pages
        self.written = 0  # sectors
        # Free slots by what the disk has of them; those that are no longer so are skipped when they come up.
        self._free = {HOLE: list(range(pages)), STORED: [], WIPED: []}

    @property
    def dead(self) -> int:
        """Slots that take memory and are not used."""
        return sum(state == STORED and slot not in self.used for slot, state in enumerate(self.disk))

    def take(self, content: int = STORED) -> int | None:
        """Write a page to a free slot, and return which; None if there is none."""
        for state, free in self._free.items():
            while free:
                slot = heappop(free)
                if slot not in self.used and self.disk[slot] == state:
                    self.used.add(slot)
                    self.disk[slot] = content
                    self.written += PAGE // SECTOR
                    return slot
        return None

    def give(self, slot: int) -> None:
        """Free a slot; a cluster that is free now is discarded."""
        self.used.discard(slot)
        heappush(self._free[self.disk[slot]], slot)
        first = slot // CLUSTER * CLUSTER
        whole = range(first, min(first + CLUSTER, self.pages))
        if not self.used.intersection(whole):
            self.discard(whole)

    def discard(self, slots: range) -> None:
        """Have the disk forget slots, none of which is used."""
        for slot in slots:
            if self.disk[slot] != HOLE:
                self.disk[slot] = HOLE
                heappush(self._free[HOLE], slot)


class FakeMachine:
    """The machine; `become` has zramd.guest look here."""

    def __init__(self, folder: Path, sizes: list[int], disk: str = "vdb") -> None:
        """`sizes` are the areas', in pages."""
        self.folder, self.disk = folder, f"/dev/{disk}"
        self.areas: dict[str, Swapped] = {}
        self.total, self.available, self.waiting, self.stalls = 1 << 30, 900 << 20, 0.0, 0
        self.cached = 0
        self.most_off = 0  # areas that were off at a time
        self.read_back = 0
        for path in (
            "proc/pressure",
            f"sys/block/{disk}/holders",
            f"sys/block/{disk}/queue",
            "sys/class/block",
        ):
            (folder / path).mkdir(parents=True)
        (folder / "proc/mounts").write_text("")
        for number, pages in enumerate(sizes, 1):
            self.add(f"/dev/{disk}{number}", Swapped(pages, 101 - number))
        self.write()

    def add(self, path: str, area: Swapped) -> None:
        """Let there be a partition."""
        disk, name = self.folder / "sys/block" / self.disk.removeprefix("/dev/"), path.removeprefix("/dev/")
        self.areas[path] = area
        (disk / name).mkdir(exist_ok=True)
        (disk / name / "partition").write_text(name.removeprefix(disk.name))
        link = self.folder / "sys/class/block" / name
        if not link.is_symlink():
            link.symlink_to(disk / name)
        self.write()

    def become(self, patch: pytest.MonkeyPatch) -> None:
        """Have zramd.guest take this machine for the one that it runs on."""
        for name, folder in (("PROC", "proc"), ("SYS", "sys"), ("RUN", "run")):
            patch.setattr(files, name, str(self.folder / folder))
        patch.setattr(notes, "cluster", lambda: CLUSTER)
        patch.setattr(refresh, "empty", self.empty)
        patch.setattr(refresh, "wipe", self.wipe)

    def write(self) -> None:
        """Bring the files up to date."""
        lines = ["Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority"]
        for path, area in self.areas.items():
            if area.on:
                size, used = area.pages * PAGE // 1024, len(area.used) * PAGE // 1024
                lines.append(
                    f"{path}                               partition\t{size}\t\t{used}\t\t{area.priority}"
                )
            name = path.removeprefix("/dev/")
            fields = [0] * 6 + [area.written] + [0] * 10
            stat = self.folder / f"sys/class/block/{name}/stat"
            stat.write_text(" ".join(map(str, fields)) + "\n")
        proc = self.folder / "proc"
        (proc / "swaps").write_text("\n".join(lines) + "\n")
        (proc / "meminfo").write_text(
            f"MemTotal: {self.total // 1024} kB\nMemAvailable:   {self.available // 1024} kB\n"
            f"SwapCached: {self.cached // 1024} kB\n"
        )
        (proc / "pressure/memory").write_text(
            f"some avg10=99.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={self.waiting:.2f} avg60=0.00\n"
        )
        (proc / "vmstat").write_text(f"nr_free_pages 1\nallocstall_dma 1\nallocstall_normal {self.stalls}\n")

    # ---- What programs do

    def swap_out(self, pages: int) -> list[tuple[str, int]]:
        """Write so many pages, and return where they are."""
        places = []
        for path, area in self.areas.items():
            while area.on and len(places) < pages and (slot := area.take()) is not None:
                places.append((path, slot))
        self.write()
        return places

    def end(self, places: list[tuple[str, int]]) -> None:
        """Free what programs had in swap."""
        for path, slot in places:
            if slot in self.areas[path].used:
                self.areas[path].give(slot)
        self.write()

    def churn(self, rnd: random.Random, daemons: int, programs: int) -> None:
        """Let programs come and go between daemons, and end them all."""
        running: list[list[tuple[str, int]]] = []
        for _ in range(programs):
            running.append(self.swap_out(rnd.randrange(50, 300)))
            self.swap_out(daemons // programs)
            if len(running) > 4:
                self.end(running.pop(rnd.randrange(len(running))))
        for one in running:
            self.end(one)

    # ---- What the two steps of a refresh do

    def empty(self, area: object, flags: int, wanted: object) -> float:
        """Bring an area's pages back, discard it, and swap to it again."""
        path: str = area.path  # type: ignore[attr-defined]
        there = self.areas[path]
        there.on = False
        self.most_off = max(self.most_off, sum(not area.on for area in self.areas.values()))
        self.read_back += len(there.used)
        self.available -= len(there.used) * PAGE
        there.used.clear()
        there.discard(range(there.pages))
        there.on = True
        self.write()
        return 0.1

    def wipe(self, paths: list[str], pages: int, wanted: object) -> float:
        """Take the free slots of areas, and give them back."""
        taken = []
        for path, area in self.areas.items():
            while len(taken) < pages and (slot := area.take(WIPED)) is not None:
                taken.append((path, slot))
        self.write()
        self.end(taken)
        return 0.1

    @property
    def dead(self) -> int:
        """Blocks that take the disk's memory and that swap no longer uses."""
        return sum(area.dead for area in self.areas.values())

    @property
    def used(self) -> int:
        """Pages that are swapped out."""
        return sum(len(area.used) for area in self.areas.values())
