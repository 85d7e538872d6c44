"""What a process that its own kernel swaps to asks of the system: locked memory, a warm heap, warm stacks, priority.

Each function does one thing and raises OSError when the system refuses; zramd.kernel.protection says in which order and why.
"""

from libc.errno cimport errno

from cpython.bytearray cimport PyByteArray_AsString

from zramd.core.system.advice cimport MADV_DONTNEED_LOCKED

import os

cdef enum:
    STACK_SIZE = 128 << 10      # five times what formatting a traceback takes

cdef extern from *:
    """
    #include <alloca.h>
    #include <linux/capability.h>
    #include <linux/futex.h>
    #include <errno.h>
    #include <limits.h>
    #include <malloc.h>
    #include <poll.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdlib.h>
    #include <time.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #ifndef PR_SET_IO_FLUSHER
    #define PR_SET_IO_FLUSHER 57    /* Linux 5.6 */
    #define PR_GET_IO_FLUSHER 58
    #endif

    /* Not inlined, so that the bytes are taken from the stack and given back at once. */
    static __attribute__((noinline)) void use_stack(size_t size)
    {
        volatile char *bytes = (volatile char *)alloca(size);
        size_t i;
        for (i = 0; i < size; i += 4096)
            bytes[i] = 0;
    }

    /* ioprio.h is no header of the C library's: the calling thread, class idle. */
    static int yield_disks(void)
    {
        return (int)syscall(SYS_ioprio_set, 1 /* IOPRIO_WHO_PROCESS */, 0, 3 << 13 /* IOPRIO_CLASS_IDLE */);
    }

    /* The C library has no header for these two: the calling thread, and what it is after an execve. */
    static int keep_capabilities_of(unsigned long long kept)
    {
        struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct data[2];
        int half;
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_capget, &head, data))
            return -1;
        for (half = 0; half < 2; half++) {
            __u32 ours = (__u32)(kept >> (32 * half));
            data[half].permitted &= ours;
            data[half].effective &= ours;
            data[half].inheritable &= ours;
        }
        return (int)syscall(SYS_capset, &head, data);
    }

    /* For the calling thread alone; a service's filter of system calls may forbid what is not needed. */
    static int lose_capability_of(int number)
    {
        struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct data[2];
        __u32 bit = 1u << number % 32;
        if (syscall(SYS_capget, &head, data))
            return errno;
        if (!(data[number / 32].permitted & bit))
            return 0;
        data[number / 32].permitted &= ~bit;
        data[number / 32].effective &= ~bit;
        data[number / 32].inheritable &= ~bit;
        return syscall(SYS_capset, &head, data) ? errno : 0;
    }

    /* The kernel has a record for a thread that waits for a lock which hands on priority, and makes it the first time. */
    static void use_lock(void)
    {
        unsigned int word = 0;
        if (!syscall(SYS_futex, &word, FUTEX_LOCK_PI_PRIVATE, 0, NULL, NULL, 0))
            syscall(SYS_futex, &word, FUTEX_UNLOCK_PI_PRIVATE, 0, NULL, NULL, 0);
    }

    static int zr_be_calm(void)
    {
        struct sched_param param;
        if (sched_getscheduler(0) != SCHED_RR || sched_getparam(0, &param))
            return 0;
        struct sched_param ordinary = {0};
        return sched_setscheduler(0, SCHED_OTHER, &ordinary) ? 0 : param.sched_priority;
    }

    static void zr_be_urgent(int priority)
    {
        struct sched_param param = {priority};
        if (priority)
            sched_setscheduler(0, SCHED_RR, &param);
    }

    static int use_heap(size_t size)
    {
        volatile char *bytes = (volatile char *)malloc(size);   /* volatile: or the compiler leaves it all out */
        size_t i;
        if (!bytes)
            return -1;
        for (i = 0; i < size; i += 4096)
            bytes[i] = 0;
        free((void *)bytes);
        return 0;
    }

    /* What was written to a pipe goes where the pipe's reader would have passed it, when the process is about to abort. */
    static volatile int words_pipe = -1, words_target = -1;
    static const char *volatile words_begun;    /* what the reader has read, and not passed on yet */
    static volatile size_t words_size;
    static struct sigaction abort_before;

    static void pass_words(const char *data, size_t size)
    {
        while (size) {
            struct pollfd target = {words_target, POLLOUT, 0};
            ssize_t written;
            if (poll(&target, 1, 0) != 1)
                return;
            written = write(words_target, data, size < PIPE_BUF ? size : PIPE_BUF);
            if (written <= 0)
                return;
            data += written;
            size -= written;
        }
    }

    /* The handler of SIGABRT: abort() goes on when it returns. All that it calls may be called in one. */
    static void say_last_words(int number)
    {
        struct timespec moment = {0, 10 * 1000 * 1000};
        char data[4096];
        ssize_t size;
        if (words_pipe >= 0) {
            dup2(words_target, 2);
            nanosleep(&moment, NULL);   /* the reader may be in the middle of it */
            pass_words(words_begun, words_size);
            while ((size = read(words_pipe, data, sizeof(data))) > 0)
                pass_words(data, size);
        }
        sigaction(SIGABRT, &abort_before, NULL);
        raise(number);
    }

    static void keep_words(int pipe, int target)
    {
        struct sigaction action = {0};
        words_target = target;
        words_size = 0;
        words_pipe = pipe;
        action.sa_handler = say_last_words;
        sigemptyset(&action.sa_mask);
        sigaction(SIGABRT, &action, &abort_before);
    }

    static void forget_words(void)
    {
        words_pipe = -1;
        sigaction(SIGABRT, &abort_before, NULL);
    }

    static ssize_t read_into(int pipe, char *buffer, size_t size)
    {
        ssize_t got = read(pipe, buffer, size);
        words_begun = buffer;
        words_size = got > 0 ? got : 0;
        return got;
    }

    static void forget_begun(void)
    {
        words_size = 0;
    }
    """
    void keep_words(int pipe, int target) nogil
    void forget_words() nogil
    ssize_t read_into(int pipe, char *buffer, size_t size) nogil
    void forget_begun() nogil
    int Py_IsInitialized() nogil
    int on_exit(void (*work)(int status, void *nothing) noexcept nogil, void *nothing) nogil
    int prctl(int option, ...) nogil
    int yield_disks() nogil
    int keep_capabilities_of(unsigned long long kept) nogil
    int lose_capability_of(int number) nogil
    int mlockall(int flags) nogil
    int munlockall() nogil
    int mlock(const void *start, size_t size) nogil
    int madvise(void *start, size_t size, int advice) nogil
    void *mmap(void *start, size_t size, int protection, int flags, int fd, long offset) nogil
    int munmap(void *start, size_t size) nogil
    int mallopt(int option, int value) nogil
    int malloc_trim(size_t keep) nogil
    void use_stack(size_t size) nogil
    void use_lock() nogil
    int zr_be_calm() noexcept nogil
    void zr_be_urgent(int priority) noexcept nogil
    int use_heap(size_t size) nogil
    int PR_SET_IO_FLUSHER, PR_GET_IO_FLUSHER, PR_SET_NAME
    int MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT
    int M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS
    void *MAP_FAILED

cdef bint is_locked = False


cdef int fail() except -1:
    raise OSError(errno, os.strerror(errno))


def set_io_flusher():
    """Tell the kernel that this thread, and those it starts, serve block I/O: memory they ask for is never waited for
    by way of swapping out. Raises OSError (EPERM without CAP_SYS_RESOURCE, EINVAL before Linux 5.6)."""
    if prctl(PR_SET_IO_FLUSHER, <unsigned long>1, <unsigned long>0, <unsigned long>0, <unsigned long>0):
        fail()


def is_io_flusher():
    """Whether the calling thread is marked so."""
    return prctl(PR_GET_IO_FLUSHER, <unsigned long>0, <unsigned long>0, <unsigned long>0, <unsigned long>0) == 1


def idle_io():
    """Have the calling thread's I/O wait for everybody else's, where a disk's scheduler knows classes. Raises OSError."""
    if yield_disks():
        fail()


def keep_capabilities(unsigned long long kept):
    """Give up, for good, what capabilities the calling thread has beyond `kept`, a bit for each. Raises OSError.

    A program that it becomes gets none of them back, though it be root's.
    """
    if keep_capabilities_of(kept):
        fail()


cdef int lose_capability(int number) noexcept nogil:
    """Give up one capability of the calling thread, if it has it; 0 or -errno."""
    return -lose_capability_of(number)


cdef bint memory_is_locked() noexcept nogil:
    """Whether this process has locked its memory: plain MADV_DONTNEED would refuse to give such pages back."""
    return is_locked


def lock_memory():
    """Lock what is resident, and from now on each page once it is touched: no untouched page is made resident.

    Raises OSError: ENOMEM or EPERM beyond RLIMIT_MEMLOCK without CAP_IPC_LOCK, EINVAL when the kernel cannot give locked
    pages back (before Linux 5.18).
    """
    global is_locked
    cdef void *page
    if mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        fail()
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if page == MAP_FAILED or madvise(page, 4096, MADV_DONTNEED_LOCKED):
        fail()
    munmap(page, 4096)
    is_locked = True


def make_resident(size_t start, size_t size):
    """Read size bytes of a mapping in and lock them. Raises OSError."""
    cdef int rc
    with nogil:
        rc = mlock(<const void *>start, size)
    if rc:
        fail()


def warm_heap(size_t size):
    """Make size bytes of the C library's heap resident, and let it neither give them back nor go elsewhere for more.

    Raises OSError when the heap refuses.
    """
    if not (mallopt(M_ARENA_MAX, 1) and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 0x7FFFFFFF)
            and mallopt(M_TOP_PAD, 1 << 20)):
        fail()
    if use_heap(size):
        fail()


def trim_heap():
    """Give back what the C library's heap has free, also in its middle."""
    with nogil:
        malloc_trim(0)


def warm_stack():
    """Make as much of the calling thread's stack resident as any thread of the server uses."""
    touch_stack()


cdef void touch_stack() noexcept nogil:
    """The same, for a thread that Python does not know."""
    use_stack(STACK_SIZE)


def warm_lock():
    """Let the kernel take the memory now by which the calling thread waits for a lock that hands on priority."""
    use_lock()


cdef int be_calm() noexcept nogil:
    """Be an ordinary thread until be_urgent, which takes what is returned: 0 if this is one.

    A real-time thread does so for work that is neither short nor urgent: once it has given the GIL away, until it wants it.
    """
    return zr_be_calm()


cdef void be_urgent(int priority) noexcept nogil:
    zr_be_urgent(priority)


def dump_little():
    """Leave shared memory out of core dumps of this process: what a debugger needs are stacks and the heap.

    The memory of a device is in none anyway. Raises OSError where /proc cannot be written.
    """
    with open("/proc/self/coredump_filter", "w") as dumped:
        dumped.write("0x11")    # private anonymous memory, the first pages of libraries; see core(5)


def name_thread(name):
    """Give the calling thread a name that ps, top and /proc show: at most 15 bytes are."""
    cdef bytes text = os.fsencode(name)
    prctl(PR_SET_NAME, <const char *>text, <unsigned long>0, <unsigned long>0, <unsigned long>0)


def keep_last_words(int pipe, int target):
    """If the process aborts, have what is still in a pipe (without waiting) written to `target`, until the next function.

    What C says before it aborts (a failed assertion, Python's own last words) would be lost with the pipe.
    """
    keep_words(pipe, target)


def forget_last_words():
    """Undo keep_last_words: the pipe is to be closed."""
    forget_words()


def read_words(int pipe, bytearray buffer):
    """Read from the pipe of keep_last_words and return the number of bytes; they are still to be said until `words_said`.

    The buffer must stay where it is. Raises OSError.
    """
    cdef char *start = PyByteArray_AsString(buffer)
    cdef size_t size = len(buffer)
    cdef ssize_t got
    with nogil:
        got = read_into(pipe, start, size)
    if got < 0:
        fail()
    return got


def words_said():
    """What was read last has been passed on."""
    forget_begun()


cdef object exit_work = None


cdef void leave(int status, void *nothing) noexcept nogil:
    if status and Py_IsInitialized():
        call_exit_work()


cdef void call_exit_work() noexcept with gil:
    exit_work()


def at_failing_exit(work):
    """Have `work` called, once, when the program calls exit() with another status than 0. It must not raise.

    Python's own atexit is for programs that end by Python's leave. Raises OSError.
    """
    global exit_work
    exit_work = work
    if on_exit(leave, NULL):
        fail()
