"""System calls: their numbers here, how each can fail, and which are never made to fail, and why."""

import errno
import re
import subprocess
from functools import cache

SHORT = "short"  # not an error: a read or a write of half of what was asked for

# Calls that are never made to fail: each with what an error there would say, or why it would say nothing.
EXCLUDED = {
    # They have no error that a sound program can meet, and libc and Python do not look.
    "exit exit_group rt_sigreturn restart_syscall": "do not return",
    "getpid gettid getppid getuid geteuid getgid getegid getpgrp umask sched_yield": "cannot fail",
    "futex rseq set_robust_list set_tid_address": "libc's own; it ends the program when they fail",
    "rt_sigaction rt_sigprocmask sigaltstack": "fail for wrong arguments only",
    "arch_prctl prlimit64 uname sysinfo getrlimit getrandom": "fail for wrong arguments only",
    "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday": "fail for wrong arguments only",
    # Were they refused, a descriptor or a mapping that is there would be lost: the kernel never does that.
    "close close_range": "Linux closes the descriptor whatever it returns",
    "dup2 dup3": "the number is an open one, or below all limits: Linux has nothing to allocate",
    "munmap": "the C library ignores it: the memory would only leak",
    "rt_sigtimedwait rt_sigsuspend tgkill kill pidfd_send_signal": "fail for wrong arguments or rights only",
    "seccomp": "the tests' own",
}

_DESCRIPTORS = ("EMFILE", "ENFILE", "ENOMEM")
_ERRORS = {
    "openat open openat2": (*_DESCRIPTORS, "EACCES", "EINTR"),
    "openat+creat": (*_DESCRIPTORS, "ENOSPC", "EACCES"),
    "read pread64 readv preadv": ("EIO", "ENOMEM", "EINTR", SHORT),
    "recvfrom recvmsg": ("ENOMEM", "EINTR", SHORT),
    "write pwrite64 writev pwritev": ("ENOSPC", "EIO", "EINTR", SHORT),
    "sendto sendmsg": ("ENOBUFS", "EINTR", SHORT),
    "mmap": ("ENOMEM",),
    "mremap mprotect mlock mlock2 mlockall brk": ("ENOMEM",),
    "madvise": ("ENOMEM", "EAGAIN"),
    "clone clone3 fork vfork": ("EAGAIN", "ENOMEM"),
    "socket accept accept4 socketpair pipe2 pipe eventfd2 epoll_create1 memfd_create": _DESCRIPTORS,
    "dup pidfd_open pidfd_getfd inotify_init1": ("EMFILE", "ENOMEM"),
    "fcntl:dupfd": ("EMFILE",),
    "fcntl flock": ("ENOLCK", "EINTR"),
    "bind": ("EACCES", "ENOSPC"),
    "listen setsockopt getsockname getpeername": ("ENOBUFS",),
    "connect": ("ENOMEM", "EAGAIN"),  # none of ours waits, so that none can be interrupted
    "getsockopt:pidfd": ("EMFILE", "ENOMEM"),  # all others have nothing to allocate
    "unlink unlinkat rmdir": ("EACCES", "ENOMEM"),
    "rename renameat renameat2 mkdir mkdirat link linkat symlink symlinkat": ("ENOSPC", "EACCES"),
    "chmod fchmod fchmodat chown fchown fchownat utimensat": ("EPERM", "ENOSPC"),
    "ftruncate truncate fallocate": ("ENOSPC", "EIO", "EINTR"),
    "newfstatat fstat stat lstat statx fstatfs statfs access faccessat faccessat2": ("ENOMEM", "EACCES"),
    "readlink readlinkat getdents64 getcwd chdir fchdir": ("ENOMEM", "EACCES"),
    "poll ppoll select pselect6 epoll_wait epoll_pwait": ("EINTR", "ENOMEM"),
    "lseek": ("EIO",),
    "fsync fdatasync": ("EIO", "ENOSPC"),
    "execve": ("ENOMEM", "EACCES"),
    "wait4 waitid": ("EINTR",),
    "sched_setscheduler setpriority prctl sched_setaffinity": ("EPERM",),
    "setsid ioctl shutdown": ("EPERM",),
    "get_mempolicy mincore": ("ENOMEM",),
}
ERRORS = {name: errors for names, errors in _ERRORS.items() for name in names.split()}
REASONS = {name: reason for names, reason in EXCLUDED.items() for name in names.split()}

# Errors of its own calls that nbdkit does not survive: thread, call, error, what it does.
NBDKIT = (("nbdkit", "poll", "ENOMEM", "it ends when it cannot wait for clients"),)

# Of a shortage all calls that can meet it fail, of another error only the one call.
SHORTAGES = frozenset(("EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "ENOBUFS"))


@cache
def numbers() -> dict[str, int]:
    """Return the number of each call on this machine, as its headers have them."""
    words = ["gcc", "-E", "-dM", "-include", "sys/syscall.h", "-xc", "/dev/null"]
    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)\n", text)}


@cache
def names() -> dict[int, str]:
    """Return the name of each number."""
    return {number: name for name, number in numbers().items()}


def code(error: str) -> int:
    """Return the number of an error; 0 for a short read or write."""
    return 0 if error == SHORT else int(getattr(errno, error))
