"""Known faults, one for each sanitizer to find: scripts/sanitize proves itself on them."""

import threading

from libc.limits cimport INT_MAX
from libc.stdlib cimport free, malloc

cdef long counter = 0


def sound() -> None:
    """What the others do, done right."""
    cdef char *bytes_ = allocate(16)
    with nogil:
        store(bytes_, 15)
    free(bytes_)
    add(INT_MAX - 1, 1)


def overflow() -> None:
    """Writes one byte behind an allocation."""
    cdef char *bytes_ = allocate(16)
    with nogil:
        store(bytes_, 16)
    free(bytes_)


def undefined() -> None:
    """Overflows a signed number."""
    add(INT_MAX, 1)


def race() -> None:
    """Counts in two threads without a lock."""
    both = threading.Barrier(2)
    threads = [threading.Thread(target=count, args=(both,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def count(both) -> None:
    both.wait()
    with nogil:
        count_up()


# volatile, here and below: what the C compiler can see through it finds or drops before the sanitizers run.
cdef char *allocate(size_t size) noexcept nogil:
    cdef volatile size_t hidden = size
    return <char *>malloc(hidden)


cdef void store(char *bytes_, Py_ssize_t index) noexcept nogil:
    cdef volatile char *place = bytes_ + index
    place[0] = 1


cdef int add(int left, int right) noexcept nogil:
    cdef volatile int total = left
    total = total + right
    return total


cdef void count_up() noexcept nogil:
    # Long enough for both threads to be in it at once.
    cdef volatile long *shared = &counter
    cdef int _
    for _ in range(1000000):
        shared[0] = shared[0] + 1
