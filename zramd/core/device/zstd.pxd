cdef extern from * nogil:
    # Contexts in memory of the caller, and frames without the four bytes that all begin with, are what the library calls
    # experimental: so it is linked statically.
    """
    #define ZSTD_STATIC_LINKING_ONLY
    #include <zstd.h>
    #include <zstd_errors.h>
    """
    ctypedef struct ZSTD_CCtx:
        pass
    ctypedef struct ZSTD_DCtx:
        pass
    ctypedef struct ZSTD_compressionParameters:
        unsigned windowLog
        unsigned chainLog
        unsigned hashLog
        unsigned searchLog
        unsigned minMatch
        unsigned targetLength
        int strategy
    enum:
        ZSTD_c_windowLog
        ZSTD_c_hashLog
        ZSTD_c_chainLog
        ZSTD_c_searchLog
        ZSTD_c_minMatch
        ZSTD_c_targetLength
        ZSTD_c_strategy
        ZSTD_c_contentSizeFlag
        ZSTD_c_checksumFlag
        ZSTD_c_format
        ZSTD_d_format
        ZSTD_f_zstd1_magicless
    const char *ZSTD_versionString()
    int ZSTD_maxCLevel()
    int ZSTD_minCLevel()
    ZSTD_compressionParameters ZSTD_getCParams(int level, unsigned long long size, size_t dictionary)
    size_t ZSTD_estimateCCtxSize_usingCParams(ZSTD_compressionParameters parameters)
    size_t ZSTD_estimateDCtxSize()
    ZSTD_CCtx *ZSTD_initStaticCCtx(void *place, size_t size)
    ZSTD_DCtx *ZSTD_initStaticDCtx(void *place, size_t size)
    size_t ZSTD_CCtx_setParameter(ZSTD_CCtx *context, int parameter, int value)
    size_t ZSTD_DCtx_setParameter(ZSTD_DCtx *context, int parameter, int value)
    size_t ZSTD_compress2(ZSTD_CCtx *context, void *dst, size_t capacity, const void *src, size_t size)
    size_t ZSTD_decompressDCtx(ZSTD_DCtx *context, void *dst, size_t capacity, const void *src, size_t size)
    unsigned ZSTD_isError(size_t code)
