/* What stands in a page. The kinds look to lz4 like real memory: their sizes after compression are spread over
   nearly all size classes of the pool. */

#include "tool.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define WORDS (PAGE / 8)

static const uint64_t *source; /* pages to take, or NULL */
static uint64_t source_pages;

void page_source(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (size < PAGE)
        die(path);
    source_pages = size / PAGE;
    source = mmap(NULL, source_pages * PAGE, PROT_READ, MAP_SHARED, fd, 0);
    if (source == MAP_FAILED)
        die(path);
    close(fd);
}

/* Words of a vocabulary: the smaller it is, the more lz4 finds. */
static void text(uint64_t *out, uint64_t random)
{
    uint64_t mask = (8u << (random & 7)) - 1; /* 8 to 1024 different words */
    uint64_t salt = random >> 8;
    for (int i = 0; i < WORDS; i++)
        out[i] = 0x2020202020202020 | (mix(salt + (next_random(&random) & mask)) & 0x5f5f5f5f5f5f5f5f);
}

/* Addresses near to each other, some of them null. */
static void pointers(uint64_t *out, uint64_t random)
{
    uint64_t base = 0x00007f0000000000 | (random & 0xffff000000);
    unsigned nulls = random >> 56; /* of 256 */
    for (int i = 0; i < WORDS; i++) {
        uint64_t r = next_random(&random);
        out[i] = (r >> 56) < nulls ? 0 : base | (r & 0xfffff0);
    }
}

/* Records of 64 bytes: a type, a counter, flags, a pointer, zeros, sometimes a checksum. */
static void records(uint64_t *out, uint64_t random)
{
    uint64_t type = random >> 40, id = random & 0xffffff;
    unsigned sums = (random >> 24) & 0xff; /* of 256 */
    for (int i = 0; i < WORDS; i += 8) {
        uint64_t r = next_random(&random);
        out[i] = type;
        out[i + 1] = id++;
        out[i + 2] = r & 0x11;
        out[i + 3] = 0xffff888000000000 | (r & 0xffffc0);
        out[i + 4] = 0;
        out[i + 5] = (r >> 24) & 0xff;
        out[i + 6] = (r >> 56) < sums ? r : 0;
        out[i + 7] = 0;
    }
}

/* Bytes that cannot be compressed, and zeros after them. */
static void noise(uint64_t *out, uint64_t random, int words)
{
    for (int i = 0; i < words; i++)
        out[i] = next_random(&random);
    memset(out + words, 0, (WORDS - words) * 8);
}

void page_content(uint64_t *out, uint64_t seed, uint64_t page, uint64_t version)
{
    uint64_t random = mix(mix(seed ^ (page << 20)) + version) | 1;
    unsigned kind = mix(random) % 100;
    if (source) {
        memcpy(out, source + mix(random) % source_pages * WORDS, PAGE);
        out[0] = random; /* no two pages are equal */
        return;
    }
    if (kind < 6)
        noise(out, random, 0);
    else if (kind < 9)
        for (int i = 0; i < WORDS; i++)
            out[i] = random;
    else if (kind < 31)
        text(out, random);
    else if (kind < 50)
        pointers(out, random);
    else if (kind < 72)
        records(out, random);
    else if (kind < 96)
        noise(out, random, (random >> 20) % WORDS);
    else
        noise(out, random, WORDS);
}
