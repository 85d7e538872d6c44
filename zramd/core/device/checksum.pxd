from libc.stdint cimport uint32_t, uint64_t

cdef uint32_t crc_of(const char *data, uint64_t size, uint32_t crc) noexcept nogil
cdef uint32_t checksum(const char *data, uint32_t size, uint64_t seed) noexcept nogil
