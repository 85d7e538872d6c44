"""The kernel's ublk devices as sysfs shows them, and which of them are ours."""

import os
import stat
from pathlib import Path

import pytest

from zramd.control import servers
from zramd.errors import AttachError
from zramd.kernel import attached, blockdevices, swap, ublk


@pytest.fixture
def sys_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /sys, and /run/zramd beside it."""
    for name in ("chars", "blocks", "run"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(ublk, "CHARS", str(tmp_path / "chars"))
    monkeypatch.setattr(ublk, "BLOCKS", str(tmp_path / "blocks"))
    monkeypatch.setattr(attached, "SYS_BLOCK", str(tmp_path / "blocks"))
    monkeypatch.setattr(attached, "FOLDER", str(tmp_path / "run"))
    monkeypatch.setattr(attached, "LOCK_TIMEOUT", 0.05)
    return tmp_path


def make(folder: Path, number: int, size: int = 1 << 20) -> Path:
    """Make a device with its disk; return the disk's folder."""
    (folder / f"chars/ublkc{number}").mkdir()
    disk = folder / f"blocks/ublkb{number}"
    (disk / "queue").mkdir(parents=True)
    (disk / "size").write_text(f"{size // 512}\n")
    return disk


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("/dev/ublkb3", 3), ("ublkb12", 12), ("/dev/ublkc3", None), ("/dev/ublkb3p1", None)),
        *(("/dev/nbd0", None), ("/dev/ublkb", None), ("", None)),
    ],
)
def test_numbers_of_names(text: str, number: int | None) -> None:
    assert ublk.number_of(text) == number


def test_what_the_kernel_has(sys_folder: Path) -> None:
    assert ublk.numbers() == []
    assert not ublk.exists(3)
    make(sys_folder, 3)
    make(sys_folder, 11)
    os.mkdir(sys_folder / "chars/ublkc4")  # whose disk the kernel has taken away
    assert ublk.numbers() == [3, 4, 11]
    assert ublk.has_disk(3)
    assert ublk.exists(4)
    assert not ublk.has_disk(4)
    assert ublk.connection(3) not in ("", ublk.connection(4))
    assert ublk.connection(5) == ""


def test_marks_differ_and_have_64_bits() -> None:
    marks = {ublk.mark(name) for name in ("zram0", "zram1", "a", "b", "")}
    assert len(marks) == 5
    assert all(0 < mark < 1 << 64 for mark in marks)
    assert ublk.mark("zram0") == ublk.mark("zram0")


@pytest.mark.parametrize(
    ("release", "broken"),
    [
        ("6.17.0-1003-aws", True),
        ("6.17.0-5-generic", False),
        ("6.18.4", True),
        ("6.18.4-zabbly+", True),
        ("6.18.40", False),
        ("6.18.5", False),
        ("6.12.117+deb13-cloud-amd64", False),
    ],
)
def test_kernels_that_hang(release: str, broken: bool) -> None:
    assert ublk.broken(release) is broken


def test_settings_are_read_back(sys_folder: Path) -> None:
    queue = make(sys_folder, 0) / "queue"
    (queue / "io_timeout").write_text("30000\n")
    ublk.settle(0, recovers=False)  # without wbt_lat_usec: a kernel that does not throttle
    assert (queue / "io_timeout").read_text() == "30000\n"
    (queue / "wbt_lat_usec").write_text("2000\n")
    with pytest.raises(AttachError, match="io_timeout' cannot be set to 500: the kernel says 50000"):
        ublk.settle(0, recovers=True)  # a file keeps what stood behind it
    assert (queue / "wbt_lat_usec").read_text() == "0000\n"
    (queue / "io_timeout").write_text("500")
    ublk.settle(0, recovers=True)
    (queue / "io_timeout").unlink()
    with pytest.raises(AttachError, match="io_timeout' cannot be set to 500: no such file"):
        ublk.settle(0, recovers=True)


def test_a_record_has_the_stage_and_the_folder(sys_folder: Path) -> None:
    make(sys_folder, 2)
    record = attached.Record("a")
    record.write("/dev/ublkb2", "data", keeper=os.getpid(), stage=attached.STARTED, folder="/run/a b\n c")
    there = attached.find("a")
    assert there == attached.Attached("a", "/dev/ublkb2", os.getpid(), "data", "started", "/run/a b\n c")
    assert there.number == 2
    assert not there.is_half
    record.write("/dev/ublkb2", "", keeper=1, stage=attached.ADDED, folder="/run/a")
    assert not attached.find("a").is_half  # type: ignore[union-attr] # its keeper is at work
    record.close()
    assert attached.find("a").is_half  # type: ignore[union-attr]


def test_another_s_device_of_the_same_number_is_not_ours(sys_folder: Path) -> None:
    """The file is left from a device that is gone; its number is somebody else's by now."""
    make(sys_folder, 2)
    record = attached.Record("a")
    record.write("/dev/ublkb2", "data", keeper=1, stage=attached.STARTED, folder="/run/a")
    record.close()
    assert attached.find("a")
    (sys_folder / "chars/other").mkdir()
    (sys_folder / "chars/ublkc2").rmdir()
    assert attached.find("a") is None
    (sys_folder / "chars/other").rename(sys_folder / "chars/ublkc2")
    assert attached.find("a") is None
    assert attached.devices("a", 1 << 20) == []


def test_devices_are_those_of_the_record(sys_folder: Path) -> None:
    """Not those of the same size: what another program serves may have that too."""
    make(sys_folder, 0)
    make(sys_folder, 1)
    record = attached.Record("a")
    record.write("/dev/ublkb1", "data", keeper=1, stage=attached.STARTED, folder="/run/a")
    assert attached.devices("a", 1 << 20) == ["/dev/ublkb1"]
    assert attached.devices("b", 1 << 20) == []
    assert servers.name_of("/dev/ublkb1") == "a"
    assert servers.name_of("/dev/ublkb0") == "ublkb0"
    assert attached.is_connected("/dev/ublkb1")
    assert not attached.is_connected("/dev/ublkb7")
    record.close()


def test_partitions_are_areas_of_their_disk(sys_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = make(sys_folder, 0)
    swaps = sys_folder / "swaps"
    swaps.write_text("F T S U P\n/dev/ublkb0p2 partition 100 10 99\n/dev/ublkb0p1 partition 100 20 100\n")
    monkeypatch.setattr(swap, "SWAPS", str(swaps))
    assert [area.path for area in swap.areas("/dev/ublkb0")] == ["/dev/ublkb0p1", "/dev/ublkb0p2"]
    monkeypatch.setattr(swap, "_size", lambda name: int((disk / "size").read_text()) * 512)
    assert swap.nbd_devices(1 << 20) == ["/dev/ublkb0"]


def test_a_backing_on_its_own_disk_is_found(sys_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(sys_folder, 0)
    record = attached.Record("a")
    record.write("/dev/ublkb0", "data", keeper=1, stage=attached.STARTED, folder="/run/a")
    block = blockdevices.Block(stat.S_IFBLK, "ublkb0p1")
    monkeypatch.setattr(blockdevices, "below", lambda number: iter((block,)))
    assert blockdevices.own(1, "a") == "ublkb0p1"
    assert blockdevices.own(1, "b") == ""
    record.close()
