"""A new server takes over from a running one, with all data; its clients see only a pause.

One of front=ublk has no sockets to hand on: its client is this machine's kernel, which waits until the keeper
of `zramd attach` has given its device to the new server.

All that can fail is done before the old server is asked to leave: see zramd.contract.handover. The old
server's side is zramd.server.leaving, the new one's zramd.server.takeover.
"""

import os
import signal
import socket
import time
from contextlib import suppress
from typing import Any, NamedTuple

from zramd.contract import handover, rundir
from zramd.control import life, peer, servers
from zramd.errors import (
    AttachError,
    DeviceError,
    RundirError,
    UsageError,
    ZramdError,
    is_shortage,
    reason,
    say,
    sentence,
)
from zramd.kernel import attached, protection
from zramd.launch import background, filters, nbdkit, processes, spawn, tlsfiles, ublkserver
from zramd.process import inherited, interrupts, pidfd
from zramd.process.steps import step
from zramd.settings import config
from zramd.settings.config import Config

DEVICE_TIMEOUT = 10.0  # seconds that the keeper has to give the kernel's device to the new server
LEAVE_TIMEOUT = 10.0  # seconds; a server needs one at most, a busy machine a few
STANDBY_TIMEOUT = 120.0  # seconds that one on standby may take: it is for a machine that is short of memory
SILENT = 2  # seconds for which a backing has not answered: then it may be long
END_TIMEOUT = 2.0  # seconds; one that does not answer may be stopping
_FIRST = 3  # the first descriptor that nbdkit takes for a listening socket
_SOCKETS_MAX = 16  # of the kind on which clients are accepted
_KEPT = ("name", "rundir", "state")  # what a restart cannot change, beside what the state says itself
_PROGRAM = {"-f", "--foreground", "--no-fork"}


class Restarted(NamedTuple):
    """A server that has taken over."""

    name: str
    pid: int
    away: float  # seconds for which nobody answered


def restart(name: str | None, folder: str | None, words: list[str]) -> Restarted:
    """Put a new server into the place of a running one; `words` are key=value settings to change.

    Raises DeviceError (with what became of the old server), UsageError, ConfigError.
    """
    interrupts.interruptible()
    served = servers.look(name, folder)
    with (
        interrupts.told(lambda: f"{served.name} goes on as before"),
        life.turn(served.path, served.name) as turn,
    ):
        step("restart.turn")
        served.look_again()
        pid, away = _replace(served, words, turn)
        _renew_standby(served, turn)
        tlsfiles.sweep(served.path)
    step("restart.serves")
    return Restarted(served.name, pid, away)


def _replace(served: servers.Served, words: list[str], turn: life.Turn) -> tuple[int, float]:
    """Replace the server; return the new one's process and for how many seconds nobody answered."""
    process = served.process()
    peer.must_be_ours(process, served.name)  # what nbdkit was told is told to the next one
    served.pid = process.pid
    settings = served.ask_json("GET", "/settings")
    served.name = settings["name"]
    pairs = _pairs(settings)
    if not settings.get("state"):
        raise DeviceError(
            f"{served.name} has no state, and its data would be lost: stop it and start it with "
            f"state=/dev/shm/{served.name}.state, then it can be restarted"
        )
    _refuse_others(served, process)
    line = processes.told(served, process, "cmdline")
    filters.refuse(served.name, line)
    changed = _override(pairs, words)
    old = _Old(served, process)
    before, after = config.parse(pairs), config.parse(changed)
    refuse_other_front(served, old.health, before.front, after.front)
    refuse_other_address(served, before.listen, after.listen)
    as_before = _plan(served, line, pairs)
    plan = _plan(served, line, changed)
    step("restart.sockets")
    old.take_sockets()
    new = _Successor(plan, old, turn)
    try:
        step("restart.spawned")
        new.wait_until_ready()
    except DeviceError as error:
        raise old.goes_on(f"the new server does not start: {error}") from None
    except BaseException:
        new.kill()
        raise
    since = time.monotonic()
    try:
        step("restart.ready")
        refuse_busy(served)
    except DeviceError as error:
        if not old.has_ended() or old.was_stopped():
            new.kill()
            raise old.goes_on(str(error)) from None
        # It has died: nobody's stream can be cut off, and the new one has all that it needs.
    except BaseException:
        new.kill()
        raise
    interrupts.finish()
    _drain(served.name, old.process)
    try:
        new.go(old)
    except (_StillThereError, _UnseenError):
        raise
    except DeviceError as error:
        new.kill()
        if not new.tells or not old.wait(LEAVE_TIMEOUT) or old.was_stopped():
            raise old.goes_on(str(error)) from None
        _come_back(served, as_before, old, turn, error)
    _await_device(served, old.health, new.pid)
    return new.pid, time.monotonic() - since


def refuse_other_front(served: servers.Served, health: dict[str, Any], before: str, after: str) -> None:
    """Raise DeviceError for a change of front while a client has the device: it could not follow."""
    if before != after and health["clients"]:
        raise DeviceError(
            f"{served.name} is in use over front={before}, and its clients cannot follow to front={after}: "
            "detach it, or disconnect them, first"
        )


def refuse_other_address(served: servers.Served, before: str, after: str) -> None:
    """Raise DeviceError for another `listen`: the next server gets the sockets that there are."""
    if before != after:
        now = f"listen={before}" if before else "its unix socket"
        then = f"listen={after}" if after else "a unix socket"
        raise DeviceError(
            f"{served.name} is reached by {now}, where its clients come again: for {then} stop it, and start "
            "it with that"
        )


def _await_device(served: servers.Served, health: dict[str, Any], pid: int) -> None:
    """Wait until the kernel's device, if the old server had one, is served by the new one.

    Raises DeviceError if it is not given to it: only the keeper of `zramd attach` can.
    """
    before = health.get("ublk") or {}
    if not before.get("serving"):
        return
    end = time.monotonic() + DEVICE_TIMEOUT
    while not served.ask_json("GET", "/health")["ublk"]["serving"]:
        if time.monotonic() > end:
            raise DeviceError(
                f"{served.name} is served by process {pid} now, but nobody has given "
                f"/dev/ublkb{before['number']} to it within {DEVICE_TIMEOUT:g} seconds: "
                f"run 'zramd attach {served.name}'"
            )
        time.sleep(0.002)


def _renew_standby(served: servers.Served, turn: life.Turn) -> None:
    """Put a new server on standby if one was: the old one knows neither new settings nor a new version."""
    try:
        if end_standby(served.path):
            stand_by(served, turn)
    except (ZramdError, OSError) as error:
        say(f"{served.name} has no new server on standby: {sentence(error)}")


def end_standby(folder: str) -> bool:
    """End the server that is on standby for a run folder; say whether there was one. Raises RundirError."""
    pid = rundir.standby(folder)
    if pid is None:
        return False
    process = pidfd.open_number(pid)
    if process is not None:
        if rundir.standby(folder) == pid:
            with suppress(ProcessLookupError):
                # It holds nothing but what it needs itself.
                signal.pidfd_send_signal(process, signal.SIGKILL)
            pidfd.has_ended(process, END_TIMEOUT)
        os.close(process)
    return True


def stand_by(served: servers.Served, turn: life.Turn) -> int:
    """Start a server as the one that serves, for when that has ended; return its process once it is ready.

    Raises DeviceError, when there is one already, too.
    """
    process = served.process()
    peer.must_be_ours(process, served.name)
    settings = served.ask_json("GET", "/settings")
    if why := no_standby(served, process, settings):
        raise DeviceError(why)
    if (other := rundir.standby(served.path)) is not None:
        raise DeviceError(f"{served.name} has a server on standby already: {other}")
    line = processes.told(served, process, "cmdline")
    filters.refuse(served.name, line)
    plan = _plan(served, line, _pairs(settings))
    old = _Old(served, process)
    old.take_sockets()
    service = processes.service_of(served, process, settings["state"])
    new = _Successor(plan, old, turn, standby=True, service=service)
    try:
        new.wait_until_ready(STANDBY_TIMEOUT)
    except BaseException:
        new.kill()
        raise
    return new.pid


def no_standby(served: servers.Served, process: peer.Process, settings: dict[str, Any]) -> str:
    """Return why a server can have no other on standby, '' if it can. Raises DeviceError."""
    if not settings.get("state"):
        return f"{served.name} has no state: nobody could take over after a crash"
    if unit := processes.stands_in(served, process):
        return f"{served.name} is served by one that was on standby, until {unit} has started the next one"
    if processes.is_in_background(served, process):
        return ""
    unit = processes.unit_of(served, process)
    if not unit:
        return f"{served.name} runs in the foreground: whoever runs it starts the next one after a crash"
    if settings.get("backing"):
        return f"{served.name} has a backing, which is open to {unit} alone"
    return ""


def _come_back(
    served: servers.Served, plan: "_Plan", old: "_Old", turn: life.Turn, error: DeviceError
) -> None:
    """Start a server as the old one was; the old one has left, and the new one failed. Raises DeviceError."""
    try:
        again = _Successor(plan, old, turn)
        again.wait_until_ready()
        again.go(old)
    except DeviceError as worse:
        raise DeviceError(
            f"{served.name} is not served: the new server failed ({error}), "
            f"and so did one as before ({worse}): the data is still in its state: start it with that"
        ) from None
    raise DeviceError(f"{served.name} is served as before, by a new process {again.pid}: {error}")


class _StillThereError(DeviceError):
    """The old server has been told to leave, and has not."""


class _UnseenError(DeviceError):
    """The new server has been let go, and cannot be looked at."""


def sockets_of(served: servers.Served) -> tuple[list[int], bool]:
    """Return the sockets on which a server accepts clients, and whether zramd made its run folder.

    They are ours to close. Raises DeviceError.
    """
    path = served.file(rundir.SOCKETS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as here:
        with suppress(FileNotFoundError):
            os.unlink(path)
        umask = os.umask(0o177)  # whoever connects gets the server's sockets
        try:
            here.bind(path)
        finally:
            os.umask(umask)
        try:
            here.listen(1)
            served.request("POST", "/sockets", path)
            with here.accept()[0] as link:
                text, listening, _, _ = socket.recv_fds(link, 64, _SOCKETS_MAX)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
    for fd in listening:
        os.set_inheritable(fd, False)  # or the new server would have these beside those that it is given
    return listening, text == b"made"


class _Old:
    """The server that is to be replaced, and what of it a new one needs."""

    def __init__(self, served: servers.Served, process: peer.Process) -> None:
        """Raise DeviceError when it has ended meanwhile."""
        self.served = served
        self.pid = process.pid
        self.process = process.fd
        # A server of an older zramd does not say.
        self.health = served.ask_json("GET", "/health")
        self.leaves_pid = bool(self.health.get("leaves_pid"))
        self.listening: list[int] = []
        self.made = False  # the run folder, by zramd
        try:
            # What nbdkit was told in relative paths is relative to this.
            self.folder = os.open(f"/proc/{self.pid}/cwd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if is_shortage(error):
                raise
            raise processes.kept_back(served, process, f"/proc/{self.pid}/cwd", error) from None

    def take_sockets(self) -> None:
        """Get the sockets on which it accepts clients. Raises DeviceError."""
        self.listening, self.made = sockets_of(self.served)
        if not self.listening and self.health.get("front") != "ublk":
            raise DeviceError(f"{self.served.name} serves its standard input: it cannot be restarted")

    def was_stopped(self) -> bool:
        """Say whether a user has stopped it: once it has ended, and if it is new enough to say."""
        return self.leaves_pid and not os.path.exists(self.served.file(rundir.PID))

    def goes_on(self, why: str) -> DeviceError:
        """Return the error that says why the restart has failed, and what became of this server."""
        if not self.has_ended():
            return DeviceError(f"{self.served.name} goes on as before: {why}")
        if self.was_stopped():
            return DeviceError(f"{self.served.name} was stopped while it was restarted: nobody serves it")
        try:
            return processes.ended(self.served)
        except RundirError as error:
            return DeviceError(f"{self.served.name} has left, and {error} ({why})")

    def has_ended(self) -> bool:
        """Say whether it has ended; one that does not answer may be about to."""
        try:
            self.served.request("GET", "/health", timeout=1)
        except DeviceError:
            return self.wait(END_TIMEOUT)
        return False

    def wait(self, seconds: float) -> bool:
        """Wait for its end; say whether that has come."""
        return pidfd.has_ended(self.process, seconds)


class _Successor:
    """A server that is ready to take over: see zramd.contract.handover."""

    def __init__(
        self,
        plan: "_Plan",
        old: _Old,
        turn: life.Turn,
        *,
        standby: bool = False,
        service: processes.Service | None = None,
    ) -> None:
        """Start it; on `standby` it does not keep the turn. `service`: what the old one is a server of."""
        self._settings = plan.settings
        tlsfiles.put(plan.settings, plan.argv)
        ours, theirs = socket.socketpair()
        self._link = ours
        self.tells = False  # it has begun to tell the old one
        # Above those that nbdkit takes for sockets of its own.
        kept = (inherited.high(theirs.fileno()), inherited.high(old.process))
        listens = plan.settings.front != "ublk"
        copies = [inherited.high(fd) for fd in old.listening if listens]
        memory = -1 if service is None else service.memory

        def prepare() -> None:
            os.fchdir(old.folder)  # before its number is a socket's
            for number, fd in enumerate(copies, _FIRST):
                os.dup2(fd, number)
            words = ({} if standby else turn.words()) | {
                handover.TAKES_OVER: handover.order(*kept, old.leaves_pid, standby=standby),
                rundir.BACKGROUND: "1",
            }
            if copies:
                words |= {"LISTEN_FDS": str(len(copies)), "LISTEN_PID": str(os.getpid())}
            background.give(words | ({handover.MADE: "1"} if old.made else {}), *kept)
            if not standby:
                background.give({}, turn.fd)
            if service is not None:
                background.give({handover.UNIT: service.unit})
                if memory >= 0:
                    background.give({handover.KEPT_FD: str(memory)}, memory)
                protection.give_up_rights(service.capabilities)

        with interrupts.blocked():
            self.pid, self._process, self._errors = spawn.spawn(plan.argv, prepare)
        for fd in (*kept, *copies, *([memory] if memory >= 0 else [])):
            os.close(fd)
        theirs.close()

    def wait_until_ready(self, patience: float | None = None) -> None:
        """Return once it has nothing left to do but to take over. Raises DeviceError with its reason."""
        patience = spawn.READY_TIMEOUT if patience is None else patience
        self._link.settimeout(patience)
        try:
            ready = self._link.recv(1)
        except TimeoutError:
            self.kill()
            raise DeviceError(f"it is not ready within {patience:g} seconds") from None
        if not ready:
            raise DeviceError(spawn.reason(spawn.read_until(self._errors, time.monotonic() + 1)))

    def go(self, old: _Old) -> None:
        """Let it tell the old server to leave, take over, and return once it answers. Raises DeviceError.

        An old server that does not leave is waited for by the new one alone, which cannot be told otherwise.
        """
        self._link.settimeout(LEAVE_TIMEOUT)
        try:
            self._link.send(handover.GO)
            self.tells = self._link.recv(1) == handover.TELLING
        except OSError as error:
            if is_shortage(error):  # else it has died: what it said last is the reason
                raise DeviceError(f"the new server cannot be told: {reason(error)}") from None
        if self.tells and not old.wait(LEAVE_TIMEOUT):
            raise _StillThereError(
                f"{old.served.name} has not left within {LEAVE_TIMEOUT:g} seconds: look at its process "
                f"{old.pid}; the new one, {self.pid}, takes over once it has ended"
            )
        # Until it serves, and turns to its log; or ends, and is about to let go of the run folder.
        end = time.monotonic() + spawn.READY_TIMEOUT
        said = spawn.read_until(self._errors, end)
        while not spawn.is_ready(self._settings, self.pid):
            if not self._serves(old.served.path) or time.monotonic() >= end:
                raise DeviceError(spawn.reason(said))
            time.sleep(0.001)

    def _serves(self, folder: str) -> bool:
        """Say whether it has the run folder."""
        end = time.monotonic() + END_TIMEOUT
        while True:
            try:
                return rundir.holder(folder) == self.pid
            except RundirError as error:
                if time.monotonic() > end:
                    raise _UnseenError(f"whether the new server, {self.pid}, serves: {error}") from None
            time.sleep(0.01)

    def kill(self) -> None:
        """End it, if it is there."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
        self._link.settimeout(1)
        with suppress(OSError):  # it may have said more than was waited for
            self.tells = self.tells or handover.TELLING in self._link.recv(16)


def _pairs(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a server's settings as a user would write them."""
    return [(key, config.written(key, value)) for key, value in settings.items() if value != ""]


def _override(pairs: list[tuple[str, str]], words: list[str]) -> list[tuple[str, str]]:
    """Return the settings with those that the user wants otherwise. Raises ConfigError, UsageError.

    A relative path is meant from here, not from where the server is.
    """
    before = config.parse(pairs)
    given = [(key, value) for key, _, value in (word.partition("=") for word in words)]
    names = {config.find(key).name for key, _ in given}
    after = [*((key, value) for key, value in pairs if key not in names), *given]
    parsed = config.parse(after)
    if parsed.front == "auto":  # it has been chosen already
        parsed = parsed._replace(front=before.front)
    for name in _KEPT:
        if getattr(parsed, name) != getattr(before, name):
            raise UsageError(
                f"{name}='{getattr(parsed, name)}' would make it another device: a restart keeps "
                f"{name}={getattr(before, name)}"
            )
    return _pairs(parsed._asdict())


def _refuse_others(served: servers.Served, process: peer.Process) -> None:
    """Raise DeviceError for a server that another program watches: it would only see its end."""
    if unit := processes.unit_of(served, process):
        raise DeviceError(f"{served.name} is a service: run 'systemctl restart {unit}'")
    if not processes.is_in_background(served, process):
        raise DeviceError(
            f"{served.name} runs in the foreground, not by 'zramd start': end it with "
            f"'kill -USR1 {served.pid}', which keeps its clients waiting, and start it again with the same "
            "settings"
        )


def refuse_busy(served: servers.Served) -> None:
    """Raise DeviceError while a save or a load would be cut off, or the server could not end."""
    health = served.ask_json("GET", "/health")  # a server of an older zramd says less
    if streams := health.get("streams"):
        raise DeviceError(f"a {' and a '.join(streams)} is under way: restart when it is done")
    if (silent := health.get("backing_silent", 0)) >= SILENT:
        raise DeviceError(
            f"its backing has not answered for {silent} s, and the kernel ends no process before that has "
            "answered: restart when it has"
        )


class _Plan(NamedTuple):
    """A server that is to take over."""

    settings: Config
    argv: list[str]


def _plan(served: servers.Served, line: list[str], pairs: list[tuple[str, str]]) -> _Plan:
    """Return what to start: with nbdkit's options as on the running one's line, but for where it listens.

    Sets the environment for it. Raises ConfigError, UsageError, DeviceError for a server that is none of
    zramd's.
    """
    words = line[:-1]
    settings = config.parse(pairs)
    if ublkserver.is_one(words):
        nbdkit.set_environment(settings)
        if settings.front == "ublk":
            return _Plan(settings, ublkserver.command(pairs))
        return _Plan(settings, nbdkit.command(settings, pairs, nbdkit.read_options([])))
    at = next(
        (
            i
            for i in range(2, len(words))
            if words[i - 1] == "python" and words[i].endswith("nbdkit_plugin.py")
        ),
        0,
    )
    if not at:
        raise DeviceError(f"{served.name} is not served by nbdkit: '{' '.join(words[:4])} …'")
    keys = {key for setting in config.SETTINGS for key in (setting.name, *setting.aliases)}
    ours = tlsfiles.OPTIONS if settings.listen else set()
    options = nbdkit.read_options(words[1 : at - 1], leave_out=nbdkit.TRANSPORTS | _PROGRAM | ours)
    after = [word for word in words[at + 1 :] if word.partition("=")[0] not in keys]
    nbdkit.set_environment(settings)
    if settings.front == "ublk":
        options.after = after
        ublkserver.check(options)
        return _Plan(settings, ublkserver.command(pairs))
    plugin = ["python", nbdkit.plugin_path(), *(f"{key}={value}" for key, value in pairs)]
    before = [*tlsfiles.options(settings), *nbdkit.threads(settings, options), *options.before]
    return _Plan(settings, ["nbdkit", "-f", *before, *plugin, *after])


def _drain(name: str, process: int) -> None:
    """Have the kernel's device, if there is one, hold requests back until the server has left.

    A queue that is given another length first waits until all that was sent is answered, and what comes
    meanwhile waits for it. In such a moment the server can leave without taking a request along: see
    zramd.server.leaving. A process of its own does it: one that comes too late is stuck until the new server
    answers, and that one waits for us. A ublk device has no need of it: the kernel asks the next server for
    what this one leaves, and while nobody serves, such a queue would wait with it for the next one.
    """
    try:
        found = attached.find(name)
    except (OSError, AttachError):  # whose device it is nobody but root may know
        return
    if found is None or found.number is not None or os.fork():
        return
    try:
        length = int(attached.read_sys(found.device, "queue/nr_requests"))
        end = time.monotonic() + LEAVE_TIMEOUT
        os.closerange(0, process)  # nobody is to wait for us, or for what we do not need
        os.closerange(process + 1, os.sysconf("SC_OPEN_MAX"))
        queue = os.open(f"/sys/block/{os.path.basename(found.device)}/queue/nr_requests", os.O_WRONLY)
        while not pidfd.has_ended(process) and time.monotonic() < end:
            for value in (length - 1, length):
                os.write(queue, b"%d" % value)
    finally:
        os._exit(0)
