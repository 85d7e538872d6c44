"""What compaction moves: zramd's, and the kernel's algorithm on the same zspages and on the kernel's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from bench.kernel_pool import KernelPool, Moved, Pool, SizeClass, Zspage
from bench.setup import BLOCK
from zramd import Device

# Columns of zsmalloc's table, see Device.classes.
SIZE, PAGES = 1, -2
STEP = 512  # bytes moved before looking whether as many pages are freed


def pool_of(blocks: Iterable[dict[str, Any]], table: Sequence[tuple[int, ...]]) -> Pool:
    """Return the zspages that hold these blocks (see Device.block) as a pool of the kernel's kind.

    `table` is zsmalloc's (see Device.classes). Its compaction then is the kernel's, on zramd's zspages.
    """
    objects: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    objs: dict[int, int] = {}
    resident: dict[tuple[int, int], int] = {}
    for block in blocks:
        if block["kind"] == "lz4":  # raw ones have a page each: there is nothing to compact
            objects[block["class_index"], block["zspage"]].append((block["chunk"], block["handle"]))
            objs[block["class_index"]] = block["zspage_objs"]
            resident[block["class_index"], block["zspage"]] = block["zspage_pages"]
    classes = {index: SizeClass(table[index][SIZE], table[index][PAGES], objs[index]) for index in objs}
    pool = Pool([classes[index] for index in sorted(classes, reverse=True)])
    for (index, zspage), chunks in sorted(objects.items()):
        # The kernel goes through a source from its first chunk on.
        place = Zspage(classes[index], resident=resident[index, zspage])
        pool.place(place, [handle for _, handle in sorted(chunks, reverse=True)])
    return pool


class CountedDevice:
    """A device that takes a trace, with a model of the kernel's pool beside it that takes the same."""

    def __init__(self, blocks: int) -> None:
        self.device = Device(blocks * BLOCK)
        self.model = KernelPool()
        self.zramd: list[Moved] = []  # of each compaction
        self.as_much: list[Moved] = []  # until it had freed as many pages as the next
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
        blocks = [self.device.block(block) for block in range(self._blocks)]
        same_state = pool_of(blocks, self.device.classes()).compact()
        before = self._moved()
        done, last = Moved(), None
        while done.pages_freed < same_state.pages_freed and done != last:
            self.device.compact(STEP)
            done, last = self._moved() - before, done
        self.as_much.append(done)
        self.device.compact()
        self.zramd.append(self._moved() - before)
        self.same_state.append(same_state)
        self.kernel.append(self.model.compact())

    def _moved(self) -> Moved:
        counters = self.device.counters()
        return Moved(counters["objects_migrated"], counters["bytes_migrated"], counters["pages_compacted"])


def per_page(moved: Moved) -> float:
    """Return the bytes moved for each page freed, 0 if there was none to free."""
    return moved.bytes / moved.pages_freed if moved.pages_freed else 0.0
