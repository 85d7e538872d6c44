"""All queues of a ublk disk over a Device: made before anything depends on them, then given a disk to serve, and another.

    Queues(device, ...)     buffers, threads, rings: all memory that serving takes
    use(device)             another device instead, by the same memory: a server on standby has none of its own yet
    serve(fd)               the kernel has all tags of every queue, and their threads serve
    join()                  the disk was stopped: the kernel has given all tags back. serve may come again

The disk is made, started and stopped elsewhere: see control.pyx.
"""

cimport cython
from libc.errno cimport ENOSPC
from libc.stdint cimport uint32_t, uint64_t

from cpython.exc cimport PyErr_CheckSignals

from zramd.core.device.device cimport Device
from zramd.core.system.locks cimport load_relaxed
from zramd.core.types cimport BLOCK_SIZE
from zramd.core.ublk.protocol cimport MAX_DEPTH, MAX_QUEUES
from zramd.core.ublk.queue cimport A_PRIORITY, A_RING, A_THREAD, FETCHING, PARKED, SERVE, SERVING, Queue, refusal, stage
from zramd.core.ublk.readers cimport Readers
from zramd.core.ublk.ring cimport ring_refusal

import errno
import fcntl
import os
import time
from contextlib import suppress

from zramd.core.ublk.control import DEPTH, MAX_IO_BYTES, QUEUES
from zramd.errors import UblkError

cdef enum:
    TURN = 50               # milliseconds: how often a wait looks for signals


@cython.final
@cython.no_gc_clear
cdef class Queues:
    """queues queues of depth requests at once, of max_io_bytes at most, that a kernel's disk hands to a device.

    urgent: the priority of their real-time threads, 0: they are ordinary ones. pool_full: the errno that clients get when
    there is no room. Memory is the caller's to lock. Raises ValueError; MemoryError; UblkError when threads are refused,
    their priority, or io_uring.
    A child that is forked off has none of the threads, and may only end or close().
    One thread at a time may call a method; any may ask for serving and stats. Requests are served by threads that Python
    does not know, also while another holds the GIL.
    """

    def __cinit__(self, Device device not None, uint32_t queues=QUEUES, uint32_t depth=DEPTH,
                  uint32_t max_io_bytes=MAX_IO_BYTES, int urgent=0, int pool_full=ENOSPC):
        cdef uint32_t i
        self.fd = -1
        self.queues = []
        if not (0 < queues <= MAX_QUEUES and 0 < depth <= MAX_DEPTH):
            raise ValueError(f"{queues} queues of {depth} requests: there must be 1 to {MAX_QUEUES} of 1 to {MAX_DEPTH}")
        if not max_io_bytes or max_io_bytes % BLOCK_SIZE:
            raise ValueError(f"requests of {max_io_bytes} bytes: not a multiple of {BLOCK_SIZE}")
        self.device = device
        self.priority = urgent
        self.number = queues
        self.depth = depth
        self.max_io_bytes = max_io_bytes
        for i in range(queues):
            self.queues.append(Queue(device, i, depth, max_io_bytes, urgent, pool_full))
        self._open()

    def __dealloc__(self):
        self._close()

    cdef int _open(self) except -1:
        """Start the threads."""
        cdef Queue queue
        cdef int rc
        self.is_open = True
        try:
            self._have_readers()
            for queue in self.queues:
                queue.readers = self.readers
                with nogil:
                    rc = queue.open()
                if rc:
                    raise self._refusal(queue.refused, -rc)
        except BaseException:
            self._close()
            raise
        return 0

    cdef int _have_readers(self) except -1:
        """Start the threads that wait for the disk, if the device has a backing. Raises UblkError."""
        cdef int rc
        if self.device.table.backing is not None:
            self.readers = Readers(self.device, self.priority)
            with nogil:
                rc = self.readers.open()
            if rc:
                raise self._refusal(A_PRIORITY if self.readers.unurgent else A_THREAD, -rc)
        return 0

    cdef _refusal(self, refusal what, int code):
        """The exception for what cannot be had."""
        if what == A_RING:
            return UblkError(ring_refusal(-code), code)
        if what == A_PRIORITY:
            return UblkError(f"threads cannot have the real-time priority {self.priority} "
                             f"({os.strerror(code).lower()}): it takes CAP_SYS_NICE, or LimitRTPRIO= of the service", code)
        return UblkError(f"a disk's queue cannot be served ({os.strerror(code).lower()}): "
                         "raise ulimit -u and -n, or TasksMax= and LimitNOFILE= of the service", code)

    cdef void _close(self) noexcept:
        """End all threads, those that serve, too, and give back what they had, but the buffers."""
        cdef Queue queue
        for queue in self.queues:
            with nogil:
                queue.end()
        # These may still have requests of the queues.
        if self.readers is not None:
            with nogil:
                self.readers.close()
        for queue in self.queues:
            with nogil:
                queue.release()
            queue.readers = None
        self.readers = None
        self.is_open = False
        self._let_go()

    cdef void _let_go(self) noexcept:
        """Close /dev/ublkcN."""
        if self.fd >= 0:
            with suppress(OSError):
                os.close(self.fd)
            self.fd = -1

    @property
    def geometry(self):
        """(queues, depth, max_io_bytes): what a disk must have been made with."""
        return self.number, self.depth, self.max_io_bytes

    @property
    def serving(self):
        """Whether the kernel has tags of some queue: a disk may be there."""
        return any([load_relaxed(&(<Queue>queue).tallies.live) != 0 for queue in self.queues])

    def use(self, Device device not None):
        """Serve another device from now on. No memory is taken or given back, but for the threads of one that has a backing.

        Raises UblkError while a disk is served, and when those threads are refused.
        """
        cdef Queue queue
        if self.fd >= 0:
            raise UblkError("these queues serve a disk already: stop it first", errno.EBUSY)
        if self.readers is not None:
            with nogil:
                self.readers.close()
            self.readers = None
        self.device = device
        for queue in self.queues:
            queue.device = device
            queue.readers = None
        if self.is_open:
            try:
                self._have_readers()
            except BaseException:
                self._close()       # serve makes them anew
                raise
            for queue in self.queues:
                queue.readers = self.readers

    def serve(self, int fd):
        """Hand all tags to the kernel by /dev/ublkcN, whose descriptor stays the caller's, and begin to serve.

        When it returns the disk may be started. Raises UblkError when the kernel refuses, and then nothing is served; also
        when another disk is served.
        """
        cdef Queue queue
        cdef int rc = 0
        if self.fd >= 0:
            raise UblkError("these queues serve a disk already: stop it first", errno.EBUSY)
        if not self.is_open:
            self._open()
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        try:
            for queue in self.queues:
                with nogil:
                    rc = queue.map(self.fd)
                if rc:
                    raise self._unserved(queue, -rc, "have the requests")
            for queue in self.queues:
                queue.command(SERVE)
            for queue in self.queues:
                with nogil:
                    queue.wait(FETCHING, 0)
            for queue in self.queues:
                if queue.rc:
                    raise self._unserved(queue, -queue.rc, "fetch")
        except BaseException:
            self._close()
            raise

    cdef _unserved(self, Queue queue, int code, str what):
        """The exception for a disk that cannot be served."""
        reasons = {
            errno.EINVAL: f"it has not {self.number} queues of {self.depth} requests, or another process has served it",
            errno.EBUSY: "it is served already",
            errno.ENODEV: "it is being stopped" if queue.asked != NULL else "the descriptor is not /dev/ublkcN's",
            errno.EOPNOTSUPP: "the descriptor is not /dev/ublkcN's",
        }
        return UblkError(f"cannot {what} of queue {queue.number} of a ublk disk: "
                         f"{reasons.get(code) or os.strerror(code).lower()}", code)

    def join(self, timeout=None):
        """Wait until the kernel has given all tags back, which it does when the disk is stopped; True: it has.

        timeout: seconds, None: for ever. True too if nothing was served. After that serve may come again.
        """
        cdef Queue queue
        cdef stage reached
        end = None if timeout is None else time.monotonic() + timeout
        for queue in self.queues:
            while self.fd >= 0:
                with nogil:
                    reached = queue.wait(SERVING, TURN)
                if reached != SERVING:
                    break
                PyErr_CheckSignals()
                if end is not None and time.monotonic() >= end:
                    return False
        broken = any([(<Queue>queue).stage != PARKED for queue in self.queues])
        for queue in self.queues:
            queue.unmap()
        self._let_go()
        if broken and self.is_open:
            self._close()       # serve makes them anew
        return True

    def close(self):
        """End all threads, and give back what they had. A disk that is still served loses its server."""
        self._close()

    def stats(self):
        """Numbers since the start: names -> numbers."""
        cdef Queue queue
        cdef uint64_t requests = 0, enters = 0, resent = 0, away = 0, lost = 0
        for queue in self.queues:
            requests += load_relaxed(&queue.tallies.requests)
            enters += load_relaxed(&queue.tallies.enters)
            resent += load_relaxed(&queue.tallies.resent)
            away += load_relaxed(&queue.tallies.away)
            lost += load_relaxed(&queue.tallies.lost)
        return {
            "ublk_requests": requests,
            "ublk_enters": enters,
            "ublk_resent": resent,
            "ublk_away": away,
            "ublk_lost": lost,
        }
