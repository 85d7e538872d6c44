"""The drop-in for systemd's swap unit, and the lock that keeps udev away."""

import fcntl
import os
from pathlib import Path

import pytest

from zramd.kernel import attached, swapunit


def test_the_order_is_written_for_everybody_to_read_and_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swapunit, "FOLDER", str(tmp_path))
    before = os.umask(0o077)
    try:
        swapunit.order("/dev/nbd3", "zram0")
        swapunit.order("/dev/nbd3", "zram0")
    finally:
        os.umask(before)
    folder = tmp_path / "dev-nbd3.swap.d"
    assert (folder / "50-zramd.conf").read_text() == "[Unit]\nAfter=zramd-attach@zram0.service\n"
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "50-zramd.conf").stat().st_mode & 0o777 == 0o644
    swapunit.forget("/dev/nbd3")
    assert list(tmp_path.iterdir()) == []
    swapunit.forget("/dev/nbd3")


def test_each_area_has_an_order_and_all_are_forgotten_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swapunit, "FOLDER", str(tmp_path))
    for area in ("/dev/nbd3p1", "/dev/nbd3p16", "/dev/nbd31", "/dev/nbd31p2"):
        swapunit.order(area, "zram0")
    swapunit.forget("/dev/nbd3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev-nbd31.swap.d", "dev-nbd31p2.swap.d"]


def test_what_others_have_written_for_that_unit_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swapunit, "FOLDER", str(tmp_path))
    swapunit.order("/dev/nbd3", "zram0")
    (tmp_path / "dev-nbd3.swap.d/local.conf").write_text("")
    swapunit.forget("/dev/nbd3")
    assert [path.name for path in (tmp_path / "dev-nbd3.swap.d").iterdir()] == ["local.conf"]


def test_without_systemd_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapunit, "FOLDER", str(tmp_path / "system"))
    swapunit.order("/dev/nbd3", "zram0")
    assert list(tmp_path.iterdir()) == []


def test_udev_finds_the_device_locked(tmp_path: Path) -> None:
    device = tmp_path / "nbd3"
    device.touch()
    with device.open() as udev:
        with attached.unobserved(str(device)), pytest.raises(BlockingIOError):
            fcntl.flock(udev, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(udev, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with attached.unobserved(str(device)):  # it waits a while for udev, and goes on then
            pass


def test_only_a_device_that_was_disconnected_loses_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ioctl cuts off what is connected; a swapoff that was interrupted leaves swap on the device."""
    device = tmp_path / "nbd3"
    device.touch()
    asked: list[int] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda fd, request: asked.append(request))
    with attached.unobserved(str(device)):
        pass
    with pytest.raises(KeyboardInterrupt), attached.unobserved(str(device)):
        raise KeyboardInterrupt
    assert asked == []
    with attached.unobserved(str(device)) as disconnected:
        disconnected()
    assert asked == [0xAB04]  # NBD_CLEAR_SOCK
