"""The pool: its fields, and what it does with objects."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zramd.core.memory.arena cimport Arena
from zramd.core.memory.region cimport Memory, Region
from zramd.core.pool.size_classes cimport size_class
from zramd.core.system.locks cimport pthread_mutex_t
from zramd.core.types cimport CLASS_SIZES, MAX_CLASSES, zspage

cdef enum:
    SPARES = 32             # pages of huge objects kept for the next one: overwriting raw blocks would else fault each time

cdef struct pool_counters:
    # All atomic. Kept: new ones go to the end.
    uint64_t pages_compacted
    uint64_t objects_migrated
    uint64_t num_compactions
    uint64_t compact_ns
    uint64_t bytes_migrated             # whole chunks

cdef class Pool:
    cdef uint64_t max_objects
    cdef uint32_t class_count
    cdef uint32_t max_payload           # largest object that is not huge
    cdef uint64_t cells_populated       # atomic: cells below this one are on pages that are there
    cdef uint64_t classes_populated     # atomic: the classes of spans below this one, too
    cdef Memory memory
    cdef Arena arena
    cdef uint32_t huge                  # number of the huge class: the last
    cdef size_class classes[MAX_CLASSES]
    cdef uint8_t class_of[CLASS_SIZES]  # chunk bytes / CLASS_DELTA, rounded up -> class
    cdef Region records
    cdef zspage *zspages                # one per span of the arena
    cdef Region span_classes
    cdef uint8_t *span_class            # per span: class_index + 1 of its last zspage; what recovery finds it by

    cdef Region cell_table
    cdef uint64_t *cells                # the handle table
    cdef pthread_mutex_t cells_lock     # guards the three below
    cdef uint64_t cells_top             # cells below this one were used at least once
    cdef uint64_t cells_free            # head of the free list, 0: empty
    cdef uint64_t cells_used

    cdef uint32_t spare[SPARES]         # spans with a resident page no huge object uses, one entry a page; huge's lock
    cdef uint32_t spares                # atomic: changed under huge's lock

    cdef uint64_t undone                # atomic: what compaction left because of others: they held a pin, or waited
    cdef pthread_mutex_t compact_lock   # one compactor at a time
    cdef uint32_t compact_waiters       # atomic: threads that want it
    cdef bint gives_way                 # whether the compactor lets them in now; compact_lock's
    cdef pool_counters *counters

    # objects: each returns 0 or -errno. alloc and begin pin the object until end.
    cdef uint32_t _class_for(self, uint32_t size) noexcept nogil
    cdef uint32_t payload_below(self, uint32_t size) noexcept nogil
    cdef int obj_alloc(self, uint32_t size, uint64_t *handle, char **payload, bint modest=*) noexcept nogil
    cdef int obj_begin(self, uint64_t handle, char **payload) noexcept nogil
    cdef void obj_end(self, uint64_t handle) noexcept nogil
    cdef void obj_publish(self, uint64_t handle, uint64_t sum) noexcept nogil
    cdef uint64_t obj_sum(self, uint64_t handle) noexcept nogil
    cdef bint obj_fits(self, const char *payload, uint32_t size) noexcept nogil
    cdef bint obj_is_there(self, const char *payload, uint32_t size) noexcept nogil
    cdef int obj_free(self, uint64_t handle) noexcept nogil
    cdef void obj_prefetch(self, uint64_t handle, uint32_t size) noexcept nogil
    cdef uint32_t obj_capacity(self, uint64_t handle) noexcept nogil

    # handles that stand for a word instead of an object
    cdef int word_alloc(self, uint64_t word, uint64_t *handle) noexcept nogil
    cdef uint64_t word_read(self, uint64_t handle) noexcept nogil
    cdef void word_free(self, uint64_t handle) noexcept nogil

    # all of it
    cdef int inherit_priority(self) noexcept nogil
    cdef uint64_t mem_limit(self) noexcept nogil
    cdef void set_mem_limit(self, uint64_t limit, bint shrinks) noexcept nogil
    cdef void tidy_budget(self) noexcept nogil
    cdef void _limits_changed(self) noexcept nogil
    cdef int populate(self) noexcept nogil
    cdef void clear(self) noexcept nogil
    cdef uint64_t metadata_bytes(self) noexcept nogil

    cdef void _make_classes(self)
    cdef int _cell_take(self, uint64_t *handle) noexcept nogil
    cdef void _cell_give(self, uint64_t handle) noexcept nogil
    cdef int _pin(self, uint64_t handle, uint64_t *obj) noexcept nogil
    cdef void _await_mover(self, uint64_t cell) noexcept nogil
    cdef int _obj_alloc(self, uint32_t index, uint64_t handle, char **payload, bint modest) noexcept nogil
    cdef int _spare_take(self, size_class *c, uint64_t handle, uint32_t *span) noexcept nogil
    cdef int _new_take(self, size_class *c, uint32_t index, uint64_t handle, uint32_t *span, bint modest) noexcept nogil
    cdef int _part_filled_take(self, size_class *c, uint64_t handle, uint32_t *span) noexcept nogil
    cdef int _resident_take(self, size_class *c, uint64_t handle, uint32_t *span) noexcept nogil
    cdef int64_t _zspage_new(self, size_class *c, uint32_t index, bint modest) noexcept nogil
    cdef int _class_take_room(self, uint32_t span) noexcept nogil
