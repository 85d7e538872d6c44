/* What a dictionary would bring cold blocks, and what a read would cost that finds it in no cache.

   usage: dictionary PAGES LEVEL KIB

   Trains a dictionary of so many KiB (0: none) from one half of the pages, which are in no order, and compresses those
   of the other half one by one. Prints the payload bytes of each, then a line with the µs of compressing one, and of
   decompressing one: mean, and median and 90 and 99 percent of reads after the caches were filled with other data. */

#define ZSTD_STATIC_LINKING_ONLY
#include <zdict.h>
#include <zstd.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PAGE 4096
#define CACHE (48 << 20) /* bytes that are read to fill all caches */
#define COLD_READS 2000
#define SAMPLES 100 /* bytes of pages for each byte of a dictionary, as zstd's manual says */

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static size_t check(size_t code)
{
    if (ZSTD_isError(code)) {
        fprintf(stderr, "%s\n", ZSTD_getErrorName(code));
        exit(1);
    }
    return code;
}

/* Read what no one else reads, so that nothing else is in a cache. */
static unsigned long forget(const char *other)
{
    unsigned long sum = 0;
    for (size_t i = 0; i < CACHE; i += 64)
        sum += other[i];
    return sum;
}

int main(int argc, char **argv)
{
    FILE *file = argc == 4 ? fopen(argv[1], "rb") : NULL;
    if (!file || fseek(file, 0, SEEK_END))
        return 2;
    size_t pages = ftell(file) / PAGE, half = pages / 2;
    char *data = malloc(pages * PAGE), *other = malloc(CACHE), block[PAGE];
    rewind(file);
    if (!data || !other || fread(data, PAGE, pages, file) != pages)
        return 1;
    memset(other, 1, CACHE);

    int level = atoi(argv[2]);
    size_t wanted = atoi(argv[3]) * 1024, size = 0;
    char *dictionary = malloc(wanted + 1);
    if (wanted) {
        size_t count = wanted * SAMPLES / PAGE < half ? wanted * SAMPLES / PAGE : half;
        size_t *sizes = malloc(count * sizeof *sizes);
        for (size_t i = 0; i < count; i++)
            sizes[i] = PAGE;
        size = check(ZDICT_trainFromBuffer(dictionary, wanted, data, sizes, count));
    }

    ZSTD_CCtx *encoder = ZSTD_createCCtx();
    ZSTD_DCtx *decoder = ZSTD_createDCtx();
    ZSTD_compressionParameters best = ZSTD_getCParams(level, PAGE, size);
    check(ZSTD_CCtx_setParameter(encoder, ZSTD_c_format, ZSTD_f_zstd1_magicless));
    check(ZSTD_DCtx_setParameter(decoder, ZSTD_d_format, ZSTD_f_zstd1_magicless));
    check(ZSTD_CCtx_setParameter(encoder, ZSTD_c_contentSizeFlag, 0));
    check(ZSTD_CCtx_setParameter(encoder, ZSTD_c_dictIDFlag, 0));
    if (size) {
        check(ZSTD_CCtx_refCDict(encoder, ZSTD_createCDict_advanced(dictionary, size, ZSTD_dlm_byRef, ZSTD_dct_auto, best,
                                                                   ZSTD_defaultCMem)));
        check(ZSTD_DCtx_refDDict(decoder, ZSTD_createDDict(dictionary, size)));
    } else {
        const int settings[][2] = {
            {ZSTD_c_windowLog, best.windowLog},       {ZSTD_c_hashLog, best.hashLog},
            {ZSTD_c_chainLog, best.chainLog},         {ZSTD_c_searchLog, best.searchLog},
            {ZSTD_c_minMatch, best.minMatch},         {ZSTD_c_targetLength, best.targetLength},
            {ZSTD_c_strategy, (int)best.strategy},
        };
        for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
            check(ZSTD_CCtx_setParameter(encoder, settings[i][0], settings[i][1]));
    }

    size_t count = pages - half;
    char **payloads = malloc(count * sizeof *payloads), out[2 * PAGE];
    size_t *lengths = malloc(count * sizeof *lengths);
    double started = now(), compress, mean = 0, reads[COLD_READS];
    for (size_t i = 0; i < count; i++) {
        lengths[i] = check(ZSTD_compress2(encoder, out, sizeof out, data + (half + i) * PAGE, PAGE));
        payloads[i] = memcpy(malloc(lengths[i]), out, lengths[i]);
        printf("%zu\n", lengths[i]);
    }
    compress = (now() - started) / count;
    started = now();
    for (size_t i = 0; i < count; i++) {
        check(ZSTD_decompressDCtx(decoder, block, PAGE, payloads[i], lengths[i]));
        if (memcmp(block, data + (half + i) * PAGE, PAGE))
            return 1;
    }
    mean = (now() - started) / count;
    unsigned long sum = 0;
    for (size_t i = 0; i < COLD_READS; i++) {
        size_t which = i * 7919 % count;
        sum += forget(other);
        started = now();
        check(ZSTD_decompressDCtx(decoder, block, PAGE, payloads[which], lengths[which]));
        reads[i] = now() - started;
    }
    qsort(reads, COLD_READS, sizeof *reads, by_size);
    printf("%.1f %.1f %.1f %.1f %.1f\n", compress, mean, reads[COLD_READS / 2], reads[COLD_READS * 9 / 10],
           reads[COLD_READS * 99 / 100]);
    return sum == 0;
}
