"""The process that makes a server's ublk device, and gives it to the next server when that one has ended.

`zramd attach` starts it. It has the right to speak to the driver, which the server has not: it adds the
device, opens /dev/ublkcN, hands that to the server over its control socket, keeps none, and starts the disk.
When the server's process has ended, requests wait in the kernel, without a limit in time, for a server that
holds the same data. That one gets the device as soon as it is ready; what was under way is sent again.

The driver forgives little. A server that dies after it has mapped the device, and before all its queues wait
for requests, leaves one that no other can take over (Linux 6.12); and a recovery that is begun once more then
has the kernel fall over a null pointer. So nothing is begun before a successor has all its memory and
answers, nor again before a successor has said that its queues wait; and how far it has come is noted in the
record, for the next keeper if this one dies. What is needed then was done once before all was said to be
well, as in zramd.kernel.keeper.
"""

import errno
import os
import select
import sys
import time
from contextlib import suppress
from typing import NamedTuple

from zramd.contract import rundir
from zramd.core.ublk.control import Control
from zramd.errors import AttachError, RundirError, UblkError, reason
from zramd.kernel import asking, attached, keeping, protection, ublk
from zramd.kernel.attached import ADDED, FETCHED, LOST, OFFERED, RECOVERING, STARTED
from zramd.kernel.keeping import LOOK, RETRY, RETRY_LATER, RETRY_SOON
from zramd.process import namespaces
from zramd.process.steps import step

ASK = 10.0  # seconds for an answer of the server
LOOK_AT = 1.0  # the same, of one that may be only starting
COMMAND = 10.0  # seconds for a command of the driver's
RETRY_START = 0.003  # seconds between two tries while the driver is not done with the old server
START = 60.0  # seconds of that: 30 with every request in flight where io_timeout could not help
APPEARS = 5.0  # seconds in which /dev/ublkcN must have come
STANDBY_AGAIN = 5.0  # seconds after which another server on standby is tried for
LOSES = 5.0  # seconds after which a device that no server can take over is called lost


class Job(NamedTuple):
    """What to attach, all of it as words on the command line."""

    name: str
    folder: str  # the server's run folder
    device: int  # its number, -1 for a free one
    stage: str  # what the record says of a device that has lost its keeper, '' for one that is to be made
    data: str  # the data that it had
    disksize: int
    queues: int
    depth: int
    max_io_bytes: int
    recovers: int  # 1: another server may take over, because the data outlives this one
    standby: str = ""  # the module that puts another server on standby, where one is to be

    def words(self) -> list[str]:
        """Return the command line's words."""
        return [str(value) for value in self]


def job(words: list[str]) -> Job:
    """Return what `Job.words` stands for."""
    kinds = (str, str, int, str, str, int, int, int, int, int, str)
    return Job(*(kind(word) for kind, word in zip(kinds, words, strict=True)))


class Geometry(NamedTuple):
    """What a server must know of a device that it is given."""

    number: int
    queues: int
    depth: int
    max_io_bytes: int
    recovers: bool


class Keeper:
    """One device and its server."""

    def __init__(self, job: Job) -> None:
        """Raise AttachError or OSError when the kernel has no ublk, or another keeper is there."""
        self._job = job
        self._data = ""
        self._stage = job.stage or ADDED
        self._added = False  # by us, and not said to be well yet
        self._said = ""
        self._stuck = 0.0  # when it seemed for the first time that no server can take over
        self._starter = 0  # the process that puts a server on standby
        self._again = STANDBY_AGAIN  # seconds after which the next one is tried for
        self._number = job.device
        self._geometry = Geometry(job.device, job.queues, job.depth, job.max_io_bytes, bool(job.recovers))
        self._poll = select.poll()
        self._server = keeping.ServerWatch(job.folder, self._poll)
        self._log = keeping.KernelLog()
        self._control = Control(timeout=COMMAND)
        self._record = attached.Record(job.name)

    @property
    def device(self) -> str:
        """The disk's name."""
        return ublk.device_of(self._number)

    def attach(self) -> None:
        """Protect this process, make the device, rehearse a recovery, and print "ok" and the number.

        Raises AttachError, UblkError, SwapError or OSError; then nothing is attached.
        """
        step("keeper.recorded")
        protection.prepare()
        protection.protect_process(keeping.HEAP_BYTES)
        protection.take_priority()
        if self._job.stage:
            self._adopt()
            keeping.ready(self._number)
            return
        try:
            self._data = attached.data_of(self._job.folder)
            with keeping.uninterrupted():
                self._add()
                self._note(ADDED)
            step("keeper.added")
            self._control.set_params(
                self._number, self._job.disksize, max_io_bytes=self._geometry.max_io_bytes
            )
            pid = self._give()
            step("keeper.given")
            self._with_pid(self._control.start, pid)
            ublk.settle(self._number, recovers=self._geometry.recovers)
            self._note(STARTED)
            self._say("attached")
            step("keeper.noted")
            if not self._server.begin():
                raise AttachError(f"the server of {self._job.name} has ended meanwhile")
            self._rehearse()
            step("keeper.ready")
            # If nobody is there any more to be told, what was done is taken back too.
            keeping.ready(self._number)
        except BaseException:
            with keeping.uninterrupted():
                self._take_back()
            raise

    def keep(self) -> None:
        """Give the device to a new server when its own has ended, until it is detached."""
        pause = self._again if self._job.standby else LOOK
        while True:
            # An adopted device may have no server that has it.
            for fd, _ in self._poll.poll(pause * 1000 if self._server.fd >= 0 else 0):
                if fd == self._server.fd:
                    self._server.end()
            if not ublk.exists(self._number):
                self._record.remove()
                return
            if self._server.fd < 0:
                if not self._geometry.recovers:
                    self._bury()
                    return
                self._recover()
            pause = LOOK if self._has_standby() else self._again

    def leave(self) -> None:
        """Take the record away if the device is gone: whoever sent the SIGTERM does the rest."""
        if not ublk.exists(self._number):
            self._record.remove()

    # ---- Making a device, and taking it back

    def _add(self) -> None:
        job = self._job
        info = self._control.add(
            job.device,
            queues=job.queues,
            depth=job.depth,
            max_io_bytes=job.max_io_bytes,
            recovers=bool(job.recovers),
            mark=ublk.mark(job.name),
        )
        self._number, self._added = info.number, True
        self._geometry = Geometry(
            info.number, info.queues, info.depth, info.max_io_bytes, self._geometry.recovers
        )

    def _give(self) -> int:
        """Hand the device to the server; return the number of its process once all its queues wait."""
        fd = self._open()
        try:
            step("keeper.opened")
            found = asking.ask_json(
                self._job.folder, "PUT", "/ublk", self._geometry._asdict(), fd=fd, timeout=ASK
            )
        finally:
            os.close(fd)
        pid = found.get("pid")
        if not isinstance(pid, int):
            raise AttachError(f"the server of {self._job.name} does not say which process serves")
        return pid

    def _open(self) -> int:
        """Open what the server serves by. udev may have to make it. Raises AttachError, OSError."""
        path = ublk.char_of(self._number)
        end = time.monotonic() + APPEARS
        while True:
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                if time.monotonic() > end:
                    raise AttachError(
                        f"{path} does not appear: is /dev a devtmpfs, or udev running?"
                    ) from None
            time.sleep(RETRY)

    def _with_pid(self, command: "Callable[[int, int], None]", pid: int) -> None:
        """Give a command that names the server's process: since Linux 6.18 the one that opened the device.

        Until 6.18.8 that is looked for by its number outside of all containers, which nobody knows in one.
        """
        try:
            command(self._number, pid)
            return
        except UblkError as error:
            if error.errno != errno.EINVAL:
                raise
        try:
            command(self._number, os.getpid())
        except UblkError as error:
            if error.errno != errno.EINVAL or not namespaces.has_own_pids():
                raise
            raise UblkError(
                f"{self.device} cannot be served in a container: before Linux 6.18.8 the kernel knows its "
                "processes by other numbers: use a later one, or the machine's PID namespace ('--pid=host')",
                error.errno,
            ) from None

    def _take_back(self) -> None:
        """Undo what was done so far. What went wrong first is what counts."""
        if self._added:
            with suppress(UblkError, OSError):
                self._renew()  # a command may have been broken off
                self._control.stop(self._number)
            with suppress(OSError):
                asking.ask(self._job.folder, "DELETE", "/ublk", {"number": self._number}, timeout=ASK)
            with suppress(UblkError, OSError):
                self._control.delete(self._number, wait=False)
        self._record.remove()

    def _renew(self) -> None:
        """Speak to the driver anew: after a command that it did not answer in time it is given no other."""
        self._control.close()
        self._control = Control(timeout=COMMAND)

    def _note(self, stage: str) -> None:
        self._stage = stage
        self._record.write(self.device, self._data, keeper=os.getpid(), stage=stage, folder=self._job.folder)

    # ---- When the server has ended

    def _adopt(self) -> None:
        """Look after a device that has lost its keeper. Raises AttachError if it is another program's."""
        info = self._control.info(self._number)
        if info.mark != ublk.mark(self._job.name):
            raise AttachError(f"{self.device} is another program's by now")
        self._geometry = Geometry(info.number, info.queues, info.depth, info.max_io_bytes, info.recovers)
        self._data = self._job.data
        if (found := attached.data_of(self._job.folder)) and found != self._data:
            raise AttachError(
                f"its server does not hold the data that {self.device} had before: start the one that does, "
                f"or give that up by 'zramd detach {self._job.name}'"
            )
        self._rehearse()
        if self._serves():
            if self._stage == STARTED:
                self._server.begin()
            else:  # the keeper has died before it could note that, or finish
                self._finish(rundir.holder(self._job.folder) or 0)

    def _serves(self) -> bool:
        """Say whether a server has the device already: the keeper alone has died."""
        state = self._health()
        return bool(state and state.get("number") == self._number and state.get("serving"))

    def _rehearse(self) -> None:
        """Go the way of a recovery once, as far as nothing changes: what is needed then is in memory."""
        self._health()
        self._control.info(self._number)
        if self._stage == STARTED and self._serves():
            # Both are refused, because the device is in use.
            with suppress(UblkError):
                self._control.start_recovery(self._number)
            with suppress(OSError):
                os.close(os.open(ublk.char_of(self._number), os.O_RDWR | os.O_CLOEXEC))
        self._note(self._stage)

    def _health(self) -> "dict[str, object] | None":
        """Return what a server that answers says of its device, None if none does."""
        try:
            found = asking.ask_json(self._job.folder, "GET", "/health", timeout=LOOK_AT)
        except (OSError, AttachError):
            return None
        state = found.get("ublk")
        return state if isinstance(state, dict) else None

    def _bury(self) -> None:
        """Remove a device that had a server without a state: the kernel has taken its disk away."""
        self._say("its server has ended, and the data with it: the device is removed")
        with suppress(UblkError, OSError):
            self._control.delete(self._number, wait=False)
        self._record.remove()

    def _recover(self) -> None:
        """Wait for a server with the same data, and give it the device."""
        self._say("its server has ended: requests wait for the next one")
        since = time.monotonic()
        self._stuck = 0.0
        while ublk.exists(self._number):
            if self._offer():
                self._say(f"served again after {time.monotonic() - since:.3f} s")
                return
            time.sleep(RETRY if time.monotonic() - since < RETRY_SOON else RETRY_LATER)

    def _offer(self) -> bool:
        """Give the device to the server that is there, if one is and is ready; say whether it has it."""
        try:
            state = self._health()
            if state is None:
                self._stuck = 0.0
                return False
            if attached.data_of(self._job.folder) != self._data:
                # Zeros instead of data are worse than an error.
                raise AttachError("it does not hold the data that was there before")
            pid = rundir.holder(self._job.folder) or 0
            if not state.get("serving"):
                self._begin()
                pid = self._hand_over()
            elif state["number"] != self._number:
                raise AttachError(f"it serves {ublk.device_of(int(str(state['number'])))} already")
            self._finish(pid)
        except (AttachError, UblkError, OSError) as error:
            if self._stage != LOST:
                self._complain(f"its server cannot take it over: {_words(error)}")
            if isinstance(error, UblkError) and error.errno in (errno.ETIME, errno.EBADF):
                with suppress(UblkError):
                    self._renew()
            return False
        self._said = ""
        return True

    def _begin(self) -> None:
        """Begin the recovery, once the driver is done with the old server. Raises UblkError.

        It is noted before, and after. Before a server was given the device there is no harm in beginning
        twice: the driver says EINVAL. Afterwards there would be.
        """
        before, end = self._stage, time.monotonic() + START
        if before in (OFFERED, LOST):
            return
        self._note(RECOVERING)
        step("keeper.recovers")
        while True:
            try:
                self._control.start_recovery(self._number)
                break
            except UblkError as error:
                if error.errno == errno.EINVAL and before == RECOVERING:
                    break
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    raise
            time.sleep(RETRY_START)
        step("keeper.recovering")
        self._note(OFFERED)

    def _hand_over(self) -> int:
        """Give the device to the server, as `_give`. Raises AttachError, OSError when it has not taken it."""
        try:
            return self._give()
        except (AttachError, OSError):
            self._look_whether_lost()
            raise

    def _finish(self, pid: int) -> None:
        """Have the driver send requests to process `pid`, whose queues wait, and watch it.

        Raises UblkError; AttachError if it has ended: the driver would take it for one that lives.
        """
        self._note(FETCHED)
        step("keeper.given")
        if not self._server.begin():
            raise AttachError("it has ended meanwhile")
        try:
            self._with_pid(self._control.end_recovery, pid)
        except UblkError as error:
            # The keeper before this one has done it, and died before it could note that.
            if error.errno != errno.EBUSY or self._control.info(self._number).state != "live":
                self._server.end()
                raise
        with suppress(AttachError):
            ublk.settle(self._number, recovers=True)
        self._note(STARTED)

    def _look_whether_lost(self) -> None:
        """Note a device that no server can take over any more: one that lives has tried for a while."""
        if self._health() is None:
            self._stuck = 0.0
            return
        self._stuck = self._stuck or time.monotonic()
        if self._stage != LOST and time.monotonic() - self._stuck > LOSES:
            self._note(LOST)
            self._say(
                "its server died at a moment after which the kernel lets no other take over, and what is "
                "stored cannot be reached by this device: "
                f"'zramd detach --swapoff --force {self._job.name}' ends it"
            )

    def _has_standby(self) -> bool:
        """Say whether a server is on standby, if one is to be; else have one put there.

        Another process does that, in its own time: this one has to act when the server ends. The first one
        `zramd attach` puts there, but for a service. Where it fails, it is tried for less often.
        """
        if not self._job.standby:
            return True
        if self._starter:
            with suppress(ChildProcessError):
                ended, status = os.waitpid(self._starter, os.WNOHANG)
                if not ended:
                    return False
                self._again = min(2 * self._again, LOOK) if status else STANDBY_AGAIN
            self._starter = 0
        with suppress(RundirError):
            if rundir.standby(self._job.folder) is not None:
                return True
        if self._server.fd < 0:
            return False
        words = [self._job.name, self._job.folder, f"ublkb{self._number}"]
        if self._again > STANDBY_AGAIN:
            words.append("again")
        with suppress(OSError):
            # It begins as real-time as we are: until it runs, we stand still.
            self._starter = os.posix_spawn(
                sys.executable,
                [sys.executable, "-S", "-P", "-m", self._job.standby, *words],
                os.environ,
                setsid=True,
            )
        return False

    def _complain(self, sentence: str) -> None:
        if self._said != sentence:
            self._said = sentence
            self._say(sentence)

    def _say(self, sentence: str) -> None:
        self._log.say(f"ublkb{self._number}", sentence)


def _words(error: Exception) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)


def main(words: list[str]) -> int:
    """Attach, print "ok" and the device's number, or one sentence that says why not, and stay."""
    return keeping.run(lambda: Keeper(job(words)))


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
