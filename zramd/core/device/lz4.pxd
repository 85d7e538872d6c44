cdef extern from "<lz4.h>" nogil:
    int LZ4_VERSION_NUMBER
    const char *LZ4_versionString()
    int LZ4_sizeofState()
    int LZ4_compress_fast_extState(void *state, const char *src, char *dst, int src_size, int dst_capacity, int acceleration)
    int LZ4_decompress_safe(const char *src, char *dst, int src_size, int dst_capacity)
