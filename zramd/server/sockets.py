"""nbdkit's sockets in this process. nbdkit does not say which they are, so we search all open files."""

import errno
import fcntl
import os
import signal
import socket
import stat
import sys
import termios
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from zramd.contract import handover
from zramd.errors import is_shortage
from zramd.process import buffers

# Leave at once, also while swapped to: the state stays. Without a state as SIGTERM.
HAND_OVER = signal.SIGUSR1
# A client that is silent for 20 seconds is asked whether it is there. After 30 more without an answer its
# connection ends; so does that of a client that takes nothing for 50. A network that is cut off for 20 or 30
# seconds, as while a switch starts, ends none.
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50_000),  # milliseconds
)
_LAST_SENT, _LAST_RECEIVED = 44, 52  # where struct tcp_info of <linux/tcp.h> has these, in milliseconds
_TCP_INFO_BYTES = 56


def listening() -> list[int]:
    """Return the descriptors of the sockets on which clients are accepted, those alone if called early."""
    found = []
    for fd, _, sock in _streams():
        with sock:
            if _listens(sock):
                found.append(fd)
    return found


def bound(descriptors: list[int]) -> list[tuple[str, os.stat_result]]:
    """Return the files of unix sockets that this process has bound itself, each with what it is known by.

    Those that were passed on to us by a service manager are that one's; by a server before, they are ours.
    """
    if "LISTEN_FDS" in os.environ and not handover.takes_over():
        return []
    found = []
    for fd in descriptors:
        with socket.socket(fileno=os.dup(fd)) as sock, suppress(OSError):
            name = sock.getsockname() if sock.family == socket.AF_UNIX else ""
            if isinstance(name, str) and name:
                path = os.path.abspath(name)
                found.append((path, os.lstat(path)))
    return found


def unlink(files: list[tuple[str, os.stat_result]]) -> None:
    """Remove what `bound` found, but for what has another file in its place. Never raises."""
    for path, status in files:
        with suppress(OSError):
            if os.path.samestat(os.lstat(path), status):
                os.unlink(path)


def has_filters() -> bool:
    """Say whether nbdkit was given filters."""
    return any(word.startswith("--fi") for word in told())


def told() -> list[str]:
    """Return this process's command line: what nbdkit was told."""
    with open("/proc/self/cmdline", "rb") as file:
        return os.fsdecode(file.read()).split("\0")[:-1]


def inherited() -> frozenset[int]:
    """Return the inodes of the sockets that are not clients, seen before nbdkit accepts the first.

    Without a listening socket nbdkit serves its standard input: then what is there is the client.
    """
    inodes = set()
    found = False
    for _, inode, sock in _streams():
        with sock:
            inodes.add(inode)
            found = found or _listens(sock)
    return frozenset(inodes) if found else frozenset()


def keep_alive(descriptors: list[int]) -> None:
    """Have the kernel end TCP connections to clients that vanished, among those accepted on these sockets.

    A machine that was switched off would count as a client for ever.
    """
    for fd in descriptors:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if not is_tcp(sock):
                continue
            for level, option, value in _KEEP_ALIVE:
                with suppress(OSError):
                    sock.setsockopt(level, option, value)


def widen_clients(others: frozenset[int]) -> None:
    """Give clients' connections large send buffers, for our answers; `others` are `inherited`.

    The kernel gives each connection its default, whatever the listening socket has. If one is closed while we
    look, another socket of ours may get the buffer, which does no harm.
    """
    for sock in _clients(others):
        buffers.widen(sock)


def shut_clients(others: frozenset[int], how: int) -> int:
    """Shut every connection of a client, and return how many there still are; `others` are `inherited`."""
    clients = 0
    for sock in _clients(others):
        clients += 1
        with suppress(OSError):  # it is gone already
            sock.shutdown(how)
    return clients


def end_idle(others: frozenset[int], seconds: float) -> int:
    """Shut TCP connections on which nothing has come or gone for so long; return how many there were.

    The kernel knows when data came last, so no request has to note it; a probe of keep-alive is no data.
    """
    ended = 0
    for sock in _clients(others):
        if not is_tcp(sock):
            continue
        with suppress(OSError):
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            if len(info) == _TCP_INFO_BYTES:
                sent, came = (
                    int.from_bytes(info[at : at + 4], sys.byteorder) for at in (_LAST_SENT, _LAST_RECEIVED)
                )
                if min(sent, came) > seconds * 1000:
                    sock.shutdown(socket.SHUT_RDWR)
                    ended += 1
    return ended


def is_tcp(sock: socket.socket) -> bool:
    """Say whether a stream socket's other end may be another machine."""
    return sock.family in (socket.AF_INET, socket.AF_INET6)


def any_tcp(descriptors: list[int]) -> bool:
    """Say whether one of these sockets is of TCP."""
    for fd in descriptors:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if is_tcp(sock):
                return True
    return False


def count_clients(others: frozenset[int]) -> int:
    """Return how many connections of clients there are; `others` are `inherited`."""
    return sum(1 for _ in _clients(others))


@contextmanager
def clients(others: frozenset[int]) -> Iterator[list[socket.socket]]:
    """Yield the connections of all clients; until the `with` ends, none of them is closed."""
    found = []
    try:
        for sock in _clients(others):
            with suppress(OSError):  # no descriptor is left for it
                found.append(sock.dup())
        yield found
    finally:
        for sock in found:
            sock.close()


def unread(sock: socket.socket) -> int:
    """Return how many bytes have come that nobody has read yet, 0 if this kind of socket does not say."""
    try:
        return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def stop_accepting(descriptors: Iterable[int], number: int) -> None:
    """Keep nbdkit from accepting clients: new ones queue for the process that has the sockets next.

    nbdkit's main thread may be waiting on the sockets, or about to return with a last client. The signal
    `number`, which does nothing, has it look again. Once that is handled, no client is accepted any more.
    """
    silent, _ = os.pipe2(os.O_CLOEXEC)
    for fd in descriptors:
        os.dup2(silent, fd, inheritable=False)
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, number)


def send(path: str, descriptors: Sequence[int], text: str) -> None:
    """Send descriptors, and a text with them, to the socket at `path`. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
        to.settimeout(1)
        to.connect(path)
        socket.send_fds(to, [text.encode()], descriptors)


def _clients(others: frozenset[int]) -> Iterator[socket.socket]:
    """Yield each connection of a client, to be used before the next."""
    for _, inode, sock in _streams():
        with sock:
            if inode not in others and not _listens(sock):
                yield sock


def _streams() -> Iterator[tuple[int, int, socket.socket]]:
    """Yield number, inode and a duplicate of each stream socket beyond stdin, stdout and stderr.

    The socket itself if none can be had: a server that leaves has to reach all. Raises OSError for one that
    cannot be looked at.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            status = os.fstat(fd)
            if fd <= 2 or not stat.S_ISSOCK(status.st_mode):
                continue
            sock = _duplicate(fd)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOTSOCK):
                raise
            continue  # closed since it was listed
        if sock.type == socket.SOCK_STREAM:
            yield fd, status.st_ino, sock
        else:
            sock.close()


class _Borrowed(socket.socket):
    """A socket whose descriptor is somebody else's, and stays open."""

    def close(self) -> None:
        self.detach()


def _duplicate(fd: int) -> socket.socket:
    try:
        copy = os.dup(fd)
    except OSError as error:
        if not is_shortage(error):
            raise
        return _Borrowed(fileno=fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:  # what is left open here is found and duplicated, too, the next time
        os.close(copy)
        raise


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
