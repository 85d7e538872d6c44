"""A device as a stream of bytes, and back: docs/save-format.md has the format.

    save    slots -> records of a chunk -> descriptor       payloads are copied as they stand
    load    descriptor -> chunk, checked -> objects         each payload is decompressed once before it is stored
    check   descriptor -> chunk, checked [-> another one]

One buffer of a chunk is all the memory it takes. A block is copied under its stripe, as a read does it; nothing is held
while bytes are read or written. The work is done without the GIL, and in a real-time thread as an ordinary one; EINTR
brings it back to Python for signals.
"""

from libc.errno cimport EAGAIN, EDQUOT, EINTR, ENOMEM, ENOSPC, ETIMEDOUT, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, strcmp, strlen

from cpython.exc cimport PyErr_CheckSignals

from zramd.core.device.checksum cimport crc_of
from zramd.core.device.codec cimport decode
from zramd.core.device.cold cimport Cold
from zramd.core.device.backing cimport ROOM
from zramd.core.device.blocks cimport OP_TRIM, OP_WRITE, OP_ZERO, STRIPES, is_touched
from zramd.core.device.device cimport Device
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
from zramd.core.types cimport BLOCK_SHIFT, BLOCK_SIZE, SLOTS_PER_PAGE

import os
import time

from zramd.errors import SaveError, error_from

cdef extern from *:
    """
    #include <poll.h>
    #include <sys/types.h>
    #include <unistd.h>
    static int wait_for(int fd, int events, int patience)
    {
        struct pollfd p = {.fd = fd, .events = (short)events};
        return poll(&p, 1, patience);
    }
    """
    int POLLIN, POLLOUT
    int wait_for(int fd, int events, int patience) noexcept nogil
    ssize_t posix_read "read"(int fd, void *to, size_t size) noexcept nogil
    ssize_t posix_write "write"(int fd, const void *source, size_t size) noexcept nogil

cdef enum:
    FORMAT = 2              # without cold blocks a save has format 1, which older versions read
    WRONG = 1               # beside 0 and -errno: the stream is not what it should be
    RECORD_MAX = 8 + BLOCK_SIZE
    VISITS = 8192           # blocks looked at for one chunk
    STEPS = 16              # chunks between two looks for signals and calls of progress
    TICK = 100              # milliseconds of waiting, the same: a signal just before a wait does not end it

MAGIC = b"\x89ZRAMD\r\n"
VERSION = FORMAT
cdef const char *magic = b"\x89ZRAMD\r\n"
cdef const char *CHANGED = "a client changed the device while it was saved"     # in streams, too: see error_of


cdef inline uint32_t word_at(const char *at) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, at, sizeof(value))
    return value


cdef inline uint64_t long_at(const char *at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, sizeof(value))
    return value


cdef inline char *put(char *at, uint64_t value) noexcept nogil:
    memcpy(at, &value, sizeof(value))
    return at + sizeof(value)


cdef error_of(const char *why):
    """The error of a save that was given up. The stream has nothing but the sentence to say it by."""
    return SaveError(why.decode("ascii", "backslashreplace"), "changed" if strcmp(why, CHANGED) == 0 else "other")


cdef class _Stream:
    """One direction of a save; for this module only."""

    def __cinit__(self, *arguments, **names):
        self.patience = -1
        self.buffer = <char *>secret_alloc(FRAME_BYTES + BODY_MAX)
        if self.buffer == NULL:
            raise MemoryError("no memory for a chunk")

    def __dealloc__(self):
        secret_free(self.buffer, FRAME_BYTES + BODY_MAX)

    cdef int _wait(self, int fd, int events) noexcept nogil:
        cdef int tick = TICK if self.patience < 0 else min(TICK, self.patience - self.waited)
        cdef int n = wait_for(fd, events, tick)
        if n < 0:
            return -errno
        if n > 0:
            self.waited = 0
            return 0
        if self.patience >= 0:
            self.waited += tick
            if self.waited >= self.patience:
                return -ETIMEDOUT
        return -EINTR

    cdef int _write(self, int fd) noexcept nogil:
        """Write the rest of the frame; 0 or -errno, and it can be called again."""
        cdef ssize_t n
        cdef int rc
        while self.moved < self.size:
            n = posix_write(fd, self.buffer + self.moved, self.size - self.moved)
            if n >= 0:
                self.moved += <uint32_t>n
                if self.moved < self.size:
                    return -EINTR       # a signal may be why it was not all
                continue
            if errno != EAGAIN:
                return -errno
            rc = self._wait(fd, POLLOUT)
            if rc:
                return rc
        return 0

    cdef void _seal(self, uint32_t kind, uint32_t records, uint32_t bytes) noexcept nogil:
        """Make the head of the frame whose body is in the buffer."""
        cdef frame_head head
        head.kind = kind
        head.records = records
        head.bytes = bytes
        head.crc = crc_of(self.buffer + FRAME_BYTES, bytes, crc_of(<const char *>&head, 12, 0))
        memcpy(self.buffer, &head, FRAME_BYTES)
        self.total = crc_of(<const char *>&head.crc, 4, self.total)
        self.size = FRAME_BYTES + bytes
        self.moved = 0

    cdef int _decode(self, uint32_t what, const char *data) noexcept nogil:
        """Decompress a record's payload, if it has one, in vain; 0 or -EIO."""
        if what == SLOT_LOST or what == SLOT_SAME:
            return 0
        if is_cold(what):
            return self.cold.decode(data, what & SLOT_SIZE_MASK, self.page)
        return decode(data, what, self.page)


cdef class _Writer(_Stream):
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

        Whoever wants the device alone does not wait for the disk: the gate is let go meanwhile.
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
        """Do it all; the numbers."""
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


cdef class _Reader(_Stream):
    """Reads and checks what a Writer wrote, and stores or copies it."""

    def __init__(self, int fd, int copy, Device device, bytes begun, uint64_t limit, int patience):
        self.fd = fd
        self.copy = copy
        self.device = device
        self.cold = Cold() if device is None else device.table.cold
        self.limit = limit
        self.patience = patience
        self.begun = begun
        self.early = begun
        self.early_left = <uint32_t>len(begun)

    cdef int _fill(self, uint32_t need) noexcept nogil:
        """Read until the buffer holds need bytes; 0, -errno (and it can be called again), or WRONG at the end."""
        cdef ssize_t n
        cdef int rc
        while self.moved < need:
            n = min(need - self.moved, self.early_left)
            if n:
                memcpy(self.buffer + self.moved, self.early, n)
                self.early += n
                self.early_left -= <uint32_t>n
            elif self.at + self.moved < self.limit:
                n = posix_read(self.fd, self.buffer + self.moved, min(need - self.moved, self.limit - self.at - self.moved))
            if n > 0:
                self.moved += <uint32_t>n
                if self.moved < need:
                    return -EINTR       # a signal may be why it was not all
                continue
            if n == 0:
                return WRONG
            if errno != EAGAIN:
                return -errno
            rc = self._wait(self.fd, POLLIN)
            if rc:
                return rc
        return 0

    cdef int _fail(self, const char *wrong) noexcept nogil:
        self.wrong = wrong
        self.wrong_at = self.at
        return WRONG

    cdef int _cut(self) noexcept nogil:
        self._fail("it was cut off")
        self.cut_off = True
        self.wrong_at += self.moved
        return WRONG

    cdef int _step(self, int steps) noexcept nogil:
        """Go over a few frames; 0, -errno, or WRONG."""
        cdef int rc
        while steps and not (self.ended and not self.ready):
            steps -= 1
            if not self.ready:
                rc = self._frame() if self.headed else self._head()
                if rc:
                    return rc
                self.ready = True
                self.size = self.moved
                self.moved = 0
            if self.copy >= 0:
                rc = self._write(self.copy)
                if rc:
                    self.copy_failed = rc != -EINTR
                    return rc
            self.ready = False
            self.at += self.size
            self.moved = 0
        return 0

    cdef int _head(self) noexcept nogil:
        cdef int rc = self._fill(HEAD_BYTES)
        if rc < 0:
            return rc
        if self.moved < 8 or memcmp(self.buffer, magic, 8):
            return self._fail("it is not a saved device")
        if rc:
            return self._cut()
        if word_at(self.buffer + HEAD_BYTES - 4) != crc_of(self.buffer, HEAD_BYTES - 4, 0):
            return self._fail("its header is damaged")
        self.version = word_at(self.buffer + 8)
        if not 1 <= self.version <= FORMAT or word_at(self.buffer + 12) != BLOCK_SIZE:
            return self._fail("it has another format than this zramd reads")
        self.disksize = long_at(self.buffer + 16)
        self.saved_at = long_at(self.buffer + 24)
        if self.device is not None and self.disksize > self.device.disksize:
            return self._fail("it is larger than the device")
        self.total = crc_of(self.buffer + HEAD_BYTES - 4, 4, 0)
        self.headed = True
        return 0

    cdef int _frame(self) noexcept nogil:
        cdef frame_head head
        cdef int rc = self._fill(FRAME_BYTES)
        if rc == 0:
            memcpy(&head, self.buffer, FRAME_BYTES)
            if head.bytes > BODY_MAX:
                return self._fail("a chunk is damaged")
            rc = self._fill(FRAME_BYTES + head.bytes)
        if rc:
            return rc if rc < 0 else self._cut()
        if head.crc != crc_of(self.buffer + FRAME_BYTES, head.bytes, crc_of(<const char *>&head, 12, 0)):
            return self._fail("a chunk is damaged")
        if head.kind == KIND_BLOCKS:
            rc = self._records(head.records, head.bytes)
        elif head.kind == KIND_END and head.bytes == END_BYTES:
            rc = self._end()
        elif head.kind == KIND_GIVEN_UP and head.bytes < 200:
            self.buffer[FRAME_BYTES + head.bytes] = 0
            self.given_up = True
            return self._fail(self.buffer + FRAME_BYTES)
        else:
            return self._fail("a chunk is of an unknown kind")
        self.total = crc_of(<const char *>&head.crc, 4, self.total)
        return rc

    cdef int _records(self, uint32_t count, uint32_t bytes) noexcept nogil:
        """Check and store the records of a chunk."""
        cdef uint32_t at = 0, what, size
        cdef uint64_t block
        cdef const char *body = self.buffer + FRAME_BYTES
        cdef int rc = 0
        if self.device is not None:
            gate_hold(&self.device.gate)
        while count and rc == 0:
            count -= 1
            if bytes - at < 8:
                rc = self._fail("a chunk contradicts itself")
                break
            block = long_at(body + at) >> 16
            what = long_at(body + at) & 0xFFFF
            size = 0 if what == SLOT_LOST else 8 if what == SLOT_SAME else what & SLOT_SIZE_MASK
            at += 8
            if block < self.next or block >= self.disksize >> BLOCK_SHIFT:
                rc = self._fail("a block is out of order")
            elif not self._is_record(what) or size > bytes - at:
                rc = self._fail("a chunk contradicts itself")
            elif self._decode(what, body + at):
                self.wrong_block = block + 1
                rc = self._fail("a block does not decompress")
            else:
                rc = self._record(block, what, body + at)
                self.next = block + (rc == 0)
                at += size
        if self.device is not None:
            gate_release(&self.device.gate)
        if rc == 0 and at != bytes:
            rc = self._fail("a chunk contradicts itself")
        return rc

    cdef bint _is_record(self, uint32_t what) noexcept nogil:
        """Whether the format has such records."""
        if what == SLOT_LOST or what == SLOT_SAME:
            return True
        if is_cold(what):
            return self.version > 1 and not what & SLOT_SAME
        return 1 <= what <= BLOCK_SIZE

    cdef int _record(self, uint64_t block, uint32_t what, const char *data) noexcept nogil:
        """Count a block that is right, and store it if a device is to be filled."""
        cdef uint64_t slot = SLOT_LOST
        cdef int rc = 0
        self.counted.blocks += 1
        if what == SLOT_LOST:
            self.counted.lost += 1
        elif what == SLOT_SAME:
            self.counted.same += 1
        else:
            self.counted.payload_bytes += what & SLOT_SIZE_MASK
            self.counted.raw += what == BLOCK_SIZE
            self.counted.cold += is_cold(what)
        if self.device is None:
            return 0
        if what == SLOT_SAME:
            rc = self.device.table.store_word(block, long_at(data), &slot)
        elif what != SLOT_LOST:
            rc = self.device.table.store_payload(block, data, what & SLOT_SIZE_MASK, &slot)
            slot |= what & (SLOT_COLD | SLOT_TRIED)
        if rc == 0:
            rc = self.device.table.put(block, slot, False)
        return rc

    cdef int _end(self) noexcept nogil:
        cdef const char *body = self.buffer + FRAME_BYTES
        if (long_at(body) != self.counted.blocks or long_at(body + 8) != self.counted.payload_bytes
                or word_at(body + 24) != self.total):
            return self._fail("chunks are missing, or not its own")
        self.changes = long_at(body + 16)
        self.ended = True
        return 0

    def run(self, progress):
        """Do it all; the numbers."""
        cdef int rc = 0, priority, steps
        cdef dict numbers
        while not self.ended or self.ready:
            steps = STEPS if self.headed else 1
            with nogil:
                priority = be_calm()
                rc = self._step(steps)
                be_urgent(priority)
            if rc == 0 and steps == 1 and self.device is not None and self.version > 1:
                self.device._expect_cold()
            if rc == -EINTR:
                PyErr_CheckSignals()
            elif rc:
                raise self._error(rc)
            if progress is not None:
                progress(self.at)
        while True:
            with nogil:
                rc = self._fill(1)
            if rc == WRONG:
                break
            if rc == -EINTR:
                PyErr_CheckSignals()
                continue
            if rc == 0:
                self._fail("something follows its end")
            raise self._error(rc if rc else WRONG)
        numbers = self.counted
        return numbers | {
            "disksize": self.disksize, "saved_at": self.saved_at, "changes": self.changes, "bytes": self.at,
        }

    def _error(self, int rc):
        if self.copy_failed:
            return OSError(-rc, os.strerror(-rc))
        if rc == -ENOSPC or rc == -EDQUOT or rc == -ENOMEM:
            return error_from(rc, f"block {self.next}")
        if rc < 0:
            return SaveError(f"it cannot be read at byte {self.at + self.moved}: {os.strerror(-rc).lower()}", "cut off")
        if self.given_up:
            return error_of(self.wrong)
        text = self.wrong.decode("ascii", "backslashreplace")
        if self.version > FORMAT:
            return SaveError(f"{text}: format {self.version}, not 1 or {FORMAT}")
        if self.wrong_block:
            return SaveError(f"{text}: block {self.wrong_block - 1}, in the chunk at byte {self.at}")
        if self.headed:
            text = f"{text} (at byte {self.wrong_at})"
        return SaveError(text, "cut off" if self.cut_off else "other")


def save(Device device, int fd, *, bint live=False, patience=-1):
    """Write a device to a descriptor: how many blocks, same, raw and lost ones, payload_bytes, changes, bytes.

    Each block is whole. live: also while clients change the device, so that blocks may be of different moments; changes
    says how many requests that were. patience: seconds that nothing may move. Raises SaveError when a client changed
    the device and not live, or it was reset (the stream says so, too); OSError.
    """
    return _Writer(device, fd, live, <int>(patience * 1000)).run()


def load(Device device, int fd, *, bytes begun=b"", length=-1, patience=-1):
    """Fill an empty device, which nothing else uses, from a descriptor: the numbers as from verify_stream.

    begun: what was read of it already; length: bytes of it, -1: to its end. Whatever is raised, the device is empty
    then. Raises SaveError; PoolFullError when no room is left, MemoryError when the system refuses memory.
    """
    cdef _Reader reader = _Reader(
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
    return _Reader(fd, copy, None, b"", <uint64_t>-1, -1).run(progress)
