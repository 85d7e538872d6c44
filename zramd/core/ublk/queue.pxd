from libc.stdint cimport int32_t, uint32_t, uint64_t

from zramd.core.device.device cimport Device
from zramd.core.memory.region cimport Region
from zramd.core.system.locks cimport pthread_cond_t, pthread_mutex_t
from zramd.core.ublk.protocol cimport descriptor
from zramd.core.ublk.readers cimport Readers, answers, job
from zramd.core.ublk.ring cimport completion, ring
from zramd.core.ublk.threads cimport pthread_t

cdef enum stage:
    STARTING
    PARKED                      # the kernel has none of its tags
    FETCHING
    SERVING
    ENDED

cdef enum order:
    NOTHING
    SERVE
    END

cdef enum refusal:
    A_THREAD
    A_PRIORITY
    A_RING

cdef struct tag:
    int32_t result              # what the kernel is answered
    uint32_t command            # FETCH, or COMMIT_AND_FETCH: what the kernel was told last
    job away                    # the request, while a reader has it

cdef struct tallies:
    # All atomic, written by the queue's thread.
    uint64_t requests
    uint64_t enters             # system calls
    uint64_t resent             # commands that the kernel had no memory for
    uint64_t away               # requests that waited for the disk
    uint64_t lost               # tags that the kernel gave an unknown error for
    uint64_t live               # tags that are not over

cdef class Queue:
    cdef Device device
    cdef Readers readers        # None: nothing is ever out
    cdef uint32_t number
    cdef uint32_t depth
    cdef uint32_t max_io_bytes
    cdef int priority
    cdef int full               # errno for a client when the pool is full
    cdef Region buffers
    cdef Region tag_table
    cdef tag *tags
    cdef tallies tallies
    # of what is served
    cdef int fd                 # /dev/ublkcN
    cdef const descriptor *asked
    cdef uint64_t asked_size
    # the thread, and what it and its owner tell each other
    cdef pthread_t thread
    cdef bint started
    cdef int process            # whose thread it is: a child that was forked off has none
    cdef ring ring
    cdef answers answers
    cdef bint listening         # the ring polls answers.wake
    cdef uint64_t leaving       # atomic: leave at once, with tags
    cdef pthread_mutex_t lock   # guards those below
    cdef pthread_cond_t news
    cdef stage stage
    cdef order order
    cdef int rc                 # of the last step
    cdef refusal refused        # what the first one was about

    cdef int open(self) noexcept nogil
    cdef int map(self, int fd) noexcept nogil
    cdef void unmap(self) noexcept nogil
    cdef void command(self, order what) noexcept nogil
    cdef stage wait(self, stage beyond, uint64_t milliseconds) noexcept nogil
    cdef void end(self) noexcept nogil
    cdef void release(self) noexcept nogil
    cdef void _tell(self, stage reached, int rc) noexcept nogil
    cdef void _run(self) noexcept nogil
    cdef int _prepare(self) noexcept nogil
    cdef void _send(self, uint32_t tag, uint32_t command) noexcept nogil
    cdef void _listen(self) noexcept nogil
    cdef int _fetch(self) noexcept nogil
    cdef int _serve(self) noexcept nogil
    cdef void _look_ahead(self, uint32_t left, uint32_t at) noexcept nogil
    cdef void _expect(self, const completion *c, bint next) noexcept nogil
    cdef uint32_t _complete(self, const completion *c) noexcept nogil
    cdef uint32_t _take(self, const completion *c) noexcept nogil
    cdef void _answer(self, uint32_t tag, int rc, uint64_t length) noexcept nogil
    cdef void _handle(self, uint32_t tag) noexcept nogil
