from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.device.backing cimport Backing
from zramd.core.device.codec cimport codec
from zramd.core.device.cold cimport Cold
from zramd.core.system.latency cimport latency
from zramd.core.system.locks cimport pthread_mutex_t
from zramd.core.memory.region cimport Memory, Region
from zramd.core.pool.pool cimport Pool
from zramd.core.types cimport BLOCK_SIZE

cdef extern from *:
    """
    #define is_touched(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define read_bit(n) ((uint64_t)1 << (n) % 64)
    #define note_read(bits, n) ((void)__atomic_fetch_or(&(bits)[(n) / 64], read_bit(n), __ATOMIC_RELAXED))
    #define clear_read(bits, n) ((void)__atomic_fetch_and(&(bits)[(n) / 64], ~read_bit(n), __ATOMIC_RELAXED))
    #define is_read(bits, n) ((__atomic_load_n(&(bits)[(n) / 64], __ATOMIC_RELAXED) & read_bit(n)) != 0)
    """
    bint is_touched(uint8_t *p) noexcept nogil
    bint is_read(uint64_t *bits, uint64_t block) noexcept nogil
    void note_read(uint64_t *bits, uint64_t block) noexcept nogil
    void clear_read(uint64_t *bits, uint64_t block) noexcept nogil

cdef enum:
    STRIPES = 256
    SCRATCHES_READY = 6         # where requests must not need memory. More come from the heap, which is resident then
    AGE_COARSE = 128            # a block of this age and more grows older in coarse sweeps only
    AGE_OLDEST = 251            # what comes after is no age
    AGE_LEAVING = 252           # it is being written to the backing
    AGE_WANTED = 253            # of a cold block or one that is out: it was read in two sweeps within READ_AGAIN
    AGE_IDLE = 254              # marked by zram's word `idle`
    AGE_COOLING = 255           # it is being made cold, or hot again
    READ_AGAIN = 3              # sweeps
    OUT_READ_AGAIN = 60         # the same for one that is out

cdef struct scratch:
    # What one request needs to compress and decompress, at the begin of a page.
    scratch *next
    char unused[48]
    char *room                  # for what is read from the backing: its ROOM bytes, if there is one
    char page[BLOCK_SIZE]       # a whole block while a part of it is merged in
    char out[BLOCK_SIZE]        # the codec's output
    char state[1]               # the codec's state: state_size bytes, at a multiple of 64

cdef enum op:
    OP_READ
    OP_WRITE
    OP_TRIM
    OP_ZERO
    OPS

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
    uint64_t unused
    uint64_t checksum_errors
    uint64_t corrupt_block      # the last one, + 1
    latency latencies[OPS]
    uint64_t cold_pages
    uint64_t cold_data_size
    uint64_t recompressed
    uint64_t recompress_useless
    uint64_t recompress_saved
    uint64_t promoted
    uint64_t out_pages
    uint64_t out_data_size
    uint64_t written_out        # blocks
    uint64_t brought_back       # blocks
    uint64_t bd_reads           # bytes
    uint64_t bd_writes          # bytes
    uint64_t reclaimed_bytes    # of these
    uint64_t bd_read_errors
    uint64_t bd_write_errors

cdef class Blocks:
    cdef uint64_t count
    cdef codec hot                          # of what is written
    cdef uint64_t hot_marks                 # of the slot of what it has compressed
    cdef bint promotes                      # what was cold and is wanted again is read faster if it is hot
    cdef bint verify
    cdef Pool pool
    cdef Region slot_table
    cdef uint64_t *slots                    # atomic words, each changed under its stripe only
    cdef Region touches
    cdef uint8_t *touched                   # per page of slots: whether one was ever written; others are not even read
    cdef uint64_t touched_pages             # atomic
    cdef Region ages_table
    cdef uint8_t *ages                      # of each block: sweeps since it was asked for. Atomic bytes, kept by nobody
    cdef Region reads_table
    cdef uint64_t *reads                    # a bit for each block: whether it was read since it was written, or went out
    cdef Cold cold
    cdef Backing backing                    # None: there is none
    cdef pthread_mutex_t stripes[STRIPES]   # stripe b % STRIPES guards block b
    cdef pthread_mutex_t scratch_lock       # guards the one below
    cdef scratch *scratches                 # those not in use, last in first out
    cdef uint64_t scratch_count             # atomic: all
    cdef uint32_t scratch_size
    cdef counters *counters

    cdef int inherit_priority(self) noexcept nogil
    cdef scratch *_scratch_make(self) noexcept nogil
    cdef scratch *scratch_take(self) noexcept nogil
    cdef void scratch_give(self, scratch *s) noexcept nogil
    cdef int _store(self, uint64_t block, const char *content, scratch *s, uint64_t *slot, bint waits) noexcept nogil
    cdef int _store_payload(self, uint64_t block, const char *payload, uint32_t size, uint64_t *slot) noexcept nogil
    cdef int store_payload(self, uint64_t block, const char *payload, uint32_t size, uint64_t *slot) noexcept nogil
    cdef int _store_word(self, uint64_t block, uint64_t word, uint64_t *slot) noexcept nogil
    cdef int store_word(self, uint64_t block, uint64_t word, uint64_t *slot) noexcept nogil
    cdef uint64_t _same_slot(self, uint64_t block, uint64_t word, uint64_t handle) noexcept nogil
    cdef int _load(self, uint64_t block, uint64_t slot, char *content) noexcept nogil
    cdef uint64_t word_of(self, uint64_t slot) noexcept nogil
    cdef bint word_is_sound(self, uint64_t block, uint64_t slot, uint64_t word) noexcept nogil
    cdef bint object_is_sound(self, uint64_t block, uint64_t slot, const char *payload) noexcept nogil
    cdef bint checksum_agrees(self, uint64_t block, uint64_t slot, const char *payload) noexcept nogil
    cdef void _free(self, uint64_t block, uint64_t slot) noexcept nogil
    cdef uint64_t get(self, uint64_t block) noexcept nogil
    cdef int put(self, uint64_t block, uint64_t slot, bint held) noexcept nogil
    cdef int _slot_take_room(self, uint64_t block) noexcept nogil
    cdef int _slot_make_room(self, uint64_t block) noexcept nogil
    cdef void _count(self, uint64_t slot, uint64_t n) noexcept nogil
    cdef void prefetch_cell(self, uint64_t block) noexcept nogil
    cdef void prefetch_object(self, uint64_t block, uint32_t most) noexcept nogil
    cdef int write_block(self, uint64_t block, const char *src, scratch *s) noexcept nogil
    cdef int merge_block(self, uint64_t block, uint32_t at, const char *src, uint32_t n, scratch *s) noexcept nogil
    cdef int merge_loaded(self, uint64_t block, uint32_t at, const char *src, uint32_t n, scratch *s,
                          uint64_t loaded) noexcept nogil
    cdef int _merge(self, uint64_t block, uint32_t at, const char *src, uint32_t n, scratch *s,
                    uint64_t loaded) noexcept nogil
    cdef bint is_away(self, uint64_t slot) noexcept nogil
    cdef int read_block(self, uint64_t block, uint32_t at, char *dst, uint32_t n, scratch *s) noexcept nogil
    cdef int zero_block(self, uint64_t block, bint hole) noexcept nogil
    cdef void _used(self, uint64_t block) noexcept nogil
    cdef void _read_again(self, uint64_t block, uint8_t age) noexcept nogil
    cdef int populate(self) noexcept nogil
    cdef void clear(self) noexcept nogil
    cdef uint64_t metadata_bytes(self) noexcept nogil
