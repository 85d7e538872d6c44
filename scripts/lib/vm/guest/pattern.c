/* The workload: anonymous memory whose every page is known. It reads one phase a line and answers each with a
   line: fill (writes every page that holds nothing), churn pages|seconds N, free PERCENT, pageout (all of it to
   swap), verify, pace N (the phases that follow touch at most so many pages a second; 0: any number), quit. */

#include "tool.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define STRETCH 512 /* pages that are given back together: 2 MiB, as malloc and garbage collectors do */
#define LONGEST_RUN 32

struct memory {
    unsigned char *start;
    uint32_t *versions; /* of each page: how often it was written */
    unsigned char *live; /* of each page: whether it holds something */
    uint64_t pages, seed, random;
    unsigned long pace; /* pages a second, 0: as many as it can */
    double due; /* when the next page may be touched */
};

struct tally {
    uint64_t written, verified, freed, bad;
    uint64_t first_bad, first_byte; /* number of the page, place in it */
    double slowest, busy; /* seconds that the slowest page took, and all together */
};

static void took(struct tally *tally, double started)
{
    double seconds = now() - started;
    tally->busy += seconds;
    if (seconds > tally->slowest)
        tally->slowest = seconds;
}

/* Wait until another page may be touched. What was late is not made up for: that would be faster than the pace. */
static void keep_pace(struct memory *memory)
{
    double time = now();
    if (!memory->pace)
        return;
    memory->due = (memory->due > time - 0.05 ? memory->due : time - 0.05) + 1.0 / memory->pace;
    if (memory->due > time + 0.01)
        usleep((memory->due - time) * 1e6);
}

static void write_page(struct memory *memory, uint64_t page, struct tally *tally)
{
    double started = now();
    memory->versions[page]++;
    memory->live[page] = 1;
    page_content((uint64_t *)(memory->start + page * PAGE), memory->seed, page, memory->versions[page]);
    took(tally, started);
    tally->written++;
    keep_pace(memory);
}

static void verify_page(struct memory *memory, uint64_t page, struct tally *tally)
{
    static uint64_t wanted[PAGE / 8];
    const unsigned char *found = memory->start + page * PAGE;
    page_content(wanted, memory->seed, page, memory->versions[page]);
    tally->verified++;
    double started = now();
    int same = !memcmp(wanted, found, PAGE);
    took(tally, started);
    keep_pace(memory);
    if (same)
        return;
    if (!tally->bad++) {
        tally->first_bad = page;
        while (((unsigned char *)wanted)[tally->first_byte] == found[tally->first_byte])
            tally->first_byte++;
    }
}

static void fill(struct memory *memory, struct tally *tally)
{
    for (uint64_t page = 0; page < memory->pages; page++)
        if (!memory->live[page])
            write_page(memory, page, tally);
}

static void verify(struct memory *memory, struct tally *tally)
{
    for (uint64_t page = 0; page < memory->pages; page++)
        if (memory->live[page])
            verify_page(memory, page, tally);
}

/* Random runs of pages are written again, or verified, until so many pages or seconds are done. */
static void churn(struct memory *memory, struct tally *tally, uint64_t pages, double seconds)
{
    double end = now() + seconds;
    while (tally->written + tally->verified < pages && now() < end) {
        uint64_t random = next_random(&memory->random);
        uint64_t page = (random >> 16) % memory->pages;
        uint64_t stop = page + 1 + random % LONGEST_RUN;
        int writes = (random >> 8) % 100 < 60;
        for (; page < stop && page < memory->pages; page++)
            if (memory->live[page]) {
                if (writes)
                    write_page(memory, page, tally);
                else
                    verify_page(memory, page, tally);
            }
    }
}

static void give_back(struct memory *memory, struct tally *tally, unsigned percent)
{
    for (uint64_t page = 0; page < memory->pages; page += STRETCH) {
        uint64_t count = memory->pages - page < STRETCH ? memory->pages - page : STRETCH;
        if (next_random(&memory->random) % 100 >= percent)
            continue;
        if (madvise(memory->start + page * PAGE, count * PAGE, MADV_DONTNEED))
            die("madvise");
        for (uint64_t i = 0; i < count; i++)
            tally->freed += memory->live[page + i];
        memset(memory->live + page, 0, count);
    }
}

static void page_out(struct memory *memory)
{
    if (madvise(memory->start, memory->pages * PAGE, MADV_PAGEOUT))
        die("madvise");
}

static uint64_t count_live(const struct memory *memory)
{
    uint64_t live = 0;
    for (uint64_t page = 0; page < memory->pages; page++)
        live += memory->live[page];
    return live;
}

static void answer(const char *phase, const struct memory *memory, const struct tally *tally, double seconds)
{
    printf("{\"phase\": \"%s\", \"pages\": %lu, \"live\": %lu, \"written\": %lu, \"verified\": %lu, \"freed\": %lu, "
           "\"bad\": %lu, \"first_bad\": %lu, \"first_byte\": %lu, \"slowest\": %.3f, \"busy\": %.3f, \"seconds\": %.3f}\n",
           phase, memory->pages, count_live(memory), tally->written, tally->verified, tally->freed, tally->bad,
           tally->first_bad, tally->first_byte, tally->slowest, tally->busy, seconds);
    fflush(stdout);
}

/* Do one line; returns 0 if it is not understood. */
static int do_phase(struct memory *memory, const char *line)
{
    struct tally tally = {0};
    char phase[16] = "", unit[16] = "";
    unsigned long count = 0;
    double started = now();

    if (sscanf(line, "churn %15s %lu", unit, &count) == 2)
        churn(memory, &tally, *unit == 'p' ? count : UINT64_MAX, *unit == 's' ? count : 1e9);
    else if (sscanf(line, "free %lu", &count) == 1)
        give_back(memory, &tally, count);
    else if (sscanf(line, "pace %lu", &count) == 1)
        memory->pace = count;
    else if (!strncmp(line, "fill", 4))
        fill(memory, &tally);
    else if (!strncmp(line, "pageout", 7))
        page_out(memory);
    else if (!strncmp(line, "verify", 6))
        verify(memory, &tally);
    else
        return 0;
    sscanf(line, "%15s", phase);
    answer(phase, memory, &tally, now() - started);
    return 1;
}

/* The kernel could not read a page back from swap. */
static void lost(int signal)
{
    static const char text[] = "{\"error\": \"a page could not be read back (SIGBUS)\"}\n";
    (void)signal;
    if (write(1, text, sizeof text - 1) < 0)
        _exit(4);
    _exit(3);
}

int pattern_main(int argc, char **argv)
{
    char line[128];
    struct memory memory = {0};
    if (argc != 2 && argc != 3)
        return 2;
    if (argc == 3)
        page_source(argv[2]);
    memory.pages = number(argv[0]) * (MIB / PAGE);
    memory.seed = number(argv[1]);
    memory.random = mix(memory.seed) | 1;
    memory.start = mmap(NULL, memory.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memory.versions = calloc(memory.pages, sizeof *memory.versions);
    memory.live = calloc(memory.pages, 1);
    if (memory.start == MAP_FAILED || !memory.versions || !memory.live)
        die("memory");
    /* Huge pages would hide the size of what is swapped. */
    madvise(memory.start, memory.pages * PAGE, MADV_NOHUGEPAGE);
    if (mlock(memory.versions, memory.pages * sizeof *memory.versions) || mlock(memory.live, memory.pages))
        die("mlock");
    set_oom_score(-900);
    signal(SIGBUS, lost);
    printf("{\"phase\": \"start\", \"pages\": %lu}\n", memory.pages);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) && strncmp(line, "quit", 4))
        if (!do_phase(&memory, line)) {
            printf("{\"error\": \"unknown phase\"}\n");
            fflush(stdout);
        }
    return 0;
}
