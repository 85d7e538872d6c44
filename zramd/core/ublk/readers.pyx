"""Threads that read blocks which are out: the disk's queues go on meanwhile.

    a queue's thread    try_read finds out that a block is out -> give(job)
    a reader            read_away into the request's buffer -> the job is an answer, and the queue's thread wakes up
    a queue's thread    take_answers -> the kernel gets its answer

A job is a part of its request, so that none is ever allocated. Those of one disk are done in the order in which they come.
"""

cimport cython
from libc.stdint cimport uint32_t

from zramd.core.system.locks cimport (
    mutex_inherit,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_signal,
    pthread_cond_wait,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from zramd.core.system.process cimport touch_stack
from zramd.core.ublk.threads cimport (
    THREAD_STACK,
    pthread_cond_broadcast,
    pthread_join,
    thread_begin,
    thread_start,
    thread_work,
    zr_wake,
)

cdef extern from *:
    """
    #include <unistd.h>
    """
    int getpid() nogil


cdef void *begin(Readers readers) noexcept nogil:
    readers._work()
    return NULL


@cython.final
@cython.no_gc_clear
cdef class Readers:
    """The threads that wait for a device's backing, real-time ones of this priority unless it is 0.

    open() is to follow, and close() in the end.
    """

    def __cinit__(self, Device device not None, int priority):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.news, NULL)
        self.process = getpid()
        self.device = device
        self.priority = priority

    def __dealloc__(self):
        self.close()
        if getpid() == self.process:
            pthread_cond_destroy(&self.news)
            pthread_mutex_destroy(&self.lock)

    cdef int open(self) noexcept nogil:
        """Start the threads; 0 or -errno: then self.unurgent says whether it is their priority that they cannot have."""
        cdef uint32_t i
        cdef int rc = mutex_inherit(&self.lock) if self.priority else 0
        for i in range(READERS):
            if rc == 0:
                rc = thread_start(&self.threads[i], <thread_work><void *>begin, <void *>self, THREAD_STACK)
                self.started += rc == 0
        pthread_mutex_lock(&self.lock)
        while self.begun < self.started:
            pthread_cond_wait(&self.news, &self.lock)
        pthread_mutex_unlock(&self.lock)
        return -(rc or self.unurgent)

    cdef void give(self, job *j) noexcept nogil:
        """Have a read done: it comes back to j.back."""
        j.next = NULL
        pthread_mutex_lock(&self.lock)
        if self.first == NULL:
            self.first = j
        else:
            self.last.next = j
        self.last = j
        pthread_cond_signal(&self.news)
        pthread_mutex_unlock(&self.lock)

    cdef void _work(self) noexcept nogil:
        """What each thread does, from its start to its end."""
        cdef job *j
        cdef bint wakes
        cdef int rc
        touch_stack()
        pthread_mutex_lock(&self.lock)
        rc = thread_begin(b"zramd-away", self.begun, self.priority)
        self.unurgent = self.unurgent or rc
        self.begun += 1
        pthread_cond_broadcast(&self.news)
        while not self.ending:
            j = self.first
            if j == NULL:
                pthread_cond_wait(&self.news, &self.lock)
                continue
            self.first = j.next
            pthread_mutex_unlock(&self.lock)
            j.result = self.device.read_away(j.buffer, j.offset, j.length, j.began)
            pthread_mutex_lock(&j.back.lock)
            wakes = j.back.first == NULL        # else it has been woken up, and not looked yet
            j.next = j.back.first
            j.back.first = j
            if wakes:
                zr_wake(j.back.wake)
            pthread_mutex_unlock(&j.back.lock)
            pthread_mutex_lock(&self.lock)
        pthread_mutex_unlock(&self.lock)

    cdef void close(self) noexcept nogil:
        """End the threads, after what each is doing; what they have not begun is never done."""
        cdef uint32_t i
        if getpid() != self.process:
            return
        pthread_mutex_lock(&self.lock)
        self.ending = True
        pthread_cond_broadcast(&self.news)
        pthread_mutex_unlock(&self.lock)
        for i in range(self.started):
            pthread_join(self.threads[i], NULL)
        self.started = 0


cdef job *take_answers(answers *back) noexcept nogil:
    """All answers that are there, the last one first; NULL: none."""
    cdef job *first
    pthread_mutex_lock(&back.lock)
    first = back.first
    back.first = NULL
    pthread_mutex_unlock(&back.lock)
    return first
