"""What compaction moves: zramd's, and the kernel's algorithm on the same zspages and on the kernel's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from bench_tools.kernel_pool import KernelPool, Moved, Pool, SizeClass, Zspage
from bench_tools.setup import BLOCK
from zramd import Device

# Columns of zsmalloc's table, see Device.classes.
SIZE, PAGES = 1, -2


def pool_of(blocks: Iterable[dict[str, Any]], table: Sequence[tuple[int, ...]]) -> Pool:
    """Return the zspages that hold these blocks (see Device.block) as a pool of the kernel's kind.

    `table` is zsmalloc's (see Device.classes). Its compaction then is the kernel's, on zramd's zspages.
    """
    objects: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    objs: dict[int, int] = {}
    for block in blocks:
        if block["kind"] == "lz4":  # raw ones have a page each: there is nothing to compact
            objects[block["class_index"], block["zspage"]].append((block["chunk"], block["handle"]))
            objs[block["class_index"]] = block["zspage_objs"]
    classes = {index: SizeClass(table[index][SIZE], table[index][PAGES], objs[index]) for index in objs}
    pool = Pool([classes[index] for index in sorted(classes, reverse=True)])
    for (index, _), chunks in sorted(objects.items()):
        # The kernel goes through a source from its first chunk on.
        pool.place(Zspage(classes[index]), [handle for _, handle in sorted(chunks, reverse=True)])
    return pool


class CountedDevice:
    """A device that takes a trace, with a model of the kernel's pool beside it that takes the same."""

    def __init__(self, blocks: int) -> None:
        self.device = Device(blocks * BLOCK)
        self.model = KernelPool()
        self.zramd: list[Moved] = []  # of each compaction
        self.same_state: list[Moved] = []
        self.kernel: list[Moved] = []
        self._blocks = blocks

    def write(self, data: bytes, offset: int) -> None:
        """Write one block."""
        self.device.write(data, offset)
        self.model.store(offset // BLOCK, int(self.device.block(offset // BLOCK).get("payload_bytes", 0)))

    def trim(self, offset: int, length: int) -> None:
        """Trim one block."""
        self.device.trim(offset, length)
        self.model.store(offset // BLOCK, 0)

    def compact(self) -> None:
        """Compact both, and note what that moved."""
        before, counters = self._where(), self.device.counters()
        table = self.device.classes()
        self.device.compact()
        after, now = self._where(), self.device.counters()
        self.zramd.append(moved_bytes(before, after, table, _gain(counters, now)))
        self.same_state.append(pool_of(before, table).compact())
        self.kernel.append(self.model.compact())

    def _where(self) -> list[dict[str, Any]]:
        return [self.device.block(block) for block in range(self._blocks)]


def _gain(before: dict[str, int], after: dict[str, int]) -> tuple[int, int]:
    return tuple(after[key] - before[key] for key in ("objects_migrated", "pages_compacted"))  # type: ignore[return-value]


def moved_bytes(
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    table: Sequence[tuple[int, ...]],
    gain: tuple[int, int],
) -> Moved:
    """Return what a compaction of zramd moved: whose place is another one, and how many moves it counted.

    It counts moves, not bytes. Objects that moved twice are taken to be as long as those that moved.
    """
    moves, pages_freed = gain
    lengths = [
        table[old["class_index"]][SIZE]
        for old, new in zip(before, after, strict=True)
        if old["kind"] == "lz4" and old["obj"] != new["obj"]
    ]
    mean = sum(lengths) / len(lengths) if lengths else 0
    return Moved(moves, sum(lengths) + round((moves - len(lengths)) * mean), pages_freed)


def per_page(moved: Moved) -> float:
    """Return the bytes moved for each page freed, 0 if there was none to free."""
    return moved.bytes / moved.pages_freed if moved.pages_freed else 0.0
