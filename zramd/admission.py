"""How many clients there may be, and what is done when descriptors are short.

nbdkit accepts whoever comes. If it cannot, for want of a descriptor, it tries again and again, with a line of
its log each time. So a client too many is cut off while there still are some, and if there are none all the
same, nobody is accepted: who comes waits in the queue.
"""

import os
import resource
import signal
import socket
import stat
import threading
import time
from contextlib import suppress

PATIENCE = 30.0  # seconds in which a client is to say what it wants
SPARE = 12  # descriptors of one's own for when there are no others: a hand-over needs that many
MARGIN = 64  # descriptors that clients leave free
# Has nbdkit's main thread look again at what it waits for. Nobody sends it otherwise.
LOOK_AGAIN = signal.SIGURG


class Arrivals:
    """Those who have connected, and not said yet what they want; each has a thread of nbdkit's of its own."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}  # by thread, on the clock of CLOCK_BOOTTIME

    def __len__(self) -> int:
        return len(self._since)

    def begin(self) -> None:
        """The calling thread serves one who has just connected."""
        self._since[threading.get_native_id()] = time.clock_gettime(time.CLOCK_BOOTTIME)

    def end(self) -> None:
        """The one that the calling thread serves has become a client."""
        self._since.pop(threading.get_native_id(), None)

    def forget_gone(self) -> None:
        """Forget those who left before they became clients: of them nbdkit does not tell."""
        for thread in list(self._since):
            if not os.path.exists(f"/proc/self/task/{thread}"):
                self._since.pop(thread, None)

    def cut_off(self, patience: float = PATIENCE) -> int:
        """Cut off who takes longer than that many seconds, and return how many those were."""
        self.forget_gone()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        late = [(thread, since) for thread, since in self._since.copy().items() if now - since > patience]
        return sum(_cut_off(thread, since) for thread, since in late)


def _cut_off(thread: int, since: float) -> bool:
    """Shut the connection that a thread waits for, if it is the one that began then.

    nbdkit does not tell which connection a thread serves, but the kernel does: it waits in a system call
    whose first argument that is.
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
        self.keep()

    def keep(self) -> bool:
        """Keep what is missing of our own; if there are no more, give all back for use, and return False."""
        try:
            while len(self._spare) < SPARE:
                self._spare.append(os.dup(self._file))
            os.close(os.dup(self._file))
        except OSError:
            self.give_back()
            return False
        return True

    def give_back(self) -> None:
        """Let what we keep be used."""
        while self._spare:
            os.close(self._spare.pop())

    def shortage(self) -> str:
        """Return why another client would leave too few, "" if he would not."""
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
    """The sockets on which nbdkit accepts clients; while they are shut, who comes waits in their queue."""

    def __init__(self, descriptors: list[int]) -> None:
        self._places = descriptors
        self.sockets = [os.dup(fd) for fd in descriptors]
        self._silent, self._never_written = os.pipe2(os.O_CLOEXEC)
        self.is_shut = False
        self._lock = threading.Lock()

    def shut(self) -> None:
        """Accept nobody from now on. Needs no descriptor."""
        with self._lock:
            if not self.is_shut:
                self.is_shut = True
                for place in self._places:
                    os.dup2(self._silent, place, inheritable=False)
                self._look_again()

    def open(self) -> None:
        """Accept again, those first who have come meanwhile."""
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
