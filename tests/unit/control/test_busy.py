"""Tests of zramd.control.busy: what is not stopped, because the kernel uses it or is about to."""

import os
import threading
import time
from pathlib import Path

import pytest

from zramd import lockfile
from zramd.control import busy, life
from zramd.control.servers import Served
from zramd.errors import DeviceError
from zramd.kernel import attached, swap


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A descriptor of the record of the attached device "a"."""
    monkeypatch.setattr(attached, "FOLDER", str(tmp_path), None)
    return os.open(tmp_path / "a.attached", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)


def test_what_nobody_attaches_is_not_refused(record: int, tmp_path: Path) -> None:
    busy.refuse(Served("a", str(tmp_path), None), "stop")
    busy.refuse(Served("b", str(tmp_path), None), "stop")
    os.close(record)


def test_an_attach_that_goes_on_is_named(
    record: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "TURN_TIMEOUT", 0.1)
    assert lockfile.ofd_take(record)
    with pytest.raises(DeviceError, match="cannot stop a: another command attaches or detaches it"):
        busy.refuse(Served("a", str(tmp_path), None), "stop")
    os.close(record)


@pytest.mark.parametrize("swaps", [True, False])
def test_the_end_of_an_attach_is_waited_for(
    record: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    """What it has swapped to by then is in use."""
    swapped: list[str] = []

    def attach() -> None:
        time.sleep(0.1)
        if swaps:
            swapped.append(swap.SWAP)
        os.close(record)

    monkeypatch.setattr(attached, "devices", lambda name, disksize: ["/dev/nbd0"])
    monkeypatch.setattr(swap, "uses", lambda device: list(swapped))
    assert lockfile.ofd_take(record)
    thread = threading.Thread(target=attach)
    thread.start()
    if swaps:
        with pytest.raises(DeviceError, match="is in use as swap"):
            busy.refuse(Served("a", str(tmp_path), None), "stop")
    else:
        busy.refuse(Served("a", str(tmp_path), None), "stop")
        assert not thread.is_alive() or not attached.is_busy("a")
    thread.join()


def test_a_turn_may_be_given_back_early(tmp_path: Path) -> None:
    """An attach does so: what is opened meanwhile stays open."""
    folder = str(tmp_path)
    with life.turn(folder, "a") as first:
        assert life.is_busy(folder)
        first.done()
        assert not life.is_busy(folder)
        with life.turn(folder, "a"):
            first.done()
            assert life.is_busy(folder)
    assert not life.is_busy(folder)
