"""What a process was started with and does not want: descriptors, and variables meant for another process.

Whoever starts us may have closed standard descriptors, may hold a lock on one that we would keep, and may
have been started by something that told it where to listen. Nothing of that is to change what is served.
"""

import errno
import fcntl
import os
import re
import socket
import stat
import sys
from collections.abc import Collection, Iterable

from zramd.errors import UsageError

HIGH = 100  # above all that nbdkit takes for listening sockets
FIRST = 3  # of the descriptors that a service manager passes: sd_listen_fds(3)
_MANAGERS = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES")
_USERS = {"ZRAMD_ROOT", "ZRAMD_STEPS"}  # all other ZRAMD_… a server is told by the command that starts it
_OF_PYTHON = {"PYTHONPATH", "PYTHONMALLOC", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"}
_OF_PYTHON |= {"PYTHONNOUSERSITE", "PYTHONSAFEPATH"}
_NAMES_ONE = r"/(?:dev|proc/self)/fd/(\d+)|=-(\d+)$"  # in a word: as <(…) has it, and nbdkit's =-FD
missing: frozenset[int] = frozenset()  # the standard descriptors that were closed


def complete_standard() -> None:
    """Open what is closed of stdin, stdout and stderr: the next file opened would be taken for it."""
    global missing
    closed = []
    for fd, how, name in ((0, os.O_RDONLY, "stdin"), (1, os.O_WRONLY, "stdout"), (2, os.O_WRONLY, "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, how)  # inheritable below: it stands for one that would be
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
            closed.append(fd)
        if getattr(sys, name) is None:  # Python has found it closed
            setattr(sys, name, os.fdopen(fd, "r" if how == os.O_RDONLY else "w", closefd=False))
    missing = frozenset(closed)


def forget_others() -> None:
    """Drop what the environment says to a process that we are not, before anything is done by it."""
    for name in list(os.environ):
        if name.startswith("ZRAMD_") and name not in _USERS:
            del os.environ[name]
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        for name in _MANAGERS:
            os.environ.pop(name, None)


def leave_manager() -> None:
    """Drop what a service manager has told this process: a server in the background is none of its own."""
    for name in (*_MANAGERS, "NOTIFY_SOCKET"):
        os.environ.pop(name, None)


def for_server() -> None:
    """Drop from the environment what would change the server in a way that nobody has asked for."""
    for name in list(os.environ):
        # Python's switches are meant for the user's programs; one has GnuTLS write the keys of all sessions.
        if (name.startswith("PYTHON") and name not in _OF_PYTHON) or name == "SSLKEYLOGFILE":
            del os.environ[name]


def high(fd: int, *, inheritable: bool = False) -> int:
    """Return a duplicate of a descriptor, not taken by nbdkit for a socket of its own. Raises OSError."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD if inheritable else fcntl.F_DUPFD_CLOEXEC, HIGH)
    except OSError as error:
        if error.errno == errno.EINVAL:  # there may not even be so many
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from None
        raise


def passed() -> range:
    """Return the descriptors that a service manager says it has passed to this process. Raises UsageError."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count:
        return range(0)
    if not re.fullmatch("[0-9]{1,4}", count):
        raise UsageError(f"LISTEN_FDS='{count}' is not a number of sockets: unset LISTEN_FDS and LISTEN_PID")
    return range(FIRST, FIRST + int(count))


def passed_sockets() -> list[int]:
    """Return those of `passed` on which to listen: all, or it raises UsageError.

    A server that believes what is not so listens where nobody wants it to.
    """
    found = passed()
    for fd in found:
        if not _listens(fd):
            raise UsageError(
                f"LISTEN_FDS={len(found)} says that descriptor {fd} is a socket on which to listen, but it "
                "is not: unset LISTEN_FDS and LISTEN_PID, or pass it"
            )
    return list(found)


def close_others(keep: Iterable[int] = (), words: Collection[str] = ()) -> None:
    """Have the program that this process becomes keep these descriptors and the standard ones, no others.

    A lock that a script holds must not be held by a server for as long as it lives. What `words`, its command
    line, name is kept, too.
    """
    kept = {0, 1, 2, *keep}
    for match in (match for word in words for match in re.finditer(_NAMES_ONE, word)):
        kept.add(int(match[1] or match[2]))
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and os.get_inheritable(fd) != (fd in kept):
                os.set_inheritable(fd, fd in kept)
        except OSError:
            continue  # the one by which they were listed


def _listens(fd: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        with socket.socket(fileno=os.dup(fd)) as sock:
            return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False
