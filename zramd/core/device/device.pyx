"""The device, as Python sees it: requests (serving.pyx), and all that is done to it as a whole, over a table of blocks.

What a device is to keep beside its blocks, its state has: state_words. Lock order: gate, then those of blocks.pyx.
"""

cimport cython
from libc.errno cimport EAGAIN, EBADMSG, EDQUOT, EINVAL, EIO, EREMOTEIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from zramd.core.device.ages cimport census, sweep
from zramd.core.device.backing cimport Backing
from zramd.core.device.blocks cimport OPS, Blocks, counters, op, scratch
from zramd.core.device.codec cimport codec_text
from zramd.core.device.cooling cimport cool
from zramd.core.device.faults cimport find_table_fault
from zramd.core.device.numbers cimport describe_block, describe_blocks, requests, table_latencies, table_stats
from zramd.core.system.checks cimport zr_static_assert
from zramd.core.system.gate cimport gate_close, gate_enter, gate_hold, gate_leave, gate_open, gate_release
from zramd.core.system.latency cimport BUCKETS, FIRST_BOUND, use_ticks
from zramd.core.system.locks cimport (
    load_relaxed,
    load_relaxed_8,
    mutex_inherit,
    owned_add,
    store_relaxed,
    store_release,
)
from zramd.core.system.process cimport be_calm, be_urgent
from zramd.core.device.recovery cimport Recovery
from zramd.core.memory.budget cimport Budget, budget_stats
from zramd.core.memory.region cimport KEPT_DEVICE, KEPT_POOL, KEPT_STATE, Memory
from zramd.core.pool.compaction cimport compact_begin, compact_end, compact_run, freeable_pages, release_stock_alone
from zramd.core.pool.lending cimport compact_whole
from zramd.core.pool.zsmalloc cimport pool_stats, pool_table
from zramd.core.types cimport BLOCK_SHIFT, BLOCK_SIZE, PAGE_SHIFT, pages_of

import os

from zramd.core.pool.size_classes import pool_layout
from zramd.errors import CorruptionError, error_from

MAX_DISKSIZE = 4 << 40      # bytes: 2**30 blocks; handles have 31 bits

cdef enum:
    EXTENTS_MAX = 4096      # in one answer: the client asks again for the rest
    EXTENTS_AT_ONCE = 64    # without the GIL

cdef int time_by_ticks() except -1:
    """Time requests by the processor's time stamp counter if the kernel trusts it: it keeps watching it."""
    try:
        with open("/sys/devices/system/clocksource/clocksource0/current_clocksource") as source:
            if source.read() == "tsc\n":
                use_ticks()
    except OSError:
        pass  # no sysfs: the system's clock is right too
    return 0

time_by_ticks()


def state_layout(uint64_t disksize):
    """What a state file for a device of disksize bytes, a multiple of 4096, must agree on: names -> numbers.

    "bytes" is the size of the file.
    """
    cdef uint64_t blocks = disksize >> BLOCK_SHIFT
    return {"disksize": disksize, "slots": blocks} | pool_layout(blocks)


def kept_out(int fd):
    """What a state, which a server may be using, says of blocks that are out: (how many, the backing's id, data_id).

    Raises OSError; (0, '', '') when the state is too short to say."""
    cdef state_words words
    cdef counters numbers
    cdef bytes kept = os.pread(fd, sizeof(words), KEPT_STATE)
    cdef bytes counted = os.pread(fd, sizeof(numbers), KEPT_DEVICE)
    if len(kept) < <Py_ssize_t>sizeof(words) or len(counted) < <Py_ssize_t>sizeof(numbers):
        return 0, "", ""
    memcpy(&words, <const char *>kept, sizeof(words))
    memcpy(&numbers, <const char *>counted, sizeof(numbers))
    return numbers.out_pages, hexadecimal(words.backing_id), hexadecimal(words.data_id)


cdef str hexadecimal(uint64_t *name):
    return f"{name[1]:016x}{name[0]:016x}"


@cython.final
cdef class Device(Served):
    """A block device of disksize bytes (rounded up to 4096) that reads as zeros until it is written.

    mem_limit: most bytes of pages the pool may use, 0: no limit. codec, level: how blocks are compressed that are written:
    lz4, lz4hc, zstd or none at a level of its own, 0: its usual one; what a state has may be of others. cold_level: zstd's,
    for `cool`; 0: nothing is made cold.
    state: descriptor, the caller's to close, of the file that holds all data (see zramd.server.state); what is in it is
    taken over, and progress(done, total) called about every second meanwhile. -1: memory of this process.
    verify: store a checksum with each block, and check it on each read; a state is all with or all without.
    keep_reserve: what the last server had made ready in the state stays so, for reserve_start, which must follow.
    cold_level: zstd's, 1 to 19, for what `cool` compresses again; 0: it compresses nothing.
    mark_cold: called with a state's descriptor before its first cold block, which a zramd of before would not know.
    backing: where blocks can be written to that nobody asks for; None: nowhere. backing_id: the name that its superblock
    has. mark_out: as mark_cold, before the first block goes out.
    Raises BackingError for a state whose blocks are out, with another backing or none: then nothing in it was changed.
    Raises ValueError for a size out of range, also of the state; MemoryError when the address space cannot be had;
    PoolFullError when the state's file system has no room for its first pages;
    CorruptionError when the state contradicts itself (then nothing in it was changed).
    Every method may be called from any number of threads.
    """

    def __cinit__(self, uint64_t disksize, *, uint64_t mem_limit=0, str codec="lz4", int level=0, int state=-1,
                  bint verify=False, progress=None, int cold_level=0, mark_cold=None, Backing backing=None,
                  str backing_id="", mark_out=None, bint keep_reserve=False):
        cdef Memory memory
        cdef Recovery recovery
        zr_static_assert(sizeof(state_words) <= KEPT_POOL - KEPT_STATE)
        if not 0 < disksize <= <uint64_t>MAX_DISKSIZE:
            raise ValueError(f"disksize {disksize} is out of range: 1 to {MAX_DISKSIZE} bytes")
        self.blocks = (disksize + BLOCK_SIZE - 1) >> BLOCK_SHIFT
        self.disksize = self.blocks << BLOCK_SHIFT
        self.memory = memory = Memory(state)
        self.kept = <state_words *>memory.kept(KEPT_STATE)
        self.table = Blocks(self.blocks, memory, codec, level, verify, cold_level, backing)
        self.pool = self.table.pool
        if state >= 0:
            if os.fstat(state).st_size != memory.end:
                raise ValueError(f"a state of {os.fstat(state).st_size} bytes is not one of {memory.end} bytes")
            recovery = Recovery(self.table, self.kept.backing_id[0] != 0,
                                backing is not None and backing_id == self.backing_id, keep_reserve)
            recovery.run(progress)
            self.recovered = recovery.numbers()
            self.mark_cold = mark_cold
            self.mark_out = mark_out
            if self.table.hot_marks:
                self._expect_cold()
            if self.kept.loading:
                self.reset()
                self.kept.loading = 0
                self.dropped = True
        # A limit that was changed at work stays, until another one is asked for than the last time.
        if self.kept.limit_asked == mem_limit + 1:
            self.pool.set_mem_limit(self.kept.limit, cold_level > 0)
        else:
            self.mem_limit = mem_limit
            self.kept.limit_asked = mem_limit + 1
        if not self.kept.data_id[0]:
            self._name_data()

    def _expect_cold(self):
        """From now on there may be cold blocks. Raises what mark_cold does."""
        if self.mark_cold is not None:
            self.mark_cold(self.memory.fd)
            self.mark_cold = None

    def _expect_out(self):
        """From now on blocks may be out. Raises what mark_out does."""
        if self.mark_out is not None:
            self.mark_out(self.memory.fd)
            self.mark_out = None

    def _name_data(self):
        cdef bytes name = os.urandom(sizeof(self.kept.data_id))
        memcpy(self.kept.data_id, <const char *>name, sizeof(self.kept.data_id))
        self.kept.data_id[0] |= 1

    @property
    def data_id(self):
        """Names the data that the device holds, as hexadecimal digits: the same name, the same data, also in a state that
        was taken over. A device begins with a new one when it is empty, reset, or loaded."""
        return hexadecimal(self.kept.data_id)

    @property
    def backing_id(self):
        """The name by which the backing is this device's; zeros: there is none that is."""
        return hexadecimal(self.kept.backing_id)

    def claim_backing(self, str backing_id=""):
        """Make backing_id, 32 hexadecimal digits of an odd number, the name by which the backing is this device's, once its
        superblock says so; "": data_id. Nothing may be out."""
        cdef object name = int(backing_id or self.data_id, 16)
        self.kept.backing_id[0] = 0         # not to be half the one name and half the other after a crash
        store_release(&self.kept.backing_id[1], name >> 64)
        store_release(&self.kept.backing_id[0], name & 0xffffffffffffffff)

    @property
    def budget(self):
        """(bytes that may be written to the backing, seconds of the boot's clock when it was so), kept in the state."""
        return load_relaxed(&self.kept.budget_left), load_relaxed(&self.kept.budget_at)

    @budget.setter
    def budget(self, left_at):
        store_relaxed(&self.kept.budget_left, left_at[0])
        store_relaxed(&self.kept.budget_at, left_at[1])

    @property
    def verify(self):
        """Whether a checksum is stored with each block and checked on each read."""
        return self.table.verify

    @property
    def codec(self):
        """The name of what compresses blocks that are written."""
        return codec_text(&self.table.hot)

    @property
    def level(self):
        """That codec's; lz4's is its acceleration: 1 compresses best."""
        return self.table.hot.level

    # --------------------------------------------------------------------------------------------------------
    # for Python

    cdef str culprit(self, int rc, uint64_t offset, uint64_t length):
        """Which block of a range that was read does not match its checksum, as the end of a sentence."""
        cdef uint64_t block = load_relaxed(&self.table.counters.corrupt_block) - 1
        cdef bint is_known = rc == -EIO or rc == -EREMOTEIO or rc == -EBADMSG
        if not is_known or not offset >> BLOCK_SHIFT <= block <= (offset + length) >> BLOCK_SHIFT:
            return ""
        return f", block {block}"

    @property
    def corrupt_block(self):
        """The last block that could not be read because its object was changed in memory; -1: there was none."""
        return <int64_t>load_relaxed(&self.table.counters.corrupt_block) - 1

    def read(self, buf, uint64_t offset):
        """Fill a writable buffer from offset. Raises CorruptObjectError; ValueError beyond the device's end."""
        cdef Py_buffer view
        cdef int rc
        PyObject_GetBuffer(buf, &view, PyBUF_WRITABLE)
        with nogil:
            rc = self.serve_read(<char *>view.buf, offset, view.len)
        PyBuffer_Release(&view)
        if rc:
            raise error_from(rc, f"read of {view.len} bytes at {offset}{self.culprit(rc, offset, view.len)}")

    def write(self, buf, uint64_t offset):
        """Write a buffer to offset. Raises PoolFullError when mem_limit, or the state's file system, leaves no room even
        after compaction (then each block has its old content or its new); ValueError beyond the device's end."""
        cdef Py_buffer view
        cdef int rc
        PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
        with nogil:
            rc = self.serve_write(<const char *>view.buf, offset, view.len)
        PyBuffer_Release(&view)
        if rc:
            raise error_from(rc, f"write of {view.len} bytes at {offset}{self.culprit(rc, offset, view.len)}")

    def trim(self, uint64_t offset, uint64_t length):
        """Free the whole blocks of a range: they are holes and read as zeros. Parts of blocks stay as they are."""
        cdef int rc
        with nogil:
            rc = self.serve_trim(offset, length)
        if rc:
            raise error_from(rc, f"trim of {length} bytes at {offset}")

    def zero(self, uint64_t offset, uint64_t length, bint may_trim=True):
        """Zero a range, to the byte. may_trim: whole blocks become holes, else allocated zeros; neither takes memory.

        Raises PoolFullError when no room is left for a part of a block that has to be merged, or for a slot.
        """
        cdef int rc
        with nogil:
            rc = self.serve_zero(offset, length, may_trim)
        if rc:
            raise error_from(rc, f"zeroing of {length} bytes at {offset}")

    def extents(self, uint64_t offset, uint64_t length, bint one=False):
        """What is stored in a range: tuples (offset, length, kind), kind 0 data, 2 allocated zeros, 3 a hole (NBD's flags).

        They follow each other from offset on, neighbours differ in kind; at most 4096 of them, one: only the first.
        """
        cdef uint64_t stops[EXTENTS_AT_ONCE]
        cdef int kinds[EXTENTS_AT_ONCE]
        cdef uint64_t end = offset + length, at
        cdef int i, n, left = 1 if one else EXTENTS_MAX
        if not self._fits(offset, length):
            raise error_from(-EINVAL, f"extents of {length} bytes at {offset}")
        extents = []
        while offset < end and left:
            # Where other threads hold the GIL for long, each time that it is to be had again takes milliseconds.
            with nogil:
                at, n = offset, 0
                while at < end and n < min(left, <int>EXTENTS_AT_ONCE):
                    gate_enter(&self.gate)
                    at = stops[n] = self._extent(at, end, &kinds[n])
                    gate_leave(&self.gate)
                    n += 1
            for i in range(n):
                extents.append((offset, stops[i] - offset, kinds[i]))
                offset = stops[i]
            left -= n
        return extents

    def compact(self, uint64_t budget=0):
        """Move about budget bytes of objects, 0: until nothing is freeable; returns the number of pages freed.

        A real-time thread is an ordinary one meanwhile, here and in release_stock and check.
        """
        cdef uint64_t freed
        cdef int priority
        with nogil:
            priority = be_calm()
            freed = compact_run(self.pool, budget, <uint64_t>-1) if budget else compact_whole(self.pool)
            be_urgent(priority)
        return freed

    def sweep(self, bint coarse=False):
        """Let every block grow older: see `ages`."""
        cdef census found
        with nogil:
            sweep(self.table, coarse, True, 0, &found)

    def ages(self):
        """How many blocks have each age, a list of 256: sweeps since a request asked for them; from 128 on coarse ones."""
        cdef uint64_t counts[256]
        cdef uint64_t block
        memset(counts, 0, sizeof(counts))
        with nogil:
            for block in range(self.blocks):
                if self.table.get(block):
                    counts[load_relaxed_8(&self.table.ages[block])] += 1
        return [counts[i] for i in range(256)]

    def cool(self, uint64_t first, uint64_t count, uint32_t threshold=0, uint8_t age=0):
        """Make blocks cold that are raw, or have a payload of threshold bytes or more, and are old enough; (how many,
        payload bytes less).

        The device must have a cold level. Stops where there is no room for a block's old and new payload at once, and
        where half of a reserve is left, which is for requests.
        """
        cdef uint64_t block, done = 0, saved = 0
        cdef int rc = 0
        cdef scratch *s
        if not self.table.cold.level:
            raise ValueError("the device has no cold level")
        self._expect_cold()
        s = self.table.scratch_take()
        if s == NULL:
            raise MemoryError("no memory to compress in")
        with nogil:
            for block in range(first, first + min(count, self.blocks - min(first, self.blocks))):
                gate_enter(&self.gate)
                rc = cool(self.table, block, threshold, age, s.page, s.out)
                gate_leave(&self.gate)
                if rc > 0:
                    done += 1
                    saved += rc
                elif rc and rc != -EAGAIN and rc != -EIO:
                    break
        self.table.scratch_give(s)
        return done, saved

    def release_stock(self):
        """Give the empty pages that are kept for the next write back to the operating system; returns how many."""
        cdef uint64_t n
        cdef int priority
        with nogil:
            priority = be_calm()
            n = release_stock_alone(self.pool)
            be_urgent(priority)
        return n

    def inherit_priority(self):
        """From now on each lock passes its waiter's priority on to its holder, and a long request of a real-time thread
        makes way for others. No other thread may use the device yet. Raises OSError."""
        cdef int rc = mutex_inherit(&self.gate.lock) or self.table.inherit_priority()
        if rc:
            raise OSError(rc, os.strerror(rc))
        self.urgent = True

    def reserve_start(self, uint64_t size):
        """Make every table resident and keep size bytes of pages ready, so that requests need no memory any more.

        Then a thread must be in reserve_keep. Raises MemoryError when the system, or the state's file system, does not give
        as much.
        """
        cdef int rc
        with nogil:
            gate_close(&self.gate)      # check looks at what is made resident here
            rc = self.table.populate()
            gate_open(&self.gate)
            if rc == 0:
                rc = self.pool.arena.reserve_start(pages_of(size))
        if rc:
            why = "file system of the state is too full" if rc == -EDQUOT else "system refuses memory"
            raise MemoryError(f"the {why} for the tables or for a reserve of {size} bytes")

    def reserve_keep(self):
        """Keep the reserve full, and no fuller, until reserve_stop: the work of one thread, which needs no GIL for it."""
        with nogil:
            self.pool.arena.reserve_keep()

    def reserve_stop(self):
        """Make the thread in reserve_keep return."""
        with nogil:
            self.pool.arena.reserve_stop()

    def pressure(self):
        """What the compactor looks at: (freeable pages, pages used, mem_limit in pages or 0, requests done, in flight,
        share of the budget that is taken, 0: none, or the device does not have what is kept for it).
        """
        cdef Budget budget = self.pool.arena.limits.budget
        taken = 0.0
        if budget is not None and budget.granted > budget.floor() and budget.limit():
            taken = budget.add_up(budget.granted).taken / <double>budget.limit()
        return (
            freeable_pages(self.pool),
            load_relaxed(&self.pool.arena.limits.pages),
            load_relaxed(&self.pool.arena.limits.mem_limit),
            sum([requests(self.table, <op>kind) for kind in range(OPS)]),
            load_relaxed(&self.gate.inside),
            taken,
        )

    def join(self, Budget budget not None):
        """Take no more memory than this grants, from now on; before anybody else uses the device."""
        self.pool.arena.limits.join(budget)

    def tidy_budget(self):
        """Let the other devices have what the budget has granted and is not needed: the work of one thread."""
        with nogil:
            self.pool.tidy_budget()

    def leave_budget(self):
        """Take no more memory, as if the pool was full; returns the bytes of pages that there are."""
        return self.pool.arena.limits.leave() << PAGE_SHIFT

    @property
    def mem_limit(self):
        """Most bytes of pages the pool may use, 0: no limit; what is stored already stays when it is lowered."""
        return self.pool.mem_limit()

    @mem_limit.setter
    def mem_limit(self, uint64_t limit):
        self.pool.set_mem_limit(limit, self.table.cold.level > 0)
        self.kept.limit = limit

    def counters(self):
        """Every number that is kept, by the names of the statistics, as a dict of ints. Nothing is waited for."""
        cdef dict recovered = self.recovered
        own = {"disksize": self.disksize, "requests_inflight": load_relaxed(&self.gate.inside)}
        own |= budget_stats(self.pool.arena.limits.budget)
        if self.table.backing is not None:
            own |= self.table.backing.numbers()
        return pool_stats(self.pool) | table_stats(self.table) | recovered | own

    @property
    def latency_bounds(self):
        """Upper bounds of the buckets of latencies, in nanoseconds; the last bucket has none."""
        return tuple([FIRST_BOUND << i for i in range(BUCKETS - 1)])

    def latencies(self):
        """How long requests took, failed ones too: by operation (their nanoseconds together, requests in each bucket)."""
        return table_latencies(self.table)

    def classes(self):
        """zsmalloc's table, see Zsmalloc.table."""
        return pool_table(self.pool)

    def block(self, uint64_t number):
        """What stands for a block, as a dict. `kind` is hole, same (one repeated word), lz4, zstd, raw, out, or lost.

        same: word, handle (0: the word is 0 and needs none). lz4, zstd and raw: handle, payload_bytes, obj (bytes into the
        arena), zspage, chunk (of the zspage), class_index, class_size (bytes of a chunk), zspage_inuse and zspage_objs
        (chunks used and in all), zspage_pages (resident ones). An object may move at any time.
        out: payload_bytes, codec (lz4, zstd or raw), place (of its record on the backing, in bytes).
        Raises ValueError beyond the device's end; CorruptionError.
        """
        if number >= self.blocks:
            raise ValueError(f"block {number} is not on the device, which has blocks 0 to {self.blocks - 1}")
        with nogil:
            gate_hold(&self.gate)
        try:
            return describe_block(self.table, number)
        finally:
            gate_release(&self.gate)

    def block_state(self, buf, uint64_t first, uint64_t now, uint64_t sweep_seconds):
        """Fill a writable buffer with lines of zram's block_state, for stored blocks from first on: (bytes written, next).

        next: the block to go on with, the number of blocks at the end. now: seconds on the clock that is shown. Each call
        holds check and reset up for 0.1 ms, and no request. Blocks that nobody has asked for since the start seem to be as
        old as the start.
        """
        cdef Py_buffer view
        cdef uint32_t written
        PyObject_GetBuffer(buf, &view, PyBUF_WRITABLE)
        with nogil:
            written = describe_blocks(self.table, &self.gate, <char *>view.buf, <uint32_t>view.len, &first, now,
                                      sweep_seconds)
        PyBuffer_Release(&view)
        return written, min(first, self.blocks)

    def reset_mem_used_max(self):
        """Forget the peak: mem_used_max starts again from what is used now."""
        self.pool.arena.limits.reset_peak()

    def reset(self):
        """Drop all data and set all counters to 0; mem_limit stays. Waits for requests at work; a long one goes on after.

        With a reserve it raises MemoryError or PoolFullError when the tables cannot be made resident again: then
        all is dropped, but requests may have to wait for memory.
        """
        cdef int rc = 0
        self._name_data()  # first: what is left after a crash is not what was there before
        with nogil:
            gate_close(&self.gate)
            compact_begin(self.pool)
            owned_add(&self.epoch, 1)
            self.table.clear()
            if load_relaxed(&self.pool.arena.reserve):
                rc = self.table.populate()
            compact_end(self.pool)
            gate_open(&self.gate)
        if rc:
            raise error_from(rc, "the data is dropped, but the tables of an empty device are not resident")

    def check(self):
        """Walk every structure. Raises CorruptionError when one contradicts another.

        Requests wait for a piece of the walk, and at its end for the counts and lists.
        """
        cdef uint64_t where = 0
        cdef const char *wrong
        cdef int priority
        with nogil:
            priority = be_calm()
            wrong = find_table_fault(self.table, &self.gate, &where)
            be_urgent(priority)
        if wrong != NULL:
            raise CorruptionError(f"{wrong.decode()} (at {where})")
