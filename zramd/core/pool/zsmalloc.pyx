"""zsmalloc for Python: an allocator for objects of 1 to 4096 bytes that can compact itself.

pool.pyx has the allocator, compaction.pyx what compacts it.
"""

cimport cython
from libc.errno cimport EINVAL
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize

from zramd.core.memory.region cimport Memory
from zramd.core.pool.compaction cimport compact_begin, compact_end, compact_run, make_room
from zramd.core.pool.faults cimport find_pool_fault, find_zspage_fault
from zramd.core.pool.lending cimport compact_whole, whole_freeable_pages
from zramd.core.pool.pool cimport Pool, pool_counters
from zramd.core.pool.size_classes cimport lock_class, size_class
from zramd.core.pool.zspages cimport freeable
from zramd.core.system.bits cimport bits_set
from zramd.core.system.checks cimport ZRAMD_CHECK
from zramd.core.system.locks cimport load_relaxed, pthread_mutex_unlock
from zramd.core.system.words cimport number_words, read_words
from zramd.core.types cimport GROUPS, PAGE_SHIFT, PAGE_SIZE, SPAN_SHIFT, SPAN_SIZE, cell_obj

from zramd.errors import CorruptionError, error_from

CHECK_LEVEL = ZRAMD_CHECK    # see checks.pxd


cdef uint64_t natural(value, str what) except? 0:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{what} {value} is out of range")
    return value


cdef uint64_t handle_number(handle) except? 0:
    """A handle as the pool has it: one that cannot be is 0, which is never live."""
    return handle if 0 <= handle < 1 << 32 else 0


cdef int object_place(Pool pool, uint64_t handle, place *found) noexcept nogil:
    """Find out where an object is; 0, or -ENOENT when the handle is not live. It may move as soon as this returns."""
    cdef char *payload
    cdef size_class *c
    cdef int rc = pool.obj_begin(handle, &payload)
    if rc:
        return rc
    found.obj = cell_obj(load_relaxed(&pool.cells[handle]))
    found.span = <uint32_t>(found.obj >> SPAN_SHIFT)
    found.class_index = pool.zspages[found.span].class_index
    c = &pool.classes[found.class_index]
    found.chunk = (<uint32_t>found.obj & (SPAN_SIZE - 1)) // c.size
    found.class_size = c.size
    found.objs = c.objs
    lock_class(c)
    found.inuse = pool.zspages[found.span].inuse
    found.pages = bits_set(pool.arena.committed[found.span])
    pthread_mutex_unlock(&c.lock)
    pool.obj_end(handle)
    return 0


cdef dict counter_indexes():
    cdef pool_counters fields
    number_words(<uint64_t *>&fields, sizeof(fields))
    return fields


cdef dict COUNTERS = counter_indexes()      # each is a statistic


cdef dict pool_stats(Pool pool):
    """See Zsmalloc.stats."""
    cdef uint64_t allocated = 0, used = 0, zspages = 0
    cdef uint32_t i
    for i in range(pool.class_count):
        zspages += load_relaxed(&pool.classes[i].zspages)
        # Places on pages that are resident: others cost nothing, and nothing is gained by filling them.
        allocated += max(load_relaxed(&pool.classes[i].inuse),
                         load_relaxed(&pool.classes[i].committed) * pool.classes[i].objs // pool.classes[i].pages)
        used += load_relaxed(&pool.classes[i].inuse)
    return read_words(<uint64_t *>pool.counters, COUNTERS) | {
        "mem_used_total": load_relaxed(&pool.arena.limits.pages) << PAGE_SHIFT,
        "mem_limit": pool.mem_limit(),
        "mem_used_max": load_relaxed(pool.arena.limits.pages_max) << PAGE_SHIFT,
        "stock_pages": load_relaxed(&pool.arena.stock),
        "reserve_bytes": load_relaxed(&pool.arena.ready_pages) << PAGE_SHIFT,
        "reserve_misses": load_relaxed(&pool.arena.misses),
        "zspages": zspages,
        "objs_allocated": allocated,
        "objs_used": used,
        "freeable_pages": whole_freeable_pages(pool),
    }


cdef list pool_table(Pool pool):
    """See Zsmalloc.table."""
    cdef size_class *c
    cdef uint32_t i, g
    rows = []
    for i in range(pool.class_count):
        c = &pool.classes[i]
        rows.append((
            i,
            c.size,
            *[load_relaxed(&c.group_count[g]) for g in range(1, GROUPS)],
            load_relaxed(&c.zspages) * c.objs,
            load_relaxed(&c.inuse),
            load_relaxed(&c.committed),
            c.pages,
            freeable(pool, c),
        ))
    return rows


@cython.final
cdef class Zsmalloc:
    """A pool of objects of 1 to 4096 bytes.

    max_objects: most objects it may ever hold (costs address space, no memory); mem_limit: most bytes of pages it may
    use, rounded up to pages, 0 for no limit. Raises ValueError for either out of range, MemoryError when the address space
    cannot be had.
    """

    def __cinit__(self, max_objects=1 << 24, *, mem_limit=0, Memory memory=None):
        self.pool = Pool(max_objects, Memory() if memory is None else memory)
        self.max_objects = self.pool.max_objects
        self.class_count = self.pool.class_count
        self.max_payload = self.pool.max_payload
        self.mem_limit = mem_limit

    @property
    def mem_limit(self):
        """Most bytes of pages the pool may use, 0: no limit. Raising and lowering it takes effect at once."""
        return self.pool.mem_limit()

    @mem_limit.setter
    def mem_limit(self, value):
        cdef uint64_t limit = natural(value, "mem_limit")
        with nogil:
            self.pool.set_mem_limit(limit, False)

    def malloc(self, size):
        """A handle to a new object of size bytes, 1 to 4096, all zero.

        Raises ValueError for another size, PoolFullError when mem_limit leaves no room even after compaction,
        MemoryError at max_objects.
        """
        cdef uint64_t handle = 0
        cdef char *payload = NULL
        cdef uint32_t n
        cdef int rc
        cdef bint in_vain = False
        if not 1 <= size <= PAGE_SIZE:
            raise error_from(-EINVAL, f"malloc of {size} bytes")
        if load_relaxed(&self.pool.cells_used) >= self.max_objects:
            raise MemoryError(f"malloc of {size} bytes: the pool holds {self.max_objects} objects, as many as it may")
        n = size
        with nogil:
            rc = self.pool.obj_alloc(n, &handle, &payload)
            while rc and make_room(self.pool, rc, &in_vain):
                rc = self.pool.obj_alloc(n, &handle, &payload)
            if rc == 0:
                memset(payload, 0, self.pool.obj_capacity(handle))
                self.pool.obj_publish(handle, n)     # its size is what is kept for it
        if rc:
            raise error_from(rc, f"malloc of {size} bytes")
        return handle

    def free(self, handle):
        """Free an object. Raises HandleError when the handle is not live."""
        cdef uint64_t number = handle_number(handle)
        cdef int rc
        with nogil:
            rc = self.pool.obj_free(number)
        if rc:
            raise error_from(rc, f"free of handle {handle}")

    def read(self, handle, size=0):
        """The first size bytes of an object, 0: all of it. Raises HandleError, ValueError."""
        cdef uint64_t number = handle_number(handle)
        cdef char *payload
        cdef uint64_t all
        cdef int rc
        with nogil:
            rc = self.pool.obj_begin(number, &payload)
        if rc:
            raise error_from(rc, f"read of handle {handle}")
        try:
            all = self.pool.obj_sum(number)
            if not 0 <= size <= all:
                raise ValueError(f"read of {size} bytes from handle {handle}, which has {all}")
            return PyBytes_FromStringAndSize(payload, size or all)
        finally:
            self.pool.obj_end(number)

    def write(self, handle, data):
        """Put data (a buffer) at the start of an object. Raises HandleError, ValueError when it does not fit."""
        cdef uint64_t number = handle_number(handle)
        cdef char *payload
        cdef uint64_t all
        cdef int rc
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                rc = self.pool.obj_begin(number, &payload)
            if rc:
                raise error_from(rc, f"write to handle {handle}")
            all = self.pool.obj_sum(number)
            if <uint64_t>view.len <= all:
                memcpy(payload, view.buf, view.len)
            self.pool.obj_end(number)
            if <uint64_t>view.len > all:
                raise ValueError(f"write of {view.len} bytes to handle {handle}, which has {all}")
        finally:
            PyBuffer_Release(&view)

    def compact(self, budget=0):
        """Move about budget bytes of objects, 0: all that frees a page; returns the number of pages freed.

        0 also gives back the pages that are kept for the next writes: it frees the freeable_pages of stats(). A budget
        may end between taking a page for what is moved and freeing those that it came from.
        """
        cdef uint64_t freed, bytes = natural(budget, "budget")
        with nogil:
            freed = compact_run(self.pool, bytes, <uint64_t>-1) if bytes else compact_whole(self.pool)
        return freed

    def stats(self):
        """The pool's numbers by the names of the statistics, as a dict of ints.

        stock_pages: pages of free spans that stay resident for the next writes: part of mem_used_total, and freeable.
        """
        return pool_stats(self.pool)

    def table(self):
        """zsmalloc's table: for each size class a tuple (class, size, zspages up to 10, 20, … 90, 99 and 100 % full,
        obj_allocated, obj_used, pages_used, pages_per_zspage, freeable)."""
        return pool_table(self.pool)

    def check(self):
        """Walk every structure. Raises CorruptionError when one contradicts another. Nobody else may use the pool."""
        cdef uint64_t where = 0
        cdef uint32_t span = 0
        cdef const char *wrong
        with nogil:
            compact_begin(self.pool)
            wrong = find_zspage_fault(self.pool, &span, <uint32_t>-1, &where)
            if wrong == NULL:
                wrong = find_pool_fault(self.pool, &where, 0)
            compact_end(self.pool)
        if wrong != NULL:
            raise CorruptionError(f"{wrong.decode()} (at {where})")
