"""The file of a budget: what is read from it, and what is refused."""

import os
from pathlib import Path

import pytest

from zramd import lockfile
from zramd.contract import budget
from zramd.contract.budget import Owner, State
from zramd.contract.handover import SYSTEMD
from zramd.errors import BudgetError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / budget.NAME
    with path.open("wb") as file:
        file.write(budget.head())
        file.truncate(budget.BYTES)
    return path


def put(path: Path, at: int, *words: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"".join(word.to_bytes(8, "little") for word in words))


def state_of(path: Path) -> State:
    status = path.stat()
    return State(str(path), status.st_dev, status.st_ino)


def test_nobody_has_a_part(made: Path, tmp_path: Path) -> None:
    assert budget.look(str(made)) is None
    assert budget.look(str(tmp_path / "none")) is None
    made.write_bytes(b"")
    assert budget.look(str(made)) is None


def test_what_is_shown(made: Path, tmp_path: Path) -> None:
    """Who is served, what the dead have left as long as it is there, and what nobody has any more."""
    put(made, budget.TABLE_AT, 1000, 3)
    for slot, granted, floor in ((0, 10, 20), (1, 30, 0), (2, 40, 0)):
        put(made, budget.lock_of(slot), granted, floor)
    left = tmp_path / "left.state"
    left.touch()
    fd = os.open(made, os.O_RDWR)
    assert lockfile.ofd_take(fd, budget.lock_of(0))
    budget.write_owner(fd, 0, Owner("swap0", None, 7))
    budget.write_owner(fd, 1, Owner("swap1", state_of(left), budget.namespace()))
    assert budget.owner(fd, 1) == Owner("swap1", state_of(left), budget.namespace())
    page = budget.PAGE
    assert budget.look(str(made)) == (1000 * page, 50 * page, 1, 30 * page)
    left.unlink()
    assert budget.look(str(made)) == (1000 * page, 20 * page, 1, 0)
    os.close(fd)
    assert budget.look(str(made)) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((0, 1, 2), "is damaged, or no budget of zramd"),
        ((16, 2), "has version 2, this zramd knows 1"),
        ((24, 99), r"is damaged \(its size is not that of 1024 slots\)"),
    ],
)
def test_refused(made: Path, change: tuple[int, ...], why: str) -> None:
    put(made, *change)
    with pytest.raises(BudgetError, match=why) as raised:
        budget.look(str(made))
    assert str(raised.value).endswith("once no device has a part in it, remove the file")


def test_cut_off(made: Path) -> None:
    os.truncate(made, 1 << 17)
    with pytest.raises(BudgetError, match="its size is not that of 1024 slots"):
        budget.look(str(made))
    os.truncate(made, 20)
    with pytest.raises(BudgetError, match="is damaged, or no budget"):
        budget.look(str(made))


def test_what_is_left_behind(memory_folder: Path) -> None:
    here = budget.namespace()
    file = memory_folder / "state"
    file.touch()
    who = Owner("a", state_of(file), here)
    assert budget.is_there(who)
    assert not budget.is_there(Owner("a", None, here))
    file.unlink()
    assert not budget.is_there(who)
    file.mkdir()  # something else has its name
    assert not budget.is_there(who)
    # A service may not see the folder in which it lies, or another one there.
    assert who.state is not None
    elsewhere = Owner("a", who.state._replace(path=f"{memory_folder}/none/state"), here + 1)
    assert budget.is_there(elsewhere)
    assert not budget.is_there(elsewhere._replace(namespace=here))
    other = Owner("a", who.state._replace(path="/proc/self/none"), here + 1)
    assert budget.is_there(other)


def test_what_the_service_manager_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptors are looked at, where one may; who may not believes that it has the file."""
    fd = os.memfd_create("kept")
    status = os.fstat(fd)
    kept = State(SYSTEMD, status.st_dev, status.st_ino)
    assert budget._is_kept(kept, "/proc/self/fd")
    os.close(fd)
    assert not budget._is_kept(kept, "/proc/self/fd")
    assert budget._is_kept(kept, "/proc/self/none")
    asked = []
    monkeypatch.setattr(budget, "_is_kept", lambda state: asked.append(state) or False)
    assert not budget.is_there(Owner("a", kept, 0))
    assert asked == [kept]


def test_an_owner_that_is_damaged(made: Path) -> None:
    """No path has such a name: the slot is nobody's, and nothing but this is lost."""
    fd = os.open(made, os.O_RDWR)
    budget.write_owner(fd, 3, Owner("swap3", State("/dev/shm/a\0b", 1, 2), budget.namespace()))
    who = budget.owner(fd, 3)
    assert who == Owner("swap3", None, budget.namespace())
    assert not budget.is_there(who)
    put(made, budget.lock_of(3), 5, 0)
    put(made, budget.TABLE_AT, 1000, 4)
    assert budget.look(str(made)) is None
    os.close(fd)


def test_a_slot_with_more_than_there_is(made: Path) -> None:
    put(made, budget.lock_of(3), 1 << 52, 0)
    fd = os.open(made, os.O_RDONLY)
    with pytest.raises(BudgetError, match=r"is damaged \(a slot has more than any machine\): once no device"):
        budget.check_slots(budget.slots(fd), str(made))
    put(made, budget.lock_of(3), (1 << 52) - 1, 0)
    budget.check_slots(budget.slots(fd), str(made))
    os.close(fd)
