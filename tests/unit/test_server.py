"""When a server may stop: never silently with its kernel's pages in its memory."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from zramd import config, sockets, swap
from zramd import server as module
from zramd.core.device import Device
from zramd.errors import ConfigError
from zramd.server import Server


def server(**settings: str) -> Server:
    return Server(config.parse([("size", "1M"), ("rundir", "/nowhere"), *settings.items()]), lambda: None)


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
