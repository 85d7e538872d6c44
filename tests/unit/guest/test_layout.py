"""A disk is divided and swapped to, and given back; what is refused."""

import os
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.swapareas import FakeMachine, Swapped

from zramd.guest import layout
from zramd.guest.areas import part
from zramd.guest.files import PAGE, SECTOR, GuestError, NotForSwap
from zramd.guest.notes import read_notes

MIB = 1 << 20
Make = Callable[..., FakeMachine]


class Disk:
    """A disk that is not divided yet, and what was done with it."""

    def __init__(self, there: FakeMachine, mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine, self.done, self.made = there, list[str](), list[str]()
        self.holds = ""  # what blkid finds on it
        self.base = there.folder / "sys/block/vdb"
        (self.base / "size").write_text(str(mib * MIB // SECTOR))
        (self.base / "queue/discard_max_bytes").write_text("2147483136\n")
        (self.base / "queue/rotational").write_text("1\n")
        (there.folder / "proc/sys/vm").mkdir(parents=True)
        (there.folder / "proc/sys/vm/page-cluster").write_text("3\n")
        exists = os.path.exists
        for name in ("divide", "join", "swap_on", "swap_off"):
            monkeypatch.setattr(layout, name, getattr(self, name))
        monkeypatch.setattr(
            layout, "_is_swap", lambda path: f"mkswap -L zramd-{path[5:]} {path}" in self.made
        )
        monkeypatch.setattr(layout.os.path, "exists", lambda path: path in there.areas or exists(path))
        monkeypatch.setattr(layout, "_run", self.run)
        monkeypatch.setattr(layout, "_unobserved", lambda disk: nullcontext())

    def divide(self, disk: str, count: int) -> list[str]:
        self.done.append(f"divide {count}")
        for number in range(1, count + 1):
            self.machine.add(part(disk, number), Swapped(1000, 0, on=False))
        return [part(disk, number) for number in range(1, count + 1)]

    def run(self, *words: str, expected: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
        if words[0] == "blkid":
            return subprocess.CompletedProcess(words, 0 if self.holds else 2, self.holds, "")
        self.done.append(" ".join(words))
        self.made.append(" ".join(words))
        return subprocess.CompletedProcess(words, 0, "", "")

    def join(self, disk: str) -> None:
        self.done.append("join")

    def swap_on(self, path: str, priority: int, flags: int) -> None:
        self.done.append(f"on {path} {priority}")
        self.machine.areas[path].on, self.machine.areas[path].priority = True, priority
        self.machine.write()

    def swap_off(self, path: str) -> None:
        self.done.append(f"off {path}")
        self.machine.areas[path].on = False
        self.machine.write()


@pytest.fixture
def disk(machine: Make, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk of 256 MiB, on which there is nothing."""
    return Disk(machine(), 256, monkeypatch)


def test_a_disk_is_divided_and_swapped_to_in_order(disk: Disk) -> None:
    assert layout.setup("/dev/vdb", None) == [f"/dev/vdb{number}" for number in range(1, 5)]
    assert disk.done == [
        "join",
        "divide 4",
        *(
            words
            for number in range(1, 5)
            for words in (
                f"mkswap -L zramd-vdb{number} /dev/vdb{number}",
                f"on /dev/vdb{number} {101 - number}",
            )
        ),
    ]
    assert (disk.base / "queue/rotational").read_text() == "0"
    assert (disk.machine.folder / "proc/sys/vm/page-cluster").read_text() == "0"
    notes = read_notes("/dev/vdb")
    assert {path: (note.priority, note.dirty, note.trims) for path, note in notes.areas.items()} == {
        f"/dev/vdb{number}": (101 - number, 0, True) for number in range(1, 5)
    }


def test_what_is_on_stays(disk: Disk) -> None:
    layout.setup("/dev/vdb", 2)
    disk.done.clear()
    assert layout.setup("/dev/vdb", 8) == ["/dev/vdb1", "/dev/vdb2"]
    assert disk.done == []


def test_what_a_refresh_left_off_is_on_again(disk: Disk) -> None:
    layout.setup("/dev/vdb", 2)
    disk.swap_off("/dev/vdb1")
    disk.done.clear()
    assert layout.setup("/dev/vdb", None) == ["/dev/vdb1", "/dev/vdb2"]
    assert disk.done == ["on /dev/vdb1 100"]


def test_a_setup_that_was_killed_is_gone_on_with(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(path: str, priority: int, flags: int) -> None:
        if path == "/dev/vdb3":
            raise Killed
        disk.swap_on(path, priority, flags)

    monkeypatch.setattr(layout, "swap_on", killed)
    with pytest.raises(Killed):
        layout.setup("/dev/vdb", 4)
    monkeypatch.setattr(layout, "swap_on", disk.swap_on)
    assert layout.setup("/dev/vdb", 4) == [f"/dev/vdb{number}" for number in range(1, 5)]
    assert [area.priority for area in disk.machine.areas.values()] == [100, 99, 98, 97]


def test_what_is_there_by_now_is_never_made_swap(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes may have outlived what they are of."""
    layout.setup("/dev/vdb", 2)
    disk.swap_off("/dev/vdb2")
    disk.made.clear()
    disk.done.clear()
    disk.holds = "ext4"
    monkeypatch.setattr(layout, "_is_swap", lambda path: False)
    with pytest.raises(NotForSwap, match=r"/dev/vdb2 holds something \(ext4\)"):
        layout.setup("/dev/vdb", 2)
    assert not [words for words in disk.done if words.startswith(("mkswap", "on "))]


def test_the_first_priority_has_room_for_all(disk: Disk) -> None:
    with pytest.raises(GuestError, match="4 areas need a priority of at least 3"):
        layout.setup("/dev/vdb", 4, 2)
    assert disk.done == []
    layout.setup("/dev/vdb", 4, 3)
    assert disk.machine.areas["/dev/vdb4"].priority == 0


def test_a_disk_in_use_is_left_alone(disk: Disk) -> None:
    mounts = disk.machine.folder / "proc/mounts"
    mounts.write_text("proc /proc proc rw 0 0\n/dev/vdb /mnt/data ext4 rw 0 0\n")
    with pytest.raises(GuestError, match="/dev/vdb is mounted on '/mnt/data': it is not for swap"):
        layout.setup("/dev/vdb", None)
    mounts.write_text("")
    (disk.base / "holders/dm-0").mkdir()
    with pytest.raises(GuestError, match="/dev/vdb is in use by dm-0"):
        layout.setup("/dev/vdb", None)
    assert disk.done == []


@pytest.mark.parametrize("held", ["ext4", "dos", "gpt", "swsuspend", "LVM2_member", "ext4\ndos"])
def test_what_a_disk_holds_is_not_destroyed(disk: Disk, held: str) -> None:
    """It is not mounted yet when swap is set up at boot."""
    disk.holds = f"{held}\n"
    words = held.replace("\n", " ")
    with pytest.raises(
        NotForSwap, match=rf"holds something \({words}\) and is not for swap: 'wipefs --all /dev/"
    ):
        layout.setup("/dev/vdb", None)
    assert disk.done == []


def test_swap_of_another_boot_is_made_again(disk: Disk) -> None:
    disk.holds = "swap\n"
    assert layout.setup("/dev/vdb", 1) == ["/dev/vdb1"]


@pytest.mark.parametrize("content", ["0\n", None])
def test_a_disk_that_takes_no_discards_is_refused(disk: Disk, content: str | None) -> None:
    path = disk.base / "queue/discard_max_bytes"
    path.write_text(content) if content else path.unlink()
    with pytest.raises(GuestError, match="takes no discards: give the disk discard=unmap on the host"):
        layout.setup("/dev/vdb", None)
    assert disk.done == []


def test_all_is_swapped_off_the_least_used_first(disk: Disk) -> None:
    layout.setup("/dev/vdb", 3)
    disk.machine.swap_out(1200)
    disk.done.clear()
    layout.take_off("/dev/vdb")
    assert disk.done == ["off /dev/vdb3", "off /dev/vdb2", "off /dev/vdb1", "join"]
    assert not list((disk.machine.folder / "run").glob("vdb.json"))


def test_swap_stays_on_where_memory_cannot_hold_it(disk: Disk) -> None:
    layout.setup("/dev/vdb", 1)
    disk.machine.swap_out(1000)
    disk.machine.available = 900 * PAGE
    disk.machine.write()
    disk.done.clear()
    with pytest.raises(GuestError, match="3 MiB are swapped out to /dev/vdb and only 3 MiB of memory"):
        layout.take_off("/dev/vdb")
    assert disk.done == []


def test_what_somebody_else_has_swapped_off_is_no_error(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.setup("/dev/vdb", 2)

    def gone(path: str) -> None:  # systemd does so at shutdown
        disk.swap_off(path)
        raise OSError(22, "Invalid argument", path)

    monkeypatch.setattr(layout, "swap_off", gone)
    layout.take_off("/dev/vdb")


def test_what_somebody_else_swaps_off_is_waited_for(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.setup("/dev/vdb", 1)
    looks = []

    def slow(path: str) -> None:  # it has no longer the mark of an area that is on, but is not empty yet
        looks.append(path)
        if len(looks) == 3:
            disk.swap_off(path)
        raise OSError(22, "Invalid argument", path)

    monkeypatch.setattr(layout, "swap_off", slow)
    monkeypatch.setattr(layout, "LOOK", 0)
    layout.take_off("/dev/vdb")
    assert looks == ["/dev/vdb1"] * 3


def test_what_cannot_be_swapped_off_is_an_error(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.setup("/dev/vdb", 1)

    def fails(path: str) -> None:
        raise OSError(12, "Cannot allocate memory", path)

    monkeypatch.setattr(layout, "swap_off", fails)
    with pytest.raises(GuestError, match="swapoff /dev/vdb1 failed: Cannot allocate memory"):
        layout.take_off("/dev/vdb")


def test_other_swap_counts_as_room(disk: Disk) -> None:
    layout.setup("/dev/vdb", 1)
    disk.machine.swap_out(1000)
    disk.machine.available = 900 * PAGE
    disk.machine.write()
    swaps = disk.machine.folder / "proc/swaps"
    swaps.write_text(f"{swaps.read_text()}/swapfile file 4000 0 -2\n")
    layout.take_off("/dev/vdb")
    assert disk.done[-2:] == ["off /dev/vdb1", "join"]


def test_a_disk_that_was_never_swapped_to_is_not_touched(disk: Disk) -> None:
    """It may be another's, with partitions of its own."""
    layout.take_off("/dev/vdb")
    assert disk.done == []


def test_notes_of_another_boot_do_not_count(disk: Disk) -> None:
    folder = Path(disk.machine.folder / "run")
    folder.mkdir()
    (folder / "vdb.json").write_text('{"areas": {"/dev/vdb9": {"priority": 5}}, "counts": {}, "last": {}}')
    assert layout.setup("/dev/vdb", 2) == ["/dev/vdb1", "/dev/vdb2"]
    assert list(read_notes("/dev/vdb").areas) == ["/dev/vdb1", "/dev/vdb2"]
