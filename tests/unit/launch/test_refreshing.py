"""`zramd refresh` around zramd.guest: whose turn it is, when it gives up, and what it says."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from zramd import lockfile
from zramd.commands import main
from zramd.contract import rundir
from zramd.control import servers
from zramd.errors import DeviceError
from zramd.guest import files, steps
from zramd.guest.areas import DISCARD
from zramd.guest.files import GuestError
from zramd.guest.policy import Plan, View
from zramd.kernel import attached
from zramd.launch import refreshing

HEAD = "Filename\tType\tSize\tUsed\tPriority\n"
Wanted = Callable[[], str]


class Machine:
    """zram0 is attached as /dev/nbd0 and swapped to in two areas; its server answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work: Callable[[str, Callable[[str], None], Wanted], Plan] = lambda disk, say, wanted: Plan(
            [], 0, []
        )
        self.answers = True
        self.seen: list[tuple[str, bool]] = []

    def refresh(self, disk: str, say: Callable[[str], None], *, dry_run: bool, wanted: Wanted) -> Plan:
        self.seen.append((disk, dry_run))
        return self.work(disk, say, wanted)

    def notes(self, flags: int = DISCARD) -> Path:
        path = self.folder / "notes/nbd0.json"
        areas = {f"/dev/nbd0p{number}": {"priority": 9 - number, "flags": flags} for number in (1, 2)}
        path.write_text(json.dumps({"areas": areas, "counts": {}, "last": {}}))
        return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    for name in ("notes", "run/zram0", "proc", "sys"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "proc/swaps").write_text(HEAD)
    (tmp_path / "run/zram0" / rundir.CONTROL_SOCKET).touch()
    there = attached.Attached("zram0", "/dev/nbd0", 1, "data")
    served = servers.Served("zram0", str(tmp_path / "run/zram0"), 1)

    def ask(self: servers.Served, *words: str, **rest: float) -> dict[str, str]:
        if not made.answers:
            raise DeviceError("it does not answer")
        return {}

    for place, name, value in (
        (os, "geteuid", lambda: 0),
        (files, "PROC", str(tmp_path / "proc")),
        (files, "SYS", str(tmp_path / "sys")),
        (files, "RUN", str(tmp_path / "notes")),
        (attached, "FOLDER", str(tmp_path / "run")),
        (attached, "find", lambda name: there if name == "zram0" else None),
        (attached, "data_of", lambda folder: "data"),
        (servers, "look", lambda name: served),
        (servers.Served, "ask_json", ask),
        (refreshing, "refresh_disk", made.refresh),
        (steps, "reached", steps.reached),
    ):
        monkeypatch.setattr(place, name, value)
    (tmp_path / "run/zram0.attached").touch()
    made.notes()
    return made


def dead() -> Plan:
    from zramd.guest.areas import Area

    return Plan([], 0, [View(Area("/dev/nbd0p1", 100, 0, 8), 70)])


def test_only_root_may(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for words in (["zram0"], ["--all"], ["zram0", "--dry-run"]):
        assert main(["refresh", *words]) == 1
        said = capsys.readouterr().err
        assert said.startswith("zramd: only root may refresh swap: run 'sudo ")
        assert said.endswith(f"refresh {' '.join(words)}'\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "which device? Give its name, as 'zramd list' shows it, or --all"),
        (["zram0", "--all"], "--all means every device: leave out NAME"),
        (["../x"], "'../x' is not a device's name: 'zramd list' shows those that there are"),
    ],
)
def test_bad_words(
    machine: Machine, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["refresh", *words]) == 2
    assert capsys.readouterr() == ("", f"zramd: {sentence}\n")


def test_what_was_done_is_told(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    def work(disk: str, say: Callable[[str], None], wanted: Wanted) -> Plan:
        assert attached.is_busy("zram0")
        assert wanted() == ""
        say("/dev/nbd0p1: up to 70 pages became free")
        return dead()

    machine.work = work
    assert main(["refresh", "zram0"]) == 0
    assert main(["refresh", "--all", "--dry-run"]) == 0
    assert capsys.readouterr() == ("/dev/nbd0p1: up to 70 pages became free\n" * 2, "")
    assert machine.seen == [("/dev/nbd0", False), ("/dev/nbd0", True)]
    assert not attached.is_busy("zram0")


def test_a_timer_says_nothing_of_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["refresh", "--all"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["refresh", "zram0"]) == 0
    assert capsys.readouterr() == ("zram0: nothing is worth it\n", "")


def test_what_is_not_refreshed(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is touched, and that is no error; but of a device that is not attached."""
    assert main(["refresh", "other"]) == 1
    assert capsys.readouterr() == ("", "zramd: other is not attached\n")
    machine.answers = False
    told = ["zram0: left for later, as its server does not answer"]
    assert main(["refresh", "zram0"]) == 0
    machine.answers = True
    machine.notes(flags=0)
    told += ["zram0: it is swapped to without discard: what swap has freed stays stored"]
    assert main(["refresh", "zram0"]) == 0
    machine.notes().unlink()
    told += ["zram0: there is no swap on it that 'zramd attach --swap' has made"]
    assert main(["refresh", "zram0"]) == 0
    assert capsys.readouterr() == ("\n".join(told) + "\n", "")
    assert machine.seen == []


def test_it_never_runs_beside_another_command(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    record = os.open(machine.folder / "run/zram0.attached", os.O_RDWR)
    assert lockfile.ofd_take(record)
    assert main(["refresh", "zram0"]) == 0
    assert capsys.readouterr().out == "zram0: left for later, as another command is at work on it\n"
    os.close(record)
    with (machine.folder / "notes/lock").open("w") as lock:
        assert lockfile.take(lock.fileno())
        assert main(["refresh", "zram0"]) == 0
    assert capsys.readouterr().out == "zram0: left for later, as another command is at work on it\n"
    assert machine.seen == []


@pytest.mark.parametrize("who", ["detach", "restart"])
def test_it_gives_up_for_another_command(
    machine: Machine, who: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A detach waits for its turn; a restart begins, and does not know of a refresh."""
    had: list[str] = []
    folder = os.open(machine.folder / "run/zram0", os.O_RDONLY)

    def other() -> None:
        if who == "restart":
            lockfile.take(folder)
            return
        with attached.turn("zram0"):
            had.append("turn")

    thread = threading.Thread(target=other)

    def work(disk: str, say: Callable[[str], None], wanted: Wanted) -> Plan:
        thread.start()
        end = time.monotonic() + 10
        while not (why := wanted()):
            assert time.monotonic() < end
            time.sleep(0.01)
        say(f"given up, as {why}")
        assert had == []
        return dead()

    machine.work = work
    assert main(["refresh", "zram0"]) == 0
    thread.join()
    os.close(folder)
    assert had == ["turn"] * (who == "detach")
    assert capsys.readouterr().out == "given up, as another command wants it\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (GuestError("/dev/nbd0p1 is not swapped to as it was"), "/dev/nbd0p1 is not swapped to as it was"),
        (
            OSError(22, "Invalid argument", "/dev/nbd0p1"),
            "the swap on zram0 cannot be refreshed: '/dev/nbd0p1': invalid argument",
        ),
    ],
)
def test_what_fails(
    machine: Machine, error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(disk: str, say: Callable[[str], None], wanted: Wanted) -> Plan:
        raise error

    machine.work = work
    for words in (["zram0"], ["--all"]):
        assert main(["refresh", *words]) == 1
        assert capsys.readouterr() == ("", f"zramd: {sentence}\n")
    assert not attached.is_busy("zram0")
