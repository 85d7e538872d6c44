cdef extern from "<lz4.h>" nogil:
    int LZ4_VERSION_NUMBER
    const char *LZ4_versionString()
    int LZ4_sizeofState()
    int LZ4_compress_fast_extState(void *state, const char *src, char *dst, int src_size, int dst_capacity, int acceleration)
    int LZ4_decompress_safe(const char *src, char *dst, int src_size, int dst_capacity)

cdef extern from "<lz4hc.h>" nogil:
    ctypedef struct LZ4_streamHC_t:
        pass
    int LZ4_sizeofStateHC()
    LZ4_streamHC_t *LZ4_initStreamHC(void *place, size_t size)
    void LZ4_resetStreamHC_fast(LZ4_streamHC_t *stream, int level)
    int LZ4_compress_HC_continue(LZ4_streamHC_t *stream, const char *src, char *dst, int src_size, int dst_capacity)
