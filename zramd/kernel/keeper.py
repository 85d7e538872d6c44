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
import socket
import sys
import time
from contextlib import suppress
from typing import NamedTuple

from zramd.contract import exported
from zramd.errors import AttachError, reason
from zramd.kernel import attached, keeping, netlink, protection
from zramd.kernel.keeping import LEAVE, LOOK, RETRY, RETRY_LATER, RETRY_SOON
from zramd.process.steps import step


class Job(NamedTuple):
    """What to attach, all of it as words on the command line."""

    name: str  # of the attachment: the server's, or remote.name
    export: str
    address: str  # of the unix socket, or host:port, where the host is a number
    folder: str  # the server's run folder, '' on another machine
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
    kinds = (str, str, str, str, int, int, str, int, float, int)
    return Job(*(kind(word) for kind, word in zip(kinds, words, strict=True)))


class Keeper:
    """One device and its connections."""

    def __init__(self, job: Job) -> None:
        """Raise AttachError or OSError when the kernel has no NBD client, or another keeper is there."""
        self.index = job.device
        self._job = job
        host, colon, port = job.address.rpartition(":")
        self._address: netlink.Address = (
            job.address if "/" in job.address or not colon else (host.strip("[]"), int(port))
        )
        self._backend = attached.backend(job.name)
        self._dead = 0  # connections that are to be replaced
        self._size = int(attached.read_sys(self.device, "size") or 0) << 9  # of a device that is adopted
        self._data = job.data  # which it must hold, from when it is known
        self._connected = False  # the device, by us
        self._said = ""
        self._poll = select.poll()
        self._server = keeping.ServerWatch(job.folder, self._poll)
        self._kernel = netlink.Kernel()
        self._links = self._kernel.dead_links()
        self._poll.register(self._links, select.POLLIN)
        self._log = keeping.KernelLog()
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
        protection.protect_process(keeping.HEAP_BYTES)
        protection.take_priority()
        try:
            if not self._job.adopt:
                with keeping.uninterrupted():
                    self._connect()
            self._record.write(self.device, self._data, keeper=os.getpid())
            self._say("attached")
            step("keeper.noted")
            self._dead = self._job.connections if self._job.adopt else 1
            if not self._offer() and not self._job.adopt:
                raise AttachError(f"{self._job.name} does not take a second connection")
            step("keeper.ready")
            # If nobody is there any more to be told, what was done is taken back too.
            keeping.ready(self.index)
        except BaseException:
            if not self._job.adopt:
                if self._connected:
                    self._kernel.disconnect(self.index)
                self._record.remove()
            raise

    def keep(self) -> None:
        """Replace connections that die, until the device is detached."""
        while True:
            news = self._poll.poll(LOOK * 1000)
            if any(fd == self._server.fd for fd, _ in news):
                self._forget_server()
            self._count_dead()
            if not attached.is_connected(self.device):
                self._record.remove()
                return
            if not news and not self._job.folder:
                # There is no process to watch, and the kernel may have had no memory to report a connection.
                self._dead = self._job.connections
                self._offer()
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
                export = netlink.handshake(links[-1], job.export)
                if (data := self._data_of(export)) != (self._data or data):
                    raise AttachError(f"another server took the place of {job.name} meanwhile")
                self._data = data
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

    def _data_of(self, export: netlink.Export) -> str:
        """Return what names the data that the server holds, with which hands were shaken just now.

        Raises AttachError for a server of another machine that names none.
        """
        if self._job.folder:
            return attached.data_of(self._job.folder)
        if data := exported.data_of(export.description):
            return data
        raise AttachError(
            f"the server at '{self._job.address}' does not name the data that it holds: it is no zramd, "
            "or one of an older version"
        )

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
                export = netlink.handshake(links[-1], self._job.export)
                # Another server may have come in its place. Zeros instead of data are worse than an error.
                if export.size != (self._size or export.size):
                    raise AttachError(f"it has {export.size} bytes instead of {self._size}")
                if self._data_of(export) != self._data:
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
        if self._job.folder:
            self._server.begin()

    def _forget_server(self, dead: int | None = None) -> None:
        self._dead = self._job.connections if dead is None else dead
        self._server.end()

    def _say(self, sentence: str) -> None:
        self._log.say(f"nbd{self.index}", sentence)


def main(words: list[str]) -> int:
    """Attach, print "ok" and the device's index, or one sentence that says why not, and stay."""
    return keeping.run(lambda: Keeper(job(words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
