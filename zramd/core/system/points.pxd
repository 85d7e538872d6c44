"""Named points: the moments between two steps of a change. One list, three uses (docs/hacking.md has examples):

crash      debug: with ZRAMD_CRASH=name:N in the environment the process kills itself the Nth time that it comes there, in
           the middle of a change that must survive it.
schedule   debug: a scheduler that was loaded before the core (tests/support/schedule.c) is told, and may let another
           thread go on. It also decides who goes on at each lock, see locks.pxd.
probe      other builds, where <sys/sdt.h> was there: a USDT probe zramd:name, one nop until a tracer asks for it.

A point is nothing but its name: the enumeration exists for Cython alone, which refuses a name that is not in it. Where a
thread holds the GIL, or a lock that is not the core's, there must be no point.
"""

cdef extern from *:
    """
    #if defined(ZRAMD_CHECK) && ZRAMD_CHECK >= 3
    #include <signal.h>
    #include <stdlib.h>
    #include <string.h>
    #include <unistd.h>
    void zr_schedule_point(const char *name) __attribute__((weak));
    static inline void zr_reach(const char *name, unsigned long *visits)
    {
        const char *wanted = getenv("ZRAMD_CRASH");
        size_t length = strlen(name);
        if (wanted && !strncmp(wanted, name, length) && wanted[length] == ':'
                && __atomic_add_fetch(visits, 1, __ATOMIC_RELAXED) == strtoul(wanted + length + 1, NULL, 10))
            kill(getpid(), SIGKILL);
        if (zr_schedule_point)
            zr_schedule_point(name);
    }
    #define zr_point(name) ({ static unsigned long visits; zr_reach(#name, &visits); })
    #elif defined(__has_include)
    #if __has_include(<sys/sdt.h>)
    #include <sys/sdt.h>
    #define zr_point(name) DTRACE_PROBE(zramd, name)
    #endif
    #endif
    #ifndef zr_point
    #define zr_point(name) ((void)0)
    #endif
    """
    enum point:
        # a handle's cell
        cell_free_seen      # the first of the free list is known, and is on it yet
        cell_taken
        cell_freed
        word_stored         # a cell that holds a word instead of an object
        word_freed
        cell_seen           # and its pin will be tried for, if that is free

        # an object
        class_stored        # of a new zspage
        chunk_taken
        cell_stored
        payload_written
        object_published
        object_pinned       # to be read, or to be written to
        free_pinned
        chunk_freed
        span_freed          # or not: its zspage may have others

        # a move
        move_seen           # the cell, and its pin will be tried for, if that is free
        move_pinned
        move_chunk_taken
        move_copied
        move_cell_stored
        move_source_freed

        # a block
        slot_seen           # of a block that is read, or merged with what is written
        slot_stored

        # a block becomes cold
        cooling_read        # and is being compressed again
        cold_published
        cold_stored

        # a cold block becomes hot again
        warming_read        # and is being compressed again
        warm_published
        warm_stored

        # a block goes out, to the backing
        leaving_copied
        extent_taken        # to be written
        extent_written
        out_stored
        out_object_freed    # what it was in memory
        out_moved           # its slot leads to another extent: reclaim

        # a block that is out
        away_pinned         # what it has on the backing, which is going to be read
        away_read           # or not, and nothing of it is looked at yet
        back_published      # and is to be in memory again
        back_stored

        # a budget
        budget_claimed      # our own slot says so, and nobody has looked at the others'
        budget_granted
        budget_refused      # and our own slot is as it was

        page_given_back     # and is counted as resident yet
        slots_cleared       # by reset
        pool_cleared
        spans_rebuilt       # of a state that is taken over
        recovered
    void zr_point(point name) noexcept nogil
