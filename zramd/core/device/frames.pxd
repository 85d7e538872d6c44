from libc.stdint cimport uint32_t

from zramd.core.device.zstd cimport ZSTD_CCtx, ZSTD_DCtx
from zramd.core.types cimport BLOCK_SIZE

cdef enum:
    PAYLOAD_ZSTD = 1            # the first byte of a payload that is not lz4's: zstd, without a dictionary
    ZSTD_LEVELS = 19            # those above take more memory than a block can use

cdef inline bint is_cold_payload(const char *payload, uint32_t size) noexcept nogil:
    """Whether a payload of that size may begin as zstd's. (None of lz4 does: its first byte is 16 or more.)"""
    return 2 <= size < BLOCK_SIZE and payload[0] == PAYLOAD_ZSTD

cdef uint32_t encoder_bytes(int level) noexcept nogil
cdef ZSTD_CCtx *encoder_make(void *place, uint32_t size, int level) noexcept nogil
cdef uint32_t frame_encode(ZSTD_CCtx *encoder, const char *block, char *out, uint32_t limit) noexcept nogil
cdef uint32_t decoder_bytes() noexcept nogil
cdef ZSTD_DCtx *decoder_make(void *place, uint32_t size) noexcept nogil
cdef int frame_decode(ZSTD_DCtx *decoder, const char *payload, uint32_t size, char *block) noexcept nogil
