"""What block devices lie on, and what they are used for, as /sys shows it."""

import os
from pathlib import Path

import pytest

from zramd.kernel import attached, blockdevices, swap
from zramd.kernel.blockdevices import Block

NUMBERS = {"sda": (8, 0), "sda1": (8, 1), "sda2": (8, 2), "sdb": (8, 16), "nbd0": (43, 0), "nbd0p1": (43, 1)}
NUMBERS |= {"dm-0": (253, 0), "dm-1": (253, 1), "dm-2": (253, 2), "loop0": (7, 0), "zram0": (252, 0)}


class System:
    """A /sys and a /proc in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("dev", "proc"):
            (path / name).mkdir()
        for name in ("sda", "sda/sda1", "sda/sda2", "sdb", "nbd0", "nbd0/nbd0p1", "loop0", "zram0"):
            self.add(name)
        self.swaps()
        (path / "proc/mountinfo").write_text("")

    def add(self, name: str) -> None:
        folder = self.path / "block" / name
        folder.mkdir(parents=True)
        base = folder.name
        major, minor = NUMBERS[base]
        (folder / "dev").write_text(f"{major}:{minor}\n")
        if "/" in name:
            (folder / "partition").write_text("1\n")
        for part in ("slaves", "holders"):
            (folder / part).mkdir()
        (self.path / f"dev/{major}:{minor}").symlink_to(folder)

    def map(self, name: str, *slaves: str, shown: str = "") -> None:
        """Have dm-N lie on other devices."""
        self.add(name)
        (self.path / f"block/{name}/dm").mkdir()
        (self.path / f"block/{name}/dm/name").write_text(f"{shown or name}\n")
        for slave in slaves:
            below = os.path.realpath(self.path / "dev/{}:{}".format(*NUMBERS[slave]))
            (self.path / f"block/{name}/slaves/{slave}").symlink_to(below)
            Path(below, "holders", name).symlink_to(self.path / "block" / name)

    def swaps(self, *paths: str) -> None:
        lines = [f"{path} partition 1000 0 -2\n" for path in paths]
        (self.path / "proc/swaps").write_text("".join(["Filename Type Size Used Priority\n", *lines]))


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(blockdevices, "SYS", str(tmp_path / "dev"))
    monkeypatch.setattr(blockdevices, "MOUNTS", str(tmp_path / "proc/mountinfo"))
    monkeypatch.setattr(attached, "SYS_BLOCK", str(tmp_path / "block"))
    monkeypatch.setattr(swap, "SWAPS", str(tmp_path / "proc/swaps"))
    return System(tmp_path)


def number(name: str) -> int:
    return os.makedev(*NUMBERS[name])


def below(name: str) -> list[str]:
    return [block.name for block in blockdevices.below(number(name))]


def test_a_device_and_what_it_lies_on(system):
    assert blockdevices.find(number("sda1")) == Block(number("sda1"), "sda1")
    assert below("sda") == ["sda"]
    assert below("sda1") == ["sda1", "sda"]
    system.map("dm-0", "sda2", "sdb")
    system.map("dm-1", "dm-0")
    assert sorted(below("dm-1")) == ["dm-0", "dm-1", "sda", "sda2", "sdb"]


def test_a_number_that_is_no_block_device(system):
    assert list(blockdevices.below(os.makedev(0, 42))) == [Block(os.makedev(0, 42), "")]
    assert blockdevices.takes_memory(os.makedev(0, 42)) == ""
    assert blockdevices.swapped_to(os.makedev(0, 42)) == ""


def test_what_takes_memory(system):
    system.map("dm-0", "sda2")
    assert [blockdevices.takes_memory(number(name)) for name in ("sda", "sda1", "dm-0")] == ["", "", ""]
    assert blockdevices.takes_memory(number("nbd0p1")) == "nbd0p1"
    assert blockdevices.takes_memory(number("zram0")) == "zram0"
    system.map("dm-1", "sdb", "loop0")
    system.map("dm-2", "dm-1")
    assert blockdevices.takes_memory(number("dm-2")) == "loop0"


def test_what_is_the_device_itself(system):
    (system.path / "block/nbd0/backend").write_text("zramd/swap0\n")
    system.map("dm-0", "nbd0p1")
    assert blockdevices.own(number("dm-0"), "swap0") == "nbd0p1"
    assert blockdevices.own(number("nbd0"), "swap0") == "nbd0"
    assert blockdevices.own(number("nbd0"), "swap1") == ""
    assert blockdevices.own(number("sda1"), "swap0") == ""


def test_what_is_swapped_to(system):
    system.map("dm-0", "sda2")
    system.swaps("/dev/sda1")
    # Another partition of one disk is nothing to us.
    assert [blockdevices.swapped_to(number(name)) for name in ("sda1", "sda2", "dm-0")] == ["sda1", "", ""]
    system.swaps("/sda2")  # as a service with a view of its own sees /dev/sda2
    assert blockdevices.swapped_to(number("dm-0")) == "sda2"
    system.swaps("/dev/dm-0")
    assert blockdevices.swapped_to(number("dm-0")) == "dm-0"
    assert blockdevices.swapped_to(number("sdb")) == ""


def test_what_it_is_used_for(system):
    assert blockdevices.used_for(number("sdb")) == "another program has it, perhaps another zramd"
    system.map("dm-0", "sdb", shown="vg-swap")
    assert blockdevices.used_for(number("sdb")) == "sdb is part of /dev/mapper/vg-swap"
    system.swaps("/dev/sda2")
    assert blockdevices.used_for(number("sda")) == "sda2 is used as swap"
    (system.path / "proc/mountinfo").write_text(
        "22 1 8:1 / /srv rw - ext4 /dev/sda1 rw\n23 1 0:31 / /x rw shared:1 - tmpfs tmpfs rw\n"
    )
    assert blockdevices.used_for(number("sda1")) == "sda1 is mounted on '/srv'"
    assert blockdevices.used_for(number("sda")) == "sda1 is mounted on '/srv'"
    assert blockdevices.filesystem(number("sda1")) == "ext4"
    assert blockdevices.filesystem(os.makedev(0, 31)) == "tmpfs"
    assert blockdevices.filesystem(os.makedev(0, 32)) == ""
