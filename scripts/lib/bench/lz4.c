/* What lz4 alone takes for the blocks of a file: the mark that zramd's in-process figures are held against.
 *
 *     bench_lz4 FILE LIMIT
 *
 * First prints "version blocks stored_bytes raw_blocks". Then answers each line "compress THREADS PASSES" or
 * "decompress THREADS PASSES" on its input with the nanoseconds that it took; ends with its input.
 *
 * compress    LZ4_compress_fast of each block with room for the worst case; the output is not kept.
 * decompress  LZ4_decompress_safe of each block into 128 KiB of output that is used over and over. A block
 *             that lz4 does not bring down to LIMIT bytes is raw, as it is in zramd: it is copied.
 */
#include <lz4.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BLOCK = 4096, REQUEST = 128 << 10, MAX_THREADS = 64 };

static char *blocks;
static char *payloads;
static size_t *at; /* at[i]: where block i's payload starts; at[count]: the end of the last */
static size_t count;

struct work {
    pthread_t thread;
    int decompress;
    int passes;
    size_t from, to;
    size_t result; /* used, so that no compiler leaves the work out */
};

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory)
        fail("malloc");
    return memory;
}

static void decompress(size_t i, char *to) {
    size_t size = at[i + 1] - at[i];
    if (size == BLOCK)
        memcpy(to, payloads + at[i], BLOCK);
    else if (LZ4_decompress_safe(payloads + at[i], to, (int)size, BLOCK) != BLOCK)
        fail("LZ4_decompress_safe");
}

static void *run(void *argument) {
    struct work *work = argument;
    char *out = allocate(REQUEST);
    for (int pass = 0; pass < work->passes; pass++)
        for (size_t i = work->from; i < work->to; i++) {
            if (work->decompress)
                decompress(i, out + i * BLOCK % REQUEST);
            else
                work->result += (size_t)LZ4_compress_fast(blocks + i * BLOCK, out, BLOCK, REQUEST, 1);
        }
    work->result += (unsigned char)out[0];
    free(out);
    return NULL;
}

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void load(const char *name) {
    FILE *file = fopen(name, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        fail(name);
    count = (size_t)ftell(file) / BLOCK;
    rewind(file);
    blocks = allocate(count * BLOCK);
    if (fread(blocks, BLOCK, count, file) != count)
        fail(name);
    fclose(file);
}

static size_t store(size_t limit) {
    char out[LZ4_COMPRESSBOUND(BLOCK)];
    size_t raw = 0, end = 0;
    payloads = allocate(count * BLOCK);
    at = allocate((count + 1) * sizeof *at);
    for (size_t i = 0; i < count; i++) {
        size_t size = (size_t)LZ4_compress_fast(blocks + i * BLOCK, out, BLOCK, sizeof out, 1);
        at[i] = end;
        if (size > limit) {
            raw++;
            size = BLOCK;
            memcpy(payloads + end, blocks + i * BLOCK, size);
        } else
            memcpy(payloads + end, out, size);
        end += size;
    }
    at[count] = end;
    return raw;
}

int main(int argc, char **argv) {
    char name[16];
    int threads, passes;
    if (argc != 3)
        return 2;
    load(argv[1]);
    size_t raw = store(strtoul(argv[2], NULL, 10));
    printf("%s %zu %zu %zu\n", LZ4_versionString(), count, at[count], raw);
    fflush(stdout);
    while (scanf("%15s %d %d", name, &threads, &passes) == 3) {
        struct work work[MAX_THREADS] = {0};
        if (threads < 1 || threads > MAX_THREADS)
            return 2;
        long long start = now();
        for (int t = 0; t < threads; t++) {
            work[t].decompress = !strcmp(name, "decompress");
            work[t].passes = passes;
            work[t].from = count * (size_t)t / (size_t)threads;
            work[t].to = count * (size_t)(t + 1) / (size_t)threads;
            if (pthread_create(&work[t].thread, NULL, run, &work[t]))
                fail("pthread_create");
        }
        for (int t = 0; t < threads; t++)
            pthread_join(work[t].thread, NULL);
        printf("%lld\n", now() - start);
        fflush(stdout);
    }
    return 0;
}
