"""One queue of a ublk disk, and the thread that serves it: from the kernel's request to its answer without Python.

    wait for requests (and hand over the answers to those of before: one system call for both)
    -> for each: descriptor -> Device.serve_... on the tag's buffer -> COMMIT_AND_FETCH
             or: a block is out -> a reader (readers.pyx) -> the eventfd -> COMMIT_AND_FETCH

The kernel copies what is written into the tag's buffer before the request comes, and what is read out of it with the answer.
A tag is over when the kernel says so (the disk is stopped), and the thread parks when all are.
All that the thread needs it has from its start: its ring, which must be its own, its stack, the buffers, each tag's words.
It allocates nothing, never knows the GIL, writes no log. The ring is closed once the thread has ended.

Lock order: a queue's lock is never held while it serves.
"""

cimport cython
from libc.errno cimport EAGAIN, EBUSY, EDQUOT, EINTR, EIO, ENODEV, ENOMEM, ENOSPC, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memset

from zramd.core.device.backing cimport AWAY
from zramd.core.device.device cimport Device
from zramd.core.memory.region cimport Region, whole_pages
from zramd.core.system.locks cimport (
    load_acquire,
    load_relaxed,
    mutex_inherit,
    nap,
    owned_add,
    owned_sub,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_wait,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_relaxed,
    store_release,
)
from zramd.core.system.process cimport CAP_SYS_ADMIN, lose_capability, touch_stack
from zramd.core.ublk.protocol cimport (
    COMMIT_AND_FETCH,
    FETCH,
    IO_DISCARD,
    IO_F_NOUNMAP,
    IO_FLUSH,
    IO_OP_MASK,
    IO_READ,
    IO_WRITE,
    IO_WRITE_ZEROES,
    MAX_DEPTH,
    SECTOR_SHIFT,
    UBLK_IO,
    descriptor,
    queue_command,
)
from zramd.core.ublk.readers cimport job, take_answers
from zramd.core.ublk.ring cimport (
    MORE,
    OP_POLL,
    OP_URING_CMD,
    POLL_ALWAYS,
    completion,
    ring_close,
    ring_completed,
    ring_completion,
    ring_enter,
    ring_next,
    ring_open,
    ring_seen,
    ring_unsent,
    submission,
)
from zramd.core.ublk.threads cimport (
    THREAD_STACK,
    cond_wait_for,
    pthread_cond_broadcast,
    pthread_join,
    thread_begin,
    thread_start,
    thread_work,
    zr_wake,
)

cdef extern from *:
    """
    #include <errno.h>
    #include <poll.h>
    #include <stdint.h>
    #include <sys/eventfd.h>
    #include <sys/mman.h>
    #include <unistd.h>
    """
    int eventfd(unsigned int initial, int flags) nogil
    int close(int fd) nogil
    void *mmap(void *start, size_t size, int protection, int flags, int fd, long offset) nogil
    int munmap(void *start, size_t size) nogil
    int madvise(void *start, size_t size, int advice) nogil
    int getpid() nogil
    int EFD_CLOEXEC, PROT_READ, MAP_SHARED, MADV_DONTFORK, POLLIN, ECANCELED, EOPNOTSUPP
    void *MAP_FAILED

cdef enum:
    WOKEN = 1 << 16             # what a completion of the eventfd's names instead of a tag


cdef void *begin(Queue queue) noexcept nogil:
    queue._run()
    return NULL


@cython.final
@cython.no_gc_clear
cdef class Queue:
    """Queue `number` of a disk: depth requests at once of max_io_bytes at most. Queues drives it.

    self.readers, the owner's to set: who waits for the disk, None: nothing of the device is ever out. priority: of its
    real-time thread, 0: it is an ordinary one. full: the errno for clients when there is no room. Raises MemoryError; open()
    is to follow, and end() and release() in the end.
    """

    def __cinit__(self, Device device not None, uint32_t number, uint32_t depth, uint32_t max_io_bytes,
                  int priority, int full):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.news, NULL)
        pthread_mutex_init(&self.answers.lock, NULL)
        self.process = getpid()
        self.device = device
        self.number = number
        self.depth = depth
        self.max_io_bytes = max_io_bytes
        self.priority = priority
        self.full = full
        self.fd = self.ring.fd = self.answers.wake = -1
        self.buffers = Region(<uint64_t>depth * max_io_bytes)
        self.tag_table = Region(depth * sizeof(tag))
        self.tags = <tag *>self.tag_table.base
        if self.buffers.populate(self.buffers.size) or self.tag_table.populate(self.tag_table.size):
            raise MemoryError(f"no memory for {depth} requests of {max_io_bytes} bytes")

    def __dealloc__(self):
        self.end()
        self.release()
        if getpid() == self.process:    # else the threads of the other one are said to wait yet
            pthread_mutex_destroy(&self.answers.lock)
            pthread_cond_destroy(&self.news)
            pthread_mutex_destroy(&self.lock)

    # --------------------------------------------------------------------------------------------------------
    # for its owner: one thread at a time

    cdef int open(self) noexcept nogil:
        """Start the thread, with all that it needs, and wait until it has that; 0 or -errno.

        Then self.refused says what it is for, and end() and release() are due.
        """
        cdef int rc = 0
        self.refused = A_THREAD
        if self.priority:
            rc = -(mutex_inherit(&self.lock) or mutex_inherit(&self.answers.lock))
        self.answers.wake = eventfd(0, EFD_CLOEXEC)
        if self.answers.wake < 0:
            return -errno
        store_relaxed(&self.leaving, 0)
        self.stage = STARTING
        self.order = NOTHING
        if rc == 0:
            rc = -thread_start(&self.thread, <thread_work><void *>begin, <void *>self, THREAD_STACK)
        if rc == 0:
            self.started = True
            self.wait(STARTING, 0)
            rc = self.rc
        return rc

    cdef int map(self, int fd) noexcept nogil:
        """Map the descriptors of a ublkc, which this queue closes in unmap; 0 or -errno."""
        # All queues' are mapped as large as the largest could be.
        cdef uint64_t place = whole_pages(MAX_DEPTH * sizeof(descriptor)) * self.number
        cdef void *start
        self.asked_size = whole_pages(self.depth * sizeof(descriptor))
        start = mmap(NULL, self.asked_size, PROT_READ, MAP_SHARED, fd, place)
        if start == MAP_FAILED:
            return -errno
        # A child that was forked off would keep /dev/ublkcN open, and Linux 6.15 and later see a server's end by its last
        # close only: what was under way would hang.
        madvise(start, self.asked_size, MADV_DONTFORK)
        self.asked = <const descriptor *>start
        self.fd = fd
        return 0

    cdef void unmap(self) noexcept nogil:
        """Give the descriptors back."""
        if self.asked != NULL:
            munmap(<void *>self.asked, self.asked_size)
        self.asked = NULL
        self.fd = -1

    cdef void command(self, order what) noexcept nogil:
        """Have the thread, which is parked, do something."""
        pthread_mutex_lock(&self.lock)
        self.order = what
        if what == SERVE:
            self.stage = FETCHING
        pthread_cond_broadcast(&self.news)
        pthread_mutex_unlock(&self.lock)

    cdef stage wait(self, stage beyond, uint64_t milliseconds) noexcept nogil:
        """Wait until the thread has left a stage, 0: for ever; where it is then. self.rc says how it went."""
        cdef stage reached
        pthread_mutex_lock(&self.lock)
        if milliseconds and self.stage == beyond:
            cond_wait_for(&self.news, &self.lock, milliseconds)
        while self.stage == beyond and not milliseconds:
            pthread_cond_wait(&self.news, &self.lock)
        reached = self.stage
        pthread_mutex_unlock(&self.lock)
        return reached

    cdef void end(self) noexcept nogil:
        """End the thread. If the kernel has tags yet, to it the process has died once release() is done, too."""
        if self.started and getpid() == self.process:
            store_release(&self.leaving, 1)
            self.command(END)
            zr_wake(self.answers.wake)
            pthread_join(self.thread, NULL)
            self.started = False

    cdef void release(self) noexcept nogil:
        """Give back what the thread had, which has ended. No reader may have a request of this queue any more."""
        ring_close(&self.ring)
        self.unmap()
        if self.answers.wake >= 0:
            close(self.answers.wake)
            self.answers.wake = -1
        self.answers.first = NULL
        self.listening = False
        store_relaxed(&self.tallies.live, 0)

    # --------------------------------------------------------------------------------------------------------
    # the thread's

    cdef void _tell(self, stage reached, int rc) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.stage = reached
        self.rc = rc
        pthread_cond_broadcast(&self.news)
        pthread_mutex_unlock(&self.lock)

    cdef void _run(self) noexcept nogil:
        """What the thread does, from its start to its end."""
        cdef order what
        cdef int rc = self._prepare()
        self._tell(ENDED if rc else PARKED, rc)
        while rc == 0:
            pthread_mutex_lock(&self.lock)
            while self.order == NOTHING:
                pthread_cond_wait(&self.news, &self.lock)
            what = self.order
            self.order = NOTHING
            pthread_mutex_unlock(&self.lock)
            if what == END:
                return
            rc = self._fetch()
            if rc == 0:
                self._tell(SERVING, 0)
                rc = self._serve()
            if rc:
                store_relaxed(&self.tallies.live, 0)    # to the kernel this thread has died, and all its tags with it
            self._tell(ENDED if rc else PARKED, rc)

    cdef int _prepare(self) noexcept nogil:
        """Have all that the thread will need; 0 or -errno."""
        cdef int rc
        touch_stack()
        self.refused = A_PRIORITY
        rc = -thread_begin(b"zramd-ublk", self.number, self.priority)
        if rc == 0:
            # With it in all threads that fetch, the kernel looks for partitions as it starts the disk. If the server ends in
            # that moment the reads wait for the next one, which the kernel (6.12) takes only when it has read them.
            rc = lose_capability(CAP_SYS_ADMIN)
        if rc == 0:
            self.refused = A_RING
            # One more: the eventfd's.
            rc = ring_open(&self.ring, self.depth + 1, False, True)
        return rc

    cdef void _send(self, uint32_t number, uint32_t command) noexcept nogil:
        """Prepare a command for a tag; it goes with the next system call."""
        cdef submission *s = ring_next(&self.ring)
        cdef queue_command *c = <queue_command *>s.command
        self.tags[number].command = command
        s.opcode = OP_URING_CMD
        s.fd = self.fd
        s.offset = UBLK_IO(command)
        s.user_data = number
        c.queue = self.number
        c.tag = number
        c.result = self.tags[number].result
        c.address = <uint64_t>(self.buffers.base + <uint64_t>number * self.max_io_bytes)

    cdef void _listen(self) noexcept nogil:
        """Have the kernel say whenever the eventfd is written to: by a reader, or by who wants the thread to leave.

        A poll that stays takes no memory when somebody writes, as a read would each time; what was written nobody reads.
        """
        cdef submission *s = ring_next(&self.ring)
        s.opcode = OP_POLL
        s.fd = self.answers.wake
        s.size = POLL_ALWAYS
        s.op_flags = POLLIN
        s.user_data = WOKEN
        self.listening = True

    cdef int _fetch(self) noexcept nogil:
        """Hand all tags to the kernel; 0, or -errno that it has for one. None is taken back then."""
        cdef uint32_t i, at, end
        cdef int rc
        memset(self.tags, 0, self.depth * sizeof(tag))
        for i in range(self.depth):
            self._send(i, FETCH)
        store_relaxed(&self.tallies.live, self.depth)
        if not self.listening:
            self._listen()
        rc = ring_enter(&self.ring, 0)
        while rc == -EINTR or rc == -EAGAIN or (rc == 0 and ring_unsent(&self.ring)):
            nap()
            rc = ring_enter(&self.ring, 0)
        if rc:
            return rc
        # What is refused is at once. Nothing else comes before the disk is started.
        at = self.ring.cq_head[0]
        end = ring_completed(&self.ring)
        while at != end:
            rc = ring_completion(&self.ring, at).result
            if rc < 0 and rc != -ENOMEM:
                return rc
            at += 1
        return 0

    cdef int _serve(self) noexcept nogil:
        """Serve until all tags are over: 0; -ECANCELED: told to leave before; -errno: the ring is broken."""
        cdef uint32_t at, end, handled
        cdef int rc
        while load_relaxed(&self.tallies.live):
            rc = ring_enter(&self.ring, 1)
            owned_add(&self.tallies.enters, 1)
            if rc == -EAGAIN or rc == -EBUSY:
                nap()           # no memory in the kernel
            elif rc and rc != -EINTR:
                return rc
            handled = 0
            at = self.ring.cq_head[0]
            end = ring_completed(&self.ring)
            while at != end:
                self._look_ahead(end - at, at)
                handled += self._complete(ring_completion(&self.ring, at))
                at += 1
            ring_seen(&self.ring, end)
            if load_acquire(&self.leaving):
                return -ECANCELED
            if not handled:
                nap()           # the same; or it was woken up for nothing
        return 0

    cdef void _look_ahead(self, uint32_t left, uint32_t at) noexcept nogil:
        """With several requests there, `left` from `at` on: fetch what the next two need while the first is served."""
        if left > 1:
            self._expect(ring_completion(&self.ring, at + 1), True)
        if left > 2:
            self._expect(ring_completion(&self.ring, at + 2), False)

    cdef void _expect(self, const completion *c, bint next) noexcept nogil:
        cdef const descriptor *asked
        if c.user_data != WOKEN and c.result == 0:
            asked = &self.asked[<uint32_t>c.user_data]
            if asked.op_flags & IO_OP_MASK != IO_READ or not next:
                self.device.expect_later(asked.start_sector << SECTOR_SHIFT)
            else:
                self.device.expect_next(asked.start_sector << SECTOR_SHIFT)

    cdef uint32_t _complete(self, const completion *c) noexcept nogil:
        """Do what a completion asks for; 0: that was to try again."""
        cdef uint32_t number = <uint32_t>c.user_data
        if number == WOKEN:
            return self._take(c)
        if c.result == 0:
            owned_add(&self.tallies.requests, 1)
            self._handle(number)
        elif c.result == -ENOMEM:
            # The command was not heard: the request hangs until it is said again.
            owned_add(&self.tallies.resent, 1)
            self._send(number, self.tags[number].command)
            return 0
        else:
            if c.result != -ENODEV:
                owned_add(&self.tallies.lost, 1)
            owned_sub(&self.tallies.live, 1)
        return 1

    cdef uint32_t _take(self, const completion *c) noexcept nogil:
        """Answer what readers have done; how many there were."""
        cdef job *j = take_answers(&self.answers)
        cdef uint32_t taken = 0
        while j != NULL:
            self._answer(j.tag, j.result, j.length)
            taken += 1
            j = j.next
        if not c.flags & MORE:
            self._listen()      # the kernel ended it
        return taken

    cdef void _answer(self, uint32_t number, int rc, uint64_t length) noexcept nogil:
        """Prepare the answer to a request: bytes, or what a client may see of an error."""
        if rc == 0:
            self.tags[number].result = <int32_t>length
        elif rc == -EOPNOTSUPP:
            self.tags[number].result = rc
        elif rc == -ENOSPC or rc == -EDQUOT or rc == -ENOMEM:
            self.tags[number].result = -self.full
        else:
            self.tags[number].result = -EIO
        self._send(number, COMMIT_AND_FETCH)

    cdef void _handle(self, uint32_t number) noexcept nogil:
        """Do what a tag's descriptor asks for, and answer; or give it to a reader."""
        cdef const descriptor *asked = &self.asked[number]
        cdef char *buffer = self.buffers.base + <uint64_t>number * self.max_io_bytes
        cdef uint64_t offset = asked.start_sector << SECTOR_SHIFT, length = <uint64_t>asked.sectors << SECTOR_SHIFT
        cdef uint32_t what = asked.op_flags & IO_OP_MASK
        cdef job *j
        cdef int rc
        if (what == IO_READ or what == IO_WRITE) and length > self.max_io_bytes:
            rc = -EIO
        elif what == IO_READ and self.readers is not None:
            j = &self.tags[number].away
            rc = self.device.try_read(buffer, offset, length, &j.began)
            if rc == AWAY:
                j.back = &self.answers
                j.buffer = buffer
                j.offset = offset
                j.length = length
                j.tag = number
                owned_add(&self.tallies.away, 1)
                self.readers.give(j)
                return
        elif what == IO_READ:
            rc = self.device.serve_read(buffer, offset, length)
        elif what == IO_WRITE:
            rc = self.device.serve_write(buffer, offset, length)
        elif what == IO_DISCARD:
            rc = self.device.serve_trim(offset, length)
        elif what == IO_WRITE_ZEROES:
            rc = self.device.serve_zero(offset, length, not asked.op_flags & IO_F_NOUNMAP)
        elif what == IO_FLUSH:
            rc = length = 0     # what is answered is in memory
        else:
            rc = -EOPNOTSUPP
        self._answer(number, rc, length)
