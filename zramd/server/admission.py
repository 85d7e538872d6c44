"""How many clients there may be, and what is done when descriptors are short.

nbdkit accepts every client. If it cannot, for lack of a descriptor, it tries again and again, and logs a line
each time. So a client too many is cut off while a few descriptors are left. If none is left all the same,
nbdkit is kept from accepting, and new clients wait in the queue.
"""

import errno
import os
import resource
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from zramd.errors import DeviceError, sentence
from zramd.server import sockets
from zramd.server.trouble import Troubles

PATIENCE = 30.0  # seconds that a client has for its handshake
HURRY = 2.0  # the same, while others wait for their turn: a client that is awake needs a thousandth of it
LEAVING = 0.1  # seconds for which a server that leaves waits to tell those that wait
TURN = 5.0  # seconds for which a client over TCP waits for its turn before it is turned away
SPARE = 12  # descriptors that we keep for ourselves: a hand-over needs that many
MARGIN = 64  # descriptors that clients must leave free
# Has nbdkit's main thread look again at what it waits for. Nobody sends it otherwise.
LOOK_AGAIN = signal.SIGURG


class Arrivals:
    """Clients in their handshake; each has a thread of nbdkit's of its own."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}  # by thread, on the clock of CLOCK_BOOTTIME

    def __len__(self) -> int:
        return len(self._since)

    def begin(self) -> None:
        """Note that the calling thread serves a client that has just connected."""
        self._since[threading.get_native_id()] = time.clock_gettime(time.CLOCK_BOOTTIME)

    def end(self) -> None:
        """Note that the client of the calling thread has completed its handshake."""
        self._since.pop(threading.get_native_id(), None)

    def forget_gone(self) -> None:
        """Forget clients that left during their handshake, which nbdkit does not report."""
        for thread in list(self._since):
            if not os.path.exists(f"/proc/self/task/{thread}"):
                self._since.pop(thread, None)

    def cut_off(self, patience: float = PATIENCE) -> int:
        """Cut off clients whose handshake takes longer than so many seconds; return how many there were."""
        self.forget_gone()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        late = [(thread, since) for thread, since in self._since.copy().items() if now - since > patience]
        return sum(_cut_off(thread, since) for thread, since in late)


def _cut_off(thread: int, since: float) -> bool:
    """Shut the connection that a thread waits for, if the thread is still the one that began then; say so.

    nbdkit does not say which connection a thread serves, but the kernel does: the thread waits in a system
    call, and the descriptor is its first argument.
    """
    try:
        with open(f"/proc/self/task/{thread}/stat", "rb") as file:
            started = int(file.read().rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        with open(f"/proc/self/task/{thread}/syscall") as file:
            words = file.read().split()
        fd = int(words[1], 16) if len(words) > 1 else -1
        # The number of a thread that has ended may be another's by now.
        if started > since + 1 or not 2 < fd < 1 << 30 or not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        with socket.socket(fileno=os.dup(fd)) as sock:
            sock.shutdown(socket.SHUT_RDWR)
        return True
    except (OSError, ValueError):
        return False


class Descriptors:
    """Keeps a few descriptors for ourselves, and knows whether there are any for clients."""

    def __init__(self, clients: int) -> None:
        """Have room for that many clients if the system lets us."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * clients + 4 * MARGIN)), hard))
        self._file = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._spare: list[int] = []
        self.are_out = False  # when looked at last
        self.missing = ""
        self.keep()

    def keep(self) -> bool:
        """Fill up what we keep for ourselves; if that cannot be, give all of it back and return False.

        `missing` says why then. Raises OSError when it is not known whether there are more.
        """
        try:
            # Opened, not duplicated: there may be too many files in the whole system, too.
            while len(self._spare) < SPARE:
                self._spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            self.give_back()
            self.missing = sentence(error)
            return False
        return True

    def give_back(self) -> None:
        """Let what we keep be used."""
        while self._spare:
            os.close(self._spare.pop())

    def shortage(self) -> str:
        """Return why another client would leave too few descriptors, "" if enough would be left."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        try:
            lowest = os.dup(self._file)  # the lowest number that is free: all below it are in use
            os.close(lowest)
            self.are_out = False
        except OSError:
            lowest = most
            self.are_out = True
        if lowest < most - min(MARGIN, most // 4):
            return ""
        return f"{lowest} of {most} descriptors are in use: raise ulimit -n, or LimitNOFILE= of the service"


class Door:
    """The sockets on which nbdkit accepts clients; while it is shut, new clients wait in their queue."""

    def __init__(self, descriptors: list[int]) -> None:
        self._places = descriptors
        self.sockets = [os.dup(fd) for fd in descriptors]
        self._silent, self._never_written = os.pipe2(os.O_CLOEXEC)
        self.is_shut = False
        self._lock = threading.Lock()

    def shut(self) -> None:
        """Keep nbdkit from accepting clients. Needs no new descriptor."""
        with self._lock:
            if not self.is_shut:
                self.is_shut = True
                for place in self._places:
                    os.dup2(self._silent, place, inheritable=False)
                self._look_again()

    def open(self) -> None:
        """Let nbdkit accept again, first the clients that have queued meanwhile."""
        with self._lock:
            if self.is_shut:
                self.is_shut = False
                for place, sock in zip(self._places, self.sockets, strict=True):
                    os.dup2(sock, place, inheritable=False)
                self._look_again()

    def _look_again(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, LOOK_AGAIN)


class Admission:
    """Lets clients in or turns them away, and says so."""

    WATCH = 1.0  # seconds between two looks
    WATCH_QUEUE = 0.02  # the same, while clients wait for their turn: some of those before them may have left
    GREET = 0.1  # the same, for newcomers: each look goes over all descriptors

    def __init__(
        self,
        troubles: Troubles,
        limit: Callable[[], int],
        clients: Callable[[], int],
        wake_up: Callable[[], None] | None = None,
        handshakes: Callable[[], int] = lambda: 1 << 16,
    ) -> None:
        """`limit` returns the most connections allowed, `clients` how many of them are clients by now.

        `handshakes` returns how many over TCP may be in their handshake at once. `wake_up` has the
        housekeeper look around: there is a newcomer to greet; None: nobody is greeted.
        """
        self._troubles = troubles
        self.lock = threading.Condition()  # one at a time comes in; notified when a handshake is over
        self._limit = limit
        self._clients = clients
        self._handshakes = handshakes
        self._strangers = False  # whether clients come over TCP: anyone may, before the handshake
        self._queue = 0  # clients that wait for their turn
        self._leaving = False
        self._arrivals = Arrivals()
        self._wake_up = wake_up
        self._turned_away = ""
        self.has_newcomers = False  # connections that `greet` has not seen
        self._descriptors: Descriptors | None = None
        self._door: Door | None = None

    def begin(self, listening: list[int]) -> None:
        """Look after the sockets on which nbdkit accepts. Raises OSError."""
        self._descriptors = Descriptors(self._limit())
        self._door = Door(listening)
        self._strangers = sockets.any_tcp(listening)

    @property
    def sockets(self) -> list[int]:
        """Those on which clients are accepted, also while nbdkit does not have them."""
        return self._door.sockets if self._door is not None else []

    def connects(self) -> None:
        """Let a client in; its thread calls this, with `lock`. Raises DeviceError for one too many.

        Over TCP it may have to wait until others have completed their handshake, and is turned away if that
        takes too long.
        """
        if reason := self._no_room() or self._no_turn():
            self._turned_away = reason
            if self._door is not None and self._descriptors is not None and self._descriptors.are_out:
                self._door.shut()  # at once: nbdkit tries for the next in a loop
            raise DeviceError(f"a client was turned away: {reason}")
        self._arrivals.begin()
        if self._wake_up is not None and not self.has_newcomers:
            self.has_newcomers = True
            self._wake_up()

    def leave(self) -> None:
        """Let nobody wait for a turn any more: nbdkit, which is ending, waits for each who does."""
        self._leaving = True
        if self.lock.acquire(timeout=LEAVING):  # one that is being opened has it while the device is reset
            self.lock.notify_all()
            self.lock.release()

    def becomes_client(self) -> None:
        """Note that the client of the calling thread has completed its handshake; call it with `lock`."""
        self._arrivals.end()
        self.lock.notify()

    @property
    def handshakes(self) -> int:
        """How many connections are in their handshake; some of them may have left since the last look."""
        return len(self._arrivals)

    def _is_full(self) -> bool:
        return len(self._arrivals) >= self._handshakes()

    def _no_turn(self) -> str:
        """Wait until a newcomer over TCP may begin its handshake; return why it may not, "" if it may."""
        if not self._strangers:
            return ""
        if self._is_full():
            self._arrivals.forget_gone()
        if not (self._queue or self._is_full()):
            return ""
        end = time.monotonic() + TURN
        self._queue += 1
        if self._wake_up is not None:
            self._wake_up()
        try:
            while not self._leaving:
                left = end - time.monotonic()
                if left <= 0:
                    return (
                        f"{self._handshakes()} connections are in their handshake, the most that "
                        "handshake_limit allows"
                    )
                self.lock.wait(left)
                if not self._is_full():
                    return ""
            return "the server is leaving"
        finally:
            self._queue -= 1

    def greet(self, others: frozenset[int]) -> None:
        """Set what newcomers' connections need; `others` are sockets that are no clients. Raises OSError."""
        self.has_newcomers = False
        try:
            sockets.widen_clients(others)
        except BaseException:
            self.has_newcomers = True
            raise

    def greet_interval(self) -> float:
        """Return the seconds between two calls of greet, 0: there is nobody to greet."""
        return self.GREET if self.has_newcomers else 0

    def use_spare(self) -> None:
        """Let the descriptors that are kept for ourselves be used."""
        if self._descriptors is not None:
            self._descriptors.give_back()

    def interval(self) -> float:
        """Return the seconds between two calls of watch_descriptors."""
        return self.WATCH / 10 if self._door is not None and self._door.is_shut else self.WATCH

    def watch_interval(self) -> float:
        """Return the seconds between two calls of watch_clients."""
        return self.WATCH_QUEUE if self._queue else self.WATCH

    def watch_descriptors(self) -> None:
        """Keep a few descriptors for ourselves, and shut the door while there are no others."""
        if self._descriptors is None or self._door is None:
            return
        what = "no client is let in, for lack of descriptors"
        if self._descriptors.keep():
            self._door.open()
            self._troubles.over(what)
        else:
            self._door.shut()
            self._troubles.begin(what, self._descriptors.missing)

    def watch_clients(self) -> None:
        """Cut off clients that never complete their handshake; report that clients are turned away, if so."""
        if len(self._arrivals):
            self._arrivals.cut_off(HURRY if self._queue else PATIENCE)
        if self._queue:
            with self.lock:
                self.lock.notify_all()  # nbdkit does not report that somebody has left in its handshake
        if self._turned_away:
            self._troubles.begin("clients are turned away", self._turned_away)
            self._turned_away = self._no_room() or (self._turned_away if self._queue else "")
        else:
            self._troubles.over("clients are turned away")

    def _no_room(self) -> str:
        """Return why no other client can be let in, "" if one can."""
        most = self._limit()
        if self._clients() + len(self._arrivals) + self._queue >= most:
            self._arrivals.forget_gone()
        if self._clients() + len(self._arrivals) + self._queue >= most:
            return f"there are {most} connections already, the most that client_limit allows"
        return "" if self._descriptors is None else self._descriptors.shortage()
