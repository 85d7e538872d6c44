from libc.stdint cimport uint8_t, uint32_t

from zramd.core.device.zstd cimport ZSTD_CCtx, ZSTD_DCtx
from zramd.core.system.locks cimport pthread_mutex_t

cdef enum:
    DECODERS_FEW = 2            # blocks that are decompressed at once where zstd is for what is cold
    DECODERS_MAX = 8            # where it is for all

cdef struct decoder:
    pthread_mutex_t lock
    ZSTD_DCtx *context

cdef class Cold:
    cdef decoder decoders[DECODERS_MAX]
    cdef uint32_t count                     # of decoders
    cdef uint8_t *memory                    # of the decoders' contexts
    cdef uint32_t memory_size
    cdef ZSTD_CCtx *encoder                 # NULL: nothing is made cold here; one thread at a time has it
    cdef uint8_t *encoder_memory
    cdef uint32_t encoder_size
    cdef readonly int level                 # zstd's; 0 without an encoder

    cdef pthread_mutex_t encoder_lock       # who has it compresses; taken before any stripe

    cdef int inherit_priority(self) noexcept nogil
    cdef void exchange_encoder(self, Cold other) noexcept nogil
    cdef int populate(self) noexcept nogil
    cdef uint32_t encode(self, const char *block, char *out, uint32_t limit) noexcept nogil
    cdef int decode(self, const char *payload, uint32_t size, char *block) noexcept nogil
    cdef uint32_t metadata_bytes(self) noexcept nogil
