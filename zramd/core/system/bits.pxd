"""Words as sets of bits, and a hint to the cache: one instruction each."""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    #define lowest_bit(x) ((uint32_t)__builtin_ctz(x))
    /* The lowest run of neighbours among the bits of a mask that is not 0. */
    #define lowest_run(x) ((x) & ~((x) + ((x) & -(x))))
    #define highest_bit_64(x) (63 - (uint32_t)__builtin_clzll(x))
    #define lowest_bit_64(x) ((uint32_t)__builtin_ctzll(x))
    #define bits_set(x) ((uint32_t)__builtin_popcount(x))
    #define bits_set_64(x) ((uint32_t)__builtin_popcountll(x))
    #define prefetch(p) __builtin_prefetch(p)
    """
    # (Of 0 there is neither a lowest nor a highest bit.)
    uint32_t lowest_bit(uint32_t x) noexcept nogil
    uint32_t lowest_run(uint32_t x) noexcept nogil
    uint32_t lowest_bit_64(uint64_t x) noexcept nogil
    uint32_t highest_bit_64(uint64_t x) noexcept nogil
    uint32_t bits_set(uint32_t x) noexcept nogil
    uint32_t bits_set_64(uint64_t x) noexcept nogil
    void prefetch(const void *p) noexcept nogil
