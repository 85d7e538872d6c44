from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zramd.core.latency cimport latency
from zramd.core.locks cimport pthread_mutex_t, pthread_rwlock_t
from zramd.core.region cimport Memory, Region
from zramd.core.types cimport BLOCK_SIZE
from zramd.core.zsmalloc cimport Zsmalloc

cdef enum:
    STRIPES = 256

cdef struct scratch:
    # What one request needs to compress and decompress.
    scratch *next
    char page[BLOCK_SIZE]       # a whole block while a part of it is merged in
    char out[BLOCK_SIZE]        # lz4's output
    char state[1]               # lz4's state: state_size() bytes

cdef enum op:
    OP_READ
    OP_WRITE
    OP_TRIM
    OP_ZERO
    OPS
cdef struct state_words:
    # Kept, and not reset.
    uint64_t limit_asked        # mem_limit of the last start + 1; 0: there was none
    uint64_t limit              # mem_limit now
    uint64_t data_id[2]         # random: names what the device holds, from when it was last empty; 0: none yet
    uint64_t loading            # a saved device is being loaded: what is there is not all of it

cdef struct counters:
    # All atomic. Kept: new ones go to the end.
    uint64_t pages_stored
    uint64_t compr_data_size
    uint64_t same_pages
    uint64_t huge_pages
    uint64_t huge_pages_since
    uint64_t failed_reads
    uint64_t failed_writes
    uint64_t invalid_io
    uint64_t notify_free
    uint64_t read_bytes
    uint64_t written_bytes
    uint64_t limit_compactions
    uint64_t inflight
    uint64_t checksum_errors
    uint64_t corrupt_block      # the last one, + 1
    latency latencies[OPS]

cdef class Device:
    cdef readonly uint64_t disksize         # bytes
    cdef readonly int acceleration
    cdef uint64_t blocks
    cdef Zsmalloc pool
    cdef readonly bint verify
    cdef Memory memory
    cdef Region slot_table
    cdef uint64_t *slots                    # atomic words, each changed under its stripe only
    cdef Region touches
    cdef uint8_t *touched                   # per page of slots: whether one was ever written; others are not even read
    cdef uint64_t touched_pages             # atomic
    cdef pthread_mutex_t stripes[STRIPES]   # stripe b % STRIPES guards block b
    cdef pthread_rwlock_t gate              # requests share it; check and reset have it alone
    cdef pthread_mutex_t scratch_lock       # guards the two below
    cdef scratch *scratches                 # those not in use, last in first out
    cdef uint64_t scratch_count
    cdef uint32_t scratch_size
    cdef counters *n
    cdef state_words *kept
    cdef uint64_t recovery_ms
    cdef uint64_t recovered_blocks
    cdef uint64_t leaked_objects
    cdef uint64_t lost_blocks
    cdef uint64_t epoch                     # atomic: how often the data was replaced as a whole, by reset or load
    cdef readonly bint dropped              # the state held a device that was loaded in part: it was reset

    cdef scratch *_scratch_take(self) noexcept nogil
    cdef void _scratch_give(self, scratch *s) noexcept nogil
    cdef int _store(self, uint64_t block, const char *content, scratch *s, uint64_t *slot) noexcept nogil
    cdef int _store_payload(self, uint64_t block, const char *payload, uint32_t size, uint64_t *slot) noexcept nogil
    cdef int _store_word(self, uint64_t block, uint64_t word, uint64_t *slot) noexcept nogil
    cdef uint64_t _same_slot(self, uint64_t block, uint64_t word) noexcept nogil
    cdef int _load(self, uint64_t block, uint64_t slot, char *content) noexcept nogil
    cdef bint _word_is_sound(self, uint64_t block, uint64_t slot, uint64_t word) noexcept nogil
    cdef bint _object_is_sound(self, uint64_t block, uint64_t slot, const char *payload) noexcept nogil
    cdef void _drop(self, uint64_t block, uint64_t slot) noexcept nogil
    cdef uint64_t _get(self, uint64_t block) noexcept nogil
    cdef uint64_t _set(self, uint64_t block, uint64_t slot) noexcept nogil
    cdef void _prefetch(self, uint64_t block) noexcept nogil
    cdef int _slot_is_ready(self, uint64_t block) noexcept nogil
    cdef int _write_block(self, uint64_t block, const char *src, scratch *s) noexcept nogil
    cdef int _merge_block(self, uint64_t block, uint32_t at, const char *src, uint32_t n, scratch *s) noexcept nogil
    cdef int _read_block(self, uint64_t block, uint32_t at, char *dst, uint32_t n, scratch *s) noexcept nogil
    cdef int _zero_block(self, uint64_t block, uint64_t slot) noexcept nogil
    # requests: 0 or -errno, -EINVAL beyond the end
    cdef int serve_read(self, char *dst, uint64_t offset, uint64_t length) noexcept nogil
    cdef int serve_write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil
    cdef int serve_trim(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int serve_zero(self, uint64_t offset, uint64_t length, bint may_trim) noexcept nogil

    cdef bint _fits(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef void _enter_gate(self) noexcept nogil
    cdef void _leave_gate(self) noexcept nogil
    cdef uint64_t _begin(self) noexcept nogil
    cdef void _end(self, op kind, uint64_t began) noexcept nogil
    cdef int _write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _read(self, char *dst, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _zero(self, uint64_t offset, uint64_t length, uint64_t slot, bint exact) noexcept nogil
    cdef uint64_t _extent(self, uint64_t offset, uint64_t end, int *kind) noexcept nogil
    cdef int _populate(self) noexcept nogil
    cdef const char *_find_fault(self, uint64_t *where) noexcept nogil
    cdef uint64_t _requests(self, op kind) noexcept nogil
    cdef str culprit(self, int rc, uint64_t offset, uint64_t length)
