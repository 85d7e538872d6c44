"""A refresh on a machine whose swap is all in files: what it frees, reads back, and leaves."""

import json
import os
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.swapareas import FakeMachine

from zramd.guest import layout, refresh
from zramd.guest.areas import Area
from zramd.guest.files import PAGE, GivenUp
from zramd.guest.notes import Notes, read_notes, write_notes
from zramd.guest.policy import READ_BACK, WIPED, WORTH

Make = Callable[..., FakeMachine]


def noted(there: FakeMachine) -> None:
    """Have the notes begin with empty areas, as `setup` leaves them."""
    notes = Notes()
    for path, area in there.areas.items():
        notes.areas[path] = layout.Note(area.priority)
        notes.areas[path].reset(path, 0)
    write_notes(there.disk, notes)


def run(there: FakeMachine, *, dry_run: bool = False) -> list[str]:
    said: list[str] = []
    refresh.refresh(there.disk, said.append, dry_run=dry_run)
    return said


def test_what_programs_leave_is_given_back(machine: Make) -> None:
    there = machine(*[1024] * 8)
    noted(there)
    there.churn(random.Random(1), daemons=400, programs=40)
    live, dead = there.used, there.dead
    assert dead > 4 * live / 3  # else this shows nothing
    before = there.read_back
    run(there)
    assert there.dead <= WORTH * 1024 * 8
    assert there.read_back - before <= READ_BACK * (dead - there.dead)
    assert run(there) == []  # and then nothing is worth it


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    count=st.integers(1, 12),
    pages=st.integers(100, 800),
    daemons=st.integers(0, 900),
    programs=st.integers(1, 15),
    rounds=st.integers(1, 4),
)
def test_of_any_churn_little_stays_dead(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    count: int,
    pages: int,
    daemons: int,
    programs: int,
    rounds: int,
) -> None:
    with monkeypatch.context() as patch:
        there = FakeMachine(tmp_path_factory.mktemp("machine"), [pages] * count)
        there.become(patch)
        noted(there)
        rnd = random.Random(seed)
        for _ in range(rounds):
            there.churn(rnd, daemons, programs)
            before = there.read_back
            known = {path: len(area.used) for path, area in there.areas.items()}
            run(there)
            # What is counted as stored may be more than is: no more is read back than that allows.
            assert there.read_back - before <= READ_BACK * sum(pages - used for used in known.values())
            # Left is what is too little, and what too many pages would have to be written for.
            assert there.dead <= (WORTH + 1 / WIPED) * pages * count
            assert there.most_off <= 1
            assert all(area.on for area in there.areas.values())


def test_nothing_is_done_while_programs_wait_for_memory(machine: Make) -> None:
    there = machine(1000, 1000)
    noted(there)
    there.end(there.swap_out(1900)[::2])
    there.waiting, there.available = 50, there.total // 4
    there.write()
    dead = there.dead
    (words,) = run(there)
    assert words.endswith("left for later, as programs wait for memory (50 % of the last 10 s)")
    assert there.dead == dead


def test_no_more_is_brought_back_than_memory_has_room_for(machine: Make) -> None:
    there = machine(2000, 2000)
    noted(there)
    places = there.swap_out(4000)
    there.end([place for place in places if place[0] == "/dev/vdb2" and place[1] % 8])
    there.total, there.available = 64 << 20, (16 << 20) + 249 * PAGE
    there.write()
    (words,) = run(there)
    assert words.startswith("/dev/vdb2: left for later, as 1.0 MiB of memory are needed")
    there.available += PAGE
    there.write()
    (words,) = run(there)
    assert words == "/dev/vdb2: up to 1750 pages became free, 250 pages read back, 0.1 s"
    assert there.read_back == 250


def test_what_is_done_is_counted_and_kept(machine: Make) -> None:
    there = machine(1000, 1000)
    noted(there)
    places = there.swap_out(2000)
    there.end([place for place in places if place[1] % 10 and place[0] == "/dev/vdb2"])
    run(there)
    notes = read_notes(there.disk)
    assert notes.counts == {"emptied": 1, "freed": 900, "read_back": 100}
    assert (notes.last["freed"], notes.last["read_back"]) == (900, 100)


def test_a_dry_run_changes_nothing(machine: Make) -> None:
    there = machine(1000, 1000)
    noted(there)
    there.end(there.swap_out(1900)[::2])
    before = {path.name: path.read_text() for path in (there.folder / "run").iterdir()}, there.dead
    assert "would become free" in run(there, dry_run=True)[0]
    assert before == ({path.name: path.read_text() for path in (there.folder / "run").iterdir()}, there.dead)


def test_a_step_that_is_given_up_ends_the_refresh(machine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    there = machine(1000, 1000, 1000)
    noted(there)
    places = there.swap_out(3000)
    there.end([place for place in places if place[1] % 10 and place[0] != "/dev/vdb1"])

    def give_up(area: Area, flags: int, wanted: Callable[[], str]) -> float:
        raise GivenUp("programs wait for memory")

    monkeypatch.setattr(refresh, "empty", give_up)
    assert run(there) == ["/dev/vdb2: given up, as programs wait for memory"]
    assert read_notes(there.disk).counts == {"given_up": 1}


def test_an_area_that_was_left_off_is_on_again(machine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    there = machine(1000, 1000)
    noted(there)
    there.areas["/dev/vdb2"].on = False  # a refresh was killed between swapoff and swapon
    there.write()

    def swap_on(path: str, priority: int, flags: int) -> None:
        assert there.areas[path].priority == priority
        there.areas[path].on = True
        there.write()

    monkeypatch.setattr(layout, "swap_on", swap_on)
    exists = os.path.exists
    monkeypatch.setattr(layout.os.path, "exists", lambda path: path in there.areas or exists(path))
    monkeypatch.setattr(layout, "_is_swap", lambda path: True)
    assert run(there) == ["/dev/vdb2 was off: swapped to again"]
    assert there.areas["/dev/vdb2"].on
    assert read_notes(there.disk).counts == {"resumed": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"areas": {"/dev/vdb1": {"nonsense": 1}}}', "null"])
def test_notes_that_are_no_notes_count_areas_as_full(machine: Make, text: str) -> None:
    there = machine(1000)
    noted(there)
    there.swap_out(100)
    (there.folder / "run/vdb.json").write_text(text)
    assert refresh.view(there.disk, read_notes(there.disk))[0].stored == 1000


def test_notes_are_written_whole(machine: Make) -> None:
    there = machine(1000)
    noted(there)
    assert [path.name for path in (there.folder / "run").iterdir()] == ["vdb.json"]
    assert json.loads((there.folder / "run/vdb.json").read_text())["areas"]["/dev/vdb1"]["priority"] == 100
