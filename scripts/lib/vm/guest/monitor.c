/* The heartbeat: each second one line with the guest's memory and, where zramd runs in the guest, its numbers.
   All of its memory is locked, so a gap between two beats is the guest's, not its own. */

#include "tool.h"

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static char text[16384], line[32768];

/* The number after `name` at the start of a line, -1 if it is not there. */
static long field(const char *name)
{
    size_t length = strlen(name);
    for (const char *at = text; at; at = strchr(at, '\n')) {
        at += *at == '\n';
        if (!strncmp(at, name, length))
            return atol(at + length + strspn(at + length, ": \t"));
    }
    return -1;
}

static size_t add(size_t used, const char *file, const char *const *names, const char *const *keys, long factor)
{
    if (read_file(file, text, sizeof text) < 0)
        return used;
    for (; *names; names++, keys++) {
        long value = field(*names);
        used += snprintf(line + used, sizeof line - used, ", \"%s\": %ld", *keys, value < 0 ? -1 : value * factor);
    }
    return used;
}

/* Page faults in a file like /proc/PID/stat. */
static int faults(const char *path, unsigned long *minor, unsigned long *major)
{
    char stat[1024];
    char *fields = read_file(path, stat, sizeof stat) > 0 ? strrchr(stat, ')') : NULL;
    return fields && sscanf(fields + 1, " %*c %*d %*d %*d %*d %*d %*u %lu %*u %lu", minor, major) == 2;
}

/* Take off what the refiller has: it makes memory ready ahead of need, and that counts as page faults too. */
static void without_refiller(int pid, unsigned long *minor, unsigned long *major)
{
    char path[280], name[32];
    unsigned long refiller_minor, refiller_major;
    struct dirent *task;

    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    while (tasks && (task = readdir(tasks))) {
        snprintf(path, sizeof path, "/proc/%d/task/%.16s/comm", pid, task->d_name);
        if (read_file(path, name, sizeof name) <= 0 || strcmp(name, "zramd-refill\n"))
            continue;
        snprintf(path, sizeof path, "/proc/%d/task/%.16s/stat", pid, task->d_name);
        if (faults(path, &refiller_minor, &refiller_major)) {
            *minor -= refiller_minor;
            *major -= refiller_major;
        }
    }
    if (tasks)
        closedir(tasks);
}

/* The daemon's process, read from /proc: resident bytes and page faults of its threads. */
static size_t add_daemon(size_t used, const char *rundir)
{
    static const char *const names[] = {"VmRSS", "VmLck", NULL};
    static const char *const keys[] = {"daemon_resident", "daemon_locked", NULL};
    char path[256];
    unsigned long minor = 0, major = 0;

    snprintf(path, sizeof path, "%s/pid", rundir);
    if (read_file(path, text, sizeof text) <= 0)
        return used;
    int pid = atoi(text);
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    used = add(used, path, names, keys, 1024);
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int alive = faults(path, &minor, &major);
    if (alive)
        without_refiller(pid, &minor, &major);
    return used + snprintf(line + used, sizeof line - used,
                           ", \"daemon_pid\": %d, \"daemon_alive\": %s, \"daemon_minor\": %lu, \"daemon_major\": %lu",
                           pid, alive ? "true" : "false", minor, major);
}

/* stats.json as it is, on one line. */
static size_t add_stats(size_t used, const char *rundir)
{
    char path[256];
    snprintf(path, sizeof path, "%s/stats.json", rundir);
    if (read_file(path, text, sizeof text) <= 0)
        return used;
    for (char *at = text; *at; at++)
        if (*at == '\n')
            *at = ' ';
    return used + snprintf(line + used, sizeof line - used, ", \"zramd\": %s", text);
}

/* All numbers of one of the files that the kernel's zram has for its device. */
static size_t add_zram(size_t used, const char *name)
{
    char path[64];
    const char *comma = "";
    int length;
    unsigned long value;

    snprintf(path, sizeof path, "/sys/block/zram0/%s", name);
    if (read_file(path, text, sizeof text) <= 0)
        return used;
    used += snprintf(line + used, sizeof line - used, ", \"%s\": [", name);
    for (const char *at = text; sscanf(at, "%lu%n", &value, &length) == 1; at += length) {
        used += snprintf(line + used, sizeof line - used, "%s%lu", comma, value);
        comma = ", ";
    }
    return used + snprintf(line + used, sizeof line - used, "]");
}

int monitor_main(int argc, char **argv)
{
    static const char *const memory[] = {"MemTotal", "MemFree", "MemAvailable", "SwapTotal", "SwapFree", "SwapCached", NULL};
    static const char *const vmstat[] = {"pswpin", "pswpout", "oom_kill", NULL};
    struct timespec next;

    if (argc != 1)
        return 2;
    if (mlockall(MCL_CURRENT | MCL_FUTURE))
        die("mlockall");
    set_oom_score(-999);
    memset(text, 0, sizeof text);
    clock_gettime(CLOCK_MONOTONIC, &next);
    for (;;) {
        size_t used = snprintf(line, sizeof line, "{\"time\": %.3f", now());
        used = add(used, "/proc/meminfo", memory, memory, 1024);
        used = add(used, "/proc/vmstat", vmstat, vmstat, 1);
        used = add_daemon(used, argv[0]);
        used = add_stats(used, argv[0]);
        used = add_zram(used, "mm_stat");
        used = add_zram(used, "io_stat");
        used = add_zram(used, "bd_stat");
        used += snprintf(line + used, sizeof line - used, "}\n");
        if (used >= sizeof line || write(1, line, used) < 0)
            return 1;
        next.tv_sec++;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
}
