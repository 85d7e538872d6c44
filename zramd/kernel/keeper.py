"""The process that stays beside an attached kernel device and connects it again when its server restarts.

`zramd attach` starts it, and the device is its doing: it shakes hands with the server, gives the connections
to the kernel and keeps none. When the kernel reports dead connections, or the server's process has
ended, it waits for a server that holds the same data, and offers the kernel new connections. Meanwhile the
kernel lets requests wait, as long as dead_conn_timeout says.

It acts when nobody can swap, so nothing that it needs may be swapped out, read from a disk, or waited for:
its memory is locked and warm, the kernel knows it for an I/O flusher, and before it says that all is well it
has gone the whole way once, with a connection that the kernel had no use for.
"""

import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from zramd.contract import rundir
from zramd.errors import AttachError, RundirError, SwapError, ZramdError, reason
from zramd.kernel import attached, netlink, protection
from zramd.process.steps import step

RETRY = 0.01  # seconds between two looks for a new server; a server takes 100 to start
RETRY_LATER = 0.2  # the same, once it has been away for RETRY_SOON
RETRY_SOON = 5.0
LOOK = 60.0  # seconds between two looks whether the device is still there
LEAVE = 1.0  # seconds for which a keeper that is told to end waits for its device to go
HEAP_BYTES = 1 << 20


class Job(NamedTuple):
    """What to attach, all of it as words on the command line."""

    name: str
    address: str  # of the unix socket, or host:port
    folder: str  # the server's run folder
    device: int  # its index, -1 for a free one
    adopt: int  # 1: the device is attached already, and its keeper has died
    data: str  # what `adopt` must find
    connections: int
    timeout: float  # seconds after which the kernel looks at a request that got no answer, 0 for its 30
    dead_conn_timeout: int  # seconds for which requests wait for a new connection

    def words(self) -> list[str]:
        """Return the command line's words."""
        return [str(value) for value in self]


def job(words: list[str]) -> Job:
    """Return what `Job.words` stands for."""
    kinds = (str, str, str, int, int, str, int, float, int)
    return Job(*(kind(word) for kind, word in zip(kinds, words, strict=True)))


class Keeper:
    """One device and its connections."""

    def __init__(self, job: Job) -> None:
        """Raise AttachError or OSError when the kernel has no NBD client, or another keeper is there."""
        self.index = job.device
        self._job = job
        host, colon, port = job.address.rpartition(":")
        self._address: netlink.Address = job.address if "/" in job.address or not colon else (host, int(port))
        self._backend = attached.backend(job.name)
        self._dead = 0  # connections that are to be replaced
        self._size = int(attached.read_sys(self.device, "size") or 0) << 9  # of a device that is adopted
        self._data = ""
        self._connected = False  # the device, by us
        self._said = ""
        self._poll = select.poll()
        self._server = -1  # pidfd
        self._kernel = netlink.Kernel()
        self._links = self._kernel.dead_links()
        self._poll.register(self._links, select.POLLIN)
        self._log = -1
        with suppress(OSError):  # a container may have none
            self._log = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._record = attached.Record(job.name)

    @property
    def device(self) -> str:
        """The device's name."""
        return f"/dev/nbd{self.index}"

    def attach(self) -> None:
        """Protect this process, attach the device, rehearse a reconnection, and print "ok" and the index.

        Raises AttachError, SwapError or OSError; then nothing is attached.
        """
        step("keeper.recorded")
        protection.prepare()
        protection.protect_process(HEAP_BYTES)
        protection.take_priority()
        try:
            if not self._job.adopt:
                with _uninterrupted():
                    self._connect()
            self._data = self._job.data if self._job.adopt else attached.data_of(self._job.folder)
            self._record.write(self.device, self._data, keeper=os.getpid())
            self._say("attached")
            step("keeper.noted")
            self._dead = self._job.connections if self._job.adopt else 1
            if not self._offer() and not self._job.adopt:
                raise AttachError(f"{self._job.name} does not take a second connection")
            step("keeper.ready")
            # If nobody is there any more to be told, what was done is taken back too.
            sys.stdout.write(f"ok {self.index}\n")
            sys.stdout.flush()
        except BaseException:
            if not self._job.adopt:
                if self._connected:
                    self._kernel.disconnect(self.index)
                self._record.remove()
            raise

    def keep(self) -> None:
        """Replace connections that die, until the device is detached."""
        while True:
            for fd, _ in self._poll.poll(LOOK * 1000):
                if fd == self._server:
                    self._forget_server()
            self._count_dead()
            if not attached.is_connected(self.device):
                self._record.remove()
                return
            if self._dead:
                self._reconnect()

    def leave(self) -> None:
        """Take the record away if the device is gone, or goes now.

        The command that detaches may have been killed.
        """
        end = time.monotonic() + LEAVE
        while attached.is_connected(self.device):
            if time.monotonic() > end:  # it lives on without us
                return
            time.sleep(RETRY)
        self._record.remove()

    # ---- Inside

    def _connect(self) -> None:
        """Give the kernel its connections."""
        job, links = self._job, []
        try:
            for _ in range(job.connections):
                links.append(self._dial())
                export = netlink.handshake(links[-1], job.name)
                if job.connections > 1 and not export.flags & netlink.MULTI_CONN:
                    raise AttachError(f"the server of {job.name} does not allow for several connections")
            self._size = export.size
            step("keeper.greeted")
            # With one connection the kernel need not cut off a server that is only slow: see _set_timeout.
            self.index = self._kernel.connect(
                [link.fileno() for link in links],
                export,
                index=job.device if job.device >= 0 else None,
                timeout=math.ceil(job.timeout) if job.connections > 1 else 0,
                dead_conn_timeout=job.dead_conn_timeout,
                backend=self._backend,
            )
            self._connected = True
            step("keeper.connected")
        except OSError as error:
            what = self.device if job.device >= 0 else "an NBD device"
            raise AttachError(f"the kernel does not give us {what}: {reason(error)}") from None
        finally:
            for link in links:
                link.close()
        if job.connections == 1 and job.timeout:
            self._set_timeout()

    def _dial(self) -> socket.socket:
        try:
            return netlink.dial(self._address)
        except OSError as error:
            raise AttachError(
                f"the server cannot be reached at '{self._job.address}': {reason(error)}"
            ) from None

    def _set_timeout(self) -> None:
        """Let the kernel look after so many seconds whether a request's connection was replaced.

        Then it sends the request again. A timeout given by netlink would do that too, but also cut off a
        server that is only slow; and what such a server has read already it may write after newer data.
        Kernels before 5.0 look after 30 s.
        """
        with suppress(OSError), open(f"/sys/block/nbd{self.index}/queue/io_timeout", "w") as file:
            file.write(f"{self._job.timeout * 1000:.0f}")

    def _reconnect(self) -> None:
        self._say(f"{self._dead} of {self._job.connections} connections to {self._job.name} are dead")
        since = time.monotonic()
        while self._dead and attached.is_connected(self.device):
            if self._offer():
                self._say(f"connected to {self._job.name} again after {time.monotonic() - since:.3f} s")
            else:
                time.sleep(RETRY if time.monotonic() - since < RETRY_SOON else RETRY_LATER)
            self._count_dead()

    def _offer(self) -> bool:
        """Offer the kernel as many connections as are dead; say whether there is a server to connect to.

        What the kernel has no use for it drops without a word.
        """
        links, dead = [], self._dead
        try:
            for _ in range(dead):
                links.append(netlink.dial(self._address))
                export = netlink.handshake(links[-1], self._job.name)
                # Another server may have come in its place. Zeros instead of data are worse than an error.
                if export.size != (self._size or export.size):
                    raise AttachError(f"it has {export.size} bytes instead of {self._size}")
                if attached.data_of(self._job.folder) != self._data:
                    raise AttachError("it does not hold the data that was there before")
            self._dead = 0
            self._kernel.reconfigure(self.index, [link.fileno() for link in links], self._backend)
            self._size = export.size
            self._said = ""
            self._watch_server()
            return True
        except AttachError as error:
            if self._said != str(error):
                self._said = str(error)
                self._say(f"{self._job.name} serves, but cannot be used: {error}")
        except OSError:
            self._dead = dead  # nobody is there
        finally:
            for link in links:
                link.close()
        return False

    def _count_dead(self) -> None:
        """Take the news from the kernel."""
        news = self._links.read()
        if news is None:
            self._dead = self._job.connections
        elif self.index in news:
            self._dead = min(self._dead + news.count(self.index), self._job.connections)

    def _watch_server(self) -> None:
        """Watch the server's process too: the kernel needs memory to report a dead connection."""
        self._forget_server(dead=0)
        with suppress(OSError, RundirError):
            pid = rundir.holder(self._job.folder)
            if pid:
                server = os.pidfd_open(pid)
                try:
                    # Else it has left its number to another process.
                    if rundir.holder(self._job.folder) == pid:
                        self._poll.register(server, select.POLLIN)
                        self._server = server
                finally:
                    if self._server != server:
                        os.close(server)

    def _forget_server(self, dead: int | None = None) -> None:
        self._dead = self._job.connections if dead is None else dead
        if self._server >= 0:
            self._poll.unregister(self._server)
            os.close(self._server)
            self._server = -1

    def _say(self, sentence: str) -> None:
        """Write to the kernel's log, where what the kernel says of the device stands too. It never blocks."""
        with suppress(OSError):
            os.write(self._log, f"zramd: nbd{self.index}: {sentence}\n".encode())


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Have a SIGTERM wait: what the kernel was told just now, it is also told to undo."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(words: list[str]) -> int:
    """Attach, print "ok" and the device's index, or one sentence that says why not, and stay.

    SIGTERM: the command that attaches has given up, or the one that detaches has done it.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    try:
        keeper = Keeper(job(words))
        keeper.attach()
    except SwapError as error:
        print(error.missing)
        return 1
    except (ZramdError, OSError) as error:
        print(reason(error) if isinstance(error, OSError) else error)
        return 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        keeper.keep()
    except SystemExit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        keeper.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
