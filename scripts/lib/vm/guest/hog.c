/* Grows until the kernel kills it, again and again, for so many seconds. */

#include "tool.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define LONGEST 120 /* seconds: what was not killed by then starts anew */

static void grow(uint64_t seed, volatile uint64_t *pages)
{
    unsigned char *place = NULL;
    set_oom_score(1000);
    for (uint64_t page = 0;; page++) {
        uint64_t at = page % (MIB / PAGE);
        if (!at)
            place = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (place == MAP_FAILED)
            _exit(1);
        page_content((uint64_t *)(place + at * PAGE), seed, page, 1);
        *pages = page + 1;
    }
}

int hog_main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    double end = now() + number(argv[0]);
    uint64_t seed = number(argv[1]), largest = 0;
    unsigned started = 0, killed = 0;
    /* Shared with the child, and locked, so that it is not paged itself. */
    volatile uint64_t *pages = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mlock((void *)pages, PAGE))
        die("memory");
    while (now() < end) {
        double stop = now() + LONGEST < end ? now() + LONGEST : end;
        int status;
        pid_t child = fork();
        if (child < 0) {
            sleep(1);
            continue;
        }
        if (!child)
            grow(seed + started, pages);
        started++;
        while (!waitpid(child, &status, WNOHANG)) {
            if (now() > stop)
                kill(child, SIGUSR1); /* not SIGKILL: that is how the kernel's killing is known */
            usleep(50000);
        }
        killed += WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
        largest = *pages > largest ? *pages : largest;
    }
    printf("{\"started\": %u, \"killed\": %u, \"largest_mib\": %lu}\n", started, killed, largest / (MIB / PAGE));
    return 0;
}
