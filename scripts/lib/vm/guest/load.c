/* Requests of one page to a disk, so many at a time, for so many seconds: how many were done, and what one took.
   It is one thread with Linux AIO and O_DIRECT, so that it costs the machine little beside what it measures. */

#define _GNU_SOURCE /* O_DIRECT */

#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST 128 /* requests at a time */
#define CONTENTS 256 /* different pages that are written again and again, so that making them costs nothing */
#define TICKS 1000000 /* what is counted for each microsecond that a request may take */

struct request {
    struct iocb iocb;
    double sent;
};

static struct request requests[MOST];
static unsigned char *buffers, *contents;
static uint32_t *took; /* requests by the microseconds that they took */

/* Make a request of a page ready; `submit` sends it, together with others. */
static struct iocb *prepare(struct request *request, uint64_t page)
{
    struct iocb *iocb = &request->iocb;
    unsigned char *buffer = buffers + (request - requests) * PAGE;
    if (iocb->aio_lio_opcode == IOCB_CMD_PWRITE)
        buffer = contents + page % CONTENTS * PAGE;
    iocb->aio_buf = (uintptr_t)buffer;
    iocb->aio_nbytes = PAGE;
    iocb->aio_offset = page * PAGE;
    iocb->aio_data = (uintptr_t)request;
    return iocb;
}

static void submit(aio_context_t context, struct iocb **iocbs, long count)
{
    double time = now();
    for (long i = 0; i < count; i++)
        ((struct request *)(uintptr_t)iocbs[i]->aio_data)->sent = time;
    while (count > 0) {
        long sent = syscall(SYS_io_submit, context, count, iocbs);
        if (sent <= 0)
            die("io_submit");
        iocbs += sent;
        count -= sent;
    }
}

/* The microseconds that this part of all requests took at most. */
static unsigned long percentile(uint64_t all, double part)
{
    uint64_t wanted = all * part, seen = 0;
    for (unsigned long us = 0; us < TICKS; us++)
        if ((seen += took[us]) > wanted)
            return us;
    return TICKS;
}

/* load DEVICE read|write|fill DEPTH SECONDS SEED: fill writes each page once, and takes as long as it does. */
int load_main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    int fills = !strcmp(argv[1], "fill"), writes = fills || !strcmp(argv[1], "write");
    unsigned long depth = number(argv[2]), seconds = number(argv[3]);
    uint64_t random = mix(number(argv[4])) | 1, next = 0, done = 0;
    if (!writes && strcmp(argv[1], "read"))
        return 2;
    if (!depth || depth > MOST)
        return 2;
    int fd = open(argv[0], (writes ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
    off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (size < PAGE)
        die(argv[0]);
    uint64_t pages = size / PAGE;
    buffers = mmap(NULL, (MOST + CONTENTS) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    took = calloc(TICKS, sizeof *took);
    aio_context_t context = 0;
    if (buffers == MAP_FAILED || !took || syscall(SYS_io_setup, MOST, &context))
        die("memory");
    contents = buffers + MOST * PAGE;
    for (int i = 0; i < CONTENTS; i++)
        page_content((uint64_t *)(contents + i * PAGE), random, i, 1);

    double started = now(), end = started + seconds;
    unsigned long flying = 0;
    struct iocb *ready[MOST];
    for (unsigned long i = 0; i < depth; i++, flying++) {
        requests[i].iocb.aio_fildes = fd;
        requests[i].iocb.aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        ready[i] = prepare(&requests[i], fills ? next++ % pages : next_random(&random) % pages);
    }
    submit(context, ready, flying);
    while (flying) {
        struct io_event events[MOST];
        long count = syscall(SYS_io_getevents, context, 1, MOST, events, NULL);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            die("io_getevents");
        double time = now();
        long again = 0;
        for (long i = 0; i < count; i++) {
            struct request *request = (struct request *)(uintptr_t)events[i].data;
            if (events[i].res != PAGE) {
                errno = events[i].res < 0 ? -events[i].res : EIO;
                die(argv[1]);
            }
            unsigned long us = (time - request->sent) * 1e6;
            took[us < TICKS ? us : TICKS - 1]++;
            done++;
            if (fills ? next < pages : time < end)
                ready[again++] = prepare(request, fills ? next++ : next_random(&random) % pages);
            else
                flying--;
        }
        submit(context, ready, again);
    }
    double spent = now() - started;
    printf("{\"requests\": %lu, \"seconds\": %.3f, \"p50\": %lu, \"p99\": %lu}\n", done, spent,
           percentile(done, 0.5), percentile(done, 0.99));
    return 0;
}
