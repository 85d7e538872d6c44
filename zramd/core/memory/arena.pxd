from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from zramd.core.system.locks cimport pthread_cond_t, pthread_mutex_t
from zramd.core.memory.limits cimport Limits
from zramd.core.memory.region cimport Memory, Region
from zramd.core.types cimport SPAN_LENGTHS

cdef extern from *:
    """
    #define pages_load(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define pages_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    """
    uint16_t pages_load(uint16_t *p) noexcept nogil
    void pages_store(uint16_t *p, uint16_t value) noexcept nogil

cdef class Arena:
    cdef readonly uint32_t span_count   # spans in the reservation
    cdef uint32_t unit                  # pages that the kernel gives and takes back together
    cdef Memory memory
    cdef Region spans
    cdef Region bitmaps
    cdef Region neighbours
    cdef Limits limits                  # which count the resident pages that are in use or in stock
    cdef char *base                     # of spans
    cdef uint16_t *committed            # per span, atomic: bitmap of its resident pages; its owner's to change
    cdef uint32_t *links                # per free span: the next free one
    cdef pthread_mutex_t lock           # guards the four below, and links
    cdef uint32_t top                   # spans below this one were handed out at least once
    cdef uint32_t writable              # spans below this one may be written to
    cdef uint32_t warm                  # free spans with resident pages (the stock), last in first out
    cdef uint32_t cold                  # free spans without
    cdef uint64_t stock                 # atomic: resident pages of the warm spans

    # The reserve: free spans that the refiller makes resident ahead of need. Guarded by lock.
    cdef uint64_t reserve               # atomic: pages to keep ready, 0: no reserve
    cdef uint32_t ready[SPAN_LENGTHS]   # [n]: free spans whose first n pages are resident; [0]: spans to be given back
    cdef uint32_t ready_count[SPAN_LENGTHS]
    cdef uint64_t demand[SPAN_LENGTHS]  # pages that were asked for in spans of each length, the latest count most
    cdef uint64_t demand_sum
    cdef uint64_t ready_pages           # atomic: resident pages of those spans; not counted by the limits
    cdef uint64_t misses                # atomic: pages that a request had to make resident by itself
    cdef pthread_cond_t work            # something for the refiller to do
    cdef bint refiller_sleeps
    cdef bint refiller_works              # it has a span on no list
    cdef bint refiller_ends
    cdef char *records                  # the owner's record of each span, made resident along with it
    cdef uint32_t record_size
    cdef uint32_t records_populated      # spans below this one have resident records

    cdef int64_t take(self, uint32_t npages, bint modest) noexcept nogil
    cdef void give(self, uint32_t span, bint keep) noexcept nogil
    cdef uint32_t whole(self, uint32_t mask) noexcept nogil
    cdef int take_room(self, uint32_t span, uint32_t mask, bint unused) noexcept nogil
    cdef int commit(self, uint32_t span, uint32_t mask) noexcept nogil
    cdef int decommit(self, uint32_t span, uint32_t mask) noexcept nogil
    cdef void _release(self, uint32_t span, uint32_t mask) noexcept nogil
    cdef uint64_t release_stock(self) noexcept nogil
    cdef int reserve_start(self, uint64_t pages) noexcept nogil
    cdef void reserve_keep(self) noexcept nogil
    cdef void reserve_stop(self) noexcept nogil
    cdef int _keep_one(self) noexcept nogil
    cdef uint32_t _scarcest(self) noexcept nogil
    cdef uint32_t _too_many(self) noexcept nogil
    cdef int _make_one(self, uint32_t span, uint32_t npages) noexcept nogil
    cdef void _return_one(self, uint32_t npages) noexcept nogil
    cdef void _work_begin(self) noexcept nogil
    cdef void _work_end(self) noexcept nogil
    cdef void _cold_give(self, uint32_t span) noexcept nogil
    cdef int _populate_used(self) noexcept nogil
    cdef int _populate(self, uint32_t span, uint32_t npages) noexcept nogil
    cdef void _note_demand(self, uint32_t npages) noexcept nogil
    cdef uint32_t _ready_wanted(self, uint32_t npages) noexcept nogil
    cdef int64_t _ready_take(self, uint32_t npages, bint modest) noexcept nogil
    cdef void _ready_give(self, uint32_t span) noexcept nogil
    cdef uint32_t _ready_pop(self, uint32_t npages) noexcept nogil
    cdef void _ready_push(self, uint32_t span) noexcept nogil
    cdef int64_t _cold_take(self) noexcept nogil
    cdef int grow(self, uint32_t writable) noexcept nogil
    cdef void reset(self) noexcept nogil
    cdef uint64_t metadata_bytes(self) noexcept nogil
    cdef const char *check(self, uint64_t used, uint64_t *where) noexcept nogil
    cdef const char *_walk(self, uint64_t used, uint64_t *where) noexcept nogil
