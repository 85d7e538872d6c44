from libc.stdint cimport uint8_t, uint32_t

from zramd.core.device.zstd cimport ZSTD_CCtx, ZSTD_DCtx
from zramd.core.system.locks cimport pthread_mutex_t
from zramd.core.types cimport BLOCK_SIZE

cdef enum:
    DECODERS = 2                # blocks that are decompressed at once; who comes next waits some 5 us
    COLD_ZSTD = 1               # the first byte of a cold payload: zstd, without a dictionary

cdef inline bint is_cold_payload(const char *payload, uint32_t size) noexcept nogil:
    """Whether a cold payload of that size may begin so. (None of lz4 does: its first byte is 16 or more.)"""
    return 2 <= size < BLOCK_SIZE and payload[0] == COLD_ZSTD

cdef struct decoder:
    pthread_mutex_t lock
    ZSTD_DCtx *context

cdef class Cold:
    cdef decoder decoders[DECODERS]
    cdef uint8_t *memory                    # of the decoders' contexts
    cdef uint32_t memory_size
    cdef ZSTD_CCtx *encoder                 # NULL: nothing is made cold here; one thread at a time has it
    cdef uint8_t *encoder_memory
    cdef uint32_t encoder_size
    cdef readonly int level                 # zstd's; 0 without an encoder

    cdef pthread_mutex_t encoder_lock       # who has it compresses; taken before any stripe

    cdef int inherit_priority(self) noexcept nogil
    cdef int populate(self) noexcept nogil
    cdef uint32_t encode(self, const char *block, char *out, uint32_t limit) noexcept nogil
    cdef int decode(self, const char *payload, uint32_t size, char *block) noexcept nogil
    cdef uint32_t metadata_bytes(self) noexcept nogil
