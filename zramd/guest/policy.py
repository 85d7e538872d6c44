"""What is worth doing for a disk, by numbers alone."""

from __future__ import annotations

from typing import NamedTuple

from .areas import Area

READ_BACK = 0.25  # an area is emptied for at most so many pages read for each one that becomes free
# So many pages of an area must be dead before anything is done about it, or such a part of a small one.
WORTH_PAGES = 256
WORTH = 1 / 16
WIPED = 8  # at most so many pages are written for each dead one


class View(NamedTuple):
    """An area, how many pages of it the disk has stored, and whether swapon discards all of it."""

    area: Area
    stored: int
    discards: bool = True

    @property
    def dead(self) -> int:
        """Pages that are stored and that swap no longer uses."""
        return max(0, self.stored - self.area.used)

    @property
    def is_worth_it(self) -> bool:
        """Whether so much is dead that something should be done."""
        return self.dead >= min(WORTH_PAGES, WORTH * self.area.pages)

    @property
    def can_be_emptied(self) -> bool:
        """Whether so little lives in it that it may be read back."""
        return self.is_worth_it and self.discards and self.area.used <= READ_BACK * self.dead


class Plan(NamedTuple):
    """What a refresh does: areas to wipe, how many pages are written for that, and areas to empty."""

    wiped: list[View]
    pages: int
    emptied: list[View]

    @property
    def dead(self) -> int:
        """Pages that become free."""
        return sum(view.dead for view in (*self.wiped, *self.emptied))


def plan(views: list[View], others: list[Area], *, can_wipe: bool = True) -> Plan:
    """Return what is worth doing for a disk's areas; `others` are swap areas elsewhere.

    Free places can only be taken in the kernel's order. So areas are wiped from the first one on, up to one
    that has much dead and cannot be emptied; areas elsewhere that the kernel fills before cost as much.
    """
    views = sorted(views, key=lambda view: -view.area.priority)
    for last in range(len(views) - 1, -1, -1) if can_wipe else ():
        if not views[last].is_worth_it or views[last].can_be_emptied:
            continue
        upto = [area for area in others if area.priority >= views[last].area.priority]
        pages = sum(area.free for area in (*(view.area for view in views[: last + 1]), *upto))
        if pages <= WIPED * sum(view.dead for view in views[: last + 1]):
            wiped, rest = views[: last + 1], views[last + 1 :]
            break
    else:
        wiped, pages, rest = [], 0, views
    emptied = sorted((view for view in rest if view.can_be_emptied), key=lambda view: view.area.used)
    return Plan(wiped, pages, emptied)
