"""The server, without nbdkit: what it says of its data, whom it lets in, what may fail."""

import errno
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from support.run import wait_until

from zramd.contract import handover, rundir
from zramd.contract.rundir import DATA_ID, Rundir
from zramd.core.device.device import Device
from zramd.errors import ConfigError, DeviceError, RundirError, SaveError, ZramdError
from zramd.server import sockets
from zramd.server.server import Server
from zramd.settings import config


def server(**settings: str) -> Server:
    pairs = {"size": "1M", "rundir": "/nowhere", **settings}
    return Server(config.parse(pairs.items()), lambda: None)


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


def test_a_thread_dies_loudly(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = server()

    def fail() -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(threading, "excepthook", made._thread_failed)
    thread = threading.Thread(target=fail, name="zramd-refill")
    thread.start()
    thread.join()
    text = "zramd-refill has ended: ZeroDivisionError: by zero"
    assert capfd.readouterr().err == f"zramd: {text}\n"
    assert made.health()["causes"] == [text]


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


def test_two_threads_do_what_was_left_undone_in_its_order() -> None:
    """A manager that is told READY=1 first has no status yet."""
    one = server()
    begun, go_on = threading.Event(), threading.Event()
    done = []

    def first() -> None:
        begun.set()
        go_on.wait(10)
        done.append("a")

    one._undone["a"] = first
    one._undone["b"] = lambda: done.append("b")
    housekeeper = threading.Thread(target=one._do_undone)
    housekeeper.start()
    assert begun.wait(10)
    other = threading.Thread(target=one._do_undone)
    other.start()
    other.join(0.1)
    go_on.set()
    for thread in (housekeeper, other):
        thread.join()
    assert done == ["a", "b"]
    assert not one._undone


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


def test_a_socket_that_does_not_tell_what_it_is_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()

    class Silent:
        def __init__(self, fileno: int) -> None:
            raise OSError(errno.ENOBUFS, "no")

    with ours, theirs:
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as short:
            short.setattr(sockets.socket, "socket", Silent)
            for look in (sockets.listening, sockets.inherited, lambda: sockets.count_clients(frozenset())):
                with pytest.raises(OSError, match="no"):
                    look()
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
