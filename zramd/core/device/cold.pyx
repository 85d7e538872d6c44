"""The cold codec: what nobody asks for is compressed again, by zstd, to two thirds of what lz4 leaves.

A cold payload begins with a byte that names its codec (COLD_ZSTD), followed by one frame of zstd without the magic
number, the content's size and a checksum: two bytes of header. All contexts live in memory of their own, made once, so
that no request allocates: one to compress, of the background worker, and a few to decompress (96 KiB each, which is why
not each thread has one).
"""

from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport uint8_t, uint32_t

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
    ZSTD_maxCLevel,
    ZSTD_versionString,
)
from zramd.core.memory.region cimport region_populate, secret_alloc, secret_free, whole_pages
from zramd.core.system.checks cimport zr_assert_held
from zramd.core.system.locks cimport (
    mutex_inherit,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_trylock,
    pthread_mutex_unlock,
)
from zramd.core.types cimport BLOCK_SIZE

cimport cython

ZSTD_VERSION = ZSTD_versionString().decode()
MAX_LEVEL = 19      # those above take more memory than a block can use


@cython.final
cdef class Cold:
    """What compresses cold blocks, and decompresses them.

    level: zstd's, 1 to 19; 0: only what is cold already can be read. Raises ValueError for another level, MemoryError.
    """

    def __cinit__(self, int level=0):
        cdef uint32_t i, each = <uint32_t>whole_pages(ZSTD_estimateDCtxSize())
        for i in range(DECODERS):
            pthread_mutex_init(&self.decoders[i].lock, NULL)
        pthread_mutex_init(&self.encoder_lock, NULL)
        if not 0 <= level <= min(MAX_LEVEL, ZSTD_maxCLevel()):
            raise ValueError(f"level {level} is out of range: 1 to {min(MAX_LEVEL, ZSTD_maxCLevel())}")
        self.memory_size = each * DECODERS
        self.memory = <uint8_t *>secret_alloc(self.memory_size)
        if self.memory == NULL:
            raise MemoryError("no memory for zstd")
        for i in range(DECODERS):
            self.decoders[i].context = ZSTD_initStaticDCtx(self.memory + i * each, each)
            ZSTD_DCtx_setParameter(self.decoders[i].context, ZSTD_d_format, ZSTD_f_zstd1_magicless)
        if level:
            self._make_encoder(level)

    def _make_encoder(self, int level):
        cdef ZSTD_compressionParameters wanted = ZSTD_getCParams(level, BLOCK_SIZE, 0)
        self.encoder_size = <uint32_t>whole_pages(ZSTD_estimateCCtxSize_usingCParams(wanted))
        self.encoder_memory = <uint8_t *>secret_alloc(self.encoder_size)
        if self.encoder_memory == NULL:
            raise MemoryError("no memory for zstd")
        self.encoder = ZSTD_initStaticCCtx(self.encoder_memory, self.encoder_size)
        for parameter, value in (
            (ZSTD_c_windowLog, wanted.windowLog),
            (ZSTD_c_hashLog, wanted.hashLog),
            (ZSTD_c_chainLog, wanted.chainLog),
            (ZSTD_c_searchLog, wanted.searchLog),
            (ZSTD_c_minMatch, wanted.minMatch),
            (ZSTD_c_targetLength, wanted.targetLength),
            (ZSTD_c_strategy, wanted.strategy),
            (ZSTD_c_contentSizeFlag, 0),
            (ZSTD_c_checksumFlag, 0),
            (ZSTD_c_format, ZSTD_f_zstd1_magicless),
        ):
            if ZSTD_isError(ZSTD_CCtx_setParameter(self.encoder, parameter, value)):
                raise ValueError(f"zstd {ZSTD_VERSION} does not take level {level}")
        self.level = level

    def __dealloc__(self):
        cdef uint32_t i
        if self.memory != NULL:
            secret_free(self.memory, self.memory_size)
        if self.encoder_memory != NULL:
            secret_free(self.encoder_memory, self.encoder_size)
        for i in range(DECODERS):
            pthread_mutex_destroy(&self.decoders[i].lock)
        pthread_mutex_destroy(&self.encoder_lock)

    cdef int inherit_priority(self) noexcept nogil:
        """Make each lock hand on priority; 0 or an errno. Nobody else may be here yet."""
        cdef uint32_t i
        cdef int rc = mutex_inherit(&self.encoder_lock)
        for i in range(DECODERS):
            rc = rc or mutex_inherit(&self.decoders[i].lock)
        return rc

    cdef int populate(self) noexcept nogil:
        """Make all contexts resident; 0 or -ENOMEM."""
        if region_populate(self.memory, self.memory_size):
            return -ENOMEM
        if self.encoder_size and region_populate(self.encoder_memory, self.encoder_size):
            return -ENOMEM
        return 0

    cdef uint32_t encode(self, const char *block, char *out, uint32_t limit) noexcept nogil:
        """Compress a block into out, which has room for limit bytes; the bytes used, or 0: it does not get so small.

        The caller has encoder_lock.
        """
        cdef size_t n
        zr_assert_held(&self.encoder_lock)
        if limit < 2:
            return 0
        out[0] = COLD_ZSTD
        n = ZSTD_compress2(self.encoder, out + 1, limit - 1, block, BLOCK_SIZE)
        return 0 if ZSTD_isError(n) else <uint32_t>n + 1

    cdef int decode(self, const char *payload, uint32_t size, char *block) noexcept nogil:
        """Decompress a cold payload; 0 or -EIO."""
        cdef uint32_t i = 0
        cdef size_t n
        if not is_cold_payload(payload, size):
            return -EIO
        while i < DECODERS - 1 and pthread_mutex_trylock(&self.decoders[i].lock):
            i += 1
        if i == DECODERS - 1:
            pthread_mutex_lock(&self.decoders[i].lock)
        n = ZSTD_decompressDCtx(self.decoders[i].context, block, BLOCK_SIZE, payload + 1, size - 1)
        pthread_mutex_unlock(&self.decoders[i].lock)
        return 0 if n == BLOCK_SIZE else -EIO

    cdef uint32_t metadata_bytes(self) noexcept nogil:
        """Bytes of all contexts."""
        return self.memory_size + self.encoder_size
