"""The backing: a block device or a file, on which payloads of blocks lie that nobody asks for. All of what is on it is this:

    | superblock | extent | extent | …        of 64 KiB each
    extent       | head | record | record …   written whole, once, from its begin on
    record       | block, size and kind, checksum | payload |     begins at a granule

No map of it is kept anywhere. A slot leads to its record by the number of the granule that it begins at; what no slot leads
to is free. So a block becomes free without any I/O, and after a crash a walk over the slots finds all that is in use. In
memory an extent has one word: the bytes of its records that live, how many threads read it, and whether it is being
written or was found to be bad. It is written again only when nothing of it lives and nobody reads it.

Reads and writes pass the page cache by (O_DIRECT): it is memory that is to be saved. What is in the superblock,
zramd.server.backingfile knows.
"""

cimport cython
from libc.errno cimport EBADMSG
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from zramd.core.device.checksum cimport checksum
from zramd.core.device.slots cimport SLOT_SIZE_MASK, out_what, slot_bytes, slot_handle, slot_sum, sum_low
from zramd.core.memory.region cimport Region
from zramd.core.system.locks cimport compare_swap, counter_add, counter_sub, load_acquire, load_relaxed, store_relaxed
from zramd.core.types cimport BLOCK_SIZE

import os

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <unistd.h>
    #define fetch_sub(p, n) __atomic_fetch_sub((p), (n), __ATOMIC_ACQ_REL)
    #define fetch_and(p, n) __atomic_fetch_and((p), (n), __ATOMIC_ACQ_REL)
    #define fetch_or(p, n) __atomic_fetch_or((p), (n), __ATOMIC_ACQ_REL)
    /* All of it, or -errno; the end of the file is EIO: it was longer. */
    static int zr_pread(int fd, char *buffer, uint64_t size, uint64_t offset)
    {
        while (size) {
            ssize_t n = pread(fd, buffer, size, (off_t)offset);
            if (n < 0 && errno == EINTR)
                continue;
            if (n <= 0)
                return n ? -errno : -EIO;
            buffer += n, size -= n, offset += n;
        }
        return 0;
    }
    static int zr_pwrite(int fd, const char *buffer, uint64_t size, uint64_t offset)
    {
        while (size) {
            ssize_t n = pwrite(fd, buffer, size, (off_t)offset);
            if (n < 0 && errno == EINTR)
                continue;
            if (n <= 0)
                return n ? -errno : -EIO;
            buffer += n, size -= n, offset += n;
        }
        return 0;
    }
    """
    uint64_t fetch_sub(uint64_t *p, uint64_t n) noexcept nogil
    uint64_t fetch_and(uint64_t *p, uint64_t n) noexcept nogil
    uint64_t fetch_or(uint64_t *p, uint64_t n) noexcept nogil
    int zr_pread(int fd, char *buffer, uint64_t size, uint64_t offset) noexcept nogil
    int zr_pwrite(int fd, const char *buffer, uint64_t size, uint64_t offset) noexcept nogil

EXTENT = EXTENT_BYTES
MAX_PLACES = 1 << 32


cdef uint32_t record_sum(uint64_t block, uint32_t what, const char *payload) noexcept nogil:
    """The checksum of a record."""
    return checksum(payload, what & SLOT_SIZE_MASK, block << 32 | what)


@cython.final
cdef class Backing:
    """What is on the backing `fd`, opened with O_DIRECT: size bytes, in sectors of `sector` bytes, 512 to 4096.

    The descriptor remains the caller's: this has one of its own, and with it the file's lock. Raises ValueError for a size
    or granule that cannot be, MemoryError.
    """

    def __cinit__(self, int fd, uint64_t size, uint32_t granule, uint32_t sector):
        self.fd = -1
        if sector not in (512, 1024, 2048, 4096):
            raise ValueError(f"sectors of {sector} bytes: 512 to 4096 can be used")
        if granule < GRANULE or granule & (granule - 1) or granule > EXTENT_BYTES // 16:
            raise ValueError(f"granule {granule} is no power of 2 from {GRANULE} to {EXTENT_BYTES // 16}")
        self.extents = size // EXTENT_BYTES
        self.size = self.extents * EXTENT_BYTES
        if self.extents < 2 or self.size > MAX_PLACES * granule:
            raise ValueError(f"size {size} is out of range: {2 * EXTENT_BYTES} to {MAX_PLACES * granule}")
        self.granule = granule
        while 1 << self.granule_shift < granule:
            self.granule_shift += 1
        self.sector = sector
        self.head = max(<uint32_t>EXTENT_HEAD, granule)
        self.cursor = 1
        self.table = Region(self.extents * sizeof(uint64_t))
        self.words = <uint64_t *>self.table.base
        self.fd = os.dup(fd)

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)

    def reopen(self, int fd):
        """Go on with another descriptor of the same backing, after it had vanished or failed. Raises OSError.

        What is under way ends with the one that it began with. Extents that were given up are tried again.
        """
        os.dup2(fd, self.fd, inheritable=False)  # the number stays: others are about to use it
        with nogil:
            self.try_again()

    def numbers(self):
        """What is in use, by the names of the statistics, as a dict of ints."""
        used, bad = load_relaxed(&self.used), load_relaxed(&self.bad)
        return {
            "backing_size": self.size,
            "backing_extents": self.extents - 1,
            "backing_free": max(0, self.extents - 1 - used - bad),
            "backing_bad": bad,
            "backing_live": load_relaxed(&self.live),
        }

    cdef int populate(self) noexcept nogil:
        """Make the table of extents resident; 0 or -ENOMEM."""
        return self.table.populate(self.table.size)

    # --------------------------------------------------------------------------------------------------------
    # places

    cdef bint has_place(self, uint64_t slot) noexcept nogil:
        """Whether the record that a slot leads to can be on the backing, within one extent."""
        cdef uint64_t first = slot_handle(slot) << self.granule_shift
        cdef uint32_t at = first & (EXTENT_BYTES - 1), size = slot_bytes(slot)
        return (EXTENT_BYTES <= first < self.size and at >= self.head and 0 < size <= BLOCK_SIZE
                and at + self.record_bytes(size) <= EXTENT_BYTES)

    cdef inline uint32_t record_bytes(self, uint32_t size) noexcept nogil:
        """Bytes that a record with a payload of that size takes."""
        return (RECORD_HEAD + size + self.granule - 1) & ~(self.granule - 1)

    cdef inline uint64_t *_word(self, uint64_t slot) noexcept nogil:
        return &self.words[slot_handle(slot) << self.granule_shift >> EXTENT_SHIFT]

    cdef void pin(self, uint64_t slot) noexcept nogil:
        """Keep what a slot leads to as it is, until unpin. The caller has the stripe of the block that has the slot."""
        counter_add(self._word(slot), EXTENT_READER)

    cdef void unpin(self, uint64_t slot) noexcept nogil:
        fetch_sub(self._word(slot), EXTENT_READER)

    cdef void add(self, uint64_t slot) noexcept nogil:
        """Count the record that a slot is going to lead to as alive. Its extent is in use already."""
        cdef uint32_t size = self.record_bytes(slot_bytes(slot))
        counter_add(self._word(slot), size)
        counter_add(&self.live, size)

    cdef void drop(self, uint64_t slot) noexcept nogil:
        """Take note that no slot leads to a record any more."""
        cdef uint32_t size = self.record_bytes(slot_bytes(slot))
        cdef uint64_t *word = self._word(slot)
        cdef uint64_t before = load_relaxed(word), now = 0
        # A slot that was changed in memory may say more than lives there.
        while True:
            now = before - min(before & EXTENT_LIVE, <uint64_t>size)
            if compare_swap(word, before, now):
                break
            before = load_relaxed(word)
        counter_sub(&self.live, size)
        if now != before and now & EXTENT_LIVE == 0 and not now & (EXTENT_WRITTEN | EXTENT_BAD):
            counter_sub(&self.used, 1)

    cdef void forget_all(self) noexcept nogil:
        """Take note that no slot leads here any more. Nobody adds or drops meanwhile, but some may read or write."""
        cdef uint64_t i
        for i in range(self.extents):
            fetch_and(&self.words[i], ~EXTENT_LIVE)
        store_relaxed(&self.live, 0)
        self.count_used()

    cdef void count_used(self) noexcept nogil:
        """Count the extents in use anew. Nobody adds or drops meanwhile."""
        cdef uint64_t i, word, used = 0, live = 0
        for i in range(1, self.extents):
            word = load_relaxed(&self.words[i])
            live += word & EXTENT_LIVE
            used += not word & EXTENT_BAD and word & (EXTENT_LIVE | EXTENT_WRITTEN) != 0
        store_relaxed(&self.used, used)
        store_relaxed(&self.live, live)

    # --------------------------------------------------------------------------------------------------------
    # extents: one thread takes and gives them

    cdef uint64_t take(self) noexcept nogil:
        """A free extent that is going to be written; 0: there is none. The one after the last is tried first."""
        cdef uint64_t at = self.cursor
        for _ in range(1, self.extents):
            at = at + 1 if at + 1 < self.extents else 1
            # (Most are in use on a full backing: their word alone is looked at.)
            if load_acquire(&self.words[at]) == 0 and compare_swap(&self.words[at], 0, EXTENT_WRITTEN):
                counter_add(&self.used, 1)
                self.cursor = at
                return at
        return 0

    cdef void give(self, uint64_t extent, bint is_bad) noexcept nogil:
        """Take note that an extent is written, or cannot be (is_bad): then it is not tried again."""
        cdef uint64_t before
        if is_bad:
            fetch_or(&self.words[extent], EXTENT_BAD)
            counter_add(&self.bad, 1)
        before = fetch_and(&self.words[extent], ~EXTENT_WRITTEN)
        if is_bad or before & EXTENT_LIVE == 0:
            counter_sub(&self.used, 1)

    cdef void give_up(self, uint64_t extent) noexcept nogil:
        """Take note that an extent cannot be read: nothing moves from it, and it is not written again."""
        cdef uint64_t before = fetch_or(&self.words[extent], EXTENT_BAD)
        if not before & EXTENT_BAD:
            counter_add(&self.bad, 1)
            # (The last block of it may have died meanwhile: then it is not in use any more.)
            counter_sub(&self.used, before & EXTENT_LIVE != 0)

    cdef void try_again(self) noexcept nogil:
        """Take back that extents were bad: the device was. Any thread may call this."""
        cdef uint64_t i, before
        if load_relaxed(&self.bad) == 0:
            return
        for i in range(1, self.extents):
            if load_relaxed(&self.words[i]) & EXTENT_BAD:
                before = fetch_and(&self.words[i], ~EXTENT_BAD)
                if before & EXTENT_BAD:
                    counter_sub(&self.bad, 1)
                    counter_add(&self.used, before & EXTENT_LIVE != 0)

    cdef uint64_t emptiest(self, uint64_t most) noexcept nogil:
        """The extent with the fewest bytes that live, at most so many, of those that nobody reads; 0: there is none."""
        cdef uint64_t i, word, found = 0
        for i in range(1, self.extents):
            word = load_relaxed(&self.words[i])
            # (Readers and flags are above what lives.)
            if 0 < word <= most:
                found = i
                most = word - 1
        return found

    # --------------------------------------------------------------------------------------------------------
    # I/O

    cdef int read(self, char *buffer, uint64_t size, uint64_t offset) noexcept nogil:
        """Read whole sectors into a buffer that begins at a multiple of 4096; 0 or -errno."""
        return zr_pread(self.fd, buffer, size, offset)

    cdef int write(self, const char *buffer, uint64_t size, uint64_t offset) noexcept nogil:
        return zr_pwrite(self.fd, buffer, size, offset)

    cdef uint32_t reach(self, uint64_t first, uint64_t slot) noexcept nogil:
        """Bytes of a read from the record that slot `first` leads to up to the end of slot's, in whole sectors.

        0: it is not behind that one in the same extent, or there are more of them than ROOM.
        """
        cdef uint64_t begin = slot_handle(first) << self.granule_shift, at = slot_handle(slot) << self.granule_shift, end
        if at < begin or (at ^ begin) >> EXTENT_SHIFT:
            return 0
        begin &= ~<uint64_t>(self.sector - 1)
        end = (at + RECORD_HEAD + slot_bytes(slot) + self.sector - 1) & ~<uint64_t>(self.sector - 1)
        return <uint32_t>(end - begin) if end - begin <= ROOM else 0

    cdef int fetch(self, uint64_t first, uint32_t size, char *room, uint64_t *moved) noexcept nogil:
        """Read so many bytes, as reach has it, from the record that a pinned slot leads to; 0 or -errno."""
        cdef uint64_t begin = (slot_handle(first) << self.granule_shift) & ~<uint64_t>(self.sector - 1)
        cdef int rc = self.read(room, size, begin)
        if rc == 0:
            counter_add(moved, size)
        return rc

    cdef const char *payload_of(self, uint64_t block, uint64_t slot, uint64_t first, const char *room) noexcept nogil:
        """A block's payload in what fetch has read from slot `first` on; NULL: the record is not what its slot says."""
        cdef uint64_t begin = (slot_handle(first) << self.granule_shift) & ~<uint64_t>(self.sector - 1)
        cdef const char *at = room + ((slot_handle(slot) << self.granule_shift) - begin)
        cdef record head
        memcpy(&head, at, RECORD_HEAD)
        if (head.block != block or head.what != out_what(slot) or sum_low(head.sum) != slot_sum(slot)
                or head.sum != record_sum(block, head.what, at + RECORD_HEAD)):
            return NULL
        return at + RECORD_HEAD

    cdef int load(self, uint64_t block, uint64_t slot, char *room, const char **payload, uint64_t *moved) noexcept nogil:
        """Read the payload of a block that is out, whose slot is pinned, into room for ROOM bytes: 0, or -errno.

        -EBADMSG: the record is not what the slot says. moved: a counter of bytes.
        """
        cdef int rc = self.fetch(slot, self.reach(slot, slot), room, moved)
        if rc:
            return rc
        payload[0] = self.payload_of(block, slot, slot, room)
        return 0 if payload[0] != NULL else -EBADMSG
