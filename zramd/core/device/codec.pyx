"""The codecs: a block of 4096 bytes is one word repeated, or what a codec makes of it, or raw.

The three are those of the kernel's zram (drivers/block/zram), whose word for the first is same-filled, and whose names the
codecs have. lz4 and lz4hc make a block of lz4's format, by the library lz4; zstd makes what frames.pyx says; none leaves
every block raw.
Everything works in memory of the caller; a codec's state is the caller's too, and is prepared once.
"""

from libc.errno cimport EIO
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize

from zramd.core.device.frames cimport (
    ZSTD_LEVELS,
    decoder_bytes,
    decoder_make,
    encoder_bytes,
    encoder_make,
    frame_decode,
    frame_encode,
)
from zramd.core.device.lz4 cimport (
    LZ4_compress_fast_extState,
    LZ4_compress_HC_continue,
    LZ4_decompress_safe,
    LZ4_initStreamHC,
    LZ4_resetStreamHC_fast,
    LZ4_sizeofState,
    LZ4_sizeofStateHC,
    LZ4_streamHC_t,
    LZ4_versionString,
)
from zramd.core.device.zstd cimport ZSTD_CCtx
from zramd.core.memory.region cimport secret_alloc, secret_free
from zramd.core.types cimport BLOCK_SIZE

from zramd.errors import error_from

LZ4_VERSION = LZ4_versionString().decode()
# Each codec's levels: the first, the last, and that of whoever asks for none. lz4's is its acceleration; from 10 on lz4hc
# takes 64 KiB from the heap for each block, which no request may; zstd's above 19 take more memory than a block can use.
LEVELS = {"lz4": (1, 65537, 1), "lz4hc": (3, 9, 9), "zstd": (1, ZSTD_LEVELS, 3), "none": (0, 0, 0)}


cdef codec codec_of(str name, int level) except *:
    """The codec of a name, at a level of its own, 0: its usual one. Raises ValueError."""
    cdef codec found
    if name not in LEVELS:
        raise ValueError(f"codec '{name}' is none of {', '.join(LEVELS)}")
    first, last, usual = LEVELS[name]
    found.name = <codec_name>list(LEVELS).index(name)
    found.level = level or usual
    if not first <= found.level <= last:
        raise ValueError(f"level {level} of {name} is out of range: {first} to {last}")
    return found


cdef str codec_text(const codec *how):
    """The name that codec_of takes."""
    return list(LEVELS)[<int>how.name]


cdef bint same_filled(const char *block, uint64_t *word) noexcept nogil:
    """Whether a block is one 64-bit word repeated, and which."""
    cdef uint64_t last
    memcpy(word, block, sizeof(uint64_t))
    memcpy(&last, block + BLOCK_SIZE - sizeof(uint64_t), sizeof(uint64_t))
    # Most blocks differ here already: the kernel found that the last word differs more often than the second.
    if word[0] != last:
        return False
    return memcmp(block, block + sizeof(uint64_t), BLOCK_SIZE - sizeof(uint64_t)) == 0


cdef void fill(char *block, uint64_t word) noexcept nogil:
    cdef uint32_t i
    if word == 0:
        memset(block, 0, BLOCK_SIZE)
        return
    for i in range(0, BLOCK_SIZE, 8):
        memcpy(block + i, &word, sizeof(uint64_t))


cdef uint32_t state_size(const codec *how) noexcept nogil:
    """Bytes that a codec works in, at a place for 64-byte words."""
    if how.name == USE_LZ4HC:
        return <uint32_t>LZ4_sizeofStateHC()
    if how.name == USE_ZSTD:
        return encoder_bytes(how.level)
    return <uint32_t>LZ4_sizeofState() if how.name == USE_LZ4 else 0


cdef bint state_prepare(const codec *how, void *state) noexcept nogil:
    """Make a state of state_size bytes ready; False: the library refuses. One thread at a time may use it."""
    if how.name == USE_LZ4HC:
        return LZ4_initStreamHC(state, LZ4_sizeofStateHC()) != NULL
    if how.name == USE_ZSTD:
        return encoder_make(state, encoder_bytes(how.level), how.level) == state
    return True


cdef uint32_t encode(const codec *how, const char *block, char *out, uint32_t limit, void *state) noexcept nogil:
    """Compress a block into out, which has room for limit bytes; the bytes used, or 0: store it raw.

    lz4 stops as soon as the limit is passed, which makes incompressible blocks cheap.
    """
    if how.name == USE_LZ4:
        return <uint32_t>LZ4_compress_fast_extState(state, block, out, BLOCK_SIZE, <int>limit, how.level)
    if how.name == USE_ZSTD:
        return frame_encode(<ZSTD_CCtx *>state, block, out, limit)
    if how.name == USE_LZ4HC:
        # Not all 256 KiB of its tables are cleared for each block, as LZ4_compress_HC_extStateHC does.
        LZ4_resetStreamHC_fast(<LZ4_streamHC_t *>state, how.level)
        return <uint32_t>LZ4_compress_HC_continue(<LZ4_streamHC_t *>state, block, out, BLOCK_SIZE, <int>limit)
    return 0


cdef int decode(const char *payload, uint32_t size, char *block) noexcept nogil:
    """Decompress a payload of lz4's format, or copy a raw one; 0 or -EIO."""
    if size == BLOCK_SIZE:
        memcpy(block, payload, BLOCK_SIZE)
        return 0
    return 0 if LZ4_decompress_safe(payload, block, <int>size, BLOCK_SIZE) == BLOCK_SIZE else -EIO


def compress(block, uint32_t limit=BLOCK_SIZE - 1, str name="lz4", int level=0):
    """What the device stores of a block (a buffer of 4096 bytes): an int, the word it repeats, or bytes.

    bytes of 4096 are the block itself: the codec did not bring it down to limit bytes. Raises ValueError for a limit of a
    block or more, a buffer of another size, and a codec or level that is none; MemoryError.
    """
    cdef Py_buffer view
    cdef uint64_t word
    cdef uint32_t size
    cdef char out[BLOCK_SIZE]
    cdef codec how = codec_of(name, level)
    cdef void *state
    if limit >= BLOCK_SIZE:
        raise ValueError(f"limit {limit} is out of range: at most {BLOCK_SIZE - 1} bytes")
    PyObject_GetBuffer(block, &view, PyBUF_SIMPLE)
    state = secret_alloc(state_size(&how))
    try:
        if state == NULL or not state_prepare(&how, state):
            raise MemoryError(f"no memory for {name}")
        if view.len != BLOCK_SIZE:
            raise ValueError(f"a block has {BLOCK_SIZE} bytes, not {view.len}")
        if same_filled(<const char *>view.buf, &word):
            return word
        size = encode(&how, <const char *>view.buf, out, limit, state)
        if size == 0:
            return PyBytes_FromStringAndSize(<const char *>view.buf, BLOCK_SIZE)
        return PyBytes_FromStringAndSize(out, size)
    finally:
        secret_free(state, state_size(&how))
        PyBuffer_Release(&view)


def decompress(payload, str name="lz4"):
    """The block of what compress returned for the codec of that name. Raises CorruptObjectError, MemoryError."""
    cdef Py_buffer view
    cdef char block[BLOCK_SIZE]
    cdef int rc = -EIO
    cdef void *state = NULL
    if isinstance(payload, int):
        fill(block, payload)
        return PyBytes_FromStringAndSize(block, BLOCK_SIZE)
    PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
    try:
        if name == "zstd" and 0 < view.len < BLOCK_SIZE:
            state = secret_alloc(decoder_bytes())
            if state == NULL:
                raise MemoryError(f"no memory for {name}")
            rc = frame_decode(decoder_make(state, decoder_bytes()), <const char *>view.buf, <uint32_t>view.len, block)
        elif 0 < view.len <= BLOCK_SIZE:
            rc = decode(<const char *>view.buf, <uint32_t>view.len, block)
    finally:
        secret_free(state, decoder_bytes())
        PyBuffer_Release(&view)
    if rc:
        raise error_from(rc, f"payload of {len(payload)} bytes")
    return PyBytes_FromStringAndSize(block, BLOCK_SIZE)
