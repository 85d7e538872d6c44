"""A budget: memory that the devices of a host share. A table in a file that all their servers have mapped.

    | header page | budget, top | slot 0: granted, floor | slot 1 | …      (zramd.contract.budget has the file)

Each server has one slot, and is the only one that writes to it. To be granted more pages it adds them to its own slot first,
then adds up all slots, and takes them back if that is more than the budget. Of two that do so at once, each sees the other's
pages, or one of them does: both may be refused, never are both granted what only one can have. So there is no lock, and
nothing that a server could hold when it is killed: what it leaves in its slot is at least what it has.
"""

cimport cython
from libc.stdint cimport int64_t, uint64_t
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from zramd.core.system cimport points
from zramd.core.system.checks cimport zr_static_assert
from zramd.core.system.locks cimport load_relaxed, ordered_load, ordered_store
from zramd.core.system.points cimport zr_point
from zramd.core.types cimport PAGE_SHIFT

import os

cdef extern from *:
    """
    #ifndef MAP_POPULATE
    #define MAP_POPULATE 0x8000
    #endif
    """
    int MAP_POPULATE

cdef enum:
    TABLE_OFFSET = 1 << 16      # in the file: whole pages of any kernel
    SLOTS = 1 << 10
    MOST_SHIFT = 52             # pages of a slot: more stands only where something has damaged the file
    LEFT_SHARE = 64             # a part in so many of what is left is claimed at once, at most


cdef dict budget_stats(Budget budget):
    """The numbers of a budget by the names of the statistics, as a dict of ints; zeros for None."""
    if budget is None:
        return dict.fromkeys(("budget", "budget_used", "budget_granted"), 0)
    return {"budget": budget.budget, "budget_used": budget.taken, "budget_granted": budget.mine}


@cython.final
cdef class Budget:
    """Slot number `slot` of the budget in the file fd, whose head has been looked at; the slot is the caller's.

    The descriptor is not needed afterwards. Raises MemoryError; ValueError for a slot out of range, and a file too short.
    """

    def __cinit__(self, int fd, uint64_t slot):
        cdef void *start
        zr_static_assert(sizeof(shared) == 64 + SLOTS * 16)
        if slot >= SLOTS:
            raise ValueError(f"slot {slot} is out of range: 0 to {SLOTS - 1}")
        if os.fstat(fd).st_size < TABLE_OFFSET + <int64_t>sizeof(shared):
            raise ValueError(f"a file of {os.fstat(fd).st_size} bytes is not a budget")
        start = mmap(NULL, sizeof(shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, TABLE_OFFSET)
        if start == MAP_FAILED:
            raise MemoryError("the budget cannot be mapped: no address space")
        self.table = <shared *>start
        self.slot = slot
        self.own = &self.table.rooms[slot]
        self.granted = min(ordered_load(&self.own.granted), <uint64_t>1 << MOST_SHIFT)

    def __dealloc__(self):
        # Nothing is given back here: after a fork, another process has the slot as well.
        if self.table != NULL:
            munmap(self.table, sizeof(shared))

    cdef uint64_t limit(self) noexcept nogil:
        """Pages for all."""
        return load_relaxed(&self.table.budget)

    cdef uint64_t floor(self) noexcept nogil:
        """Pages that are kept for this device."""
        return load_relaxed(&self.own.floor)

    cdef sums add_up(self, uint64_t own) noexcept nogil:
        """The sums over all slots, with so many pages granted in our own."""
        cdef sums found
        cdef uint64_t i, granted, floor, top = min(ordered_load(&self.table.top), <uint64_t>SLOTS)
        found.taken = found.granted = 0
        for i in range(max(top, self.slot + 1)):
            granted = own if i == self.slot else ordered_load(&self.table.rooms[i].granted)
            floor = load_relaxed(&self.table.rooms[i].floor)
            # (What is damaged is too much, and no sum of 1024 of these wraps.)
            granted = min(granted, <uint64_t>1 << MOST_SHIFT)
            floor = min(floor, <uint64_t>1 << MOST_SHIFT)
            found.granted += granted
            found.taken += max(granted, floor)
        return found

    cdef bint raise_to(self, uint64_t pages, uint64_t more) noexcept nogil:
        """Have so many pages granted, and up to so many more while there is plenty; False: the budget leaves no room.

        One thread at a time.
        """
        cdef uint64_t taken = self.add_up(max(pages, self.granted)).taken, limit = self.limit()
        if pages <= self.granted:
            return True
        more = min(more, (limit - taken) // LEFT_SHARE if limit > taken else 0)
        return more and self._try(pages + more) or self._try(pages)

    cdef bint _try(self, uint64_t pages) noexcept nogil:
        ordered_store(&self.own.granted, pages)
        zr_point(points.budget_claimed)
        if self.fits(pages):
            self.granted = pages
            zr_point(points.budget_granted)
            return True
        ordered_store(&self.own.granted, self.granted)
        zr_point(points.budget_refused)
        return False

    cdef bint fits(self, uint64_t pages) noexcept nogil:
        """Whether the budget has room for so many pages in this slot.

        What is kept for others has no room. But where they have more than that leaves for all, since the budget was lowered
        or a device with a floor came, what they have counts for who is below the own floor.
        """
        cdef sums now = self.add_up(pages)
        cdef uint64_t limit = self.limit()
        return now.taken <= limit or (pages <= self.floor() and now.granted <= limit)

    cdef void set_granted(self, uint64_t pages) noexcept nogil:
        """Have so many pages, whatever the budget is: fewer than before, or what the device has already."""
        self.granted = pages
        ordered_store(&self.own.granted, pages)

    # --------------------------------------------------------------------------------------------------------
    # for Python, in bytes

    def begin(self, uint64_t floor, uint64_t least):
        """Take the slot, with so many bytes kept for it, and at least so many granted: those that it has already."""
        if self.slot >= ordered_load(&self.table.top):
            ordered_store(&self.table.top, self.slot + 1)
        ordered_store(&self.own.floor, floor >> PAGE_SHIFT)
        self.set_granted(max(self.granted, least >> PAGE_SHIFT))

    def end(self, uint64_t left):
        """Leave the slot to whoever finds so many bytes still taken, 0: to anybody. The device may take no more."""
        ordered_store(&self.own.floor, 0)
        self.set_granted(left >> PAGE_SHIFT)

    def free(self, uint64_t slot):
        """Free the slot of a dead server, whose lock the caller holds. Raises ValueError for one out of range."""
        if slot >= SLOTS:
            raise ValueError(f"slot {slot} is out of range: 0 to {SLOTS - 1}")
        ordered_store(&self.table.rooms[slot].floor, 0)
        ordered_store(&self.table.rooms[slot].granted, 0)

    def claim(self, uint64_t size):
        """Have so many bytes granted, whole pages; False if there is no room. For tests: a device does so by itself."""
        cdef bint done
        with nogil:
            done = self.raise_to(size >> PAGE_SHIFT, 0)
        return done

    @property
    def budget(self):
        """Bytes for all."""
        return self.limit() << PAGE_SHIFT

    @budget.setter
    def budget(self, uint64_t size):
        ordered_store(&self.table.budget, size >> PAGE_SHIFT)

    @property
    def mine(self):
        """Bytes that this device may have."""
        return self.granted << PAGE_SHIFT

    @property
    def taken(self):
        """Bytes that all have, or that are kept for them."""
        return self.add_up(self.granted).taken << PAGE_SHIFT
