"""A device as a stream of bytes, and back: docs/save-format.md has the format.

    save    slots -> records of a chunk -> descriptor       payloads are copied as they stand
    load    descriptor -> chunk, checked -> objects         zramd.core.device.loading reads, and checks
    check   descriptor -> chunk, checked [-> another one]

One buffer of a chunk is all the memory it takes. A block is copied under its stripe, as a read does it; nothing is held
while bytes are read or written. The work is done without the GIL, and in a real-time thread as an ordinary one; EINTR
brings it back to Python for signals.
"""

cimport cython
from libc.errno cimport EBADMSG, EINTR
from libc.stdint cimport uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, strlen

from cpython.exc cimport PyErr_CheckSignals

from zramd.core.device.checksum cimport crc_of
from zramd.core.device.backing cimport ROOM
from zramd.core.device.blocks cimport OP_TRIM, OP_WRITE, OP_ZERO, STRIPES, is_touched
from zramd.core.device.device cimport Device
from zramd.core.device.loading cimport (
    BODY_MAX,
    CHANGED,
    END_BYTES,
    FORMAT,
    FRAME_BYTES,
    HEAD_BYTES,
    KIND_BLOCKS,
    KIND_END,
    KIND_GIVEN_UP,
    STEPS,
    Reader,
    Stream,
    error_of,
    magic,
)
from zramd.core.device.numbers cimport requests
from zramd.core.device.slots cimport (
    SAME,
    SLOT_COLD,
    SLOT_LOST,
    SLOT_SAME,
    SLOT_SIZE_MASK,
    SLOT_TRIED,
    SLOT_OUT_ZSTD,
    has_object,
    is_cold,
    slot_bytes,
    slot_handle,
    slot_kind,
)
from zramd.core.system.gate cimport gate_close, gate_hold, gate_open, gate_release
from zramd.core.system.locks cimport (
    counter_add,
    load_relaxed,
    owned_add,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_release,
)
from zramd.core.system.process cimport be_calm, be_urgent
from zramd.core.memory.region cimport secret_alloc, secret_free
from zramd.core.types cimport BLOCK_SIZE, SLOTS_PER_PAGE

import os
import time

from zramd.errors import SaveError

cdef enum:
    RECORD_MAX = 8 + BLOCK_SIZE
    VISITS = 8192           # blocks looked at for one chunk

MAGIC = magic
VERSION = FORMAT


cdef inline char *put(char *at, uint64_t value) noexcept nogil:
    memcpy(at, &value, sizeof(value))
    return at + sizeof(value)


@cython.final
cdef class Writer(Stream):
    """Writes a device."""

    def __dealloc__(self):
        secret_free(self.room, ROOM)

    def __init__(self, Device device, int fd, bint live, int patience):
        cdef char *at
        cdef uint32_t crc
        self.device = device
        self.cold = device.table.cold
        if device.table.backing is not None:
            self.room = <char *>secret_alloc(ROOM)
            if self.room == NULL:
                raise MemoryError("no memory to read blocks in that are out")
        self.fd = fd
        self.live = live
        self.patience = patience
        self.epoch = load_relaxed(&device.epoch)
        self.changes_before = self._changes()
        memcpy(self.buffer, magic, 8)
        with nogil:
            self.version = FORMAT if self._has_cold() else 1
        at = put(self.buffer + 8, self.version | <uint64_t>BLOCK_SIZE << 32)
        at = put(at, device.disksize)
        put(at, <uint64_t>int(time.time()))
        crc = crc_of(self.buffer, HEAD_BYTES - 4, 0)
        memcpy(self.buffer + HEAD_BYTES - 4, &crc, 4)
        self.total = crc_of(<const char *>&crc, 4, 0)
        self.size = HEAD_BYTES

    cdef bint _has_cold(self) noexcept nogil:
        """Whether a block is compressed by another codec than lz4 now, or is out."""
        cdef uint64_t page, block
        for page in range(self.device.blocks // SLOTS_PER_PAGE + 1):
            if is_touched(&self.device.table.touched[page]):
                for block in range(page * SLOTS_PER_PAGE, min((page + 1) * SLOTS_PER_PAGE, self.device.blocks)):
                    if load_relaxed(&self.device.table.slots[block]) & SLOT_COLD:
                        return True
        return False

    cdef uint64_t _changes(self) noexcept nogil:
        """Requests that changed the device so far."""
        return (requests(self.device.table, OP_WRITE) + requests(self.device.table, OP_TRIM)
                + requests(self.device.table, OP_ZERO))

    cdef int _step(self) noexcept nogil:
        """Write a few frames; 0 or -errno."""
        cdef int rc = 0
        for _ in range(STEPS):
            rc = self._write(self.fd)
            if rc:
                break
            self.at += self.size
            self.size = self.moved = 0
            if self.ended:
                break
            if self.next < self.device.blocks:
                self._gather()
            else:
                self._finish()
        return rc

    cdef void _gather(self) noexcept nogil:
        """Make a frame of the blocks that come next."""
        cdef uint32_t used = 0, records = 0, n, visits = 0
        gate_hold(&self.device.gate)
        self._look()
        while self.gave_up == NULL and self.next < self.device.blocks and used + RECORD_MAX <= BODY_MAX and visits < VISITS:
            visits += 1
            if not is_touched(&self.device.table.touched[self.next // SLOTS_PER_PAGE]):
                self.next = (self.next // SLOTS_PER_PAGE + 1) * SLOTS_PER_PAGE
                continue
            n = self._record(self.next, self.buffer + FRAME_BYTES + used)
            used += n
            records += n != 0
            self.next += 1
        gate_release(&self.device.gate)
        if self.gave_up != NULL:
            self._give_up(self.gave_up)
        elif records:
            self._seal(KIND_BLOCKS, records, used)

    cdef void _look(self) noexcept nogil:
        """See whether the device is still what is being saved. The gate is held."""
        if load_relaxed(&self.device.epoch) != self.epoch:
            self.gave_up = "the device was reset or loaded while it was saved"
        elif load_relaxed(&self.device.kept.loading):
            self.gave_up = "the device is being loaded"
        elif not self.live and self._changes() != self.changes_before:
            self.gave_up = CHANGED

    cdef uint32_t _record(self, uint64_t block, char *out) noexcept nogil:
        """Write what stands for a block to out; the bytes, 0 for a hole."""
        cdef uint64_t slot, word = 0
        cdef uint32_t what = SLOT_LOST, size
        cdef char *payload
        if self.device.table.get(block) == 0:
            return 0
        pthread_mutex_lock(&self.device.table.stripes[block % STRIPES])
        slot = self.device.table.get(block)
        size = slot_bytes(slot)
        if self.device.table.is_away(slot):
            self.device.table.backing.pin(slot)
        elif slot_kind(slot) == SAME:
            word = self.device.table.word_of(slot)
            if self.device.table.word_is_sound(block, slot, word):
                what = SLOT_SAME
        elif has_object(slot) and self.device.pool.obj_begin(slot_handle(slot), &payload) == 0:
            if size and self.device.table.object_is_sound(block, slot, payload):
                if self.version > 1 or not is_cold(slot):
                    memcpy(out + 8, payload, size)
                    what = size | slot & (SLOT_COLD | SLOT_TRIED) if is_cold(slot) else size
                elif self.device.table.cold.decode(payload, size, out + 8) == 0:
                    what = BLOCK_SIZE
            self.device.pool.obj_end(slot_handle(slot))
        pthread_mutex_unlock(&self.device.table.stripes[block % STRIPES])
        if slot == 0:
            return 0
        if self.device.table.is_away(slot):
            what = self._record_away(block, slot, out + 8)
            if self.gave_up != NULL:
                return 0
        # What a read would not get is not to stop a load either.
        if self._decode(what, out + 8):
            what = SLOT_LOST
        put(out, block << 16 | what)
        self.counted.blocks += 1
        if what == SLOT_LOST:
            self.counted.lost += 1
            return 8
        if what == SLOT_SAME:
            self.counted.same += 1
            put(out + 8, word)
            return 16
        size = what & SLOT_SIZE_MASK
        self.counted.payload_bytes += size
        self.counted.raw += what == BLOCK_SIZE
        self.counted.cold += is_cold(what)
        return 8 + size

    cdef uint32_t _record_away(self, uint64_t block, uint64_t slot, char *out) noexcept nogil:
        """Write the payload of a block that is out, whose slot is pinned, to out; what it is, as in a record.

        Whoever wants the device alone does not wait for the disk: the gate is let go meanwhile. Where it cannot be read,
        the save is given up: the disk may be mended, and what a file says is lost stays so.
        """
        cdef const char *payload
        cdef uint32_t size = slot_bytes(slot), what = SLOT_LOST
        cdef int rc
        gate_release(&self.device.gate)
        rc = self.device.table.backing.load(block, slot, self.room, &payload, &self.device.table.counters.bd_reads)
        gate_hold(&self.device.gate)
        self._look()
        if rc:
            counter_add(&self.device.table.counters.bd_read_errors, 1)
            if self.gave_up == NULL:
                snprintf(
                    self.unread, sizeof(self.unread), "block %llu is out and %s: see docs/backing.md, 'When the disk fails'",
                    <unsigned long long>block, b"its disk has other data" if rc == -EBADMSG else b"cannot be read")
                self.gave_up = self.unread
        elif self.version > 1 or not slot & SLOT_OUT_ZSTD:
            memcpy(out, payload, size)
            what = size | SLOT_COLD if slot & SLOT_OUT_ZSTD else size
        elif self.cold.decode(payload, size, out) == 0:
            what = BLOCK_SIZE
        self.device.table.backing.unpin(slot)
        return what

    cdef void _finish(self) noexcept nogil:
        """Make the last frame, once all requests that may have changed what was written are counted."""
        cdef char *at = self.buffer + FRAME_BYTES
        cdef uint64_t epoch
        gate_close(&self.device.gate)
        self.changes = self._changes() + load_relaxed(&self.device.unfinished) - self.changes_before
        epoch = self.device.epoch
        gate_open(&self.device.gate)
        self.ended = True
        if epoch != self.epoch:
            self._give_up("the device was reset or loaded while it was saved")
        elif self.changes and not self.live:
            self._give_up(CHANGED)
        else:
            at = put(put(put(at, self.counted.blocks), self.counted.payload_bytes), self.changes)
            memcpy(at, &self.total, 4)
            self._seal(KIND_END, 0, END_BYTES)

    cdef void _give_up(self, const char *why) noexcept nogil:
        self.gave_up = why
        self.ended = True
        memcpy(self.buffer + FRAME_BYTES, why, strlen(why))
        self._seal(KIND_GIVEN_UP, 0, <uint32_t>strlen(why))

    def run(self):
        """Do it all; the numbers. Raises SaveError for what was given up, OSError."""
        cdef int rc = 0, priority
        cdef dict numbers
        while not (self.ended and self.moved == self.size):
            with nogil:
                priority = be_calm()
                rc = self._step()
                be_urgent(priority)
            if rc == -EINTR:
                PyErr_CheckSignals()
            elif rc:
                raise OSError(-rc, os.strerror(-rc))
        if self.gave_up != NULL:
            raise error_of(self.gave_up)
        numbers = self.counted
        return numbers | {"changes": self.changes, "bytes": self.at}


def save(Device device, int fd, *, bint live=False, patience=-1):
    """Write a device to a descriptor: how many blocks, same, raw and lost ones, payload_bytes, changes, bytes.

    Each block is whole. live: also while clients change the device, so that blocks may be of different moments; changes
    says how many requests that were. patience: seconds that nothing may move. Raises SaveError when a client changed
    the device and not live, when it was reset, or when a block that is out cannot be read (the stream says so, too);
    OSError.
    """
    return Writer(device, fd, live, <int>(patience * 1000)).run()


def load(Device device, int fd, *, bytes begun=b"", length=-1, patience=-1):
    """Fill an empty device, which nothing else uses, from a descriptor: the numbers as from verify_stream.

    begun: what was read of it already; length: bytes of it, -1: to its end. Whatever is raised, the device is empty
    then. Raises SaveError; PoolFullError when no room is left, MemoryError when the system refuses memory.
    """
    cdef Reader reader = Reader(
        fd, -1, device, begun, <uint64_t>-1 if length < 0 else length, <int>(patience * 1000))
    if load_relaxed(&device.table.counters.pages_stored):
        raise SaveError("the device is not empty")
    device._name_data()
    with nogil:
        gate_close(&device.gate)
        owned_add(&device.epoch, 1)
        store_release(&device.kept.loading, 1)
        gate_open(&device.gate)
    try:
        return reader.run(None)
    except BaseException:
        if load_relaxed(&device.table.counters.pages_stored):
            device.reset()
        raise
    finally:
        store_release(&device.kept.loading, 0)


def verify_stream(int fd, *, int copy=-1, progress=None):
    """Read a saved device from a descriptor, check all of it, and write it to another one if there is one.

    Returns disksize, saved_at (seconds since 1970), blocks, and of them same, raw, lost; payload_bytes, changes, bytes.
    Calls progress(bytes) now and then. Raises SaveError; OSError when it cannot be written.
    """
    return Reader(fd, copy, None, b"", <uint64_t>-1, -1).run(progress)
