"""CRC-32C, and the checksum of an object: four CRC-32C lanes over every fourth word, and the CRC-32C of the four.

One lane would wait three cycles for each word. Each lane finds what a CRC finds in its words, and folding them loses
nothing that happened in one of them: each is multiplied by an odd number first, which is one to one. Without that, the same
change in two neighbouring words, such as of a stuck bit line, would cancel out: a CRC of CRCs is but a sum of shifted
changes. The seed, a block's number, makes another block's object wrong here.

CRC-32C is Castagnoli's (polynomial 0x1EDC6F41; one instruction of SSE 4.2). The odd numbers are the first primes of xxHash.
"""

from libc.stdint cimport uint32_t, uint64_t

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

cdef extern from *:
    """
    #include <string.h>

    /* When a word that led here is wrong, what is read may be another object's, or free: that is what is to be found. */
    #define CHECKSUM_CODE __attribute__((no_sanitize("address"))) static

    #define CHECKSUM_MIX(lane, odd) ((uint64_t)((uint32_t)(lane) * odd##u))
    #define CHECKSUM_LANES(name, step)                                                          \\
    CHECKSUM_CODE uint32_t name(const char *data, uint32_t size, uint64_t seed)                 \\
    {                                                                                           \\
        uint64_t a = step(0xFFFFFFFFu, seed), b = 1, c = 2, d = 3;                              \\
        const checksum_word *word = (const checksum_word *)data;                                \\
        uint32_t words = size / 8, i = 0;                                                       \\
        uint64_t rest = 0;                                                                      \\
        for (; i + 4 <= words; i += 4) {                                                        \\
            a = step(a, word[i]);                                                               \\
            b = step(b, word[i + 1]);                                                           \\
            c = step(c, word[i + 2]);                                                           \\
            d = step(d, word[i + 3]);                                                           \\
        }                                                                                       \\
        for (; i < words; i++)                                                                  \\
            a = step(a, word[i]);                                                               \\
        for (i = words * 8; i < size; i++)                                                      \\
            rest = rest << 8 | (unsigned char)data[i];                                          \\
        b = step(b, rest);                                                                      \\
        return (uint32_t)step(step(step(a, CHECKSUM_MIX(b, 0x9E3779B1)), CHECKSUM_MIX(c, 0x85EBCA77)), \\
                              CHECKSUM_MIX(d, 0xC2B2AE3D) | (uint64_t)size << 32);              \\
    }
    typedef uint64_t __attribute__((aligned(1), may_alias)) checksum_word;

    static uint32_t checksum_table[256];

    static __attribute__((constructor)) void checksum_prepare(void)
    {
        uint32_t n, bit, crc;
        for (n = 0; n < 256; n++) {
            crc = n;
            for (bit = 0; bit < 8; bit++)
                crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
            checksum_table[n] = crc;
        }
    }

    static inline uint64_t crc_by_table(uint64_t crc, uint64_t word)
    {
        int i;
        for (i = 0; i < 8; i++, word >>= 8)
            crc = crc >> 8 ^ checksum_table[(crc ^ word) & 0xFF];
        return crc;
    }
    CHECKSUM_LANES(checksum_portable, crc_by_table)


    /* CRC-32C as everybody has it, of little-endian words. */
    #define CRC_LANE(name, step)                                                                \\
    static uint32_t name(const char *data, uint64_t size, uint32_t crc)                         \\
    {                                                                                           \\
        const checksum_word *word = (const checksum_word *)data;                                \\
        uint64_t c = ~crc, i;                                                                   \\
        for (i = 0; i < size / 8; i++)                                                          \\
            c = step(c, word[i]);                                                               \\
        for (i = size / 8 * 8; i < size; i++)                                                   \\
            c = c >> 8 ^ checksum_table[(c ^ (unsigned char)data[i]) & 0xFF];                   \\
        return ~(uint32_t)c;                                                                    \\
    }
    CRC_LANE(crc_portable, crc_by_table)

    #if defined(__x86_64__)
    #define crc_by_cpu __builtin_ia32_crc32di
    __attribute__((target("sse4.2"))) CHECKSUM_LANES(checksum_fast, crc_by_cpu)
    __attribute__((target("sse4.2"))) CRC_LANE(crc_fast, crc_by_cpu)
    #define crc_best(data, size, crc) \\
        (__builtin_cpu_supports("sse4.2") ? crc_fast(data, size, crc) : crc_portable(data, size, crc))
    #define checksum_best(data, size, seed) \\
        (__builtin_cpu_supports("sse4.2") ? checksum_fast(data, size, seed) : checksum_portable(data, size, seed))
    #elif defined(__ARM_FEATURE_CRC32)
    #include <arm_acle.h>
    #define crc_by_cpu(crc, word) __crc32cd((uint32_t)(crc), (word))
    CHECKSUM_LANES(checksum_fast, crc_by_cpu)
    CRC_LANE(crc_fast, crc_by_cpu)
    #define crc_best crc_fast
    #define checksum_best checksum_fast
    #else
    #define crc_best crc_portable
    #define checksum_best checksum_portable
    #endif
    """
    uint32_t crc_best(const char *data, uint64_t size, uint32_t crc) noexcept nogil
    uint32_t crc_portable(const char *data, uint64_t size, uint32_t crc) noexcept nogil
    uint32_t checksum_best(const char *data, uint32_t size, uint64_t seed) noexcept nogil
    uint32_t checksum_portable(const char *data, uint32_t size, uint64_t seed) noexcept nogil


cdef uint32_t checksum(const char *data, uint32_t size, uint64_t seed) noexcept nogil:
    return checksum_best(data, size, seed)


cdef uint32_t crc_of(const char *data, uint64_t size, uint32_t crc) noexcept nogil:
    return crc_best(data, size, crc)


def crc32c(data, uint32_t crc=0, bint portable=False):
    """The CRC-32C of a buffer, from that of what comes before it on; portable as in `of`."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    if portable:
        crc = crc_portable(<const char *>view.buf, view.len, crc)
    else:
        crc = crc_best(<const char *>view.buf, view.len, crc)
    PyBuffer_Release(&view)
    return crc


def of(data, uint64_t seed=0, bint portable=False):
    """The checksum of a buffer, 32 bits; portable: without the processor's own instruction, which is to give the same."""
    cdef Py_buffer view
    cdef uint32_t result
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    if portable:
        result = checksum_portable(<const char *>view.buf, <uint32_t>view.len, seed)
    else:
        result = checksum_best(<const char *>view.buf, <uint32_t>view.len, seed)
    PyBuffer_Release(&view)
    return result
