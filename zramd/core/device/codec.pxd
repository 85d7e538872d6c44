from libc.stdint cimport uint32_t, uint64_t

cdef enum codec_name:
    USE_LZ4
    USE_LZ4HC
    USE_ZSTD
    USE_NONE

cdef struct codec:
    # How blocks are compressed that are written.
    codec_name name
    int level                   # lz4: its acceleration

cdef codec codec_of(str name, int level) except *
cdef str codec_text(const codec *how)
cdef uint32_t state_size(const codec *how) noexcept nogil
cdef bint state_prepare(const codec *how, void *state) noexcept nogil

cdef bint same_filled(const char *block, uint64_t *word) noexcept nogil
cdef void fill(char *block, uint64_t word) noexcept nogil
cdef uint32_t encode(const codec *how, const char *block, char *out, uint32_t limit, void *state) noexcept nogil
cdef int decode(const char *payload, uint32_t size, char *block) noexcept nogil
