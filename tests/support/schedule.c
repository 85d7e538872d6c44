/* A seeded scheduler: of the threads that take part, one runs at a time. Preloaded, zramd's debug build asks it at each
   named point, each lock and each nap (zramd/core/system/points.pxd), and there it may let another thread go on. So the
   same seed gives the same interleaving, however the system runs the threads.

   begin:   schedule_begin(seed, n), then n threads each call schedule_enter(number), which returns when it is its turn.
   end:     each calls schedule_leave(). What happened is in schedule_step, of the first STEPS, and schedule_digest.

   A thread that must wait for a lock, or that naps because another is in its way, lets others go on until it may. Where a
   thread holds Python's GIL nothing is decided: who goes on would wait for it. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    MOST = 16,          /* threads */
    STEPS = 1 << 18,    /* that are kept */
    VAIN = 100000       /* waits, and nobody came to anything else: each waits for another */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;    /* guards `running` and `missing`; the rest is who runs' */
static pthread_cond_t turns[MOST];
static int running, missing;
static int present[MOST], threads;
static const char *places[MOST];    /* where each came last */
static uint64_t dice, patience, digest, vain;
static struct {
    int thread;
    const char *place;
} steps[STEPS];
static uint64_t step_count;
static __thread int me = -1;

int PyGILState_Check(void) __attribute__((weak));

/* splitmix64 */
static uint64_t roll(void)
{
    uint64_t z = dice += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static int takes_part(void)
{
    return me >= 0 && !(PyGILState_Check && PyGILState_Check());
}

static void note(const char *place)
{
    const char *c;
    places[me] = place;
    digest = (digest ^ (uint64_t)me) * 0x100000001b3;
    for (c = place; *c; c++)
        digest = (digest ^ (uint64_t)*c) * 0x100000001b3;
    if (step_count < STEPS) {
        steps[step_count].thread = me;
        steps[step_count].place = place;
    }
    step_count++;
}

/* Any thread that is there but `other`; -1: there is none. */
static int pick(int other)
{
    int candidates[MOST], n = 0, i;
    for (i = 0; i < threads; i++)
        if (present[i] && i != other)
            candidates[n++] = i;
    return n ? candidates[roll() % (uint64_t)n] : -1;
}

/* With `lock` held. */
static void await_turn(void)
{
    while (running != me || missing)
        pthread_cond_wait(&turns[me], &lock);
}

static void hand_to(int next)
{
    if (next < 0 || next == me)
        return;
    pthread_mutex_lock(&lock);
    running = next;
    pthread_cond_signal(&turns[next]);
    await_turn();
    pthread_mutex_unlock(&lock);
}

static void wait_at(const char *place)
{
    int i;
    note(place);
    if (++vain > VAIN) {
        fprintf(stderr, "schedule: no thread gets on:\n");
        for (i = 0; i < threads; i++)
            if (present[i])
                fprintf(stderr, "  thread %d is at %s\n", i, places[i]);
        abort();
    }
    hand_to(pick(me));
}

/* ---- what zramd's core calls ---- */

void zr_schedule_point(const char *name)
{
    if (!takes_part())
        return;
    note(name);
    vain = 0;
    if (roll() % patience == 0)
        hand_to(pick(-1));
}

int zr_schedule_lock(pthread_mutex_t *wanted)
{
    if (!takes_part())
        return pthread_mutex_lock(wanted);
    zr_schedule_point("(lock)");
    while (pthread_mutex_trylock(wanted))
        wait_at("(waits for a lock)");
    return 0;
}

int zr_schedule_trylock(pthread_mutex_t *wanted)
{
    zr_schedule_point("(trylock)");
    return pthread_mutex_trylock(wanted);
}

int zr_schedule_unlock(pthread_mutex_t *held)
{
    int rc = pthread_mutex_unlock(held);
    zr_schedule_point("(unlock)");
    return rc;
}

void zr_schedule_nap(void)
{
    if (takes_part())
        wait_at("(naps)");
}

/* ---- what a test calls ---- */

void schedule_begin(uint64_t seed, int count)
{
    int i;
    dice = seed;
    /* Some races need many changes of threads, others one at the right moment, and long runs before and after. */
    patience = 1u << roll() % 6;
    digest = 0xcbf29ce484222325;
    step_count = vain = 0;
    threads = missing = count;
    for (i = 0; i < count; i++) {
        pthread_cond_init(&turns[i], NULL);
        present[i] = 1;
        places[i] = "(start)";
    }
    running = pick(-1);
}

void schedule_enter(int number)
{
    me = number;
    pthread_mutex_lock(&lock);
    if (--missing == 0)
        pthread_cond_signal(&turns[running]);
    await_turn();
    pthread_mutex_unlock(&lock);
}

void schedule_leave(void)
{
    note("(end)");
    vain = 0;
    pthread_mutex_lock(&lock);
    present[me] = 0;
    running = pick(-1);
    if (running >= 0)
        pthread_cond_signal(&turns[running]);
    pthread_mutex_unlock(&lock);
    me = -1;
}

uint64_t schedule_digest(void)
{
    return digest;
}

uint64_t schedule_steps(void)
{
    return step_count;
}

/* Where step i came to, and its thread; NULL beyond the steps that were kept. */
const char *schedule_step(uint64_t i, int *thread)
{
    if (i >= step_count || i >= STEPS)
        return NULL;
    *thread = steps[i].thread;
    return steps[i].place;
}
