"""A queue of submissions to the kernel, and one of its completions: as much of io_uring as ublk needs, by its system calls.

A ring belongs to the thread that opened it (SINGLE_ISSUER): only it submits, and only there completions arrive, while it
waits for some (DEFER_TASKRUN), so that nothing interrupts it. Kernels before 6.1 do not have these two; there completions
come at its next system call (COOP_TASKRUN). Any thread may close a ring whose thread has ended.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    OP_POLL = 6
    OP_URING_CMD = 46           # Linux 5.19

cdef enum:
    POLL_ALWAYS = 1 << 0        # a poll's size: it stays, and completes each time that there is news; 5.13
    MORE = 1 << 1               # a completion's flags: its submission stays

cdef struct submission:
    uint8_t opcode
    uint8_t flags
    uint16_t priority
    int32_t fd
    uint64_t offset             # a command's number
    uint64_t address
    uint32_t size
    uint32_t op_flags
    uint64_t user_data
    uint16_t buffer
    uint16_t personality
    int32_t file_index
    uint64_t command[2]         # of a command: its 16 bytes; 80 in a ring of wide submissions

cdef struct completion:
    uint64_t user_data
    int32_t result
    uint32_t flags

cdef struct ring:
    int fd                      # -1: not open
    bint wide                   # submissions of 128 bytes
    char *shared                # both queues' indices, and the completions
    uint64_t shared_size
    char *submissions
    uint64_t submissions_size
    uint32_t *sq_head           # the kernel's
    uint32_t *sq_tail
    uint32_t sq_mask
    uint32_t sq_next            # where the next one goes: sq_tail, and those that the kernel is to see at the next enter
    uint32_t *cq_head
    uint32_t *cq_tail           # the kernel's
    uint32_t cq_mask
    completion *completions

cdef int ring_open(ring *r, uint32_t entries, bint wide, bint single) noexcept nogil
cdef void ring_close(ring *r) noexcept nogil
cdef submission *ring_next(ring *r) noexcept nogil
cdef int ring_enter(ring *r, uint32_t wait) noexcept nogil
cdef int ring_enter_for(ring *r, uint32_t wait, uint64_t milliseconds) noexcept nogil
cdef uint32_t ring_unsent(const ring *r) noexcept nogil
cdef uint32_t ring_completed(const ring *r) noexcept nogil
cdef completion *ring_completion(const ring *r, uint32_t at) noexcept nogil
cdef void ring_seen(ring *r, uint32_t end) noexcept nogil
cdef str ring_refusal(int rc)
