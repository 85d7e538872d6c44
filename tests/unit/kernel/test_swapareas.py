"""Swap on a device and its areas: what is run in which order, and what is left when it is interrupted.

The kernel is files in a folder: mkswap, swapon and swapoff are scripts that change /proc/swaps, and the calls
of zramd.guest do so too.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zramd.errors import AttachError
from zramd.guest import areas as guest
from zramd.guest import files
from zramd.guest.areas import DISCARD, DISCARD_PAGES
from zramd.guest.notes import notes_path, read_notes
from zramd.kernel import attached, swap, swapareas

MIB = 1 << 20
HEAD = "Filename\tType\tSize\tUsed\tPriority\n"
SWAPON = """
path=${@: -1}; pri=${2#pri=}; pri=${pri%%,*}
echo "swapon $2 $path" >>$HERE/log
[ -e $HERE/refuse ] && [ "$(cat $HERE/refuse)" = $path ] && { echo "swapon: $path: no" >&2; exit 255; }
echo "$path partition 65532 0 $pri" >>$HERE/proc/swaps
"""
SWAPOFF = """
echo "swapoff $1" >>$HERE/log
[ -e $HERE/refuse ] && [ "$(cat $HERE/refuse)" = $1 ] &&
    { echo "swapoff: $1: Cannot allocate memory" >&2; exit 255; }
grep -v "^$1 " $HERE/proc/swaps >$HERE/swaps.new; mv $HERE/swaps.new $HERE/proc/swaps
"""


class System:
    """A machine with /dev/nbd0 of 256 MiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def program(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\nHERE={self.folder}; PATH=/usr/bin:/bin\n{script}\n")
        path.chmod(0o755)

    def swaps(self, *lines: str) -> None:
        (self.folder / "proc/swaps").write_text(HEAD + "".join(f"{line}\n" for line in lines))

    def on(self) -> list[tuple[str, int]]:
        return [(area.path, area.priority) for area in swap.areas("/dev/nbd0")]

    def partition(self, number: int) -> None:
        for place in (f"sys/block/nbd0/nbd0p{number}", f"sys/class/block/nbd0p{number}"):
            (self.folder / place).mkdir(parents=True)
            (self.folder / place / "partition").write_text(f"{number}\n")
        (self.folder / f"sys/class/block/nbd0p{number}/stat").write_text("0 " * 17)

    def partitions(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "sys/block/nbd0").glob("nbd0p*"))

    def log(self) -> list[str]:
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> System:
    made = System(tmp_path)
    for folder in ("bin", "proc/self", "sys/block/nbd0", "sys/class/block/nbd0", "run"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000000 kB\nMemAvailable:     600000 kB\n")
    (tmp_path / "sys/block/nbd0/size").write_text(f"{256 * MIB // 512}\n")
    (tmp_path / "sys/class/block/nbd0/stat").write_text("0 " * 17)
    made.swaps()
    made.program("mkswap", 'echo "mkswap $1" >>$HERE/log')
    made.program("swapon", SWAPON)
    made.program("swapoff", SWAPOFF)

    def partition(disk: str, operation: int, number: int, start: int = 0, length: int = 0) -> None:
        if operation == 1:
            made.partition(number)
            return
        if any(path == f"{disk}p{number}" for path, _ in made.on()):
            raise files.GuestError(f"partition {number} of {disk} cannot be removed: busy")
        for place in (f"sys/block/nbd0/nbd0p{number}", f"sys/class/block/nbd0p{number}"):
            for file in (tmp_path / place).iterdir():
                file.unlink()
            (tmp_path / place).rmdir()

    def swap_on(path: str, priority: int, flags: int = DISCARD) -> None:
        with (tmp_path / "proc/swaps").open("a") as file:
            file.write(f"{path} partition 65532 0 {priority}\n")
        with (tmp_path / "log").open("a") as file:
            file.write(f"again {path} {priority} {flags:#x}\n")

    def swap_off(path: str) -> None:
        made.swaps(*(f"{each} partition 65532 0 {priority}" for each, priority in made.on() if each != path))

    @contextmanager
    def unobserved(device: str) -> Iterator[object]:
        yield None

    for module, name, value in (
        (swap, "SWAPS", str(tmp_path / "proc/swaps")),
        (swap, "MEMINFO", str(tmp_path / "proc/meminfo")),
        (swap, "PATH", str(tmp_path / "bin")),
        (swap, "settle_queue", lambda device: None),
        (swapareas, "MAX_PART", str(tmp_path / "max_part")),
        (swapareas, "_wait_for", lambda path: None),
        (swapareas, "PROGRESS_INTERVAL", 0.05),
        (swapareas, "BUSY", 0.05),
        (attached, "SYS_BLOCK", str(tmp_path / "sys/block")),
        (attached, "unobserved", unobserved),
        (files, "PROC", str(tmp_path / "proc")),
        (files, "SYS", str(tmp_path / "sys")),
        (files, "RUN", str(tmp_path / "run")),
        (guest, "_partition", partition),
        (guest, "swap_on", swap_on),
        (guest, "swap_off", swap_off),
    ):
        monkeypatch.setattr(module, name, value)
    return made


def test_one_area_is_the_device(system: System) -> None:
    swapareas.on("/dev/nbd0", -1, count=1)
    assert system.log() == ["mkswap /dev/nbd0", "swapon pri=-1,discard /dev/nbd0"]
    swapareas.on("/dev/nbd0", 7, count=1)  # it is on already
    assert system.log() == []
    swapareas.off("/dev/nbd0")
    assert system.log() == ["swapoff /dev/nbd0"]
    assert system.on() == []


def test_areas_have_descending_priorities(system: System) -> None:
    ordered: list[str] = []
    swapareas.on("/dev/nbd0", 100, options="discard=pages", count=3, order=ordered.append)
    paths = [f"/dev/nbd0p{number}" for number in (1, 2, 3)]
    assert system.on() == list(zip(paths, (100, 99, 98), strict=True))
    assert ordered == paths
    assert system.log() == [
        line
        for path, priority in system.on()
        for line in (f"mkswap {path}", f"swapon pri={priority},discard=pages {path}")
    ]
    notes = read_notes("/dev/nbd0").areas
    assert [(path, note.priority, note.flags, note.dirty) for path, note in notes.items()] == [
        (path, priority, DISCARD | DISCARD_PAGES, 0) for path, priority in system.on()
    ]
    swapareas.off("/dev/nbd0")
    swapareas.join("/dev/nbd0")
    assert (system.on(), system.partitions(), Path(notes_path("/dev/nbd0")).exists()) == ([], [], False)


@pytest.mark.parametrize(
    ("priority", "others", "max_part", "count"),
    [
        *((100, 0, "16", 4), (2, 0, "16", 3), (0, 0, "16", 1), (-1, 0, "16", 1)),
        *((100, 21, "16", 2), (100, 30, "16", 1), (100, 0, "0", 1)),
    ],
)
def test_how_many_areas(system: System, priority: int, others: int, max_part: str, count: int) -> None:
    """As many as suit its size, as the priority allows, and as the kernel has places for."""
    system.swaps(*(f"/swap{number} file 4 0 -2" for number in range(others)))
    (system.folder / "max_part").write_text(max_part)
    assert swapareas.default_count("/dev/nbd0", priority) == count


def test_without_discard(system: System) -> None:
    swapareas.on("/dev/nbd0", 100, options="", count=2)
    assert system.log()[1] == "swapon pri=100 /dev/nbd0p1"
    assert {note.flags for note in read_notes("/dev/nbd0").areas.values()} == {0}


def test_what_fails_is_taken_back(system: System) -> None:
    (system.folder / "refuse").write_text("/dev/nbd0p3")
    with pytest.raises(AttachError, match=r"^swapon /dev/nbd0p3 failed: swapon: /dev/nbd0p3: no$"):
        swapareas.on("/dev/nbd0", 100, count=4)
    assert (system.on(), system.partitions(), list((system.folder / "run").iterdir())) == ([], [], [])


def test_too_small_for_so_many(system: System) -> None:
    (system.folder / "sys/block/nbd0/size").write_text("8192")
    with pytest.raises(
        AttachError, match=r"^/dev/nbd0 is too small for 4 areas: an area has at least 2 MiB$"
    ):
        swapareas.on("/dev/nbd0", 100, count=4)


@pytest.mark.parametrize("on", [[], [1], [1, 2], [2], [3], [1, 2, 3]])
def test_what_a_killed_attach_has_left(system: System, on: list[int]) -> None:
    """Some partitions may be made, some of them on: afterwards all are, as if nothing had happened."""
    for number in (1, 2, 3):
        system.partition(number)
    system.swaps(*(f"/dev/nbd0p{number} partition 4 2 {101 - number}" for number in on))
    swapareas.on("/dev/nbd0", 100, count=3)
    assert system.on() == [("/dev/nbd0p1", 100), ("/dev/nbd0p2", 99), ("/dev/nbd0p3", 98)]
    made = [line.split()[1] for line in system.log() if line.startswith("mkswap")]
    assert made == [f"/dev/nbd0p{number}" for number in (1, 2, 3) if number not in on]
    swapareas.on("/dev/nbd0", 100, count=3)
    assert system.log() == []


def test_notes_of_an_earlier_device_count_for_nothing(system: System) -> None:
    Path(notes_path("/dev/nbd0")).write_text(
        '{"areas": {"/dev/nbd0p9": {"priority": 1}}, "counts": {"emptied": 3}, "last": {}}'
    )
    swapareas.on("/dev/nbd0", 100, count=2)
    notes = read_notes("/dev/nbd0")
    assert (list(notes.areas), notes.counts) == (["/dev/nbd0p1", "/dev/nbd0p2"], {})


def test_swapoff_is_refused_without_memory(system: System) -> None:
    """There must be enough for all areas before the first one is off."""
    lines = [f"/dev/nbd0p{number} partition 400000 262144 {9 - number}" for number in (1, 2)]
    system.swaps(*lines)
    (system.folder / "proc/meminfo").write_text("MemAvailable: 500000 kB\n")
    with pytest.raises(
        AttachError,
        match=r"^512 MiB are swapped out to /dev/nbd0 and only 488 MiB of memory are available: end ",
    ):
        swapareas.off("/dev/nbd0")
    assert system.log() == []
    swapareas.off("/dev/nbd0", force=True)
    assert system.log() == ["swapoff /dev/nbd0p1", "swapoff /dev/nbd0p2"]


def test_swapoff_of_what_is_off(system: System) -> None:
    swapareas.off("/dev/nbd0")
    assert system.log() == []


def test_swapoff_tells_how_far_it_is(system: System) -> None:
    """Of all areas taken together, the least used first."""
    system.swaps("/dev/nbd0p1 partition 4000 2048 9", "/dev/nbd0p2 partition 4000 1024 8")
    system.program("swapoff", f"sleep 0.3\n{SWAPOFF}")
    seen: list[tuple[int, int]] = []
    swapareas.off("/dev/nbd0", progress=lambda left, total: seen.append((left >> 20, total >> 20)))
    assert list(dict.fromkeys(seen)) == [(3, 3), (2, 3), (0, 3)]
    assert system.log() == ["swapoff /dev/nbd0p2", "swapoff /dev/nbd0p1"]


def test_swapoff_fails(system: System) -> None:
    """All areas are on again then, with what they had; and what was noted of them is noted still."""
    swapareas.on("/dev/nbd0", 100, options="discard=pages", count=3)
    before = system.on()
    (system.folder / "refuse").write_text("/dev/nbd0p2")
    system.log()
    with pytest.raises(
        AttachError, match=r"^swapoff /dev/nbd0p2 failed: swapoff: .*: Cannot allocate memory$"
    ):
        swapareas.off("/dev/nbd0")
    assert system.on() == before
    assert system.log()[-1] == f"again /dev/nbd0p1 100 {DISCARD | DISCARD_PAGES:#x}"
    assert list(read_notes("/dev/nbd0").areas) == [path for path, _ in before]


def test_swapoff_is_ended_when_interrupted(system: System) -> None:
    system.swaps("/dev/nbd0p1 partition 4000 0 9", "/dev/nbd0p2 partition 4000 1024 8")
    before = system.on()
    system.program(
        "swapoff", f"[ $1 = /dev/nbd0p1 ] || {{ echo $$ >$HERE/pid; exec /bin/sleep 60; }}\n{SWAPOFF}"
    )

    def interrupt(left: int, total: int) -> None:
        if (system.folder / "pid").exists():
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        swapareas.off("/dev/nbd0", progress=interrupt)
    assert time.monotonic() - started < 10
    assert not Path(f"/proc/{(system.folder / 'pid').read_text().strip()}").exists()
    assert threading.active_count() == 1
    assert system.on() == before


def test_programs_that_are_missing(system: System) -> None:
    (system.folder / "bin/mkswap").unlink()
    with pytest.raises(
        AttachError, match=r"^mkswap is not installed: run 'apt-get install util-linux' as root$"
    ):
        swapareas.on("/dev/nbd0", 1, count=2)
    assert system.partitions() == []
