/* Kills a server that this machine may swap to, starts another one, and tells how long the device was away. It is
   locked in memory: nothing that was swapped out comes back before the new server is there. */

#define _GNU_SOURCE /* O_DIRECT */

#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

/* revive PID DEVICE LOG [COMMAND...]: what the command says is added to LOG; without one another server is there. */
int revive_main(int argc, char **argv)
{
    static unsigned char buffer[PAGE] __attribute__((aligned(PAGE)));
    if (argc < 3)
        return 2;
    pid_t server = number(argv[0]);
    int device = open(argv[1], O_RDONLY | O_DIRECT | O_CLOEXEC);
    int log = open(argv[2], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (device < 0 || log < 0)
        die(device < 0 ? argv[1] : argv[2]);
    if (mlockall(MCL_CURRENT | MCL_FUTURE))
        die("memory");
    double started = now();
    if (kill(server, SIGKILL))
        die(argv[0]);
    while (!kill(server, 0)) /* who started it sees its end: it is not our child */
        usleep(1000);
    double ended = now();
    pid_t child = argc > 3 ? fork() : 0;
    if (child < 0)
        die("fork");
    if (argc > 3 && !child) {
        setsid();
        dup2(log, 1);
        dup2(log, 2);
        execv(argv[3], argv + 3);
        die(argv[3]);
    }
    /* The kernel has it wait until the device is served. */
    if (pread(device, buffer, PAGE, 0) != PAGE)
        die(argv[1]);
    printf("{\"seconds\": %.3f, \"ended\": %.3f, \"pid\": %d}\n", now() - started, ended - started, child);
    return 0;
}
