from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from zramd.core.memory.arena cimport Arena
from zramd.core.system.locks cimport pthread_mutex_t
from zramd.core.memory.region cimport Memory, Region
from zramd.core.types cimport GROUPS, MAPPED_CHUNKS, MAX_CLASSES, PAGE_SHIFT, PAGE_SIZE, zspage

cdef struct size_class:
    pthread_mutex_t lock            # guards all of this and the zspages of the class
    uint32_t waiters                # atomic: threads that want the lock; the compactor looks and gives way
    uint32_t size                   # bytes of a chunk, header and rounding included
    uint32_t pages                  # per zspage
    uint32_t objs                   # chunks per zspage
    uint32_t unit                   # pages that the kernel gives and takes back together
    uint32_t heads[GROUPS]          # first zspage of each fullness group, NIL: none; last in first out
    uint32_t tails[GROUPS]          # last of each: those without room on resident pages, as far as is known
    uint64_t group_count[GROUPS]    # zspages listed in each
    uint64_t zspages                # isolated ones included
    uint64_t inuse                  # objects
    uint64_t committed              # resident pages; of huge: those in use and the spare ones
    uint64_t stuck                  # atomic: what was tried without avail since an object of the class was freed

cdef enum:
    STUCK = 1                       # to compact it
    LENT_OUT = 2                    # to move more of its last objects to larger classes

cdef inline bint is_mapped(size_class *c) noexcept nogil:
    """Whether zspages of the class have a bitmap of the chunks in use, not a list of the free ones."""
    return c.objs <= MAPPED_CHUNKS

cdef inline uint32_t pages_below(size_class *c, uint32_t chunks) noexcept nogil:
    """Pages that the first chunks of a zspage need."""
    return (((chunks * c.size + PAGE_SIZE - 1) >> PAGE_SHIFT) + c.unit - 1) & ~(c.unit - 1)

cdef inline uint32_t pages_of_chunk(size_class *c, uint32_t chunk) noexcept nogil:
    """Bitmap of the pages of its zspage that a chunk touches."""
    cdef uint32_t start = chunk * c.size
    cdef uint32_t first = start >> PAGE_SHIFT, last = (start + c.size - 1) >> PAGE_SHIFT
    return (<uint32_t>2 << last) - (<uint32_t>1 << first)

cdef struct pool_counters:
    # All atomic. Kept: new ones go to the end.
    uint64_t pages_compacted
    uint64_t objects_migrated
    uint64_t num_compactions
    uint64_t compact_ns
    uint64_t bytes_migrated             # whole chunks

cdef class Zsmalloc:
    cdef readonly uint64_t max_objects
    cdef readonly uint32_t class_count
    cdef readonly uint32_t max_payload  # largest object that is not huge
    cdef uint64_t cells_ready           # atomic: cells below this one are on pages that are there
    cdef uint64_t classes_ready         # atomic: the classes of spans below this one, too
    cdef Memory memory
    cdef Arena arena
    cdef uint32_t huge                  # number of the huge class: the last
    cdef size_class classes[MAX_CLASSES]
    cdef uint8_t class_of[513]          # chunk bytes / CLASS_DELTA, rounded up -> class
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

    cdef uint32_t spare[32]             # spans with a resident page no huge object uses, one entry a page; huge's lock
    cdef uint32_t spares                # atomic: changed under huge's lock

    cdef uint64_t undone                # atomic: what compaction left because of others: they held a pin, or waited
    cdef pthread_mutex_t compact_lock   # one compactor at a time
    cdef uint32_t compact_waiters       # atomic: threads that want it
    cdef bint gives_way                 # whether who compacts now lets them in; compact_lock's
    cdef pool_counters *n

    # objects: each returns 0 or -errno. alloc and begin pin the object until end.
    cdef int obj_alloc(self, uint32_t size, uint64_t *handle, char **payload) noexcept nogil
    cdef int obj_begin(self, uint64_t handle, char **payload) noexcept nogil
    cdef void obj_end(self, uint64_t handle) noexcept nogil
    cdef void obj_publish(self, uint64_t handle, uint64_t check) noexcept nogil
    cdef uint64_t obj_check(self, uint64_t handle) noexcept nogil
    cdef bint obj_fits(self, const char *payload, uint32_t size) noexcept nogil
    cdef bint obj_is_there(self, const char *payload, uint32_t size) noexcept nogil
    cdef int obj_free(self, uint64_t handle) noexcept nogil
    cdef void obj_prefetch(self, uint64_t handle, uint32_t size) noexcept nogil
    cdef uint32_t obj_capacity(self, uint64_t handle) noexcept nogil

    # handles that stand for a word instead of an object
    cdef int word_alloc(self, uint64_t word, uint64_t *handle) noexcept nogil
    cdef uint64_t word_read(self, uint64_t handle) noexcept nogil
    cdef void word_free(self, uint64_t handle) noexcept nogil

    cdef uint64_t freeable(self, size_class *c) noexcept nogil
    cdef uint32_t _pages_wanted(self, size_class *c, uint32_t chunks) noexcept nogil
    cdef uint64_t freeable_pages(self) noexcept nogil
    cdef uint64_t whole_freeable_pages(self) noexcept nogil
    cdef uint64_t _borrowable(self) noexcept nogil
    cdef bint _fill_larger(self, uint32_t index, uint32_t wanted, uint32_t *last) noexcept nogil
    cdef uint32_t _last_page_chunks(self, size_class *c, uint32_t chunks) noexcept nogil
    cdef bint make_room(self, int rc, bint *in_vain) noexcept nogil
    cdef bint _free_some(self, int rc) noexcept nogil
    cdef int inherit_priority(self) noexcept nogil
    cdef void compact_begin(self) noexcept nogil
    cdef void compact_end(self) noexcept nogil
    cdef bint _is_wanted(self) noexcept nogil
    cdef uint64_t compact_run(self, uint64_t budget, uint64_t enough) noexcept nogil
    cdef uint64_t compact_whole(self) noexcept nogil
    cdef uint64_t _borrow(self, uint32_t index) noexcept nogil
    cdef uint32_t _lend(self, uint32_t index, uint32_t span, uint32_t wanted, bint move) noexcept nogil
    cdef uint64_t give_back(self) noexcept nogil
    cdef uint64_t trim(self) noexcept nogil
    cdef int populate(self) noexcept nogil
    cdef void clear(self) noexcept nogil
    cdef uint64_t metadata_bytes(self) noexcept nogil
    cdef const char *find_fault(self, uint64_t *where, uint64_t words) noexcept nogil
    cdef const char *find_zspage_fault(self, uint32_t *span, uint32_t chunks, uint64_t *where) noexcept nogil

    cdef int _cell_take(self, uint64_t *handle) noexcept nogil
    cdef void _cell_give(self, uint64_t handle) noexcept nogil
    cdef int _pin(self, uint64_t handle, uint64_t *obj) noexcept nogil
    cdef void _await_mover(self, uint64_t cell) noexcept nogil
    cdef int _part_filled_take(self, size_class *c, uint64_t handle, int64_t *span) noexcept nogil
    cdef int _resident_take(self, size_class *c, uint64_t handle, int64_t *span) noexcept nogil
    cdef int _obj_alloc(self, uint32_t index, uint64_t handle, char **payload) noexcept nogil
    cdef int _chunk_take(self, size_class *c, uint32_t span, uint64_t handle, bint resident) noexcept nogil
    cdef void _chunk_give(self, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil
    cdef bint _chunk_holds(self, size_class *c, uint32_t span, uint32_t chunk, uint64_t handle) noexcept nogil
    cdef int _list_take(self, size_class *c, uint32_t span, bint resident) noexcept nogil
    cdef int _mapped_take(self, size_class *c, uint32_t span, bint resident) noexcept nogil
    cdef int _commit(self, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil
    cdef uint64_t _chunks_below(self, size_class *c, uint32_t span) noexcept nogil
    cdef uint64_t _mapped_room(self, size_class *c, uint32_t span) noexcept nogil
    cdef void _spare_page(self, size_class *c, uint32_t span, uint32_t page) noexcept nogil
    cdef void _spare_add(self, uint32_t span) noexcept nogil
    cdef void _spare_drop(self, uint32_t i) noexcept nogil
    cdef uint32_t _unused_pages(self, size_class *c, uint32_t span, uint32_t pages) noexcept nogil
    cdef void _give_pages(self, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil
    cdef uint32_t _next_used(self, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil
    cdef uint32_t _last_used(self, size_class *c, uint32_t span, uint32_t end) noexcept nogil
    cdef void _link(self, size_class *c, uint32_t span) noexcept nogil
    cdef void _unlink(self, size_class *c, uint32_t span) noexcept nogil
    cdef void _regroup(self, size_class *c, uint32_t span) noexcept nogil
    cdef int64_t _zspage_new(self, size_class *c, uint32_t index) noexcept nogil
    cdef int _class_is_ready(self, uint32_t span) noexcept nogil
    cdef uint32_t _zspage_gone(self, size_class *c, uint32_t span) noexcept nogil
    cdef uint32_t _isolate_fullest(self, size_class *c, bint resident) noexcept nogil
    cdef uint32_t _find_room(self, size_class *c, uint32_t group, uint32_t *tries) noexcept nogil
    cdef void _link_dry(self, size_class *c, uint32_t span) noexcept nogil
    cdef bint _has_resident_room(self, size_class *c, uint32_t span) noexcept nogil
    cdef uint32_t _isolate_emptiest(self, size_class *c) noexcept nogil
    cdef uint32_t _putback(self, size_class *c, uint32_t span) noexcept nogil
    cdef bint _is_worth_moving(self, size_class *c, bint whole) noexcept nogil
    cdef uint64_t _compact_class(self, uint32_t index, uint64_t *budget, uint64_t enough, bint whole) noexcept nogil
    cdef uint64_t _tighten(self, size_class *c, uint32_t span, uint64_t *budget, bint always) noexcept nogil
    cdef void _pack(self, size_class *c, uint32_t span, uint64_t *budget) noexcept nogil
    cdef void _pack_list(self, size_class *c, uint32_t span, uint64_t *budget) noexcept nogil
    cdef void _pack_mapped(self, size_class *c, uint32_t span, uint64_t *budget) noexcept nogil
    cdef void _list_chunks(self, size_class *c, uint32_t span) noexcept nogil
    cdef int _move(self, size_class *c, uint32_t src, uint32_t chunk, size_class *d, uint32_t dst,
                   bint resident) noexcept nogil
    cdef const char *_find_class_fault(self, uint32_t index, uint64_t *where) noexcept nogil
    cdef const char *_find_chunk_fault(self, size_class *c, uint64_t obj) noexcept nogil
    cdef const char *_find_zspage_fault(self, uint32_t index, uint32_t span) noexcept nogil
