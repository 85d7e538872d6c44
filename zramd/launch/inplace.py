"""`zramd serve` where a server that was on standby serves: it takes over from that one.

A service manager starts a server again that has crashed. If one was on standby, that serves meanwhile, and
this process becomes the next server as one that `zramd restart` starts: see zramd.contract.handover. All that
can be refused is refused before; if it fails before it tells the other one to leave, that goes on.
"""

import os
from contextlib import suppress

from zramd.contract import handover, rundir
from zramd.control import life, peer, servers
from zramd.errors import DeviceError, RundirError
from zramd.launch import background, nbdkit, processes, takeover
from zramd.launch.nbdkit import Options
from zramd.process import inherited
from zramd.process.steps import step
from zramd.settings.config import Config


class Predecessor:
    """The server from which this process takes over."""

    def __init__(self, settings: Config) -> None:
        """Look at what holds the run folder, and keep others off. Raises RundirError, DeviceError.

        RundirError, too, for a server that was not on standby, or has other data than these settings mean.
        """
        pid = rundir.holder(settings.rundir)
        if pid is None or not _has_taken_over(settings, pid):
            raise rundir.in_use(settings.rundir, pid or 0)
        self.turn = _turn(settings)
        try:
            self._served = served = servers.Served(settings.name, settings.rundir, pid)
            served.look_again()
            if served.pid != pid:
                raise rundir.in_use(settings.rundir, served.pid or 0)
            self._process = served.process()
            peer.must_be_ours(self._process, served.name)
            self.health = served.ask_json("GET", "/health")
            takeover.refuse_busy(served)
        except BaseException:
            self.turn.done()
            raise

    def front(self, wanted: str) -> str:
        """Return the front to serve by. Raises DeviceError for one to which its clients could not follow."""
        now = str(self.health.get("front", "nbd"))
        if wanted == "auto":
            return now
        takeover.refuse_other_front(self._served, self.health, now, wanted)
        return wanted

    def options(self, settings: Config, words: list[str]) -> Options:
        """Return nbdkit's options, of `words`, for a server that gets this one's sockets.

        They stand then where a service manager passes sockets, and those that are the same came from there.
        Raises DeviceError.
        """
        taken, self.made = takeover.sockets_of(self._served)
        copies = [inherited.high(fd) for fd in taken]  # out of the way of those that are put there
        for fd in taken:
            os.close(fd)
        if settings.front == "ublk" or not copies:
            for fd in copies:
                os.close(fd)
            return nbdkit.read_options(words)
        before = str(self._served.ask_json("GET", "/settings").get("listen", ""))
        takeover.refuse_other_address(self._served, before, settings.listen)
        options = nbdkit.read_options(words, leave_out=nbdkit.TRANSPORTS)
        options.sockets = list(range(inherited.FIRST, inherited.FIRST + len(copies)))
        for number, fd in zip(options.sockets, copies, strict=True):
            os.dup2(fd, number)
            os.close(fd)
        return options

    def memory_file(self) -> int:
        """Open the memory file that state=systemd means, as this server has it. Raises DeviceError."""
        return processes.memory_file(self._served, self._process)

    def hand_over(self, options: Options) -> None:
        """Have the program that this process becomes take over."""
        process = inherited.high(self._process.fd)
        order = handover.order(handover.NOBODY, process, bool(self.health.get("leaves_pid")))
        words = self.turn.words() | {handover.TAKES_OVER: order}
        if self.made:
            words |= {handover.MADE: "1"}
        if options.sockets:
            words |= {"LISTEN_FDS": str(len(options.sockets)), "LISTEN_PID": str(os.getpid())}
        background.give(words, process, self.turn.fd, *options.sockets)
        step("inplace.exec")


def find(settings: Config) -> Predecessor | None:
    """Return the server from which to take over, None if the run folder is free.

    Raises RundirError when a server has it that is to go on, DeviceError.
    """
    if rundir.holder(settings.rundir) is None:
        return None
    return Predecessor(settings)


def _has_taken_over(settings: Config, pid: int) -> bool:
    """Say whether the process that serves was on standby, and has the data that these settings mean."""
    if not settings.state:
        return False
    served = servers.Served(settings.name, settings.rundir, pid)
    with suppress(DeviceError):
        if served.ask_json("GET", "/health").get("standby"):
            found = served.ask_json("GET", "/settings")
            return (found["name"], found["state"]) == (settings.name, settings.state)
    return False


def _turn(settings: Config) -> life.Turn:
    try:
        return life.take(settings.rundir, settings.name)
    except OSError:
        raise RundirError(f"rundir '{settings.rundir}' was removed meanwhile: start again") from None
