"""Requests of any offset and length over a table of blocks, run without the GIL, counted and timed: what a Device serves.

    read, write, trim, zero:  gate -> each block of the range, one after the other -> counters

Requests pass the gate side by side; check and reset have the device alone. A long request makes way between two blocks:
it leaves the gate and enters it again when another thread wants it closed. A request that fails leaves each block with its
old content or its new. What a block is made of is known to blocks.pyx, where an object is to pool.pyx.

Lock order: gate, then those of blocks.pyx.
"""

cimport cython
from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from zramd.core.device.away cimport find_near, load_away, load_near, near, pin_away
from zramd.core.device.backing cimport AWAY
from zramd.core.device.blocks cimport OP_READ, OP_TRIM, OP_WRITE, OP_ZERO, is_touched, op, scratch
from zramd.core.device.slots cimport is_zeros
from zramd.core.system.gate cimport gate_enter, gate_is_closed, gate_leave
from zramd.core.system.latency cimport clock_now, latency_add
from zramd.core.system.locks cimport counter_add, counter_sub, pthread_mutex_destroy, pthread_mutex_init
from zramd.core.types cimport BLOCK_SHIFT, BLOCK_SIZE, SLOTS_PER_PAGE

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    TURN_STEPS = 256        # blocks of a long request, then other real-time threads have the processor: 0.1 to 1 ms
    # NBD's block status flags
    STATE_HOLE = 1
    STATE_ZERO = 2

cdef inline piece pieces_of(uint64_t offset, uint64_t length) noexcept nogil:
    """A walk over a range that is to begin with Served._next."""
    cdef piece p
    p.offset = offset
    p.end = offset + length
    p.block = p.at = p.size = p.steps = 0
    return p

cdef inline bint has_parts(uint64_t offset, uint64_t length) noexcept nogil:
    """Whether a range begins or ends within a block."""
    return ((offset | length) & (BLOCK_SIZE - 1)) != 0


cdef class Served:
    """A table of blocks that serves requests; what it is made of, and all else that is done to it, Device knows."""

    def __cinit__(self, *arguments, **names):
        pthread_mutex_init(&self.gate.lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.gate.lock)

    # --------------------------------------------------------------------------------------------------------
    # whole requests: 0 or -errno of the first block that failed; blocks before it are done

    @cython.final
    cdef void _make_way(self, uint32_t *steps, bint changes) noexcept nogil:
        """Between two blocks of a request: let others have the gate, and now and then the processor."""
        if gate_is_closed(&self.gate):
            if changes:
                counter_add(&self.unfinished, 1)
            gate_leave(&self.gate)
            gate_enter(&self.gate)
            if changes:
                counter_sub(&self.unfinished, 1)
        steps[0] += 1
        if steps[0] % TURN_STEPS == 0 and self.urgent:
            sched_yield()   # to real-time threads: this one would have it for 100 ms before one that is as urgent

    @cython.final
    cdef uint64_t _begin(self) noexcept nogil:
        """Enter the gate for a request; when it came. Waiting at the gate is part of what the client waits for.

        At work until _end: check and reset wait for it, the compactor makes way.
        """
        cdef uint64_t began = clock_now()
        gate_enter(&self.gate)
        return began

    @cython.final
    cdef void _end(self, op kind, uint64_t began) noexcept nogil:
        """Count a request, failed or not, and leave the gate: reset is never between the two."""
        latency_add(&self.table.counters.latencies[<int>kind], began)
        gate_leave(&self.gate)

    @cython.final
    cdef bint _next(self, piece *p, bint changes) noexcept nogil:
        """Go on to the next piece of a range: a block, or the part of one at an end; False: that was the last.

        Between two pieces others are let in.
        """
        p.offset += p.size
        if p.offset >= p.end:
            return False
        if p.size:
            self._make_way(&p.steps, changes)
        p.block = p.offset >> BLOCK_SHIFT
        p.at = p.offset & (BLOCK_SIZE - 1)
        p.size = min(<uint64_t>(BLOCK_SIZE - p.at), p.end - p.offset)
        return True

    @cython.final
    cdef void _look_ahead(self, const piece *p, uint64_t soon, uint32_t most) noexcept nogil:
        """Ask the cache for the first `most` bytes of the object of a block that comes soon, and for what leads to a later
        one's.

        Cells and objects of neighbouring blocks are anywhere, so the processor cannot guess where the next ones are. With
        much stored each of them comes from memory, one after the other, and these waits are hidden behind other blocks.
        """
        cdef uint64_t last = (p.end - 1) >> BLOCK_SHIFT
        if p.block + soon + 2 <= last:
            self.table.prefetch_cell(p.block + soon + 2)
        if p.block + soon <= last:
            self.table.prefetch_object(p.block + soon, most)

    @cython.final
    cdef int _write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil:
        cdef piece p = pieces_of(offset, length)
        cdef int rc = 0
        cdef scratch *s = self.table.scratch_take()
        if s == NULL:
            rc = -ENOMEM
        while rc == 0 and self._next(&p, True):
            if p.size == BLOCK_SIZE:
                rc = self.table.write_block(p.block, src + (p.offset - offset), s)
            else:
                rc = self.table.merge_block(p.block, p.at, src + (p.offset - offset), p.size, s)
                if rc == AWAY:
                    rc = self._merge_away(&p, src + (p.offset - offset), s)
        if s != NULL:
            self.table.scratch_give(s)
        if rc:
            counter_add(&self.table.counters.failed_writes, 1)
        else:
            counter_add(&self.table.counters.written_bytes, length)
        return rc

    @cython.final
    cdef int _read(self, char *dst, uint64_t offset, uint64_t length, bint waits) noexcept nogil:
        """As all of these; AWAY, and nothing is counted: it does not wait for the disk, and a block of the range is out."""
        cdef piece p = pieces_of(offset, length)
        cdef int rc = 0
        cdef scratch *s = NULL
        if has_parts(offset, length):
            s = self.table.scratch_take()
            if s == NULL:
                rc = -ENOMEM
        while rc == 0 and self._next(&p, False):
            if p.offset + p.size < p.end:
                self._look_ahead(&p, 1, BLOCK_SIZE)
            rc = self.table.read_block(p.block, p.at, dst + (p.offset - offset), p.size, s)
            if rc == AWAY and waits:
                rc = self._read_away(&p, dst + (p.offset - offset), &s)
        if s != NULL:
            self.table.scratch_give(s)
        if rc < 0:
            counter_add(&self.table.counters.failed_reads, 1)
        elif rc == 0:
            counter_add(&self.table.counters.read_bytes, length)
        return rc

    @cython.final
    cdef int _zero(self, uint64_t offset, uint64_t length, bint hole, bint exact) noexcept nogil:
        """Make the blocks of a range holes, or allocated zeros. Parts of blocks at its ends: zeroed if exact, else left."""
        cdef piece p = pieces_of(offset, length)
        cdef uint64_t holes
        cdef int rc = 0
        cdef scratch *s = NULL
        if exact and has_parts(offset, length):
            s = self.table.scratch_take()
            if s == NULL:
                return -ENOMEM
        while rc == 0 and self._next(&p, True):
            if p.size == BLOCK_SIZE and hole and not is_touched(&self.table.touched[p.block // SLOTS_PER_PAGE]):
                # A client trims whole devices: go over what was never written a page of slots at a time.
                holes = min(SLOTS_PER_PAGE - p.block % SLOTS_PER_PAGE, (p.end - p.offset) >> BLOCK_SHIFT)
                counter_add(&self.table.counters.notify_free, holes)
                p.size = <uint32_t>(holes << BLOCK_SHIFT)
            elif p.size == BLOCK_SIZE:
                if p.offset + p.size < p.end and self.table.get(p.block):
                    self._look_ahead(&p, 2, 1)      # a block takes half as long as to read one
                rc = self.table.zero_block(p.block, hole)
                counter_add(&self.table.counters.notify_free, 1)
            elif exact and (self.table.get(p.block) or not hole):
                rc = self.table.merge_block(p.block, p.at, NULL, p.size, s)
                if rc == AWAY:
                    rc = self._merge_away(&p, NULL, s)
        if s != NULL:
            self.table.scratch_give(s)
        return rc

    @cython.final
    cdef int _load_away(self, uint64_t block, scratch *s, uint64_t *slot, bint changes) noexcept nogil:
        """Read a block that is out into s.page, and leave its slot pinned: 0; AWAY: it is not out any more; -errno.

        Whoever wants the device alone does not wait for the disk, and so nobody else does behind him: the gate is left
        meanwhile.
        """
        cdef int rc
        if not pin_away(self.table, block, slot):
            return AWAY
        if changes:
            counter_add(&self.unfinished, 1)
        gate_leave(&self.gate)
        rc = load_away(self.table, block, slot[0], s)
        gate_enter(&self.gate)
        if changes:
            counter_sub(&self.unfinished, 1)
        if rc:
            self.table.backing.unpin(slot[0])
        return rc

    @cython.final
    cdef uint32_t _read_near(self, const piece *p, char *dst, scratch *s) noexcept nogil:
        """Read the next blocks of a range by one read of the disk, as far as they are out and it reaches them: how many.

        0: so it cannot be done, and each is to be read by itself, which also tells what is the matter.
        """
        cdef near found
        cdef uint32_t done
        if not find_near(self.table, p.block, (p.end - p.offset) >> BLOCK_SHIFT, &found):
            return 0
        gate_leave(&self.gate)
        done = load_near(self.table, &found, dst, s)
        gate_enter(&self.gate)
        self.table.backing.unpin(found.slots[0])
        return done

    @cython.final
    cdef int _read_away(self, piece *p, char *dst, scratch **s) noexcept nogil:
        """Read a piece of a block that was found to be out, or a few whole blocks from it on: p.size says how much it was.

        s: the request's scratch, which is taken if there is none.
        """
        cdef uint64_t slot = 0
        cdef uint32_t done
        cdef int rc = AWAY
        if s[0] == NULL:
            s[0] = self.table.scratch_take()
            if s[0] == NULL:
                return -ENOMEM
        if p.size == BLOCK_SIZE and p.end - p.offset >= 2 * BLOCK_SIZE:
            done = self._read_near(p, dst, s[0])
            if done:
                p.size = done << BLOCK_SHIFT
                return 0
        while rc == AWAY:
            rc = self._load_away(p.block, s[0], &slot, False)
            if rc == 0:
                self.table.backing.unpin(slot)
                memcpy(dst, s[0].page + p.at, p.size)
            elif rc == AWAY:
                rc = self.table.read_block(p.block, p.at, dst, p.size, s[0])
        return rc

    @cython.final
    cdef int _merge_away(self, const piece *p, const char *src, scratch *s) noexcept nogil:
        """Change a part of a block that was found to be out."""
        cdef uint64_t slot = 0
        cdef int rc = AWAY
        while rc == AWAY:
            rc = self._load_away(p.block, s, &slot, True)
            if rc == 0:
                # While it is pinned nothing else can have this slot: if the block still has it, it is what was read.
                rc = self.table.merge_loaded(p.block, p.at, src, p.size, s, slot)
                self.table.backing.unpin(slot)
            elif rc == AWAY:
                rc = self.table.merge_block(p.block, p.at, src, p.size, s)
        return rc

    @cython.final
    cdef uint64_t _extent(self, uint64_t offset, uint64_t end, int *kind) noexcept nogil:
        """Where the run of blocks of one kind that offset is in ends, at most end; kind: NBD's hole and zero flags.

        Called inside of the gate.
        """
        cdef uint32_t steps = 0
        cdef uint64_t block = offset >> BLOCK_SHIFT, last = (end + BLOCK_SIZE - 1) >> BLOCK_SHIFT, slot
        cdef int this
        kind[0] = -1
        while block < last:
            slot = self.table.get(block)
            this = STATE_HOLE | STATE_ZERO if slot == 0 else STATE_ZERO if is_zeros(slot) else 0
            if kind[0] < 0:
                kind[0] = this
            if this != kind[0]:
                break
            if block % SLOTS_PER_PAGE == 0:
                self._make_way(&steps, False)
            if not is_touched(&self.table.touched[block // SLOTS_PER_PAGE]):
                block = (block // SLOTS_PER_PAGE + 1) * SLOTS_PER_PAGE
            else:
                block += 1
        return min(block << BLOCK_SHIFT, end)

    # --------------------------------------------------------------------------------------------------------
    # what clients ask for: 0 or -errno, -EINVAL beyond the end of the device

    @cython.final
    cdef void expect_next(self, uint64_t offset) noexcept nogil:
        """The next request is for the block at offset: ask the cache for its object. It helps where expect_later came first.

        Only a hint, for who has several requests at once: any offset may be said, and nothing need be asked for. It is given
        outside of the gate, so a reset may be at work: what that empties stays mapped, and reads as zeros.
        """
        if offset < self.disksize:
            self.table.prefetch_object(offset >> BLOCK_SHIFT, BLOCK_SIZE)

    @cython.final
    cdef void expect_later(self, uint64_t offset) noexcept nogil:
        """The request after the next one is for the block at offset: ask the cache for what leads to its object."""
        if offset < self.disksize:
            self.table.prefetch_cell(offset >> BLOCK_SHIFT)

    @cython.final
    cdef bint _fits(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Whether a range is on the device; one that is not is counted."""
        if offset > self.disksize or length > self.disksize - offset:
            counter_add(&self.table.counters.invalid_io, 1)
            return False
        return True

    @cython.final
    cdef int serve_read(self, char *dst, uint64_t offset, uint64_t length) noexcept nogil:
        cdef int rc
        cdef uint64_t began
        if not self._fits(offset, length):
            return -EINVAL
        began = self._begin()
        rc = self._read(dst, offset, length, True)
        self._end(OP_READ, began)
        return rc

    @cython.final
    cdef int try_read(self, char *dst, uint64_t offset, uint64_t length, uint64_t *began) noexcept nogil:
        """As serve_read, for a thread that must not wait for a disk.

        AWAY: a block of the range is out. Then read_away has to be called, by a thread that may wait, with `began`.
        """
        cdef int rc
        if not self._fits(offset, length):
            return -EINVAL
        began[0] = self._begin()
        rc = self._read(dst, offset, length, False)
        if rc == AWAY:
            gate_leave(&self.gate)
        else:
            self._end(OP_READ, began[0])
        return rc

    @cython.final
    cdef int read_away(self, char *dst, uint64_t offset, uint64_t length, uint64_t began) noexcept nogil:
        """Serve a read of what try_read found to be out; 0 or -errno. It is timed from when that came."""
        cdef int rc
        gate_enter(&self.gate)
        rc = self._read(dst, offset, length, True)
        self._end(OP_READ, began)
        return rc

    @cython.final
    cdef int serve_write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil:
        cdef int rc
        cdef uint64_t began
        if not self._fits(offset, length):
            return -EINVAL
        began = self._begin()
        rc = self._write(src, offset, length)
        self._end(OP_WRITE, began)
        return rc

    @cython.final
    cdef int serve_trim(self, uint64_t offset, uint64_t length) noexcept nogil:
        cdef uint64_t began
        if not self._fits(offset, length):
            return -EINVAL
        began = self._begin()
        self._zero(offset, length, True, False)
        self._end(OP_TRIM, began)
        return 0

    @cython.final
    cdef int serve_zero(self, uint64_t offset, uint64_t length, bint may_trim) noexcept nogil:
        cdef int rc
        cdef uint64_t began
        if not self._fits(offset, length):
            return -EINVAL
        began = self._begin()
        rc = self._zero(offset, length, may_trim, True)
        if rc:
            counter_add(&self.table.counters.failed_writes, 1)
        self._end(OP_ZERO, began)
        return rc
