"""What is kept of a disk from one run to the next: how full each area was, and what was done."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from . import files
from .areas import DISCARD, DISCARD_ONCE, DISCARD_PAGES, Area, areas, cluster, sectors_written
from .files import PAGE, SECTOR, GuestError, read


@dataclass
class Note:
    """What is known of an area beside what the kernel says.

    When the disk had `dirty` pages of it stored, the kernel had written so many sectors to it (`written`).
    """

    priority: int
    dirty: int = 0
    written: int = 0
    flags: int = DISCARD  # of swapon(2)
    known: bool = True  # they are

    @property
    def trims(self) -> bool:
        """Whether the kernel discards each cluster that becomes free."""
        only_once = self.flags & DISCARD_ONCE and not self.flags & DISCARD_PAGES
        return self.known and bool(self.flags & DISCARD) and not only_once

    def stored(self, area: Area) -> int:
        """Return how many pages of the area the disk has stored at most.

        No more than were written since the area was clean, and none of a cluster in which nothing is used. It
        may be less: what was written twice counts twice, what was discarded counts still. The sectors that
        the kernel has discarded do not help: with each cluster it discards places that were never written.
        """
        written = (sectors_written(area.path) - self.written) * SECTOR // PAGE
        most = min(area.pages, self.dirty + written)
        if self.trims:
            most = min(most, area.used * cluster())
        return max(area.used, most)

    def reset(self, path: str, dirty: int) -> None:
        """Note that the disk has `dirty` pages of the area stored now."""
        self.dirty = dirty
        self.written = sectors_written(path)


@dataclass
class Notes:
    """What is kept of a disk from one run to the next, in RUN."""

    areas: dict[str, Note] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)  # the last refresh that did something

    def count(self, name: str, by: float = 1) -> None:
        """Add to one of the counters."""
        self.counts[name] = self.counts.get(name, 0) + by


def notes_path(disk: str) -> str:
    """Return the file in which the notes of a disk are kept."""
    return f"{files.RUN}/{os.path.basename(disk)}.json"


def read_notes(disk: str) -> Notes:
    """Return what was noted of a disk. Without notes its areas count as full: no harm, some work in vain."""
    try:
        data = json.loads(read(notes_path(disk)))
        notes = Notes(
            {path: Note(**note) for path, note in data["areas"].items()}, data["counts"], data["last"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        notes = Notes()
    for area in areas(disk):
        if area.path not in notes.areas:
            notes.areas[area.path] = Note(area.priority, known=False)
            notes.areas[area.path].reset(area.path, area.pages)
    return notes


def write_notes(disk: str, notes: Notes) -> None:
    """Keep what is known of a disk, whole or not at all."""
    os.makedirs(files.RUN, mode=0o755, exist_ok=True)
    data = {"areas": {path: asdict(note) for path, note in notes.areas.items()}}
    partial = f"{notes_path(disk)}.new"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({**data, "counts": notes.counts, "last": notes.last}, file, indent=1)
    os.replace(partial, notes_path(disk))


@contextmanager
def turn() -> Iterator[None]:
    """Let one command at a time change areas. Raises GuestError when another one does."""
    os.makedirs(files.RUN, mode=0o755, exist_ok=True)
    with open(f"{files.RUN}/lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GuestError("another zramd-guest is at work: try again when it has ended") from None
        yield
