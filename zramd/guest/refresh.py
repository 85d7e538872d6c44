"""A refresh: what is worth it, step by step, as long as memory is at ease."""

from __future__ import annotations

import time
from collections.abc import Callable

from .areas import DISCARD, areas, disk_of
from .files import GivenUp
from .layout import resume
from .memory import hindrance, memory, zswap_is_on
from .notes import Notes, read_notes, write_notes
from .policy import Plan, View, plan
from .steps import empty, nothing, wipe


def view(disk: str, notes: Notes) -> list[View]:
    """Return the areas of a disk with what is stored of them, in the kernel's order."""
    return [
        View(area, notes.areas[area.path].stored(area), bool(notes.areas[area.path].flags & DISCARD))
        for area in areas(disk)
    ]


def refresh(
    disk: str,
    say: Callable[[str], None],
    *,
    dry_run: bool = False,
    quiet: bool = False,
    wanted: Callable[[], str] = nothing,
) -> Plan:
    """Give back what swap on a disk has freed, as far as it is worth it and memory is at ease.

    `say` gets a sentence for each step; `quiet`: not for one that was not begun. `wanted` returns why a step
    is to be given up, beside memory, or ''. Returns what there was to do. Raises GuestError, OSError.
    """
    notes = read_notes(disk)
    if not dry_run:
        for path in resume(disk, notes):
            say(f"{path} was off: swapped to again")
    views = view(disk, notes)
    others = [area for area in areas() if disk_of(area.path) != disk]
    todo = plan(views, others, can_wipe=not zswap_is_on())
    steps: list[tuple[str, list[View], int]] = [("empty", [one], one.area.used) for one in todo.emptied]
    if todo.wiped:  # last: what is emptied gives memory back at once where the pool is in this machine's
        steps.append(("wipe", todo.wiped, todo.pages))
    if steps and not dry_run:
        write_notes(disk, notes)  # by them the next one knows what this one, if it is killed, has left off
    freed = read_back = 0
    started = time.monotonic()
    for kind, these, pages in steps:
        names = these[0].area.path + (f" to {these[-1].area.path}" if len(these) > 1 else "")
        dead = sum(one.dead for one in these)
        verb = f"{pages} pages read back" if kind == "empty" else f"{pages} free places wiped"
        # What is wiped is in memory for a moment only, a few pages at a time.
        if why := hindrance(memory(), pages if kind == "empty" else 0) or wanted():
            if not quiet:
                say(f"{names}: left for later, as {why}")
            break
        if dry_run:
            say(f"{names}: {dead} pages would become free, {verb}")
            continue
        try:
            seconds = (
                empty(these[0].area, notes.areas[these[0].area.path].flags, wanted)
                if kind == "empty"
                else wipe([one.area.path for one in these], pages, wanted)
            )
        except GivenUp as why:
            notes.count("given_up")
            resume(disk, notes)  # its process may have been killed between the two
            write_notes(disk, notes)
            say(f"{names}: given up, as {why}")
            break
        for area in areas(disk):
            if any(area.path == one.area.path for one in these):
                notes.areas[area.path].reset(area.path, area.used)
        notes.count("emptied" if kind == "empty" else "wiped", len(these))
        freed, read_back = freed + dead, read_back + (pages if kind == "empty" else 0)
        write_notes(disk, notes)
        say(f"{names}: up to {dead} pages became free, {verb}, {seconds:.1f} s")
    if freed:
        notes.count("freed", freed)
        notes.count("read_back", read_back)
        seconds = round(time.monotonic() - started, 1)
        notes.last = {"time": int(time.time()), "freed": freed, "read_back": read_back, "seconds": seconds}
    if not dry_run:
        write_notes(disk, notes)
    return todo
