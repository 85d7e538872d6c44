"""Keeps the Python thread state of nbdkit's worker threads, so that a request does not build and destroy one.

nbdkit wraps each callback in PyGILState_Ensure and PyGILState_Release. In a thread that Python does not know, that makes
a new thread state each time: 9 us, and a 16 KiB mapping made and unmade, an allocation in the middle of a swap-out.
One more PyGILState_Ensure that is never released makes the state stay, and a call costs 0.16 us.

A state must then be given back when its thread ends. A destructor of thread-specific data may not take the GIL (Python's
own data of that thread is gone by then), so it only puts the state on a list, and the next thread that keeps its state
clears and deletes those on the list. With that, 2000 connections leave the memory as it was; without, each thread
that ever served a request leaves 5 KB.

"Already kept" is remembered in the thread itself: thread identifiers are used again.
"""

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdlib.h>

    typedef struct kept_state {
        struct kept_state *next;
        PyThreadState *state;
    } kept_state;

    static __thread int thread_is_kept;
    static pthread_key_t kept_key;
    /* Atomic: pushed to one by one, taken whole. */
    static kept_state *ended_threads, *cleaners;

    static void push(kept_state **list, kept_state *kept)
    {
        kept->next = __atomic_load_n(list, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(list, &kept->next, kept, 1, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
            ;
    }

    static int delete_all(kept_state **list)
    {
        int deleted = 0;
        kept_state *kept, *next;
        for (kept = __atomic_exchange_n(list, NULL, __ATOMIC_ACQUIRE); kept; kept = next, deleted++) {
            next = kept->next;
            PyThreadState_Clear(kept->state);
            PyThreadState_Delete(kept->state);
            free(kept);
        }
        return deleted;
    }

    static void thread_ended(void *value) { push(&ended_threads, (kept_state *)value); }

    static int kept_init(void) { return pthread_key_create(&kept_key, thread_ended); }

    /* Delete the states of ended threads; how many there were. own: the calling thread's, which has the GIL, and may
       wait for it once more.

       Since Python 3.12 whoever deletes a state is left without one for PyGILState_Ensure. So a state that is made for
       it does; with that the thread's own counts as unbound, and is bound when it comes back. The stable ABI lets no
       state delete itself: the next cleaner does that. */
    static int reclaim(PyThreadState *own)
    {
        int reclaimed;
        kept_state *cleaner;
        if (!__atomic_load_n(&ended_threads, __ATOMIC_RELAXED))
            return 0;
        cleaner = (kept_state *)malloc(sizeof(*cleaner));
        if (!cleaner)
            return 0;
        cleaner->state = PyThreadState_New(PyThreadState_GetInterpreter(own));
        if (!cleaner->state) {
            free(cleaner);
            return 0;
        }
        PyThreadState_Swap(cleaner->state);
        delete_all(&cleaners);
        reclaimed = delete_all(&ended_threads);
        PyThreadState_Swap(own);
        push(&cleaners, cleaner);
        return reclaimed;
    }

    /* Holds the GIL. Returns how many ended threads' states were deleted, or -1: out of memory, nothing kept. */
    static int keep_this_thread(void)
    {
        kept_state *kept = (kept_state *)malloc(sizeof(*kept));
        if (!kept)
            return -1;
        PyGILState_Ensure();
        kept->state = PyThreadState_Get();
        thread_is_kept = 1;
        pthread_setspecific(kept_key, kept);
        return reclaim(kept->state);
    }
    """
    int thread_is_kept
    int kept_init() noexcept
    int keep_this_thread() noexcept

cdef bint enabled
cdef object warm_stack = None
cdef unsigned long long kept_count, reclaimed_count

enabled = kept_init() == 0      # else requests are slower, and right


cdef void keep_current() noexcept:
    global kept_count, reclaimed_count
    cdef int reclaimed
    if enabled and not thread_is_kept:
        reclaimed = keep_this_thread()
        if warm_stack is not None:
            warm_stack()
        if reclaimed >= 0:
            kept_count += 1
            reclaimed_count += reclaimed


def keep():
    """Keep the calling thread's Python state until the thread ends. Only for threads that Python did not start."""
    keep_current()


def on_keep(function):
    """From now on, call a function in each thread whose state is kept, once."""
    global warm_stack
    warm_stack = function


def kept():
    """(states kept so far, states of ended threads reclaimed so far)."""
    return kept_count, reclaimed_count


def begin(enter, news, running):
    """The whole life of a thread: enter(), then news and running, two locks, are released.

    enter releases news by itself first. Compiled, this has no frame of Python: so both are released even where memory is
    short for the first one, that of enter, and no thread waits for news that do not come.
    """
    has_begun = True
    try:
        enter()
    except MemoryError:
        has_begun = False
    if not has_begun and news.locked():
        news.release()
    running.release()
