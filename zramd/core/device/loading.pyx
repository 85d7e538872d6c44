"""Reads a saved device from a descriptor, and checks all of it: for saving.pyx, whose writer has the same base.

    Stream   a frame at a time, in one buffer, and waiting for a descriptor
    Reader   descriptor -> frame, checked -> objects of a device, or another descriptor

Nothing that a stream says is believed before its checksum was compared, and each payload is decompressed once before it is
stored.
"""

cimport cython
from libc.errno cimport EAGAIN, EDQUOT, EINTR, ENOMEM, ENOSPC, ETIMEDOUT, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, strcmp

from cpython.exc cimport PyErr_CheckSignals

from zramd.core.device.checksum cimport crc_of
from zramd.core.device.codec cimport decode
from zramd.core.device.cold cimport Cold
from zramd.core.device.device cimport Device
from zramd.core.device.slots cimport SLOT_COLD, SLOT_LOST, SLOT_SAME, SLOT_SIZE_MASK, SLOT_TRIED, is_cold
from zramd.core.memory.region cimport secret_alloc, secret_free
from zramd.core.system.gate cimport gate_hold, gate_release
from zramd.core.system.process cimport be_calm, be_urgent
from zramd.core.types cimport BLOCK_SHIFT, BLOCK_SIZE

import os

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
    WRONG = 1               # beside 0 and -errno: the stream is not what it should be
    TICK = 100              # milliseconds of waiting between two looks for signals: one just before a wait does not end it


cdef inline uint32_t word_at(const char *at) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, at, sizeof(value))
    return value


cdef inline uint64_t long_at(const char *at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, sizeof(value))
    return value


cdef object error_of(const char *why):
    """The error of a save that was given up. The stream has nothing but the sentence to say it by."""
    return SaveError(why.decode("ascii", "backslashreplace"), "changed" if strcmp(why, CHANGED) == 0 else "other")


cdef class Stream:
    """One direction of a save, a frame at a time: what both have in common. Raises MemoryError."""

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


@cython.final
cdef class Reader(Stream):
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
        """Do it all; the numbers. Raises SaveError, OSError, PoolFullError, MemoryError."""
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
