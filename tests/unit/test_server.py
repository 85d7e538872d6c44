"""The server, without nbdkit: when it may stop, what it says of its data, whom it lets in, what may fail."""

import errno
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

from zramd import config, handover, rundir, sockets, swap
from zramd import server as module
from zramd.core.device import Device
from zramd.errors import ConfigError, DeviceError, RundirError, SaveError, ZramdError
from zramd.rundir import DATA_ID, Rundir
from zramd.server import Server


def server(**settings: str) -> Server:
    pairs = {"size": "1M", "rundir": "/nowhere", **settings}
    return Server(config.parse(pairs.items()), lambda: None)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that are swapped to."""
    devices = ["/dev/nbd0"]
    monkeypatch.setattr(swap, "devices_in_use", lambda disksize: devices if disksize == 1 << 20 else [])
    return devices


TERM = bytes([signal.SIGTERM])


def test_waits_for_swapoff(used: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    local = server(swap="local")
    local.client_opened()
    assert not local._may_leave(TERM)
    assert "/dev/nbd0 is in use as swap: stopping once 'swapoff /dev/nbd0' was run" in capfd.readouterr().err
    assert not local._may_leave(b"")
    assert capfd.readouterr().err == ""
    used.clear()
    assert local._may_leave(b"")


def test_stops_when_told_to_lose_the_data(used: list[str]) -> None:
    local = server(swap="local")
    local.client_opened()
    assert local._may_leave(bytes([signal.SIGQUIT]))


def test_stops_without_clients_and_for_others(used: list[str]) -> None:
    assert server(swap="local")._may_leave(TERM)
    other = server()
    other.client_opened()
    assert other._may_leave(TERM)


def test_change() -> None:
    changed = server(mem_limit="1M")
    changed.device = Device(1 << 20, mem_limit=1 << 20)
    assert changed.change("mem_limit", "10000") == 12288
    assert changed.device.mem_limit == changed.config.mem_limit == 12288
    assert changed.change("compaction_threshold", "10%") == 10
    assert changed.settings()["compaction_threshold"] == 10
    with pytest.raises(ConfigError, match="compaction: 'x' is neither on nor off"):
        changed.change("compaction", "x")
    with pytest.raises(ConfigError, match="disksize cannot be changed while the device is served: clients"):
        changed.change("disksize", "2M")
    assert changed.config.disksize == 1 << 20


class TestDataId:
    """Who connects again goes by it: it never names other data than the device holds."""

    @pytest.fixture
    def served(self, tmp_path: Path) -> Server:
        made = server(rundir=str(tmp_path / "run"))
        made.device = Device(1 << 20)
        made._rundir = Rundir(made.config.rundir)
        made._publish_data_id()
        made.device.write(b"data", 0)
        return made

    def published(self, served: Server) -> str | None:
        try:
            return Path(served.config.rundir, DATA_ID).read_text().strip()
        except FileNotFoundError:
            return None

    @pytest.fixture
    def full(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Nothing can be written to a run folder while this list holds an error number."""
        errors: list[int] = []
        replace_file = rundir.replace_file

        def refuse(*arguments: Any) -> None:
            if errors:
                raise OSError(errors[0], os.strerror(errors[0]))
            replace_file(*arguments)

        monkeypatch.setattr(rundir, "replace_file", refuse)
        return errors

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EIO, errno.EROFS, errno.EACCES])
    def test_reset_without_room(self, served: Server, full: list[int], number: int) -> None:
        full.append(number)
        assert served.reset()
        assert self.published(served) is None
        assert served.health()["status"] == "degraded"
        assert served.health()["causes"][0].startswith("data_id is not written: ")
        served._do_undone()
        assert self.published(served) is None
        full.clear()
        served._do_undone()
        assert self.published(served) == served.device.data_id
        assert served.health()["status"] == "ok"

    def test_nothing_is_dropped_under_an_old_name(
        self, served: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(name: str) -> None:
            raise RundirError(f"'{name}' cannot be removed")

        assert served._rundir is not None
        monkeypatch.setattr(served._rundir, "withdraw", refuse)
        with pytest.raises(RundirError):
            served.reset()
        assert self.published(served) == served.device.data_id
        assert served.device.counters()["pages_stored"] == 1

    @pytest.mark.parametrize("sound", [True, False])
    def test_load_without_room(self, served: Server, full: list[int], sound: bool) -> None:
        """Clients are served again after it, and the name comes when there is room."""
        with tempfile.TemporaryFile() as file:
            served.save(file.fileno(), live=False)
            assert served.reset()
            stream = file.seek(0) or file.read()
        full.append(errno.ENOSPC)
        reader, writer = os.pipe()
        os.write(writer, stream if sound else stream[:-1])
        os.close(writer)
        if sound:
            assert served.load(reader, b"", -1)["blocks"] == 1
        else:
            with pytest.raises(SaveError):
                served.load(reader, b"", -1)
        os.close(reader)
        assert self.published(served) is None
        served.client_opened()
        served.client_closed()
        full.clear()
        served._do_undone()
        assert self.published(served) == served.device.data_id

    def test_clients_come_until_a_load_has_begun(self, served: Server) -> None:
        assert served.reset()
        reader, writer = os.pipe()
        failures: list[ZramdError] = []

        def load() -> None:
            try:
                served.load(reader, b"", -1)
            except ZramdError as error:
                failures.append(error)

        loading = threading.Thread(target=load, daemon=True)
        loading.start()
        loading.join(0.1)
        served.client_opened()
        os.close(writer)
        loading.join(30)
        os.close(reader)
        assert str(failures[0]) == "the device is in use: disconnect every client before a load"


class TestClientLimit:
    def test_one_too_many(self) -> None:
        limited = server(client_limit="2")
        opened = []

        def come() -> None:
            limited.client_connects()
            limited.client_opened()
            opened.append(threading.get_native_id())

        come()
        come()
        for _ in range(2):
            with pytest.raises(DeviceError) as caught:
                come()
        assert str(caught.value) == (
            "a client was turned away: there are 2 connections already, the most that client_limit allows"
        )
        limited._admission.watch_clients()
        limited._admission.watch_clients()
        assert limited.health()["causes"] == [
            "clients are turned away: there are 2 connections already, the most that client_limit allows"
        ]
        limited.client_closed()
        limited._admission.watch_clients()
        limited._admission.watch_clients()
        assert limited.health()["status"] == "ok"
        come()
        limited.change("client_limit", "3")
        come()
        assert len(opened) == 4

    def test_who_left_before_he_was_a_client_does_not_count(self) -> None:
        limited = server(client_limit="1")
        for _ in range(5):
            comer = threading.Thread(target=limited.client_connects)
            comer.start()
            comer.join()
            wait_until(lambda: not os.path.exists(f"/proc/self/task/{comer.native_id}"))  # noqa: B023
        limited.client_connects()
        with pytest.raises(DeviceError):
            limited.client_connects()


def test_asks_again_when_it_cannot_tell_whether_swap_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal to stop is not lost, and data in use neither."""
    answers: list[object] = [OSError(errno.EMFILE, "Too many open files"), ["/dev/nbd0"], []]

    def devices_in_use(disksize: int) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(swap, "devices_in_use", devices_in_use)
    local = server(swap="local")
    local.client_opened()
    with pytest.raises(OSError, match="Too many"):
        local._may_leave(TERM)
    assert local._stop_refused
    assert not local._may_leave(TERM)
    assert local._may_leave(b"")


def test_a_thread_dies_loudly(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = server()

    def fail() -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(threading, "excepthook", made._thread_failed)
    thread = threading.Thread(target=fail, name="zramd-keeper")
    thread.start()
    thread.join()
    text = "zramd-keeper has ended: ZeroDivisionError: by zero"
    assert capfd.readouterr().err == f"zramd: {text}\n"
    assert made.health()["causes"] == [text]


def test_leaving_ends_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child: the way out is os._exit."""
    made = server()

    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    child = os.fork()
    if child == 0:
        made._surely(fail)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_full_pipe_is_no_error() -> None:
    made = server()
    made.device = Device(1 << 20)
    made._wake = os.pipe2(os.O_NONBLOCK)
    made._housekeeping = threading.current_thread()
    with pytest.raises(BlockingIOError):
        while True:
            os.write(made._wake[1], bytes(4096))
    assert made.change("stats_interval", "5") == 5
    for fd in made._wake:
        os.close(fd)


class Parting:
    """A server that leaves a client: a thread looks for a moment in which it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.client, self.connection = socket.socketpair()
        self.server = server()
        self.server.device = Device(1 << 20)
        monkeypatch.setattr(module, "QUIET", seconds)
        monkeypatch.setattr(sockets, "clients", self.clients)
        self.thread = threading.Thread(target=self.server._await_quiet, daemon=True)

    @contextmanager
    def clients(self, others: frozenset[int]) -> Iterator[list[socket.socket]]:
        yield [self.connection]

    def is_cut_off(self) -> bool:
        try:
            self.client.send(b".")
        except BrokenPipeError:
            return True
        return False


def test_leaves_when_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    parting = Parting(monkeypatch, 60)
    parting.client.send(b"request")
    parting.thread.start()
    parting.thread.join(0.1)
    assert parting.thread.is_alive()
    assert not parting.is_cut_off()
    parting.connection.recv(64)
    parting.thread.join(30)
    assert not parting.thread.is_alive()
    assert parting.is_cut_off()


def test_leaves_when_requests_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    parting = Parting(monkeypatch, 0.05)
    parting.client.send(b"request")
    parting.thread.start()
    parting.thread.join(30)
    assert not parting.thread.is_alive()
    assert parting.is_cut_off()
    assert parting.connection.recv(64) == b"request"  # what has come can still be read, and answered


def test_two_threads_may_do_what_was_left_undone() -> None:
    one = server()
    done = []
    one._undone["a"] = one._do_undone  # as the housekeeper does meanwhile
    one._undone["b"] = lambda: done.append("b")
    one._do_undone()
    assert done == ["b"]
    assert not one._undone


def test_a_farewell_that_fails_everywhere_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    one = server()
    ends: list[int] = []

    def fail() -> None:
        raise OSError(errno.EMFILE, "no")

    monkeypatch.setattr(one._admission, "use_spare", fail)
    monkeypatch.setattr(one, "_remove_files", fail)
    monkeypatch.setattr(module.os, "_exit", ends.append)
    with pytest.raises(OSError, match="no"):  # the end that is replaced here
        one._surely(fail)
    assert ends == [0]


def test_clients_are_found_without_a_descriptor_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()

    def no_dup(fd: int) -> int:
        raise OSError(errno.EMFILE, "no")

    with ours, theirs:
        others = sockets.inherited() - {os.fstat(ours.fileno()).st_ino}
        with monkeypatch.context() as short:
            short.setattr(os, "dup", no_dup)
            found = sockets.shut_clients(frozenset(others), socket.SHUT_RDWR)
        assert found >= 1
        assert theirs.recv(1) == b""
        assert ours.fileno() >= 0
        os.fstat(ours.fileno())


def test_a_socket_that_does_not_tell_what_it_is_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()

    class Silent:
        def __init__(self, fileno: int) -> None:
            raise OSError(errno.ENOBUFS, "no")

    with ours, theirs:
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as short:
            short.setattr(sockets.socket, "socket", Silent)
            assert sockets.count_clients(frozenset()) == 0
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_turn_that_cannot_be_given_now_is_given_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setenv(handover.TURN, str(turn))
    one = server(rundir=str(tmp_path))
    one._undone["turn"] = one._give_turn
    stat = os.stat

    def short(path: Any, **rest: Any) -> os.stat_result:
        if path == str(tmp_path):
            raise OSError(errno.ENOMEM, "no memory")
        return stat(path, **rest)

    with monkeypatch.context() as shortage:
        shortage.setattr(os, "stat", short)
        one._do_undone()
    assert "turn" in one._undone
    os.fstat(turn)
    one._do_undone()
    assert not one._undone
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(turn)
