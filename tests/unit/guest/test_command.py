"""The command zramd-guest: which disks it takes, what it says, how it ends."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.swapareas import FakeMachine

from zramd.guest import __main__ as command
from zramd.guest import layout, notes
from zramd.guest.files import GuestError, NotForSwap

Make = Callable[..., FakeMachine]


@pytest.fixture
def there(machine: Make, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A machine that swaps to eight areas of a zramd disk, and root."""
    made = machine(*[1024] * 8)
    (made.folder / "sys/block/vdb/serial").write_text("zramd-swap0")
    (made.folder / "sys/block/vdb/size").write_text("65536")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    known = notes.Notes()
    for path, area in made.areas.items():
        known.areas[path] = notes.Note(area.priority)
        known.areas[path].reset(path, 0)
    notes.write_notes(made.disk, known)
    return made


def leave_dead(there: FakeMachine) -> None:
    """Let an area and a half be used, and most of it be free again."""
    places = there.swap_out(1600)
    there.end([place for number, place in enumerate(places) if number % 40])


@pytest.mark.parametrize("verb", ["setup", "refresh", "off"])
def test_no_disk_is_an_error_or_nothing_to_do(
    there: FakeMachine, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (there.folder / "sys/block/vdb/serial").write_text("another")
    assert command.main([verb]) == 1
    assert capsys.readouterr().err.startswith("zramd-guest: no disk of a zramd is here: ")
    assert command.main([verb, "--if-any"]) == 0
    assert capsys.readouterr() == ("", "")


def test_quiet_says_what_was_done(there: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["refresh", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    leave_dead(there)
    assert command.main(["refresh", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "pages became free" in said
    assert "nothing is worth it" not in said


def test_quiet_does_not_say_what_was_left(there: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    leave_dead(there)
    there.waiting, there.available = 50.0, there.total // 4
    there.write()
    assert command.main(["refresh"]) == 0
    assert "left for later" in capsys.readouterr().out
    assert command.main(["refresh", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_zswap_is_told_and_nothing_is_wiped(there: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    """What would be written to wipe stays in zswap, and the disk keeps what it has."""
    folder = there.folder / "sys/module/zswap/parameters"
    folder.mkdir(parents=True)
    (folder / "enabled").write_text("N\n")
    places = there.swap_out(1024)
    there.end([place for number, place in enumerate(places) if number % 2])
    assert command.main(["status"]) == 0
    assert "zswap" not in capsys.readouterr().out
    assert command.main(["refresh", "--dry-run"]) == 0
    assert "free places wiped" in capsys.readouterr().out
    (folder / "enabled").write_text("Y\n")
    assert command.main(["status"]) == 0
    assert capsys.readouterr().out.startswith(
        "zswap is on: areas in which much lives cannot be refreshed; 'echo N >"
    )
    assert command.main(["refresh", "--dry-run"]) == 0
    assert capsys.readouterr().out == "/dev/vdb: nothing is worth it\n"


def test_one_disk_keeps_no_other_from_it(
    there: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    for name in ("vda", "vdc", "vdd"):
        (there.folder / "sys/block" / name).mkdir()
        (there.folder / "sys/block" / name / "serial").write_text(f"zramd-{name}")

    def setup(disk: str, count: int | None, priority: int) -> list[str]:
        done.append(disk)
        if disk == "/dev/vda":
            raise NotForSwap("/dev/vda holds something")
        if disk == "/dev/vdb":
            raise GuestError("/dev/vdb takes no discards")
        return [f"{disk}1"]

    monkeypatch.setattr(command, "setup", setup)
    assert command.main(["setup"]) == 1
    assert done == ["/dev/vda", "/dev/vdb", "/dev/vdc", "/dev/vdd"]
    said = capsys.readouterr()
    assert said.out.splitlines() == ["left alone: /dev/vda holds something", "/dev/vdc1", "/dev/vdd1"]
    assert said.err == "zramd-guest: /dev/vdb takes no discards\n"
    # One that was named is not left alone without an error.
    assert command.main(["setup", "--disk", "/dev/vda"]) == 1
    assert capsys.readouterr().err == "zramd-guest: /dev/vda holds something\n"


def test_off_gives_all_back(there: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    off: list[str] = []

    def swap_off(path: str) -> None:
        there.areas[path].on = False
        there.write()
        off.append(path)

    monkeypatch.setattr(layout, "swap_off", swap_off)
    monkeypatch.setattr(layout, "join", lambda disk: off.append("join"))
    assert command.main(["off"]) == 0
    assert off == [*there.areas, "join"]
    assert not Path(notes.notes_path(there.disk)).exists()
