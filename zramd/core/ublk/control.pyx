"""/dev/ublk-control: makes, starts, stops and deletes the kernel's ublk devices, and lets a new server take one over.

A command waits for the kernel, at most as long as the caller allows: some wait for what another process does, and a
kernel with a fault in its driver never answers. Only root may (CAP_SYS_ADMIN), but for `available`.

    add -> set_params -> (a server fetches from /dev/ublkcN) -> start -> ... -> stop -> delete
    after a server's death: start_recovery -> (a server fetches) -> end_recovery
"""

cimport cython
from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, EOPNOTSUPP, ETIME
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from cpython.exc cimport PyErr_CheckSignals

from zramd.core.system.checks cimport zr_static_assert
from zramd.core.types cimport BLOCK_SHIFT, BLOCK_SIZE
from zramd.core.ublk.protocol cimport (
    ADD_DEV,
    ANY_NUMBER,
    DEL_DEV,
    DEL_DEV_ASYNC,
    DEV_DEAD,
    DEV_FAIL_IO,
    DEV_LIVE,
    DEV_QUIESCED,
    END_USER_RECOVERY,
    F_CMD_IOCTL_ENCODE,
    F_USER_RECOVERY,
    F_USER_RECOVERY_REISSUE,
    GET_DEV_INFO,
    GET_FEATURES,
    GET_PARAMS,
    MAX_DEPTH,
    NO_QUEUE,
    PARAM_BASIC,
    PARAM_DEVT,
    PARAM_DISCARD,
    SECTOR_SHIFT,
    SET_PARAMS,
    START_DEV,
    START_USER_RECOVERY,
    STOP_DEV,
    UBLK_CONTROL,
    UBLK_CONTROL_OUT,
    control_command,
    descriptor,
    device_info,
    parameters,
    queue_command,
)
from zramd.core.ublk.ring cimport (
    OP_URING_CMD,
    completion,
    ring_close,
    ring_completed,
    ring_completion,
    ring_enter_for,
    ring_next,
    ring_open,
    ring_refusal,
    ring_seen,
    submission,
)

import errno
import os
import time
from contextlib import suppress
from typing import NamedTuple

from zramd.core.ublk.ring import refusal
from zramd.errors import UblkError

cdef extern from *:
    """
    #include <stdlib.h>
    """
    void *calloc(size_t count, size_t size) nogil
    void free(void *start) nogil

QUEUES = 4                  # at most: as many as there are processors
DEPTH = 128
MAX_IO_BYTES = 64 << 10
CONTROL = "/dev/ublk-control"

cdef enum:
    TURN = 100              # milliseconds: how often a wait looks for signals
    MAX_TRIM = 1 << 30      # bytes of one request

cdef dict STATES = {DEV_DEAD: "dead", DEV_LIVE: "live", DEV_QUIESCED: "quiesced", DEV_FAIL_IO: "fail_io"}

# What GET_FEATURES has a bit for, in their order.
cdef tuple FEATURES = (
    "zero_copy", "comp_in_task", "need_get_data", "user_recovery", "user_recovery_reissue", "unprivileged", "ioctl_encode",
    "user_copy", "zoned", "user_recovery_fail_io", "update_size", "auto_buf_reg", "quiesce", "per_io_daemon",
    "buf_reg_off_daemon", "batch_io", "integrity", "safe_stop", "no_auto_part_scan", "shmem_zero_copy",
)


class Info(NamedTuple):
    """What the kernel says of a device; state is dead, live, quiesced or fail_io, pid its server's, 0 or -1 without one.

    mark: what `add` was given.
    """

    number: int
    queues: int
    depth: int
    max_io_bytes: int
    state: str
    pid: int
    recovers: bool
    flags: int
    owner_uid: int
    owner_gid: int
    mark: int


def available(path=CONTROL):
    """Why ublk cannot be used by this process, as one sentence with a remedy; '' if it can be."""
    cdef str reason = refusal()
    if reason:
        return reason
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return no_control(error, path)
    return ""


cdef str no_control(error, path):
    """Why /dev/ublk-control cannot be opened."""
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return f"there is no '{path}': load the kernel's module with 'modprobe ublk_drv' (Linux 6.0 and later may have it)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"'{path}' may not be opened: only root may attach ublk devices"
    return f"'{path}' cannot be opened: {error.strerror.lower()}"


cdef info_of(const device_info *info):
    return Info(
        number=info.number,
        queues=info.queues,
        depth=info.depth,
        max_io_bytes=info.max_io_bytes,
        state=STATES.get(info.state, f"state {info.state}"),
        pid=info.pid,
        recovers=bool(info.flags & F_USER_RECOVERY),
        flags=info.flags,
        owner_uid=info.owner_uid,
        owner_gid=info.owner_gid,
        mark=info.server_flags,
    )


@cython.final
cdef class Control:
    """The kernel's ublk devices, by their numbers: /dev/ublkb3 is number 3. A context manager; one thread at a time.

    timeout: seconds that a command may take; each method may be given another. Raises UblkError, with the errno of the
    system, when there is no /dev/ublk-control, it may not be opened, or there is no io_uring; MemoryError.
    Every method raises UblkError;
    ETIME: the kernel has not answered in time, and the command may still be done. After that no other can be given.
    """

    def __cinit__(self, path=CONTROL, double timeout=10):
        cdef int rc
        zr_static_assert(sizeof(control_command) == 32)
        zr_static_assert(sizeof(device_info) == 64)
        zr_static_assert(sizeof(parameters) == 80)
        zr_static_assert(sizeof(descriptor) == 24)
        zr_static_assert(sizeof(queue_command) == 16)
        self.ring.fd = self.fd = -1
        self.timeout = timeout
        self.room = calloc(1, max(sizeof(device_info), sizeof(parameters)))
        if self.room == NULL:
            raise MemoryError("no memory for a ublk command")
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UblkError(no_control(error, path), error.errno) from None
        rc = ring_open(&self.ring, 1, True, False)
        if rc:
            raise UblkError(ring_refusal(rc), -rc)

    def __dealloc__(self):
        self._close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._close()

    def close(self):
        """Give everything back; no method may be called after that."""
        self._close()

    cdef void _close(self) noexcept:
        ring_close(&self.ring)
        if self.fd >= 0:
            with suppress(OSError):
                os.close(self.fd)
            self.fd = -1
        if not self.stuck:
            free(self.room)
        self.room = NULL

    cdef int _command(self, uint32_t command, uint32_t number, uint32_t size, uint64_t data, timeout) except? -1:
        """Have the kernel do a command with what is in self.room: what it returned, or -errno. Raises at a wait's end."""
        cdef submission *s
        cdef control_command *c
        cdef completion *done
        cdef int rc
        cdef double end = time.monotonic() + (self.timeout if timeout is None else timeout)
        if self.room == NULL or self.stuck:
            raise UblkError("/dev/ublk-control: it was closed, or has not answered an earlier command", errno.EBADF)
        s = ring_next(&self.ring)
        s.opcode = OP_URING_CMD
        s.fd = self.fd
        s.offset = command
        c = <control_command *>s.command
        c.number = number
        c.queue = NO_QUEUE
        c.data = data
        if size:
            c.address = <uint64_t>self.room
            c.size = size
        while True:
            with nogil:
                rc = ring_enter_for(&self.ring, 1, TURN)
            if rc and rc != -ETIME and rc != -EINTR and rc != -EAGAIN and rc != -EBUSY:
                self.stuck = True
                return rc
            if ring_completed(&self.ring) != self.ring.cq_head[0]:
                break
            try:
                PyErr_CheckSignals()
                if time.monotonic() >= end:
                    raise UblkError("the kernel does not answer a ublk command: see 'dmesg' for what it says", errno.ETIME)
            except BaseException:
                self.stuck = True
                raise
        done = ring_completion(&self.ring, self.ring.cq_head[0])
        rc = done.result
        ring_seen(&self.ring, self.ring.cq_head[0] + 1)
        return rc

    cdef int _do(self, str what, uint32_t command, uint32_t number, uint32_t size=0, uint64_t data=0, timeout=None,
                 dict reasons=None) except -1:
        """The same; raises UblkError, where reasons have a sentence's end for an errno."""
        cdef int rc = self._command(command, number, size, data, timeout)
        if rc < 0:
            raise failure(what, -rc, number, reasons)
        return rc

    def features(self):
        """The names of what this kernel's ublk has, as a frozenset; empty before Linux 6.5, which does not tell."""
        cdef uint64_t bits
        cdef int rc
        memset(self.room, 0, sizeof(uint64_t))
        rc = self._command(UBLK_CONTROL_OUT(GET_FEATURES), 0, sizeof(uint64_t), 0, None)
        if rc in (-EOPNOTSUPP, -EINVAL, -errno.ENODEV):
            return frozenset()
        if rc < 0:
            raise failure("ask for ublk's features", -rc, ANY_NUMBER, None)
        bits = (<uint64_t *>self.room)[0]
        return frozenset(name for place, name in enumerate(FEATURES) if bits >> place & 1)

    def add(self, number=-1, *, uint32_t queues=QUEUES, uint32_t depth=DEPTH, uint32_t max_io_bytes=MAX_IO_BYTES,
            bint recovers=False, uint64_t mark=0, timeout=None):
        """Make a device of this number, -1: of one that is free; its Info. There is no disk before `start`.

        recovers: without a server requests wait for the next one, which gets again what was under way; else they fail.
        The kernel may give fewer queues. mark: 64 bits that it keeps for whoever asks for the device's Info. Raises
        ValueError for what no device can have.
        """
        cdef device_info *info = <device_info *>self.room
        cdef uint32_t which = ANY_NUMBER if number < 0 else number
        if not (0 < queues <= 0xFFFF and 0 < depth <= MAX_DEPTH):
            raise ValueError(f"{queues} queues of {depth} requests: 1 or more, and {MAX_DEPTH} at most")
        if max_io_bytes % BLOCK_SIZE or not max_io_bytes:
            raise ValueError(f"requests of {max_io_bytes} bytes: not a multiple of {BLOCK_SIZE}")
        memset(self.room, 0, sizeof(device_info))
        info.queues = queues
        info.depth = depth
        info.max_io_bytes = max_io_bytes
        info.number = which
        info.pid = os.getpid()
        info.flags = F_CMD_IOCTL_ENCODE
        info.server_flags = mark
        if recovers:
            info.flags |= F_USER_RECOVERY | F_USER_RECOVERY_REISSUE
        self._do("make a ublk device", UBLK_CONTROL(ADD_DEV), which, sizeof(device_info), 0, timeout, {
            errno.EEXIST: f"/dev/ublkb{number} exists already: choose another",
            errno.EACCES: "there are as many as the kernel allows: raise ublks_max of its module ublk_drv, "
                          "or detach one",
        })
        made = info_of(info)
        if recovers and not info.flags & F_USER_RECOVERY_REISSUE:
            self.delete(made.number)
            raise UblkError("this kernel's ublk devices do not outlive their servers: use Linux 6.1 or later",
                            errno.EOPNOTSUPP)
        return made

    def set_params(self, uint32_t number, uint64_t disksize, *, max_io_bytes=MAX_IO_BYTES):
        """Say how large the disk will be, in bytes, and what else the kernel must know; before `start`.

        Raises ValueError unless they are a multiple of 4096.
        """
        cdef parameters *p = <parameters *>self.room
        if not disksize or disksize % BLOCK_SIZE:
            raise ValueError(f"a disk of {disksize} bytes: not a multiple of {BLOCK_SIZE}")
        memset(p, 0, sizeof(parameters))
        p.size = sizeof(parameters)
        p.types = PARAM_BASIC | PARAM_DISCARD
        p.basic.logical_shift = p.basic.physical_shift = p.basic.io_opt_shift = p.basic.io_min_shift = BLOCK_SHIFT
        p.basic.max_sectors = max_io_bytes >> SECTOR_SHIFT
        p.basic.sectors = disksize >> SECTOR_SHIFT
        p.discard.granularity = BLOCK_SIZE
        p.discard.max_sectors = p.discard.max_zeroes_sectors = MAX_TRIM >> SECTOR_SHIFT
        p.discard.max_segments = 1
        self._do(f"describe /dev/ublkb{number}", UBLK_CONTROL(SET_PARAMS), number, sizeof(parameters), 0, None, {
            errno.EACCES: "it has been started already",
        })

    def start(self, uint32_t number, int pid, *, timeout=None):
        """Make the disk, once a server has fetched from every queue: it is waited for. pid: the server's."""
        self._do(f"start /dev/ublkb{number}", UBLK_CONTROL(START_DEV), number, 0, pid, timeout, {
            errno.EEXIST: "it has been started already",
            errno.EINVAL: f"process {pid} is not its server, or it has no parameters yet",
        })

    def stop(self, uint32_t number, *, timeout=None):
        """Take the disk away, even one that is in use: then its users get errors. What is under way is waited for."""
        self._do(f"stop /dev/ublkb{number}", UBLK_CONTROL(STOP_DEV), number, 0, 0, timeout)

    def delete(self, uint32_t number, *, bint wait=True, timeout=None):
        """Delete a device, stopping it first. wait: until its last user has closed it, and the number is free again.

        Kernels before 6.9 always wait; beyond the time limit they go on with it.
        """
        cdef int rc
        what = f"delete /dev/ublkb{number}"
        if not wait:
            rc = self._command(UBLK_CONTROL_OUT(DEL_DEV_ASYNC), number, 0, 0, timeout)
            if rc >= 0:
                return
            if rc != -EOPNOTSUPP:
                raise failure(what, -rc, number, None)
        self._do(what, UBLK_CONTROL(DEL_DEV), number, 0, 0, timeout)

    def info(self, uint32_t number):
        """What the kernel says of a device: Info."""
        memset(self.room, 0, sizeof(device_info))
        self._do(f"ask about /dev/ublkb{number}", UBLK_CONTROL_OUT(GET_DEV_INFO), number, sizeof(device_info))
        return info_of(<device_info *>self.room)

    def params(self, uint32_t number):
        """A device's parameters as the kernel has them: names -> bytes, and disk, its device number, once started."""
        cdef parameters *p = <parameters *>self.room
        memset(p, 0, sizeof(parameters))
        p.size = sizeof(parameters)
        self._do(f"ask about /dev/ublkb{number}", UBLK_CONTROL_OUT(GET_PARAMS), number, sizeof(parameters))
        found = {}
        if p.types & PARAM_BASIC:
            found |= {
                "disksize": p.basic.sectors << SECTOR_SHIFT,
                "block": 1 << p.basic.logical_shift,
                "max_io_bytes": p.basic.max_sectors << SECTOR_SHIFT,
            }
        if p.types & PARAM_DISCARD:
            found |= {
                "max_discard_bytes": <uint64_t>p.discard.max_sectors << SECTOR_SHIFT,
                "max_zeroes_bytes": <uint64_t>p.discard.max_zeroes_sectors << SECTOR_SHIFT,
            }
        if p.types & PARAM_DEVT:
            found["disk"] = os.makedev(p.devt.disk_major, p.devt.disk_minor)
        return found

    def start_recovery(self, uint32_t number, *, timeout=None):
        """Let the next server have a device whose server is gone; it then opens /dev/ublkcN and fetches.

        errno EBUSY: the kernel has not noticed yet that the server is gone, or another one is there: try again. EINVAL: it
        was done already, or the device does not outlive a server.
        """
        self._do(f"take /dev/ublkb{number} over", UBLK_CONTROL(START_USER_RECOVERY), number, 0, 0, timeout, {
            errno.EBUSY: "the server of before is not gone yet: try again",
            errno.EINVAL: "it was begun already, or the device does not outlive its server",
        })

    def end_recovery(self, uint32_t number, int pid, *, timeout=None):
        """Let requests go to the new server, once it has fetched from every queue: it is waited for. pid: the server's."""
        self._do(f"take /dev/ublkb{number} over", UBLK_CONTROL(END_USER_RECOVERY), number, 0, pid, timeout, {
            errno.EINVAL: f"process {pid} is not its server",
            errno.EBUSY: "it is served already",
        })


cdef failure(str what, int code, uint32_t number, dict reasons):
    """The exception for a command that failed with an errno."""
    cdef str reason = None if reasons is None else reasons.get(code)
    if reason is None:
        if code == errno.EPERM or code == errno.EACCES:
            reason = "only root may (CAP_SYS_ADMIN)"
        elif code == errno.ENODEV and number != <uint32_t>ANY_NUMBER:
            reason = "there is no such device"
        elif code == errno.EOPNOTSUPP:
            reason = "this kernel cannot: use Linux 6.1 or later"
        elif code == errno.ENOMEM:
            reason = "the kernel has no memory for it: free some"
        else:
            reason = os.strerror(code).lower()
    return UblkError(f"cannot {what}: {reason}", code)
