"""The codec: a block of 4096 bytes is one word repeated, or an lz4 block, or raw.

The three are those of the kernel's zram (drivers/block/zram), whose word for the first is same-filled. What is compressed
has the block format of lz4, by the library lz4 itself.
Everything works in memory of the caller; the lz4 state is the caller's too (16 KiB, needs no preparation).
"""

from libc.errno cimport EIO
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc

from zramd.core.device.lz4 cimport (
    LZ4_compress_fast_extState,
    LZ4_decompress_safe,
    LZ4_sizeofState,
    LZ4_versionString,
)
from zramd.core.types cimport BLOCK_SIZE

from zramd.errors import error_from

LZ4_VERSION = LZ4_versionString().decode()


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


cdef uint32_t encode(const char *block, char *out, uint32_t limit, void *state, int acceleration) noexcept nogil:
    """Compress a block into out, which has room for limit bytes; the bytes used, or 0: store it raw.

    lz4 stops as soon as the limit is passed, which makes incompressible blocks cheap.
    """
    return <uint32_t>LZ4_compress_fast_extState(state, block, out, BLOCK_SIZE, <int>limit, acceleration)


cdef int decode(const char *payload, uint32_t size, char *block) noexcept nogil:
    """Decompress a payload, or copy a raw one; 0 or -EIO."""
    if size == BLOCK_SIZE:
        memcpy(block, payload, BLOCK_SIZE)
        return 0
    return 0 if LZ4_decompress_safe(payload, block, <int>size, BLOCK_SIZE) == BLOCK_SIZE else -EIO


cdef uint32_t state_size() noexcept nogil:
    return <uint32_t>LZ4_sizeofState()


def compress(block, uint32_t limit=BLOCK_SIZE - 1, int acceleration=1):
    """What the device stores of a block (a buffer of 4096 bytes): an int, the word it repeats, or bytes.

    bytes of 4096 are the block itself: lz4 did not bring it down to limit bytes. Raises ValueError for a limit of a block
    or more, and for a buffer of another size, MemoryError.
    """
    cdef Py_buffer view
    cdef uint64_t word
    cdef uint32_t size
    cdef char out[BLOCK_SIZE]
    cdef void *state
    if limit >= BLOCK_SIZE:
        raise ValueError(f"limit {limit} is out of range: at most {BLOCK_SIZE - 1} bytes")
    PyObject_GetBuffer(block, &view, PyBUF_SIMPLE)
    state = PyMem_Malloc(state_size())
    try:
        if state == NULL:
            raise MemoryError("no memory for lz4")
        if view.len != BLOCK_SIZE:
            raise ValueError(f"a block has {BLOCK_SIZE} bytes, not {view.len}")
        if same_filled(<const char *>view.buf, &word):
            return word
        size = encode(<const char *>view.buf, out, limit, state, acceleration)
        if size == 0:
            return PyBytes_FromStringAndSize(<const char *>view.buf, BLOCK_SIZE)
        return PyBytes_FromStringAndSize(out, size)
    finally:
        PyMem_Free(state)
        PyBuffer_Release(&view)


def decompress(payload):
    """The block of what compress returned. Raises CorruptObjectError."""
    cdef Py_buffer view
    cdef char block[BLOCK_SIZE]
    cdef int rc
    if isinstance(payload, int):
        fill(block, payload)
        return PyBytes_FromStringAndSize(block, BLOCK_SIZE)
    PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
    rc = -EIO
    if 0 < view.len <= BLOCK_SIZE:
        rc = decode(<const char *>view.buf, <uint32_t>view.len, block)
    PyBuffer_Release(&view)
    if rc:
        raise error_from(rc, f"payload of {len(payload)} bytes")
    return PyBytes_FromStringAndSize(block, BLOCK_SIZE)
