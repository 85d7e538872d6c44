"""What a server does for NBD's clients, without nbdkit: whom it lets in, and when it leaves them."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.run import wait_until

from zramd.contract.rundir import Rundir
from zramd.core.device.device import Device
from zramd.errors import DeviceError
from zramd.server import admission, sockets
from zramd.server.fronts import nbd as module
from zramd.server.fronts.nbd import Nbd
from zramd.server.service import Service
from zramd.server.trouble import Troubles
from zramd.settings import config


def front(folder: Path, **settings: str) -> Nbd:
    """The front of an empty device; nobody listens."""
    made = config.parse({"size": "1M", "rundir": str(folder / "run"), **settings}.items())
    found = Nbd(lambda: None)
    found.serve(Service(made, Device(made.disksize), Rundir(made.rundir), Troubles(), found))
    return found


class TestGreeting:
    def test_whoever_connects_is_greeted_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        greeted: list[frozenset[int]] = []
        monkeypatch.setattr(sockets, "widen_clients", greeted.append)
        admission = front(tmp_path).admission
        assert admission.greet_interval() == 0
        for _ in range(2):
            admission.connects()
        assert admission.greet_interval() > 0
        admission.greet(frozenset({7}))
        assert greeted == [{7}]
        assert admission.greet_interval() == 0

    def test_it_is_tried_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(others: frozenset[int]) -> None:
            raise OSError(errno.ENFILE, "no")

        monkeypatch.setattr(sockets, "widen_clients", fail)
        admission = front(tmp_path).admission
        admission.connects()
        with pytest.raises(OSError, match="no"):
            admission.greet(frozenset())
        assert admission.greet_interval() > 0

    def test_nobody_is_where_this_machine_swaps(self, tmp_path: Path) -> None:
        admission = front(tmp_path, swap="local").admission
        admission.connects()
        assert admission.greet_interval() == 0


class TestClientLimit:
    def test_one_too_many(self, tmp_path: Path) -> None:
        limited = front(tmp_path, client_limit="2")
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
        limited.admission.watch_clients()
        limited.admission.watch_clients()
        assert limited._service.health()["causes"] == [
            "clients are turned away: there are 2 connections already, the most that client_limit allows"
        ]
        limited.client_closed()
        limited.admission.watch_clients()
        limited.admission.watch_clients()
        assert limited._service.health()["status"] == "ok"
        come()
        limited._service.change("client_limit", "3")
        come()
        assert len(opened) == 4

    def test_who_left_before_he_was_a_client_does_not_count(self, tmp_path: Path) -> None:
        limited = front(tmp_path, client_limit="1")
        for _ in range(5):
            comer = threading.Thread(target=limited.client_connects)
            comer.start()
            comer.join()
            wait_until(lambda: not os.path.exists(f"/proc/self/task/{comer.native_id}"))  # noqa: B023
        limited.client_connects()
        with pytest.raises(DeviceError):
            limited.client_connects()


class Parting:
    """A server that leaves a client: a thread looks for a moment in which it may."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.client, self.connection = socket.socketpair()
        monkeypatch.setattr(module, "QUIET", seconds)
        monkeypatch.setattr(sockets, "clients", self.clients)
        self.thread = threading.Thread(target=front(tmp_path).await_quiet, daemon=True)

    @contextmanager
    def clients(self, others: frozenset[int]) -> Iterator[list[socket.socket]]:
        yield [self.connection]

    def is_cut_off(self) -> bool:
        try:
            self.client.send(b".")
        except BrokenPipeError:
            return True
        return False


def test_leaves_when_nothing_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parting = Parting(tmp_path, monkeypatch, 60)
    parting.client.send(b"request")
    parting.thread.start()
    parting.thread.join(0.1)
    assert parting.thread.is_alive()
    assert not parting.is_cut_off()
    parting.connection.recv(64)
    parting.thread.join(30)
    assert not parting.thread.is_alive()
    assert parting.is_cut_off()


def test_leaves_when_requests_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parting = Parting(tmp_path, monkeypatch, 0.05)
    parting.client.send(b"request")
    parting.thread.start()
    parting.thread.join(30)
    assert not parting.thread.is_alive()
    assert parting.is_cut_off()
    assert parting.connection.recv(64) == b"request"  # what has come can still be read, and answered


class TestHandshakes:
    """Over TCP anyone may begin one."""

    @pytest.fixture
    def limited(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nbd:
        made = front(tmp_path, handshake_limit="1")
        made.admission._strangers = True
        monkeypatch.setattr(admission, "TURN", 60.0)
        return made

    def test_the_next_one_has_its_turn(self, limited: Nbd) -> None:
        limited.client_connects()
        began = threading.Thread(target=limited.client_connects, daemon=True)
        began.start()
        wait_until(lambda: limited.admission._queue == 1)
        assert limited.admission.watch_interval() == limited.admission.WATCH_QUEUE
        limited.client_opened()
        began.join(30)
        assert not began.is_alive()
        assert (limited.admission._queue, limited.admission.handshakes) == (0, 1)

    def test_who_waits_too_long_is_turned_away(self, limited: Nbd, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(admission, "TURN", 0.0)
        limited.client_connects()
        with pytest.raises(DeviceError) as caught:
            limited.client_connects()
        assert str(caught.value) == (
            "a client was turned away: 1 connections are in their handshake, the most that handshake_limit "
            "allows"
        )
        limited._service.change("handshake_limit", "2")
        other = threading.Thread(target=limited.client_connects)
        other.start()
        other.join(30)
        assert limited.admission.handshakes == 2

    def test_who_left_makes_room(self, limited: Nbd) -> None:
        """At once, though nbdkit does not report it."""
        gone = threading.Thread(target=limited.client_connects)
        gone.start()
        gone.join(30)
        wait_until(lambda: not os.path.exists(f"/proc/self/task/{gone.native_id}"))
        began = threading.Thread(target=limited.client_connects, daemon=True)
        began.start()
        began.join(30)
        assert not began.is_alive()
        assert limited.admission.handshakes == 1

    def test_the_slow_hurry_while_others_wait(self, limited: Nbd, monkeypatch: pytest.MonkeyPatch) -> None:
        found: list[float] = []
        monkeypatch.setattr(limited.admission._arrivals, "cut_off", found.append)
        limited.client_connects()
        limited.admission.watch_clients()
        limited.admission._queue = 1
        limited.admission.watch_clients()
        assert found == [admission.PATIENCE, admission.HURRY]

    def test_those_who_wait_count(self, tmp_path: Path) -> None:
        limited = front(tmp_path, handshake_limit="1", client_limit="2")
        limited.admission._strangers = True
        limited.client_connects()
        limited.admission._queue = 1
        with pytest.raises(DeviceError, match="the most that client_limit allows"):
            limited.client_connects()
