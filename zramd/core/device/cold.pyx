"""The cold codec: what nobody asks for is compressed again, by zstd, to two thirds of what lz4 leaves.

Its encoder is for one thread at a time. Its decoders serve all threads, also for what zstd compressed
when it was written: each has 96 KiB, which is why not each thread has one.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t

from zramd.core.device.frames cimport (
    ZSTD_LEVELS,
    decoder_bytes,
    decoder_make,
    encoder_bytes,
    encoder_make,
    frame_decode,
    frame_encode,
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

cimport cython

import os


@cython.final
cdef class Cold:
    """What compresses cold blocks, and decompresses those and all others of zstd.

    level: zstd's, 1 to 19; 0: nothing is made cold. many: all processors may be decompressing, because all blocks are
    zstd's. Raises ValueError for another level, MemoryError.
    """

    def __cinit__(self, int level=0, bint many=False):
        cdef uint32_t i, each = <uint32_t>whole_pages(decoder_bytes())
        for i in range(DECODERS_MAX):
            pthread_mutex_init(&self.decoders[i].lock, NULL)
        pthread_mutex_init(&self.encoder_lock, NULL)
        if not 0 <= level <= ZSTD_LEVELS:
            raise ValueError(f"level {level} is out of range: 1 to {ZSTD_LEVELS}")
        self.count = DECODERS_FEW
        if many:
            # Twice as many: who loses the processor in the middle of a block keeps his.
            self.count = min(<int>DECODERS_MAX, 2 * len(os.sched_getaffinity(0)))
        self.memory_size = each * self.count
        self.memory = <uint8_t *>secret_alloc(self.memory_size)
        if self.memory == NULL:
            raise MemoryError(f"no memory to decompress by zstd: {self.memory_size} bytes")
        for i in range(self.count):
            self.decoders[i].context = decoder_make(self.memory + i * each, each)
            if self.decoders[i].context == NULL:
                raise MemoryError(f"zstd cannot decompress with {each} bytes of memory")
        if level:
            self._make_encoder(level)

    def _make_encoder(self, int level):
        self.encoder_size = <uint32_t>whole_pages(encoder_bytes(level))
        self.encoder_memory = <uint8_t *>secret_alloc(self.encoder_size)
        if self.encoder_memory == NULL:
            raise MemoryError(f"no memory to recompress by zstd(level={level}): {self.encoder_size} bytes")
        self.encoder = encoder_make(self.encoder_memory, self.encoder_size, level)
        if self.encoder == NULL:
            raise MemoryError(f"zstd(level={level}) cannot compress with {self.encoder_size} bytes of memory")
        self.level = level

    def __dealloc__(self):
        cdef uint32_t i
        secret_free(self.memory, self.memory_size)
        secret_free(self.encoder_memory, self.encoder_size)
        for i in range(DECODERS_MAX):
            pthread_mutex_destroy(&self.decoders[i].lock)
        pthread_mutex_destroy(&self.encoder_lock)

    cdef int inherit_priority(self) noexcept nogil:
        """Make each lock hand on priority; 0 or an errno. Nobody else may be here yet."""
        cdef uint32_t i
        cdef int rc = mutex_inherit(&self.encoder_lock)
        for i in range(DECODERS_MAX):
            rc = rc or mutex_inherit(&self.decoders[i].lock)
        return rc

    cdef void exchange_encoder(self, Cold other) noexcept nogil:
        """Take another's encoder, which is not in use, and give it the own one."""
        pthread_mutex_lock(&self.encoder_lock)
        self.encoder, other.encoder = other.encoder, self.encoder
        self.encoder_memory, other.encoder_memory = other.encoder_memory, self.encoder_memory
        self.encoder_size, other.encoder_size = other.encoder_size, self.encoder_size
        self.level, other.level = other.level, self.level
        pthread_mutex_unlock(&self.encoder_lock)

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
        zr_assert_held(&self.encoder_lock)
        return frame_encode(self.encoder, block, out, limit)

    cdef int decode(self, const char *payload, uint32_t size, char *block) noexcept nogil:
        """Decompress a payload of zstd; 0 or -EIO. Whoever finds all decoders at work waits some 5 us."""
        cdef uint32_t i = 0
        cdef int rc
        # The first that is free, whose tables are still in the cache.
        while i < self.count and pthread_mutex_trylock(&self.decoders[i].lock):
            i += 1
        if i == self.count:
            # Any will do, but not the same one for all who wait.
            i = <uint32_t>(<size_t>block >> 12) % self.count
            pthread_mutex_lock(&self.decoders[i].lock)
        rc = frame_decode(self.decoders[i].context, payload, size, block)
        pthread_mutex_unlock(&self.decoders[i].lock)
        return rc

    cdef uint32_t metadata_bytes(self) noexcept nogil:
        """Bytes of all contexts."""
        return self.memory_size + self.encoder_size
