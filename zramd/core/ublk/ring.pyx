"""io_uring by its system calls: see ring.pxd."""

from libc.errno cimport EINVAL, ENOSYS, EPERM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from zramd.core.system.checks cimport zr_static_assert

import os
from contextlib import suppress

cdef extern from *:
    """
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #define zr_uring_setup(entries, params) ((int)syscall(SYS_io_uring_setup, (entries), (params)))
    #define zr_uring_enter(fd, submit, wait, flags, argument, size) \\
        ((int)syscall(SYS_io_uring_enter, (fd), (submit), (wait), (flags), (argument), (size)))
    """
    int zr_uring_setup(uint32_t entries, setup *params) nogil
    int zr_uring_enter(int fd, uint32_t submit, uint32_t wait, uint32_t flags, const void *argument, size_t size) nogil
    void *mmap(void *start, size_t size, int protection, int flags, int fd, long offset) nogil
    int munmap(void *start, size_t size) nogil
    int close(int fd) nogil
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_POPULATE
    void *MAP_FAILED

cdef extern from *:
    """
    #define load_acquire_u32(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define store_release_u32(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    """
    uint32_t load_acquire_u32(const uint32_t *p) noexcept nogil
    void store_release_u32(uint32_t *p, uint32_t value) noexcept nogil

cdef enum:
    SETUP_COOP_TASKRUN = 1 << 8         # Linux 5.19
    SETUP_WIDE = 1 << 10                # 5.19
    SETUP_SINGLE_ISSUER = 1 << 12       # 6.0
    SETUP_DEFER_TASKRUN = 1 << 13       # 6.1
    FEATURE_SINGLE_MMAP = 1 << 0        # 5.4
    ENTER_GETEVENTS = 1 << 0
    ENTER_EXT_ARG = 1 << 3
    OFFSET_RINGS = 0
    OFFSET_SUBMISSIONS = 0x10000000

cdef struct sq_offsets:
    uint32_t head
    uint32_t tail
    uint32_t mask
    uint32_t entries
    uint32_t flags
    uint32_t dropped
    uint32_t array
    uint32_t reserved
    uint64_t address

cdef struct cq_offsets:
    uint32_t head
    uint32_t tail
    uint32_t mask
    uint32_t entries
    uint32_t overflow
    uint32_t completions
    uint32_t flags
    uint32_t reserved
    uint64_t address

cdef struct setup:
    uint32_t sq_entries
    uint32_t cq_entries
    uint32_t flags
    uint32_t thread_cpu
    uint32_t thread_idle
    uint32_t features
    uint32_t wq_fd
    uint32_t reserved[3]
    sq_offsets sq
    cq_offsets cq

cdef struct time_limit:
    int64_t seconds
    int64_t nanoseconds

cdef struct extended:
    uint64_t mask
    uint32_t mask_size
    uint32_t pad
    uint64_t time               # a time_limit's address


cdef int ring_open(ring *r, uint32_t entries, bint wide, bint single) noexcept nogil:
    """Open a ring for so many submissions at once, as the calling thread's: 0 or -errno.

    wide: for control commands. single: the calling thread alone will use it, else one after the other may.
    """
    cdef setup params
    cdef uint32_t flags = SETUP_WIDE if wide else 0, i
    cdef uint32_t *array
    cdef uint32_t kinds[3]
    cdef int fd = -1
    zr_static_assert(sizeof(setup) == 120)
    zr_static_assert(sizeof(submission) == 64)
    zr_static_assert(sizeof(completion) == 16)
    memset(r, 0, sizeof(ring))
    r.fd = -1
    kinds[0] = SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN
    kinds[1] = SETUP_COOP_TASKRUN
    kinds[2] = 0
    for i in range(0 if single else 2, 3):
        memset(&params, 0, sizeof(params))
        params.flags = flags | kinds[i]
        fd = zr_uring_setup(entries, &params)
        if fd >= 0 or errno != EINVAL:
            break
    if fd < 0:
        return -errno
    if not params.features & FEATURE_SINGLE_MMAP:
        close(fd)
        return -ENOSYS
    r.fd = fd
    r.wide = wide
    r.shared_size = max(params.sq.array + params.sq_entries * sizeof(uint32_t),
                        params.cq.completions + params.cq_entries * sizeof(completion))
    r.submissions_size = params.sq_entries * sizeof(submission) * (2 if wide else 1)
    r.shared = <char *>mmap(NULL, r.shared_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, OFFSET_RINGS)
    if r.shared != <char *>MAP_FAILED:
        r.submissions = <char *>mmap(NULL, r.submissions_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                                     OFFSET_SUBMISSIONS)
    if r.shared == <char *>MAP_FAILED or r.submissions == <char *>MAP_FAILED:
        fd = -errno
        if r.shared == <char *>MAP_FAILED:
            r.shared = NULL
        r.submissions = NULL
        ring_close(r)
        return fd
    r.sq_head = <uint32_t *>(r.shared + params.sq.head)
    r.sq_tail = <uint32_t *>(r.shared + params.sq.tail)
    r.sq_mask = (<uint32_t *>(r.shared + params.sq.mask))[0]
    r.sq_next = r.sq_tail[0]
    r.cq_head = <uint32_t *>(r.shared + params.cq.head)
    r.cq_tail = <uint32_t *>(r.shared + params.cq.tail)
    r.cq_mask = (<uint32_t *>(r.shared + params.cq.mask))[0]
    r.completions = <completion *>(r.shared + params.cq.completions)
    # Which submission stands at which place of the queue: each at its own.
    array = <uint32_t *>(r.shared + params.sq.array)
    for i in range(params.sq_entries):
        array[i] = i
    return 0


cdef void ring_close(ring *r) noexcept nogil:
    """Close a ring; what it still waits for, the kernel cancels. The ring's thread must have ended, or be the caller."""
    if r.submissions != NULL:
        munmap(r.submissions, r.submissions_size)
    if r.shared != NULL:
        munmap(r.shared, r.shared_size)
    if r.fd >= 0:
        close(r.fd)
    r.fd = -1
    r.shared = r.submissions = NULL


cdef submission *ring_next(ring *r) noexcept nogil:
    """A cleared submission, which the next enter hands over; there must be room: no more than `entries` are under way."""
    cdef uint32_t size = sizeof(submission) * (2 if r.wide else 1)
    cdef submission *s = <submission *>(r.submissions + (r.sq_next & r.sq_mask) * size)
    memset(s, 0, size)
    r.sq_next += 1
    return s


cdef int ring_enter(ring *r, uint32_t wait) noexcept nogil:
    """Hand over what was prepared, and wait for so many completions; 0 or -errno (then all of it can be tried again).

    One system call, whatever it does.
    """
    store_release_u32(r.sq_tail, r.sq_next)
    if zr_uring_enter(r.fd, ring_unsent(r), wait, ENTER_GETEVENTS, NULL, 0) < 0:
        return -errno
    return 0


cdef int ring_enter_for(ring *r, uint32_t wait, uint64_t milliseconds) noexcept nogil:
    """As ring_enter, but wait so long at most: -ETIME after that."""
    cdef time_limit limit
    cdef extended argument
    limit.seconds = milliseconds // 1000
    limit.nanoseconds = milliseconds % 1000 * 1000000
    memset(&argument, 0, sizeof(argument))
    argument.time = <uint64_t>&limit
    store_release_u32(r.sq_tail, r.sq_next)
    if zr_uring_enter(r.fd, ring_unsent(r), wait, ENTER_GETEVENTS | ENTER_EXT_ARG, &argument,
                      sizeof(argument)) < 0:
        return -errno
    return 0


cdef uint32_t ring_unsent(const ring *r) noexcept nogil:
    """How many submissions the kernel has not taken yet."""
    return r.sq_next - load_acquire_u32(r.sq_head)


cdef uint32_t ring_completed(const ring *r) noexcept nogil:
    """Where the completions end that have arrived; they begin at r.cq_head[0]."""
    return load_acquire_u32(r.cq_tail)


cdef completion *ring_completion(const ring *r, uint32_t at) noexcept nogil:
    return &r.completions[at & r.cq_mask]


cdef void ring_seen(ring *r, uint32_t end) noexcept nogil:
    """Give the places of all completions before `end` back."""
    store_release_u32(r.cq_head, end)


cdef str ring_refusal(int rc):
    """Why there is no ring, as a sentence with a remedy."""
    if rc == -ENOSYS:
        return "io_uring cannot be used: this kernel is without it, or older than Linux 5.4"
    if rc == -EINVAL:
        return "io_uring cannot take commands: use Linux 6.0 or later"
    if rc == -EPERM:
        with suppress(OSError, ValueError), open("/proc/sys/kernel/io_uring_disabled") as file:
            if int(file.read()):
                return "io_uring is disabled: set the sysctl kernel.io_uring_disabled to 0"
        return "io_uring is forbidden: allow it in the seccomp filter of the container or service"
    return f"io_uring cannot be used: {os.strerror(-rc).lower()}"


def refusal():
    """Why a process like this one cannot have a ring, as a sentence with a remedy; '' if it can."""
    cdef ring r
    cdef int rc
    with nogil:
        rc = ring_open(&r, 1, True, False)
        if rc == 0:
            ring_close(&r)
    return ring_refusal(rc) if rc else ""
