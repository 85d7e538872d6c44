"""The gate: requests pass it side by side; a thread that closes it has the device alone.

    request           gate_enter, gate_leave     counts itself in, then looks whether the gate is closed
    check, reset      gate_close, gate_open      holds the lock, waits until no request is inside
    save, load        gate_hold, gate_release    holds the lock: the gate stays open, and requests pass

A reader-writer lock would do, but none passes priority on. Here a request waits for the holder of the lock alone. That lock
can pass priority on, and only requests are inside: a thread less urgent than they are holds the lock instead.
It is cheaper, too: no lock is taken while the gate is open, and the count also says how many requests are at work.
"""

from libc.stdint cimport uint32_t, uint64_t

from zramd.core.system.locks cimport (
    cpu_relax,
    load_relaxed,
    nap,
    ordered_add,
    ordered_load,
    ordered_store,
    ordered_sub,
    pthread_mutex_lock,
    pthread_mutex_t,
    pthread_mutex_unlock,
)

cdef enum:
    CLOSE_SPINS = 200       # a few blocks' time

cdef struct gate:
    uint64_t inside         # atomic: requests at work
    uint64_t closed         # atomic: whether it is; changed with the lock held
    pthread_mutex_t lock

cdef inline void gate_enter(gate *g) noexcept nogil:
    ordered_add(&g.inside, 1)
    if ordered_load(&g.closed):
        ordered_sub(&g.inside, 1)
        # With the lock held the gate is open.
        pthread_mutex_lock(&g.lock)
        ordered_add(&g.inside, 1)
        pthread_mutex_unlock(&g.lock)

cdef inline void gate_leave(gate *g) noexcept nogil:
    ordered_sub(&g.inside, 1)

cdef inline bint gate_is_closed(gate *g) noexcept nogil:
    """Whether a thread waits for those inside to leave: a long request then leaves and enters again."""
    return load_relaxed(&g.closed) != 0

cdef inline void gate_hold(gate *g) noexcept nogil:
    pthread_mutex_lock(&g.lock)

cdef inline void gate_release(gate *g) noexcept nogil:
    pthread_mutex_unlock(&g.lock)

cdef inline void gate_close(gate *g) noexcept nogil:
    cdef uint32_t spins = 0
    pthread_mutex_lock(&g.lock)
    ordered_store(&g.closed, 1)
    while ordered_load(&g.inside):
        spins += 1
        if spins < CLOSE_SPINS:
            cpu_relax()
        else:
            nap()

cdef inline void gate_open(gate *g) noexcept nogil:
    ordered_store(&g.closed, 0)
    pthread_mutex_unlock(&g.lock)
