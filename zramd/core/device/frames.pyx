"""A block as a frame of zstd, and the contexts that make and read one, in memory of the caller.

A payload begins with a byte that names its codec (PAYLOAD_ZSTD), followed by one frame without the magic number, the
content's size and a checksum: two bytes of header. A context is made once, in memory that it never grows out of: nothing
here allocates.
"""

from libc.errno cimport EIO
from libc.stdint cimport uint32_t

from zramd.core.device.zstd cimport (
    ZSTD_CCtx_setParameter,
    ZSTD_DCtx_setParameter,
    ZSTD_c_chainLog,
    ZSTD_c_checksumFlag,
    ZSTD_c_contentSizeFlag,
    ZSTD_c_format,
    ZSTD_c_hashLog,
    ZSTD_c_minMatch,
    ZSTD_c_searchLog,
    ZSTD_c_strategy,
    ZSTD_c_targetLength,
    ZSTD_c_windowLog,
    ZSTD_compress2,
    ZSTD_compressionParameters,
    ZSTD_d_format,
    ZSTD_decompressDCtx,
    ZSTD_estimateCCtxSize_usingCParams,
    ZSTD_estimateDCtxSize,
    ZSTD_f_zstd1_magicless,
    ZSTD_getCParams,
    ZSTD_initStaticCCtx,
    ZSTD_initStaticDCtx,
    ZSTD_isError,
    ZSTD_versionString,
)
from zramd.core.types cimport BLOCK_SIZE

ZSTD_VERSION = ZSTD_versionString().decode()


cdef uint32_t encoder_bytes(int level) noexcept nogil:
    """Bytes of what compresses blocks at a level, 1 to ZSTD_LEVELS."""
    return <uint32_t>ZSTD_estimateCCtxSize_usingCParams(ZSTD_getCParams(level, BLOCK_SIZE, 0))


cdef ZSTD_CCtx *encoder_make(void *place, uint32_t size, int level) noexcept nogil:
    """Make what compresses blocks at a level of size encoder_bytes, at a place for 64-byte words; NULL: zstd refuses.

    It begins at the place. One thread at a time may use it.
    """
    cdef ZSTD_compressionParameters wanted = ZSTD_getCParams(level, BLOCK_SIZE, 0)
    cdef ZSTD_CCtx *made = ZSTD_initStaticCCtx(place, size)
    cdef size_t wrong
    if made == NULL:
        return NULL
    # The parameters one by one: by the level zstd would take those for content of unknown size, and more memory.
    wrong = (
        ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_windowLog, <int>wanted.windowLog))
        | ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_hashLog, <int>wanted.hashLog))
        | ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_chainLog, <int>wanted.chainLog))
        | ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_searchLog, <int>wanted.searchLog))
        | ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_minMatch, <int>wanted.minMatch))
        | ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_targetLength, <int>wanted.targetLength))
        | ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_strategy, wanted.strategy))
        | ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_contentSizeFlag, 0))
        | ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_checksumFlag, 0))
        | ZSTD_isError(ZSTD_CCtx_setParameter(made, ZSTD_c_format, ZSTD_f_zstd1_magicless))
    )
    return NULL if wrong else made


cdef uint32_t frame_encode(ZSTD_CCtx *encoder, const char *block, char *out, uint32_t limit) noexcept nogil:
    """Compress a block into out, which has room for limit bytes; the bytes used, or 0: it does not get so small."""
    cdef size_t n
    if limit < 2:
        return 0
    out[0] = PAYLOAD_ZSTD
    n = ZSTD_compress2(encoder, out + 1, limit - 1, block, BLOCK_SIZE)
    return 0 if ZSTD_isError(n) else <uint32_t>n + 1


cdef uint32_t decoder_bytes() noexcept nogil:
    """Bytes of what decompresses blocks of any level."""
    return <uint32_t>ZSTD_estimateDCtxSize()


cdef ZSTD_DCtx *decoder_make(void *place, uint32_t size) noexcept nogil:
    """Make what decompresses blocks of size decoder_bytes, at a place for 64-byte words; NULL: zstd refuses.

    One thread at a time may use it.
    """
    cdef ZSTD_DCtx *made = ZSTD_initStaticDCtx(place, size)
    if made == NULL or ZSTD_isError(ZSTD_DCtx_setParameter(made, ZSTD_d_format, ZSTD_f_zstd1_magicless)):
        return NULL
    return made


cdef int frame_decode(ZSTD_DCtx *decoder, const char *payload, uint32_t size, char *block) noexcept nogil:
    """Decompress a payload; 0, or -EIO: it is not one of a block."""
    if not is_cold_payload(payload, size):
        return -EIO
    return 0 if ZSTD_decompressDCtx(decoder, block, BLOCK_SIZE, payload + 1, size - 1) == BLOCK_SIZE else -EIO
