"""Races that the core's locks, pins and order keep away, and what puts each back (docs/hacking.md)."""

Edits = dict[str, list[tuple[str, str]]]  # file in zramd/core -> (old text, new text)

# The first three are one of each module: they are always tried.
RACES: dict[str, Edits] = {
    # What the slot stands for is gone while the slot can still be read.
    "an object is freed before its slot is changed": {
        "device/blocks.pyx": [
            (
                """            gone = self.get(block)
            if slot or gone:
""",
                """            gone = self.get(block)
            pthread_mutex_unlock(&self.stripes[block % STRIPES])
            self._free(block, gone)
            pthread_mutex_lock(&self.stripes[block % STRIPES])
            if slot or gone:
""",
            ),
            (
                """        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        self._free(block, gone)
        return rc
""",
                """        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        return rc
""",
            ),
        ]
    },
    # Between the look at the cell and the pin somebody else pins the object, or frees it.
    "a mover does not look again when it pins": {
        "pool/compaction.pyx": [
            (
                """    if cell & CELL_PIN or not compare_swap(&pool.cells[handle], cell, cell | CELL_PIN):
        counter_add(&pool.undone, 1)
        return -EBUSY
""",
                """    if cell & CELL_PIN:
        counter_add(&pool.undone, 1)
        return -EBUSY
    store_release(&pool.cells[handle], cell | CELL_PIN)
""",
            )
        ]
    },
    # Two get the same handle.
    "a free cell is taken without the lock": {
        "pool/pool.pyx": [
            (
                """        cdef int rc = 0
        pthread_mutex_lock(&self.cells_lock)
        handle = self.cells_free
""",
                """        cdef int rc = 0
        handle = self.cells_free
""",
            ),
            (
                """            owned_add(&self.cells_used, 1)
        pthread_mutex_unlock(&self.cells_lock)
""",
                """            owned_add(&self.cells_used, 1)
""",
            ),
        ]
    },
    # A slot is looked at, its object is freed, and another one gets the handle before it is pinned.
    "a block is read without its stripe's lock": {
        "device/blocks.pyx": [
            (
                """        pthread_mutex_lock(&self.stripes[block % STRIPES])
        age = load_relaxed_8(&self.ages[block])
        if age:
            self._read_again(block, age)
        rc = self._load(block, self.get(block), dst if n == BLOCK_SIZE else s.page)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
""",
                """        rc = self._load(block, self.get(block), dst if n == BLOCK_SIZE else s.page)
""",
            ),
            (
                """        cdef block_kind what = slot_kind(slot)
        zr_assert_held(&self.stripes[block % STRIPES])
""",
                """        cdef block_kind what = slot_kind(slot)
""",
            ),
        ]
    },
    # Two that replace the same slot both free what it stood for.
    "a stripe's lock is let go before the slot is stored": {
        "device/blocks.pyx": [
            (
                """            gone = self.get(block)
            if slot or gone:
""",
                """            gone = self.get(block)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        if rc == 0:
            if slot or gone:
""",
            ),
            (
                """                self._count(gone, <uint64_t>-1)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
""",
                """                self._count(gone, <uint64_t>-1)
""",
            ),
        ]
    },
    # What is written to the old place after the copy is lost; what is read there may be overwritten.
    "a mover does not mind a pin": {
        "pool/compaction.pyx": [
            (
                """    if cell & CELL_PIN or not compare_swap(&pool.cells[handle], cell, cell | CELL_PIN):
""",
                """    cell &= ~<uint64_t>CELL_PIN
    if not compare_swap(&pool.cells[handle], load_relaxed(&pool.cells[handle]), cell | CELL_PIN):
""",
            )
        ]
    },
    # The new place is found, and read, before the content is there.
    "a move is committed before the copy": {
        "pool/compaction.pyx": [
            (
                """    memcpy(new + HEADER_SIZE, old + HEADER_SIZE, c.size - HEADER_SIZE)
    zr_point(points.move_copied)
    cell = cell ^ obj ^ <uint64_t>(new - pool.arena.base)
    store_release(&pool.cells[handle], cell if d == c else cell | CELL_LENT)
    zr_point(points.move_cell_stored)
""",
                """    cell = cell ^ obj ^ <uint64_t>(new - pool.arena.base)
    store_release(&pool.cells[handle], cell if d == c else cell | CELL_LENT)
    zr_point(points.move_cell_stored)
    memcpy(new + HEADER_SIZE, old + HEADER_SIZE, c.size - HEADER_SIZE)
    zr_point(points.move_copied)
""",
            )
        ]
    },
    # Its mover has it in hand, and lists it again, or gives it back a second time.
    "a free does not leave an isolated zspage alone": {
        "pool/pool.pyx": [
            (
                """        if self.zspages[span].group != ISOLATED:
            if self.zspages[span].inuse:
""",
                """        if True:
            if self.zspages[span].inuse:
""",
            )
        ]
    },
    # The page of a raw block that is written meanwhile goes with the spare ones.
    "spare pages are given back without their class's lock": {
        "pool/compaction.pyx": [
            (
                """    cdef uint32_t span, gone
    lock_class(c)
    while pool.spares:
""",
                """    cdef uint32_t span, gone
    while pool.spares:
""",
            ),
            (
                """        n += gone
    pthread_mutex_unlock(&c.lock)
    return n
""",
                """        n += gone
    return n
""",
            ),
        ]
    },
    # A free may hand the chunk to another object while it is looked up who holds it.
    "two free the same object at once": {
        "pool/pool.pyx": [
            (
                """            zr_point(points.cell_seen)
            if not cell & CELL_PIN and compare_swap(&self.cells[handle], cell, cell | CELL_PIN):
""",
                """            zr_point(points.cell_seen)
            if not cell & CELL_PIN:
                store_release(&self.cells[handle], cell | CELL_PIN)
""",
            )
        ]
    },
    # What another thread has written to the block meanwhile is lost.
    "a part is written without the stripe's lock in between": {
        "device/blocks.pyx": [
            (
                """            rc = self._load(block, self.get(block), s.page)
        if rc == 0:
""",
                """            rc = self._load(block, self.get(block), s.page)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        pthread_mutex_lock(&self.stripes[block % STRIPES])
        if rc == 0:
""",
            )
        ]
    },
    # Two writes have come meanwhile, and the second has got the handle of before: only its age tells.
    "a block becomes cold if its slot is as before": {
        "device/cooling.pyx": [
            (
                "    stored = load_relaxed_8(&table.ages[block]) == AGE_COOLING\n",
                "    stored = table.get(block) == slot\n",
            )
        ]
    },
    # What it was compressed from is gone, by a write, a trim or a reset.
    "a block becomes cold whatever came meanwhile": {
        "device/cooling.pyx": [
            (
                "    stored = load_relaxed_8(&table.ages[block]) == AGE_COOLING\n",
                "    stored = table.get(block) != 0\n",
            )
        ]
    },
    # What was copied from it is not what it holds any more.
    "a block goes out whatever came meanwhile": {
        "device/writeback.pyx": [
            (
                """        stored = table.get(e.block) == e.slot
        if not e.moves:
            stored = stored and load_relaxed_8(&table.ages[e.block]) == AGE_LEAVING
""",
                """        stored = table.get(e.block) == e.slot
        if not e.moves:
""",
            )
        ]
    },
    # It was written meanwhile, and is in the buffer twice.
    "of a block that was gathered twice the first copy counts": {
        "device/writeback.pyx": [
            ("&self.entries[self.count - 1 - i], extent)", "&self.entries[i], extent)"),
        ]
    },
    # Another thread has written another part of the block meanwhile.
    "a part is merged with what was read from the backing": {
        "device/blocks.pyx": [
            (
                "        if loaded == 0 or self.get(block) != loaded:\n",
                "        if loaded == 0:\n",
            )
        ]
    },
    # It meets changes that are half done.
    "a check does not wait for requests": {
        "system/gate.pxd": [("    while ordered_load(&g.inside):\n", "    while False:\n")]
    },
}
