"""A model of the kernel's zsmalloc: its zspages, and what compaction moves. Sizes, no bytes.

The rules are those of Linux since 6.6, with zspages of up to 8 pages: classes 16 bytes apart, a header of
8 bytes, fullness groups of 10 %, lists whose head is the zspage that joined last, and the compaction of 2023:
from the emptiest zspage into the fullest until that is full, as long as a class has a zspage's worth of free
places. Where a machine has the real thing, scripts/bench reports how many pages both free on the same trace.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

PAGE = 4096
CHAIN = 8
DELTA = 16
HEADER = 8
MIN_CLASS = 32
GROUPS = 12  # empty, up to 10 %, 20, … 90, 99, and full
FULL = GROUPS - 1


@dataclass(eq=False)
class Zspage:
    """A zspage and the objects in it, by what they are known as; the one that came last moves first."""

    size_class: SizeClass
    objects: dict[int, None] = field(default_factory=dict)
    resident: int = -1  # pages that are there; the kernel's zspages have all of theirs

    def __post_init__(self) -> None:
        if self.resident < 0:
            self.resident = self.size_class.pages

    @property
    def group(self) -> int:
        """Its fullness group."""
        inuse, objs = len(self.objects), self.size_class.objs
        if inuse == 0:
            return 0
        return FULL if inuse == objs else 100 * inuse // objs // 10 + 1


@dataclass(eq=False)
class SizeClass:
    """A size class; `lists` has the zspages of each fullness group, the head last."""

    size: int  # bytes of a chunk
    pages: int  # of a zspage
    objs: int  # chunks of a zspage
    zspages: int = 0
    inuse: int = 0
    lists: list[dict[Zspage, None]] = field(default_factory=lambda: [{} for _ in range(GROUPS)])

    def insert(self, zspage: Zspage) -> None:
        """Put a zspage at the head of its group's list."""
        self.lists[zspage.group][zspage] = None

    def isolate(self, groups: Iterable[int]) -> Zspage | None:
        """Take the head of the first of these groups that has one off its list."""
        for number in groups:
            if self.lists[number]:
                return self.lists[number].popitem()[0]
        return None


@dataclass
class Moved:
    """What a compaction did; a move copies a whole chunk."""

    objects: int = 0
    bytes: int = 0
    pages_freed: int = 0

    def __sub__(self, before: Moved) -> Moved:
        return Moved(
            self.objects - before.objects,
            self.bytes - before.bytes,
            self.pages_freed - before.pages_freed,
        )


class Pool:
    """Objects in zspages of some size classes; `classes` are ordered as compaction takes them."""

    def __init__(self, classes: list[SizeClass]) -> None:
        self.classes = classes
        self._where: dict[int, Zspage] = {}

    @property
    def pages(self) -> int:
        """Pages in use."""
        return sum(c.zspages * c.pages for c in self.classes)

    def place(self, zspage: Zspage, objects: Iterable[int]) -> None:
        """Add a new zspage with these objects."""
        zspage.objects = dict.fromkeys(objects)
        self._where.update(dict.fromkeys(zspage.objects, zspage))
        zspage.size_class.zspages += 1
        zspage.size_class.inuse += len(zspage.objects)
        zspage.size_class.insert(zspage)

    def malloc(self, size_class: SizeClass, name: int) -> None:
        """Put an object into the fullest zspage that has room, or into a new one."""
        zspage = size_class.isolate(range(FULL - 1, 0, -1))
        if zspage is None:
            self.place(Zspage(size_class), [name])
            return
        zspage.objects[name] = None
        self._where[name] = zspage
        size_class.inuse += 1
        size_class.insert(zspage)

    def free(self, name: int) -> None:
        """Free an object; an empty zspage goes at once."""
        zspage = self._where.pop(name)
        size_class = zspage.size_class
        before = zspage.group
        del zspage.objects[name]
        size_class.inuse -= 1
        if zspage.group != before:
            del size_class.lists[before][zspage]
            if zspage.objects:
                size_class.insert(zspage)
            else:
                size_class.zspages -= 1

    def compact(self) -> Moved:
        """Do what zs_compact does when nobody is in its way."""
        moved = Moved()
        for size_class in self.classes:
            self._compact_class(size_class, moved)
        return moved

    def _compact_class(self, size_class: SizeClass, moved: Moved) -> None:
        target: Zspage | None = None
        freed = 0
        while size_class.zspages * size_class.objs - size_class.inuse >= size_class.objs:
            target = target or size_class.isolate(range(FULL - 1, 0, -1))
            source = size_class.isolate(range(1, FULL))
            if target is None or source is None:
                break
            while source.objects and len(target.objects) < size_class.objs:
                name = source.objects.popitem()[0]
                target.objects[name] = None
                self._where[name] = target
                moved.objects += 1
                moved.bytes += size_class.size
                wanted = -(-len(target.objects) * size_class.size // PAGE)
                freed -= max(wanted - target.resident, 0)
                target.resident = max(wanted, target.resident)
            if source.objects:
                size_class.insert(source)
            else:
                size_class.zspages -= 1
                freed += source.resident
            if len(target.objects) == size_class.objs:
                size_class.insert(target)
                target = None
        if target is not None:
            size_class.insert(target)
        moved.pages_freed += freed


def size_classes() -> tuple[list[SizeClass], list[SizeClass]]:
    """Return the kernel's size classes, largest first, and the class of each step of DELTA from the least."""
    classes: list[SizeClass] = []
    steps: list[SizeClass] = []
    for size in range(PAGE, MIN_CLASS - 1, -DELTA):
        pages = 1
        if size & (size - 1):
            waste = {n: n * PAGE % size for n in range(1, CHAIN + 1)}
            pages = min(waste, key=lambda n: (waste[n], n))
        objs = pages * PAGE // size
        if not classes or (classes[-1].pages, classes[-1].objs) != (pages, objs):
            classes.append(SizeClass(size, pages, objs))
        steps.append(classes[-1])
    return classes, steps[::-1]


class KernelPool(Pool):
    """The pool of the kernel's zram; an object is known by the number of the write that made it."""

    def __init__(self) -> None:
        classes, self._steps = size_classes()
        super().__init__(classes)
        self._raw_from = max(c.size for c in classes if c.size < PAGE) - HEADER + 1
        self._objects: dict[int, int] = {}
        self._writes = 0

    def store(self, block: int, payload_bytes: int) -> None:
        """Store a block's payload, 0: it needs none. The old object goes once the new one is there."""
        old = self._objects.pop(block, None)
        if payload_bytes:
            self._writes += 1
            self._objects[block] = self._writes
            self.malloc(self.class_of(payload_bytes), self._writes)
        if old is not None:
            self.free(old)

    def class_of(self, payload_bytes: int) -> SizeClass:
        """Return the class of a payload; what is too long is stored raw."""
        if payload_bytes >= self._raw_from:
            return self._steps[-1]
        return self._steps[max(0, -(-(payload_bytes + HEADER - MIN_CLASS) // DELTA))]
