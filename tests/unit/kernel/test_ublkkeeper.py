"""The keeper of a ublk device against a driver and a server that are made up: what it does, and when."""

import errno
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zramd import lockfile
from zramd.contract import rundir
from zramd.errors import AttachError, UblkError
from zramd.kernel import asking, attached, keeping, protection, ublk, ublkkeeper
from zramd.kernel.attached import FETCHED, LOST, OFFERED, RECOVERING, STARTED
from zramd.process import namespaces


class Driver:
    """What stands for the kernel's driver: `done` is what was asked of it, `fails` what it refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[str] = []
        self.fails: dict[str, list[int]] = {}
        self.mark = 0
        self.recovers = False
        self.state = "live"

    def _do(self, what: str) -> None:
        self.done.append(what)
        if codes := self.fails.get(what.split(" ")[0]):
            raise UblkError(f"cannot {what}: refused", codes.pop(0))

    def control(self, **_: object) -> "Driver":
        return self

    def close(self) -> None: ...

    def add(self, number: int, *, mark: int, recovers: bool, **_: object) -> SimpleNamespace:
        self._do("add")
        self.mark, self.recovers = mark, recovers
        (self.folder / "chars/ublkc3").mkdir()
        (self.folder / "blocks/ublkb3/queue").mkdir(parents=True)
        return self.info(3)

    def info(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(
            number=3,
            queues=1,
            depth=128,
            max_io_bytes=65536,
            mark=self.mark,
            recovers=self.recovers,
            state=self.state,
        )

    def set_params(self, number: int, disksize: int, *, max_io_bytes: int) -> None:
        self._do(f"params {disksize} {max_io_bytes}")

    def start(self, number: int, pid: int) -> None:
        self._do(f"start {pid}")

    def stop(self, number: int) -> None:
        self._do("stop")

    def delete(self, number: int, *, wait: bool) -> None:
        self._do("delete")
        (self.folder / "chars/ublkc3").rmdir()

    def start_recovery(self, number: int) -> None:
        self._do("recover")

    def end_recovery(self, number: int, pid: int) -> None:
        self._do(f"recovered {pid}")


class Server:
    """A control socket in a run folder that answers as a server does; the descriptors it was given count."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.given: list[dict[str, Any]] = []
        self.number: int | None = None
        self.status = 200
        self.takes: Callable[[], bool] = lambda: True  # a device that it is given
        self.dies = False  # instead of saying that it does not take it
        folder.mkdir(exist_ok=True)
        self.lock = os.open(folder / rundir.PID, os.O_RDWR | os.O_CREAT)
        assert lockfile.take(self.lock)
        os.pwrite(self.lock, b"%d\n" % os.getpid(), 0)
        (folder / rundir.DATA_ID).write_text("data\n")
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(folder / rundir.CONTROL_SOCKET))
        self.socket.listen()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self.socket.accept()
            except OSError:
                return
            with link:
                data, rights, _, _ = link.recvmsg(65536, socket.CMSG_SPACE(64))
                fds = [fd for _, _, words in rights for fd in memoryview(words).cast("i")]
                line, _, body = data.decode().partition("\r\n\r\n")
                what = " ".join(line.split(" ")[:2])
                self.asked.append(what)
                status, answer = 200, {}
                if what == "GET /health":
                    answer = {
                        "front": "ublk",
                        "ublk": {"number": self.number, "serving": self.number is not None},
                    }
                elif what == "PUT /ublk" and not self.takes():
                    if self.dies:
                        continue
                    status = 409
                elif what == "PUT /ublk" and self.status == 200:
                    assert len(fds) == 1
                    self.given.append(json.loads(body))
                    self.number = self.given[-1]["number"]
                    answer = {"pid": 4711}
                elif what == "DELETE /ublk":
                    self.number = None
                elif self.status != 200:
                    status = self.status
                text = json.dumps(answer) if status == 200 else "no, not now\n"
                link.sendall(f"HTTP/1.1 {status} X\r\n\r\n{text}".encode())
                for fd in fds:
                    os.close(fd)

    def close(self) -> None:
        """Answer nobody any more."""
        with suppress(OSError):  # it was done before
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.socket.close()

    def end(self) -> None:
        """Be gone, as a server that has died."""
        self.close()
        os.unlink(self.folder / rundir.CONTROL_SOCKET)
        os.close(self.lock)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    for name in ("chars", "blocks", "dev"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(ublk, "CHARS", str(tmp_path / "chars"))
    monkeypatch.setattr(ublk, "BLOCKS", str(tmp_path / "blocks"))
    monkeypatch.setattr(ublk, "char_of", lambda number: str(tmp_path / f"dev/ublkc{number}"))
    monkeypatch.setattr(attached, "FOLDER", str(tmp_path))
    monkeypatch.setattr(attached, "LOCK_TIMEOUT", 0.05)
    for name in ("prepare", "take_priority"):
        monkeypatch.setattr(protection, name, lambda: None)
    monkeypatch.setattr(protection, "protect_process", lambda heap: None)
    monkeypatch.setattr(keeping, "ready", lambda number: None)
    monkeypatch.setattr(ublk, "settle", lambda number, recovers: None)
    (tmp_path / "dev/ublkc3").write_text("")
    found = Driver(tmp_path)
    monkeypatch.setattr(ublkkeeper, "Control", found.control)
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path / "a")
    yield found
    found.close()


def keeper_of(folder: Path, **changes: object) -> ublkkeeper.Keeper:
    job = ublkkeeper.Job("a", str(folder / "a"), -1, "", "", 1 << 20, 2, 128, 65536, 1)
    return ublkkeeper.Keeper(job._replace(**changes))  # type: ignore[arg-type]


def stage(folder: Path) -> str:
    there = attached.find("a")
    return there.stage if there else "none"


def test_job_survives_the_command_line() -> None:
    job = ublkkeeper.Job("zram 0", "/run/a b", -1, "", "", 1 << 30, 4, 128, 65536, 1)
    assert ublkkeeper.job(job.words()) == job


def test_attach(tmp_path: Path, driver: Driver, server: Server) -> None:
    """The server gets the device before it is started, with the queues that the kernel gives it."""
    keeper = keeper_of(tmp_path)
    keeper.attach()
    assert driver.done[:3] == ["add", "params 1048576 65536", "start 4711"]
    assert server.given == [{"number": 3, "queues": 1, "depth": 128, "max_io_bytes": 65536, "recovers": True}]
    assert attached.find("a") == attached.Attached(
        "a", "/dev/ublkb3", os.getpid(), "data", STARTED, str(tmp_path / "a")
    )
    keeper.leave()
    assert stage(tmp_path) == STARTED  # the device is there still
    (tmp_path / "chars/ublkc3").rmdir()
    keeper.leave()
    assert not (tmp_path / "a.attached").exists()


def test_the_opener_is_named_where_the_server_is_refused(
    tmp_path: Path, driver: Driver, server: Server
) -> None:
    """Since Linux 6.18."""
    driver.fails["start"] = [errno.EINVAL]
    keeper_of(tmp_path).attach()
    assert [done for done in driver.done if done.startswith("start")] == [
        "start 4711",
        f"start {os.getpid()}",
    ]


@pytest.mark.parametrize(
    ("own", "says"), [(True, r"container: before Linux 6\.18\.8 .*--pid=host"), (False, "refused")]
)
def test_who_refuses_both_may_not_know_them(
    tmp_path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch, server: Server, own: bool, says: str
) -> None:
    """Where processes have other numbers than on the machine, some kernels take no number at all."""
    monkeypatch.setattr(namespaces, "has_own_pids", lambda: own)
    driver.fails["start"] = [errno.EINVAL, errno.EINVAL]
    with pytest.raises(UblkError, match=says) as caught:
        keeper_of(tmp_path).attach()
    assert caught.value.errno == errno.EINVAL
    assert driver.done[-2:] == ["stop", "delete"]


@pytest.mark.parametrize("fails", ["params", "start", "put"])
def test_what_fails_is_taken_back(tmp_path: Path, driver: Driver, server: Server, fails: str) -> None:
    if fails == "put":
        server.status = 409
    else:
        driver.fails[fails] = [errno.EIO]
    with pytest.raises((AttachError, UblkError), match=r"no, not now|refused"):
        keeper_of(tmp_path).attach()
    assert driver.done[-2:] == ["stop", "delete"]
    assert server.asked[-1] == "DELETE /ublk"
    assert not (tmp_path / "a.attached").exists()


def test_another_s_device_is_left_alone(tmp_path: Path, driver: Driver, server: Server) -> None:
    """ADD_DEV is refused for a number that somebody has: nothing is stopped, let alone deleted."""
    driver.fails["add"] = [errno.EEXIST]
    with pytest.raises(UblkError):
        keeper_of(tmp_path, device=3).attach()
    assert driver.done == ["add"]
    driver.mark = 1
    with pytest.raises(AttachError, match="/dev/ublkb3 is another program's by now"):
        keeper_of(tmp_path, device=3, stage=STARTED, data="data").attach()
    assert driver.done == ["add"]


def recovering(tmp_path: Path, driver: Driver, before: str = STARTED) -> ublkkeeper.Keeper:
    """A keeper that has adopted device 3, whose server is gone."""
    driver.mark, driver.recovers = ublk.mark("a"), True
    (tmp_path / "chars/ublkc3").mkdir()
    keeper = keeper_of(tmp_path, device=3, stage=before, data="data")
    keeper.attach()
    driver.done.clear()
    return keeper


def test_a_new_server_gets_the_device(
    tmp_path: Path, driver: Driver, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as the driver has let go of the old one; the record says in between that it has begun."""
    keeper = recovering(tmp_path, driver)
    driver.fails["recover"] = [errno.EBUSY, errno.EBUSY]
    stages = []
    monkeypatch.setattr(ublkkeeper, "step", lambda name: stages.append((name, stage(tmp_path))))
    assert keeper._offer()
    assert driver.done == ["recover"] * 3 + ["recovered 4711"]
    assert stages == [
        ("keeper.recovers", RECOVERING),
        ("keeper.recovering", RECOVERING),
        ("keeper.opened", OFFERED),
        ("keeper.given", FETCHED),
    ]
    assert stage(tmp_path) == STARTED


@pytest.mark.parametrize(
    ("before", "asked", "goes_on"),
    [
        (RECOVERING, ["recover"], True),  # EINVAL: the keeper before has done it, and no server was there yet
        (OFFERED, [], True),
        (LOST, [], True),
        (FETCHED, ["recover"], False),  # EINVAL: the kernel means something else
        (STARTED, ["recover"], False),
    ],
)
def test_a_recovery_that_was_begun_goes_on(
    tmp_path: Path, driver: Driver, server: Server, before: str, asked: list[str], goes_on: bool
) -> None:
    """Once a server was given the device, it is not begun again before one has said that its queues wait."""
    keeper = recovering(tmp_path, driver, before)
    driver.fails["recover"] = [errno.EINVAL]
    assert keeper._offer() is goes_on
    assert driver.done == asked + (["recovered 4711"] if goes_on else [])


def test_a_device_without_a_server_is_offered_at_once(
    tmp_path: Path, driver: Driver, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper before has died too: the next one does not wait for another death."""
    keeper = recovering(tmp_path, driver, OFFERED)
    waits: list[float] = []
    monkeypatch.setattr(
        keeper, "_poll", SimpleNamespace(poll=lambda ms: waits.append(ms) or [], register=lambda *_: None)
    )
    keeper._server._poll = keeper._poll

    def recovered() -> None:
        assert keeper._offer()
        raise KilledError

    monkeypatch.setattr(keeper, "_recover", recovered)
    with pytest.raises(KilledError):
        keeper.keep()
    assert waits == [0]
    assert stage(tmp_path) == STARTED


def test_nothing_is_begun_for_a_server_that_is_not_ready(
    tmp_path: Path, driver: Driver, server: Server
) -> None:
    keeper = recovering(tmp_path, driver)
    (tmp_path / "a" / rundir.DATA_ID).write_text("other\n")
    assert not keeper._offer()
    (tmp_path / "a" / rundir.DATA_ID).write_text("data\n")
    server.number = 7  # it has another device
    assert not keeper._offer()
    server.end()
    assert not keeper._offer()
    assert driver.done == []
    assert stage(tmp_path) == STARTED


def test_a_device_that_is_lost_is_said_to_be(
    tmp_path: Path, driver: Driver, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers that live are refused by the kernel for a while; one that may take it after all is let."""
    said: list[str] = []
    monkeypatch.setattr(keeping.KernelLog, "say", lambda self, device, sentence: said.append(sentence))
    monkeypatch.setattr(ublkkeeper, "LOSES", 0.0)
    keeper = recovering(tmp_path, driver)
    server.status = 409
    assert not keeper._offer()
    assert not keeper._offer()
    assert stage(tmp_path) == LOST
    assert "'zramd detach --swapoff --force a' ends it" in said[-1]
    server.status = 200
    assert keeper._offer()
    assert stage(tmp_path) == STARTED


def test_another_server_is_put_on_standby_once_this_one_serves(
    tmp_path: Path, driver: Driver, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process of its own, one at a time, whenever there is none; but not while nobody serves."""
    starts = tmp_path / "starts.py"
    starts.write_text("import sys; open(sys.argv[0] + '.done', 'a').write(' '.join(sys.argv[1:]) + '\\n')")
    spawn = os.posix_spawn
    words: list[list[str]] = []

    def run(path: str, argv: list[str], environment: dict[str, str], *, setsid: bool) -> int:
        words.append(argv[1:])
        return spawn(path, [path, str(starts), *argv[5:]], environment, setsid=setsid)

    monkeypatch.setattr(os, "posix_spawn", run)
    keeper = recovering(tmp_path, driver)
    assert keeper._has_standby()  # nobody has asked for one
    keeper._job = keeper._job._replace(standby="some.module")
    keeper._server.fd = -1
    assert not keeper._has_standby()
    assert words == []
    assert keeper._offer()
    keeper._server.fd = os.open(os.devnull, os.O_RDONLY)
    assert not keeper._has_standby()
    assert words == [["-S", "-P", "-m", "some.module", "a", str(tmp_path / "a"), "ublkb3"]]
    os.waitid(os.P_PID, keeper._starter, os.WEXITED | os.WNOWAIT)
    assert Path(f"{starts}.done").read_text() == f"a {tmp_path / 'a'} ublkb3\n"
    assert not keeper._has_standby()  # it has ended, and none is there
    assert len(words) == 2
    assert not keeper._has_standby()
    waiting = rundir.Standby(str(tmp_path / "a"))
    os.waitid(os.P_PID, keeper._starter, os.WEXITED | os.WNOWAIT)
    assert keeper._has_standby()
    assert len(words) == 2
    waiting.leave()
    starts.write_text("import sys; open(sys.argv[0] + '.done', 'a').write(sys.argv[-1] + '\\n'); sys.exit(1)")
    pauses = [keeper._again]
    for _ in range(7):
        assert not keeper._has_standby()
        os.waitid(os.P_PID, keeper._starter, os.WEXITED | os.WNOWAIT)
        pauses.append(keeper._again)
    assert pauses == [5.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]  # where it fails, ever less often
    assert Path(f"{starts}.done").read_text().split()[-7:] == ["ublkb3", *["again"] * 6]  # it says why once
    waiting = rundir.Standby(str(tmp_path / "a"))
    assert keeper._has_standby()
    assert keeper._again == 60.0
    starts.write_text("")
    waiting.leave()
    for _ in range(2):
        assert not keeper._has_standby()
        os.waitid(os.P_PID, keeper._starter, os.WEXITED | os.WNOWAIT)
    assert keeper._again == 5.0
    os.close(keeper._server.fd)
    keeper._server.fd = -1


def test_without_a_state_the_device_goes_with_its_server(tmp_path: Path, driver: Driver) -> None:
    """The keeper removes what the kernel has left of it, and its record, and ends."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    driver.mark = ublk.mark("a")
    (tmp_path / "chars/ublkc3").mkdir()
    keeper = keeper_of(tmp_path, device=3, stage=STARTED, data="data")
    keeper.attach()
    pidfd = os.pidfd_open(ended.pid)
    keeper._server.fd = pidfd
    keeper._poll.register(pidfd, select.POLLIN)
    keeper.keep()
    assert driver.done == ["delete"]
    assert not (tmp_path / "a.attached").exists()
    ended.wait()


def test_who_is_asked_is_the_folder_s_owner(tmp_path: Path, server: Server) -> None:
    assert asking.ask(str(tmp_path / "a"), "GET", "/health", timeout=5)[0] == 200
    server.status = 500
    with pytest.raises(AttachError, match="no, not now"):
        asking.ask_json(str(tmp_path / "a"), "PUT", "/ublk", {}, timeout=5)
    with pytest.raises(FileNotFoundError):
        asking.ask(str(tmp_path / "b"), "GET", "/health", timeout=5)


# ---- The map: who dies when, and what a kernel makes of it (Linux 6.12)


class Recovers(Driver):
    """A device of two queues as the kernel has it, started, and its server has died."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mapped = True  # by the server that has died
        self.ready = [True, True]  # the queues that have, or had, one who asks for requests
        self.is_open = False
        self.state = "quiesced"
        self.fallen = False

    def start_recovery(self, number: int) -> None:
        super().start_recovery(number)
        if self.is_open or self.state != "quiesced":
            raise UblkError("busy", errno.EBUSY)
        if not any(self.ready):
            raise UblkError("begun already", errno.EINVAL)
        if not all(self.ready):
            self.fallen = True  # over a null pointer
        self.mapped, self.ready = False, [False, False]

    def end_recovery(self, number: int, pid: int) -> None:
        super().end_recovery(number, pid)
        if self.state != "quiesced" or not all(self.ready):
            raise UblkError("busy", errno.EBUSY)
        self.state = "live"

    def given(self, gets: str) -> bool:
        """What the kernel lets a server do that gets so far: whether its queues wait then."""
        if gets == "nowhere" or self.mapped:
            return False
        self.mapped = True
        if gets != "mapped":
            self.ready[0] = True
        self.ready[1] = self.is_open = gets == "whole"
        return gets == "whole"

    def server_dies(self) -> None:
        self.is_open = False
        if self.state == "live":
            self.state = "quiesced"


class KilledError(BaseException):
    """What ends a keeper."""


@pytest.mark.parametrize("gets", ["nowhere", "mapped", "half", "whole"])
@pytest.mark.parametrize("server_lives", [True, False])
@pytest.mark.parametrize(
    "killed_at", ["keeper.recovers", "keeper.recovering", "keeper.opened", "keeper.given", "end", "never"]
)
def test_the_map(
    tmp_path: Path,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    gets: str,
    server_lives: bool,
    killed_at: str,
) -> None:
    """A server dies while it takes over, the keeper too: the next ones serve if any can, else it is lost.

    Whatever happens, the kernel does not fall.
    """
    device = Recovers(tmp_path)
    device.mark, device.recovers = ublk.mark("a"), True
    (tmp_path / "chars/ublkc3").mkdir()
    monkeypatch.setattr(ublkkeeper, "Control", device.control)
    monkeypatch.setattr(ublkkeeper, "LOSES", 0.0)
    monkeypatch.setattr(ublkkeeper, "LOOK_AT", 5.0)
    server = Server(tmp_path / "a")
    server.takes, server.dies = lambda: device.given(gets), True

    def step(name: str) -> None:
        if name == killed_at:
            raise KilledError

    first = keeper_of(tmp_path, device=3, stage=STARTED, data="data")
    first.attach()
    monkeypatch.setattr(ublkkeeper, "step", step)
    if killed_at == "end":  # before it could note that
        monkeypatch.setattr(ublk, "settle", lambda number, recovers: step("end"))
    with suppress(KilledError):
        first._offer()
    first._record.close()
    monkeypatch.setattr(ublkkeeper, "step", lambda name: None)
    monkeypatch.setattr(ublk, "settle", lambda number, recovers: None)
    if gets != "whole" or not server_lives:
        server.end()
        device.server_dies()
        server = Server(tmp_path / "a")
    server.takes, server.dies = lambda: device.given("whole"), False
    there = attached.find("a")
    assert there is not None
    second = keeper_of(tmp_path, device=3, stage=there.stage, data="data")
    second.attach()
    for _ in range(3):
        if second._stage != STARTED or device.state != "live":
            second._offer()
    second._record.close()
    server.close()
    assert not device.fallen
    # Given to a server that has mapped it and died before its queues waited, or that nobody knows of.
    offered = killed_at in ("keeper.given", "end", "never")
    lost = offered and gets in ("mapped", "half")
    assert stage(tmp_path) == (LOST if lost else STARTED)
    assert device.state == ("quiesced" if lost else "live")
