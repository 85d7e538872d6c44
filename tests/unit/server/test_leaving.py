"""When a server may end, and that it does."""

import errno
import os
import signal
import threading

import pytest

from zramd.kernel import swap
from zramd.process import notify
from zramd.server.fronts.front import Front
from zramd.server.leaving import Leaving
from zramd.settings import config


class FakeFront(Front):
    """A front whose devices are swapped to as the kernel says of NBD's."""

    def swap_devices(self) -> list[str]:
        return swap.nbd_devices(1 << 20)


def leaving(clients: int = 1, **settings: str) -> Leaving:
    pairs = {"size": "1M", "rundir": "/nowhere", **settings}
    return Leaving(
        config.parse(pairs.items()),
        FakeFront(),
        notify.Manager(),
        signals=-1,
        clients=lambda: clients,
        stopping=threading.Event(),
        clean_up=lambda: None,
    )


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that are swapped to."""
    devices = ["/dev/nbd0"]
    monkeypatch.setattr(swap, "nbd_devices", lambda disksize: devices if disksize == 1 << 20 else [])
    return devices


TERM = bytes([signal.SIGTERM])


def test_waits_for_swapoff(used: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    local = leaving(swap="local")
    assert not local.may_leave(TERM)
    assert (
        "/dev/nbd0 is in use as swap: stopping as soon as 'swapoff /dev/nbd0' has run"
        in capfd.readouterr().err
    )
    assert not local.may_leave(b"")
    assert capfd.readouterr().err == ""
    used.clear()
    assert local.may_leave(b"")


def test_names_what_swaps_off_areas(
    used: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """'swapoff /dev/nbd0' would do nothing about partitions of it."""
    areas = [swap.Swap(f"/dev/nbd0p{number}", 1 << 20, 0, number) for number in (1, 2)]
    monkeypatch.setattr(swap, "swaps", lambda: areas)
    assert not leaving(swap="local", name="zram7").may_leave(TERM)
    assert (
        "/dev/nbd0 is in use as swap: stopping as soon as 'zramd detach --swapoff zram7' has run"
        in capfd.readouterr().err
    )


def test_stops_when_told_to_lose_the_data(used: list[str]) -> None:
    local = leaving(swap="local")
    assert local.may_leave(bytes([signal.SIGQUIT]))


def test_stops_without_clients_and_for_others(used: list[str]) -> None:
    assert leaving(clients=0, swap="local").may_leave(TERM)
    assert leaving().may_leave(TERM)


def test_asks_again_when_it_cannot_tell_whether_swap_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal to stop is not lost, and data in use neither."""
    answers: list[object] = [OSError(errno.EMFILE, "Too many open files"), ["/dev/nbd0"], []]

    def nbd_devices(disksize: int) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(swap, "nbd_devices", nbd_devices)
    local = leaving(swap="local")
    with pytest.raises(OSError, match="Too many"):
        local.may_leave(TERM)
    assert local.refused
    assert not local.may_leave(TERM)
    assert local.may_leave(b"")


def test_leaving_ends_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child: the way out is os._exit."""
    made = leaving()

    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    child = os.fork()
    if child == 0:
        made.surely(fail)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_farewell_that_fails_everywhere_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    one = leaving()
    ends: list[int] = []

    def fail() -> None:
        raise OSError(errno.EMFILE, "no")

    monkeypatch.setattr(one._front, "use_spare", fail)
    monkeypatch.setattr(one, "_clean_up", fail)
    monkeypatch.setattr(os, "_exit", ends.append)
    with pytest.raises(OSError, match="no"):  # the end that is replaced here
        one.surely(fail)
    assert ends == [0]
