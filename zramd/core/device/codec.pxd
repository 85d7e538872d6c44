from libc.stdint cimport uint32_t, uint64_t

cdef bint same_filled(const char *block, uint64_t *word) noexcept nogil
cdef void fill(char *block, uint64_t word) noexcept nogil
cdef uint32_t encode(const char *block, char *out, uint32_t limit, void *state, int acceleration) noexcept nogil
cdef int decode(const char *payload, uint32_t size, char *block) noexcept nogil
cdef uint32_t state_size() noexcept nogil
