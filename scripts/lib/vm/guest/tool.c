/* The program inside the guest: writes and verifies memory, eats memory, tells how the guest does, asks zramd's
   control socket, loads a disk with requests, and has a server die. Static, so that it needs nothing else to be in memory. */

#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

uint64_t mix(uint64_t value)
{
    value += 0x9e3779b97f4a7c15;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
    value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
    return value ^ (value >> 31);
}

uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

long read_file(const char *path, char *buffer, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    size_t used = 0;
    while (used < size - 1) {
        ssize_t got = read(fd, buffer + used, size - 1 - used);
        if (got <= 0)
            break;
        used += got;
    }
    close(fd);
    buffer[used] = 0;
    return used;
}

void set_oom_score(int score)
{
    char text[16];
    int length = snprintf(text, sizeof text, "%d", score);
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, length) != length)
        die("/proc/self/oom_score_adj cannot be written");
    close(fd);
}

unsigned long number(const char *text)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (errno || end == text || *end || *text == '-') {
        fprintf(stderr, "'%s' is not a number\n", text);
        exit(2);
    }
    return value;
}

void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*main)(int, char **);
    } verbs[] = {
        {"pattern", pattern_main}, {"churn", churn_main}, {"hog", hog_main}, {"monitor", monitor_main},
        {"control", control_main}, {"load", load_main}, {"revive", revive_main}};

    for (size_t i = 0; argc > 1 && i < sizeof verbs / sizeof *verbs; i++)
        if (!strcmp(argv[1], verbs[i].name))
            return verbs[i].main(argc - 2, argv + 2);
    fprintf(stderr, "usage: guest_tool pattern MIB SEED [PAGES] | churn SEED | hog SECONDS SEED | monitor RUNDIR |"
                    " control SOCKET METHOD PATH [BODY] | load DEVICE read|write|fill DEPTH SECONDS SEED |"
                    " revive PID DEVICE LOG [COMMAND...]\n");
    return 2;
}
