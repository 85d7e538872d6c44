/* A kernel with ublk, inside of the process: io_uring's system calls, /dev/ublkcN and /dev/ublk-control, as far as zramd
   uses them, and clients of the disk. To be preloaded; tests call fake_... by ctypes.

   A ring and a ublkc are files in memory, which the program maps as it maps the kernel's. As with DEFER_TASKRUN,
   completions arrive in io_uring_enter of the ring's thread only. What a real kernel would take amiss is noted: see
   fake_violation. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <linux/ublk_cmd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define FETCH _IOWR('u', UBLK_IO_FETCH_REQ, struct ublksrv_io_cmd)
#define COMMIT _IOWR('u', UBLK_IO_COMMIT_AND_FETCH_REQ, struct ublksrv_io_cmd)
#define COMMAND(op) ((op)&0xff)
enum { RINGS = 64, DISKS = 64, QUEUES = 8, DEPTH = 4096, HEAD = 1 << 16, GET_FEATURES = 0x13, DEL_ASYNC = 0x14 };

struct request {
    struct request *next;
    uint32_t op_flags, sectors;
    uint64_t sector;
    char *buffer;
    int result, done;
};

struct ring {
    int fd, kick, wide;
    unsigned entries;
    pid_t thread;
    uint32_t *words; /* heads, tails and masks: see the offsets in setup */
    struct io_uring_cqe *cqes;
    char *sqes;
    int poll_fd; /* -1: none is polled */
    uint64_t poll_data;
};

enum state { GONE, IDLE, OUT };

struct slot {
    enum state state;
    struct ring *ring;
    uint64_t address, data;
    struct request *request;
};

struct disk {
    int used, fd, stopping, aborted, started, recovering;
    struct ublksrv_ctrl_dev_info info;
    struct ublk_params params;
    char *asked;
    uint32_t max_bytes;
    struct request *first[QUEUES], *last[QUEUES];
    int under_way;
    struct slot *slots[QUEUES]; /* of DEPTH */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t news = PTHREAD_COND_INITIALIZER;
static struct ring rings[RINGS];
static struct disk disks[DISKS];
static char violation[200];
static unsigned enomem_every, commits, polls_end, polled, silent, refused_setup, refused_fetch = -1u;
static int refused_errno, broken;
static int rings_open, stands_still; /* atomic */
static long allocations;             /* atomic */
static __thread int counted;         /* is this a thread whose allocations count? */
/* the C library's own */
int __close(int fd);
void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *start, size_t size);

static long real_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    static long (*real)(long, ...);
    if (!real)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return real(number, a, b, c, d, e, f);
}

#define amiss(...) (*violation ? 0 : snprintf(violation, sizeof(violation), __VA_ARGS__))

static pid_t thread_number(void)
{
    return (pid_t)real_syscall(SYS_gettid, 0, 0, 0, 0, 0, 0);
}

static struct ring *ring_of(int fd)
{
    int i;
    for (i = 0; i < RINGS; i++)
        if (rings[i].words && rings[i].fd == fd)
            return &rings[i];
    return NULL;
}

/* A descriptor may be a duplicate: the file counts. */
static struct disk *disk_of(int fd)
{
    char path[64], target[64];
    unsigned number;
    ssize_t size;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    size = readlink(path, target, sizeof(target) - 1);
    if (size < 0)
        return NULL;
    target[size] = 0;
    if (sscanf(target, "/memfd:ublkc%u", &number) != 1 || number >= DISKS || !disks[number].used)
        return NULL;
    return &disks[number];
}

/* The words' places in the first page of a ring. */
enum { SQ_HEAD, SQ_TAIL, SQ_MASK, CQ_HEAD = 16, CQ_TAIL, CQ_MASK, SQ_ARRAY = 64 };

static int setup(unsigned wanted, struct io_uring_params *p)
{
    unsigned entries = 1, size, i;
    struct ring *r = NULL;
    char *start;
    if (refused_setup) {
        errno = refused_setup;
        return -1;
    }
    while (entries < wanted)
        entries *= 2;
    for (i = 0; i < RINGS && !r; i++)
        if (!rings[i].words)
            r = &rings[i];
    if (!r)
        abort();
    memset(r, 0, sizeof(*r));
    r->wide = !!(p->flags & IORING_SETUP_SQE128);
    r->entries = entries;
    r->thread = p->flags & IORING_SETUP_SINGLE_ISSUER ? thread_number() : 0;
    counted |= r->thread != 0;
    r->poll_fd = -1;
    size = HEAD + 2 * entries * sizeof(struct io_uring_cqe);
    r->fd = memfd_create("ring", MFD_CLOEXEC);
    r->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ftruncate(r->fd, IORING_OFF_SQES + entries * 128))
        abort();
    start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, 0);
    r->sqes = mmap(NULL, entries * (r->wide ? 128 : 64), PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, IORING_OFF_SQES);
    r->words = (uint32_t *)start;
    r->cqes = (struct io_uring_cqe *)(start + HEAD);
    r->words[SQ_MASK] = entries - 1;
    r->words[CQ_MASK] = 2 * entries - 1;
    p->sq_entries = entries;
    p->cq_entries = 2 * entries;
    p->features = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;
    p->sq_off.head = 4 * SQ_HEAD;
    p->sq_off.tail = 4 * SQ_TAIL;
    p->sq_off.ring_mask = 4 * SQ_MASK;
    p->sq_off.array = 4 * SQ_ARRAY;
    p->cq_off.head = 4 * CQ_HEAD;
    p->cq_off.tail = 4 * CQ_TAIL;
    p->cq_off.ring_mask = 4 * CQ_MASK;
    p->cq_off.cqes = HEAD;
    __atomic_fetch_add(&rings_open, 1, __ATOMIC_RELAXED);
    return r->fd;
}

static unsigned completed(struct ring *r)
{
    return r->words[CQ_TAIL] - r->words[CQ_HEAD];
}

static void complete(struct ring *r, uint64_t data, int result)
{
    struct io_uring_cqe *cqe = &r->cqes[r->words[CQ_TAIL] & r->words[CQ_MASK]];
    if (completed(r) >= 2 * r->entries)
        amiss("more completions than the ring has places");
    cqe->user_data = data;
    cqe->res = result;
    cqe->flags = 0;
    __atomic_store_n(&r->words[CQ_TAIL], r->words[CQ_TAIL] + 1, __ATOMIC_RELEASE);
}

static void kick(struct disk *d)
{
    uint64_t one = 1;
    unsigned q;
    for (q = 0; q < d->info.nr_hw_queues; q++)
        if (d->slots[q][0].ring && write(d->slots[q][0].ring->kick, &one, 8) != 8)
            abort();
}

static struct ublksrv_io_desc *descriptor(struct disk *d, unsigned q, unsigned tag)
{
    /* as far apart as those of a queue of 4096, in whole pages */
    size_t page = sysconf(_SC_PAGESIZE), size = (4096 * sizeof(struct ublksrv_io_desc) + page - 1) / page * page;
    return (struct ublksrv_io_desc *)(d->asked + q * size) + tag;
}

/* Hand waiting requests to idle tags of a ring, or abort those. */
static void deliver(struct ring *r)
{
    struct ublksrv_io_desc *asked;
    struct request *request;
    struct slot *slot;
    struct disk *d;
    unsigned q, tag, begin;
    for (d = disks; d < disks + DISKS; d++) {
        if (!d->used)
            continue;
        for (q = 0; q < d->info.nr_hw_queues; q++) {
            begin = rand();     /* which tag is anybody's guess */
            for (tag = 0; tag < d->info.queue_depth; tag++) {
                slot = &d->slots[q][(begin + tag) % d->info.queue_depth];
                if (slot->ring != r || slot->state != IDLE)
                    continue;
                if (d->aborted) {
                    slot->state = GONE;
                    slot->ring = NULL;
                    complete(r, slot->data, UBLK_IO_RES_ABORT);
                    pthread_cond_broadcast(&news);
                    continue;
                }
                request = d->first[q];
                if (!request || d->recovering || !d->started)
                    continue;
                d->first[q] = request->next;
                asked = descriptor(d, q, slot - d->slots[q]);
                asked->op_flags = request->op_flags;
                asked->nr_sectors = request->sectors;
                asked->start_sector = request->sector;
                asked->addr = slot->address;
                if ((request->op_flags & 0xff) == UBLK_IO_OP_WRITE)
                    memcpy((void *)slot->address, request->buffer, (size_t)request->sectors << 9);
                slot->request = request;
                slot->state = OUT;
                complete(r, slot->data, UBLK_IO_RES_OK);
            }
        }
    }
}

static int commit(struct disk *d, struct slot *slot, int result)
{
    struct request *request = slot->request;
    if (slot->state != OUT) {
        amiss("an answer for a tag that has no request");
        return -EINVAL;
    }
    if (enomem_every && ++commits % enomem_every == 0)
        return -ENOMEM;
    if ((request->op_flags & 0xff) == UBLK_IO_OP_READ && result > 0)
        memcpy(request->buffer, (void *)slot->address, result);
    memset((void *)slot->address, 0xEE, d->max_bytes); /* the kernel's until the next request */
    request->result = result;
    request->done = 1;
    slot->request = NULL;
    slot->state = IDLE;
    d->under_way--;
    pthread_cond_broadcast(&news);
    return 1;
}

static int queue_command(struct ring *r, const struct io_uring_sqe *sqe)
{
    const struct ublksrv_io_cmd *c = (const struct ublksrv_io_cmd *)sqe->cmd;
    struct disk *d = disk_of(sqe->fd);
    struct slot *slot;
    int rc = 1;
    if (!d)
        return -EOPNOTSUPP;
    if (c->q_id >= d->info.nr_hw_queues || c->tag >= d->info.queue_depth)
        return -EINVAL;
    slot = &d->slots[c->q_id][c->tag];
    if (sqe->cmd_op == FETCH) {
        if (c->q_id == refused_fetch)
            return -refused_errno;
        if (slot->state != GONE)
            return -EBUSY;
        slot->state = IDLE;
        slot->ring = r;
        pthread_cond_broadcast(&news);
    } else if (sqe->cmd_op == COMMIT) {
        if (slot->ring != r)
            amiss("an answer by another ring than the request came to");
        rc = commit(d, slot, c->result);
    } else
        return -EOPNOTSUPP;
    if (rc > 0) {
        slot->data = sqe->user_data;
        slot->address = c->addr;
    }
    return rc;
}

static int fetched(struct disk *d)
{
    unsigned q, tag, found = 0;
    for (q = 0; q < d->info.nr_hw_queues; q++)
        for (tag = 0; tag < d->info.queue_depth; tag++)
            found += d->slots[q][tag].state != GONE;
    return found;
}

static void abort_all(struct disk *d, int waits)
{
    d->stopping = 1;
    while (waits && d->under_way)
        pthread_cond_wait(&news, &lock);
    d->aborted = 1;
    kick(d);
    while (waits && fetched(d))
        pthread_cond_wait(&news, &lock);
}

static int control_command(const struct io_uring_sqe *sqe)
{
    const struct ublksrv_ctrl_cmd *c = (const struct ublksrv_ctrl_cmd *)sqe->cmd;
    unsigned all, number = c->dev_id, command = COMMAND(sqe->cmd_op);
    struct ublksrv_ctrl_dev_info *info = (struct ublksrv_ctrl_dev_info *)c->addr;
    struct ublk_params *params = (struct ublk_params *)c->addr;
    struct disk *d;
    char name[32];
    if (c->queue_id != (uint16_t)-1 && command != GET_FEATURES)
        return -EINVAL;
    if (command == GET_FEATURES) {
        if (c->len != 8)
            return -EINVAL;
        *(uint64_t *)c->addr = 0x1fe;
        return 0;
    }
    if (command == UBLK_CMD_ADD_DEV) {
        if (c->len < sizeof(*info) || info->dev_id != number || !info->nr_hw_queues || info->max_io_buf_bytes & 4095)
            return -EINVAL;
        for (all = 0; number == (uint32_t)-1 && all < DISKS; all++)
            if (!disks[all].used)
                number = all;
        if (number >= DISKS)
            return -EACCES;
        d = &disks[number];
        if (d->used)
            return -EEXIST;
        memset(d, 0, sizeof(*d));
        for (all = 0; all < QUEUES; all++)
            if (!(d->slots[all] = calloc(DEPTH, sizeof(struct slot))))
                abort();
        d->used = 1;
        info->dev_id = number;
        if (info->nr_hw_queues > QUEUES)
            info->nr_hw_queues = QUEUES;
        info->ublksrv_pid = -1;
        d->info = *info;
        d->max_bytes = info->max_io_buf_bytes;
        snprintf(name, sizeof(name), "ublkc%u", number);
        d->fd = memfd_create(name, MFD_CLOEXEC);
        if (ftruncate(d->fd, QUEUES * (4096 * 24 + 65536)))
            abort();
        d->asked = mmap(NULL, QUEUES * (4096 * 24 + 65536), PROT_READ | PROT_WRITE, MAP_SHARED, d->fd, 0);
        return 0;
    }
    if (number >= DISKS || !disks[number].used)
        return -ENODEV;
    d = &disks[number];
    all = d->info.nr_hw_queues * d->info.queue_depth;
    switch (command) {
    case UBLK_CMD_GET_DEV_INFO:
        if (c->len < sizeof(*info))
            return -EINVAL;
        *info = d->info;
        return 0;
    case UBLK_CMD_SET_PARAMS:
        if (params->len > c->len || !params->types)
            return -EINVAL;
        if (d->started)
            return -EACCES;
        memcpy(&d->params, params, params->len < sizeof(*params) ? params->len : sizeof(*params));
        return 0;
    case UBLK_CMD_GET_PARAMS:
        memcpy(params, &d->params, params->len < sizeof(*params) ? params->len : sizeof(*params));
        return 0;
    case UBLK_CMD_START_DEV:
        if (!d->params.basic.dev_sectors || (pid_t)c->data[0] != getpid())
            return -EINVAL;
        if (d->started)
            return -EEXIST;
        if (fetched(d) != (int)all)
            return -EBUSY; /* a kernel waits */
        d->started = 1;
        d->info.state = UBLK_S_DEV_LIVE;
        d->info.ublksrv_pid = c->data[0];
        return 0;
    case UBLK_CMD_START_USER_RECOVERY:
        if (!(d->info.flags & UBLK_F_USER_RECOVERY) || d->recovering)
            return -EINVAL;
        if (fetched(d))
            return -EBUSY;
        d->recovering = 1;
        d->info.state = 2;
        return 0;
    case UBLK_CMD_END_USER_RECOVERY:
        if (!d->recovering || fetched(d) != (int)all)
            return -EBUSY;
        d->recovering = 0;
        d->info.state = UBLK_S_DEV_LIVE;
        kick(d);
        return 0;
    case UBLK_CMD_STOP_DEV:
        abort_all(d, 1);
        d->info.state = UBLK_S_DEV_DEAD;
        return 0;
    case UBLK_CMD_DEL_DEV:
    case DEL_ASYNC:
        abort_all(d, 1);
        munmap(d->asked, QUEUES * (4096 * 24 + 65536));
        __close(d->fd);
        for (all = 0; all < QUEUES; all++)
            free(d->slots[all]);
        d->used = 0;
        return 0;
    }
    return -EOPNOTSUPP;
}

static int enter(struct ring *r, unsigned submit, unsigned wait, unsigned flags, const struct io_uring_getevents_arg *limit)
{
    const struct io_uring_sqe *sqe;
    struct pollfd both[2];
    const struct timespec *pause = NULL;
    uint32_t place;
    uint64_t word;
    unsigned i;
    int rc;
    if (flags & IORING_ENTER_EXT_ARG)
        pause = (const struct timespec *)limit->ts;
    pthread_mutex_lock(&lock);
    if (broken && !r->wide) {
        errno = broken;
        broken = 0;
        pthread_mutex_unlock(&lock);
        return -1;
    }
    if (r->thread && r->thread != thread_number())
        amiss("a ring is used by another thread than the one that made it");
    for (i = 0; i < submit; i++) {
        place = r->words[SQ_ARRAY + (r->words[SQ_HEAD] & r->words[SQ_MASK])];
        sqe = (const struct io_uring_sqe *)(r->sqes + place * (r->wide ? 128 : 64));
        if (sqe->opcode == IORING_OP_POLL_ADD) {
            if (r->poll_fd >= 0)
                amiss("two polls of the same");
            if (sqe->len != IORING_POLL_ADD_MULTI || sqe->poll32_events != POLLIN)
                amiss("a poll that is not for all news");
            r->poll_fd = sqe->fd;
            r->poll_data = sqe->user_data;
        } else if (sqe->opcode != IORING_OP_URING_CMD)
            complete(r, sqe->user_data, -EINVAL);
        else if (r->wide) {
            if (!silent)
                complete(r, sqe->user_data, control_command(sqe));
        } else {
            rc = queue_command(r, sqe);
            if (rc <= 0)
                complete(r, sqe->user_data, rc);
        }
        __atomic_store_n(&r->words[SQ_HEAD], r->words[SQ_HEAD] + 1, __ATOMIC_RELEASE);
    }
    for (;;) {
        deliver(r);
        both[0] = (struct pollfd){r->kick, POLLIN, 0};
        both[1] = (struct pollfd){r->poll_fd, POLLIN, 0};
        if (r->poll_fd >= 0 && poll(&both[1], 1, 0) == 1) {
            /* A kernel does not read, but tells each time that something is written. */
            if (read(r->poll_fd, &word, 8) != 8)
                abort();
            complete(r, r->poll_data, POLLIN);
            if (polls_end && ++polled % polls_end == 0)
                r->poll_fd = -1;
            else
                r->cqes[(r->words[CQ_TAIL] - 1) & r->words[CQ_MASK]].flags = IORING_CQE_F_MORE;
        }
        if (completed(r) >= wait)
            break;
        pthread_mutex_unlock(&lock);
        if (pause) {
            nanosleep(pause, NULL);
            errno = ETIME;
            return -1;
        }
        both[1].fd = r->poll_fd;
        poll(both, 2, -1);
        if (read(r->kick, &word, 8) != 8 && errno != EAGAIN)
            abort();
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    return submit;
}

long syscall(long number, ...)
{
    long a[6], result;
    struct ring *r;
    va_list list;
    int i;
    va_start(list, number);
    for (i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_io_uring_setup) {
        pthread_mutex_lock(&lock);
        result = setup(a[0], (struct io_uring_params *)a[1]);
        pthread_mutex_unlock(&lock);
        return result;
    }
    if (number == SYS_io_uring_enter) {
        pthread_mutex_lock(&lock);
        r = ring_of(a[0]);
        pthread_mutex_unlock(&lock);
        if (!r) {
            errno = EBADF;
            return -1;
        }
        return enter(r, a[1], a[2], a[3], (const struct io_uring_getevents_arg *)a[4]);
    }
    return real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void *allocated(void *start)
{
    if (counted)
        __atomic_add_fetch(&allocations, 1, __ATOMIC_SEQ_CST);
    return start;
}

void *malloc(size_t size) { return allocated(__libc_malloc(size)); }
void *calloc(size_t n, size_t size) { return allocated(__libc_calloc(n, size)); }
void *realloc(void *start, size_t size) { return allocated(__libc_realloc(start, size)); }

/* What reads the backing waits while that stands still. */
ssize_t pread(int fd, void *buffer, size_t size, off_t offset)
{
    char name[16];
    if (!counted && prctl(PR_GET_NAME, name) == 0 && strncmp(name, "zramd-away", 10) == 0)
        counted = 1;
    while (__atomic_load_n(&stands_still, __ATOMIC_ACQUIRE))
        usleep(1000);
    return real_syscall(SYS_pread64, fd, (long)buffer, size, offset, 0, 0);
}

ssize_t pread64(int fd, void *buffer, size_t size, off64_t offset)
{
    return pread(fd, buffer, size, offset);
}

/* Who closes a ring with tags has died, as the kernel sees it: requests that were under way come again. */
int close(int fd)
{
    struct request *request;
    struct slot *slot;
    struct ring *r;
    struct disk *d;
    unsigned q, tag;
    /* A sanitizer closes files before it has begun. */
    if (!__atomic_load_n(&rings_open, __ATOMIC_RELAXED))
        return __close(fd);
    pthread_mutex_lock(&lock);
    r = ring_of(fd);
    if (r) {
        __atomic_fetch_sub(&rings_open, 1, __ATOMIC_RELAXED);
        if (r->thread && real_syscall(SYS_tgkill, getpid(), r->thread, 0, 0, 0, 0) == 0)
            amiss("a ring is closed before its thread has ended");
        for (d = disks; d < disks + DISKS; d++)
            for (q = 0; d->used && q < d->info.nr_hw_queues; q++)
                for (tag = 0; tag < d->info.queue_depth; tag++) {
                    slot = &d->slots[q][tag];
                    if (slot->ring != r)
                        continue;
                    request = slot->request;
                    if (request) {
                        request->next = d->first[q];
                        if (!d->first[q])
                            d->last[q] = request;
                        d->first[q] = request;
                    }
                    memset(slot, 0, sizeof(*slot));
                    pthread_cond_broadcast(&news);
                }
        munmap(r->words, HEAD + 2 * r->entries * sizeof(struct io_uring_cqe));
        munmap(r->sqes, r->entries * (r->wide ? 128 : 64));
        __close(r->kick);
        r->words = NULL;
    }
    pthread_mutex_unlock(&lock);
    return __close(fd);
}

/* ---- for tests ---- */

/* /dev/ublkcN: a descriptor, the caller's to close. */
int fake_open(unsigned number)
{
    return dup(disks[number].fd);
}

/* A request by a client, who waits for it: what the server answered; -ENODEV: the disk was stopped. */
int fake_io(unsigned number, unsigned q, uint32_t op_flags, uint64_t sector, uint32_t sectors, char *buffer)
{
    struct disk *d = &disks[number];
    struct request request = {NULL, op_flags, sectors, sector, buffer, 0, 0};
    pthread_mutex_lock(&lock);
    if (d->stopping) {
        pthread_mutex_unlock(&lock);
        return -ENODEV;
    }
    d->under_way++;
    if (d->first[q])
        d->last[q]->next = &request;
    else
        d->first[q] = &request;
    d->last[q] = &request;
    kick(d);
    while (!request.done)
        pthread_cond_wait(&news, &lock);
    pthread_mutex_unlock(&lock);
    return request.result;
}

/* So many reads of a block each by clients who all come at the same time and wait: how many failed. */
int fake_batch(unsigned number, unsigned q, uint64_t sector, unsigned count, char *buffer)
{
    struct disk *d = &disks[number];
    struct request all[64];
    unsigned i;
    int failed = 0;
    pthread_mutex_lock(&lock);
    for (i = 0; i < count && i < 64; i++) {
        all[i] = (struct request){NULL, UBLK_IO_OP_READ, 8, sector + 8 * i, buffer + 4096 * i, 0, 0};
        if (d->first[q])
            d->last[q]->next = &all[i];
        else
            d->first[q] = &all[i];
        d->last[q] = &all[i];
    }
    d->under_way += count;
    kick(d);
    for (i = 0; i < count; i++) {
        while (!all[i].done)
            pthread_cond_wait(&news, &lock);
        failed += all[i].result != 4096;
    }
    pthread_mutex_unlock(&lock);
    return failed;
}

/* Every so many answers the kernel has no memory for one; 0: it always has. */
void fake_enomem(unsigned every) { enomem_every = every; }

/* Every so many news the kernel ends a poll; 0: it never does. */
void fake_end_polls(unsigned every) { polls_end = every; }

/* How often memory was asked for by threads that serve, until now; count: by this one, too, or no more. */
long fake_allocations(int count)
{
    counted = count;
    return __atomic_load_n(&allocations, __ATOMIC_SEQ_CST);
}

/* Control commands are not answered. */
void fake_silent(unsigned is) { silent = is; }

/* io_uring_setup fails with an errno; 0: no more. */
void fake_no_rings(unsigned code) { refused_setup = code; }

/* FETCH of a queue fails with an errno; queue -1: none. */
void fake_no_fetch(unsigned queue, int code)
{
    refused_fetch = queue;
    refused_errno = code;
}

/* The next system call of a queue fails with an errno. */
void fake_break(int code)
{
    pthread_mutex_lock(&lock);
    broken = code;
    pthread_mutex_unlock(&lock);
}

/* The disk that the backing is on stands still, until it does not. */
void fake_stand_still(int is) { __atomic_store_n(&stands_still, is, __ATOMIC_RELEASE); }

/* How many tags of a disk the kernel has, or has given out. */
int fake_fetched(unsigned number)
{
    int found;
    pthread_mutex_lock(&lock);
    found = fetched(&disks[number]);
    pthread_mutex_unlock(&lock);
    return found;
}

/* What a kernel would have taken amiss first; "": nothing. */
const char *fake_violation(void) { return violation; }
