"""When a server may stop: never silently with its kernel's pages in its memory."""

import signal

import pytest

from zramd import config, swap
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


def test_waits_for_swapoff(used: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    local = server(swap="local")
    local.client_opened()
    assert not local._may_leave(TERM)
    assert "/dev/nbd0 is in use as swap: stopping once 'swapoff /dev/nbd0' was run" in capsys.readouterr().err
    assert not local._may_leave(b"")
    assert capsys.readouterr().err == ""
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
