/* Programs that come and go, beside others that stay. Their memory is verified as it is used, and each page fault
   that reads from swap is timed. It reads one phase a line and answers each with a line, which says what was done
   since the last such line (but for `clusters`):

     daemons COUNT MIB   so many programs begin that stay until the end
     programs COUNT MIB  so many programs run from now on, each for 10 to 40 s and of MIB to 4 MIB; 0 ends all
     run SECONDS         answers after so many seconds
     clusters SLOTS      says how the swap slots that processes hold lie in clusters of so many slots
     quit                ends all */

#include "tool.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST 64     /* programs at a time */
#define LONGEST_RUN 16
#define BUCKETS 512 /* of times: eight to each power of two of nanoseconds */
#define AREAS 32
#define MAX_CLUSTERS (1u << 16)

/* What all processes count in; each field by atomic additions. */
struct tally {
    uint64_t written, verified, bad, lost, killed, faults; /* lost: swap did not give a page back */
    uint64_t took[BUCKETS];                                /* the faults, by their time */
};

static struct tally *tally;

static void count(uint64_t *number, uint64_t by)
{
    __atomic_fetch_add(number, by, __ATOMIC_RELAXED);
}

static uint64_t take(uint64_t *number)
{
    return __atomic_exchange_n(number, 0, __ATOMIC_RELAXED);
}

static uint64_t swapped_in(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_majflt;
}

/* Read the first word of a page, and note the time if that was a page fault that read from swap. */
static void touch(const volatile uint64_t *page)
{
    uint64_t before = swapped_in();
    double started = now();
    (void)*page;
    uint64_t nanoseconds = (now() - started) * 1e9;
    if (swapped_in() == before)
        return;
    nanoseconds = nanoseconds < 8 ? 8 : nanoseconds;
    unsigned exponent = 63 - __builtin_clzll(nanoseconds);
    count(&tally->took[exponent * 8 + (nanoseconds >> (exponent - 3) & 7)], 1);
    count(&tally->faults, 1);
}

static void lost(int signal)
{
    (void)signal;
    count(&tally->lost, 1);
    _exit(3);
}

/* One program: it writes all of its memory, then works on it, mostly on a fifth of it that moves on slowly.
   `seconds`: how long it lives once all is written, so that a slow machine has as much in memory as a fast one;
   0: it stays. `pause`: microseconds between two runs of pages. */
static void live(uint64_t seed, uint64_t pages, double seconds, unsigned pause)
{
    uint64_t random = mix(seed) | 1, wanted[PAGE / 8];
    unsigned char *start = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *versions = calloc(pages, sizeof *versions);
    if (start == MAP_FAILED || !versions || mlock(versions, pages * sizeof *versions))
        _exit(1);
    madvise(start, pages * PAGE, MADV_NOHUGEPAGE);
    signal(SIGBUS, lost);
    for (uint64_t page = 0; page < pages; page++) {
        page_content((uint64_t *)(start + page * PAGE), seed, page, 0);
        count(&tally->written, 1);
        if (page % 64 == 63)
            usleep(2000); /* so that those that begin together lie mixed, as real ones do */
    }
    double end = now() + seconds;
    for (uint64_t round = 0; !seconds || now() < end; round++) {
        uint64_t hot = pages / 5, r = next_random(&random);
        uint64_t page = (r >> 16) % 100 < 95 ? (round / 64 + (r >> 24) % hot) % pages : (r >> 24) % pages;
        int writes = (r >> 8) % 100 < 30;
        for (uint64_t end = page + 1 + r % LONGEST_RUN; page < end && page < pages; page++) {
            uint64_t *place = (uint64_t *)(start + page * PAGE);
            touch(place);
            page_content(wanted, seed, page, versions[page]);
            count(&tally->verified, 1);
            if (memcmp(wanted, place, PAGE))
                count(&tally->bad, 1);
            if (writes) {
                page_content(place, seed, page, ++versions[page]);
                count(&tally->written, 1);
            }
        }
        usleep(pause);
    }
    _exit(0);
}

static pid_t start_one(uint64_t seed, uint64_t pages, double seconds, unsigned pause)
{
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    if (!pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        set_oom_score(500);
        live(seed, pages, seconds, pause);
    }
    return pid;
}

static void end_one(pid_t *program)
{
    kill(*program, SIGKILL);
    waitpid(*program, NULL, 0);
    *program = 0;
}

/* See to the processes that have ended by themselves: the kernel kills some when memory is out. */
static void reap(pid_t *programs)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
            count(&tally->killed, 1);
        for (unsigned i = 0; i < MOST; i++)
            if (programs[i] == pid)
                programs[i] = 0;
    }
}

/* ---- Where swapped pages lie -------------------------------------------------------------------------------- */

/* Live slots of each cluster of each swap area. Bit 62 of an entry of /proc/PID/pagemap: swapped; bits 0 to 4:
   the area; bits 5 to 54: the slot. */
static uint16_t *lives[AREAS];
static uint64_t slots_per_cluster;

static void add_mapping(int pagemap, uint64_t from, uint64_t to)
{
    uint64_t entries[512];
    for (uint64_t page = from / PAGE; page < to / PAGE;) {
        uint64_t want = to / PAGE - page < 512 ? to / PAGE - page : 512;
        ssize_t got = pread(pagemap, entries, want * 8, page * 8);
        if (got <= 0)
            return;
        for (ssize_t i = 0; i < got / 8; i++)
            if (entries[i] >> 62 & 1) {
                unsigned area = entries[i] & 31;
                uint64_t cluster = (entries[i] >> 5 & ((1ull << 50) - 1)) / slots_per_cluster;
                if (!lives[area])
                    lives[area] = calloc(MAX_CLUSTERS, sizeof **lives);
                if (lives[area] && cluster < MAX_CLUSTERS)
                    lives[area][cluster]++;
            }
        page += got / 8;
    }
}

static void add_process(const char *pid)
{
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%.16s/pagemap", pid);
    int pagemap = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/proc/%.16s/maps", pid);
    FILE *maps = fopen(path, "re");
    unsigned long from, to;
    while (maps && pagemap >= 0 && fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx", &from, &to) == 2 && !strstr(line, "[vsyscall]"))
            add_mapping(pagemap, from, to);
    if (maps)
        fclose(maps);
    if (pagemap >= 0)
        close(pagemap);
}

/* How many clusters have at least one live slot, and how full these are: ten bins of a tenth each. */
static void say_clusters(void)
{
    struct dirent *entry;
    DIR *processes = opendir("/proc");
    while (processes && (entry = readdir(processes)))
        if (isdigit(*entry->d_name))
            add_process(entry->d_name);
    if (processes)
        closedir(processes);
    uint64_t used = 0, slots = 0, bins[10] = {0};
    for (unsigned area = 0; area < AREAS; area++)
        for (uint64_t i = 0; lives[area] && i < MAX_CLUSTERS; i++)
            if (lives[area][i]) {
                used++;
                slots += lives[area][i];
                uint64_t bin = (lives[area][i] - 1) * 10 / slots_per_cluster;
                bins[bin < 10 ? bin : 9]++;
            }
    for (unsigned area = 0; area < AREAS; area++) {
        free(lives[area]);
        lives[area] = NULL;
    }
    printf("{\"clusters\": %lu, \"slots\": %lu, \"tenths\": [", used, slots);
    for (int i = 0; i < 10; i++)
        printf("%s%lu", i ? ", " : "", bins[i]);
    printf("]}\n");
    fflush(stdout);
}

/* ---- The phases --------------------------------------------------------------------------------------------- */

static void answer(void)
{
    printf("{\"written\": %lu, \"verified\": %lu, ", take(&tally->written), take(&tally->verified));
    printf("\"bad\": %lu, \"lost\": %lu, ", take(&tally->bad), take(&tally->lost));
    printf("\"killed\": %lu, \"faults\": %lu, \"took\": {", take(&tally->killed), take(&tally->faults));
    const char *comma = "";
    for (unsigned i = 0; i < BUCKETS; i++) {
        uint64_t faults = take(&tally->took[i]);
        if (faults) {
            printf("%s\"%u\": %lu", comma, i, faults);
            comma = ", ";
        }
    }
    printf("}}\n");
    fflush(stdout);
}

int churn_main(int argc, char **argv)
{
    pid_t programs[MOST] = {0};
    unsigned wanted = 0;
    uint64_t least = MIB / PAGE, started = 0;
    char line[128];
    if (argc != 1)
        return 2;
    uint64_t seed = number(argv[0]), random = mix(seed) | 1;
    tally = mmap(NULL, sizeof *tally, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (tally == MAP_FAILED || mlockall(MCL_CURRENT))
        die("memory");
    set_oom_score(-900);
    setvbuf(stdin, NULL, _IONBF, 0); /* or poll would not see what has been read ahead */
    double until = 0; /* of the phase `run` */
    answer();
    for (;;) {
        reap(programs);
        for (unsigned i = 0; i < MOST; i++)
            if (i >= wanted && programs[i]) {
                end_one(programs + i);
            } else if (i < wanted && !programs[i]) {
                uint64_t r = next_random(&random), pages = least + (r >> 16) % (3 * least);
                programs[i] = start_one(seed + ++started, pages, 10 + r % 3000 / 100.0, 10000);
            }
        if (until && now() > until) {
            until = 0;
            answer();
        }
        struct pollfd input = {0, POLLIN, 0};
        if (poll(&input, 1, 100) <= 0)
            continue;
        unsigned long a = 0, b = 0;
        if (!fgets(line, sizeof line, stdin) || !strncmp(line, "quit", 4))
            return 0;
        if (sscanf(line, "daemons %lu %lu", &a, &b) == 2) {
            for (unsigned long i = 0; i < a; i++)
                start_one(seed + (1u << 20) + i, b * (MIB / PAGE), 0, 50000);
            answer();
        } else if (sscanf(line, "programs %lu %lu", &a, &b) == 2 && a <= MOST) {
            wanted = a;
            least = b * (MIB / PAGE);
            answer();
        } else if (sscanf(line, "run %lu", &a) == 1) {
            until = now() + a;
        } else if (sscanf(line, "clusters %lu", &a) == 1 && a) {
            slots_per_cluster = a;
            say_clusters();
        } else {
            printf("{\"error\": \"unknown phase\"}\n");
            fflush(stdout);
        }
    }
}
