"""A server's part of the budget: who gets which slot, what the dead leave, and what is refused."""

import os
import random
import subprocess
from pathlib import Path

import pytest

from zramd import lockfile
from zramd.contract import budget as file
from zramd.contract import handover
from zramd.core.device.device import Device
from zramd.errors import BudgetError, ConfigError, PoolFullError
from zramd.server import budget, opening
from zramd.server.budget import Member
from zramd.server.opening import Made
from zramd.settings import config
from zramd.settings.config import Config

MIB = 1 << 20


@pytest.fixture
def folder(memory_folder: Path) -> Path:
    return memory_folder


def settings(folder: Path, name: str, *, state: bool | str = False, **words: str) -> Config:
    given = {"disksize": "64M", "budget": "8M", "name": name, "rundir": f"{folder}/{name}"} | words
    if state:
        given["state"] = f"{folder}/{name}.state" if state is True else state
    return config.parse(given.items())


class Server:
    """What there is of a server; `kill` leaves all as a kill does."""

    def __init__(self, folder: Path, name: str, *, state: bool | str = False, **words: str) -> None:
        self.config = settings(folder, name, state=state, **words)
        self.made: Made = opening.make_device(self.config)
        assert self.made.member is not None
        self.member: Member = self.made.member

    @property
    def device(self) -> Device:
        return self.made.device

    def fill(self) -> int:
        for block in range(4096):
            try:
                self.device.write(random.randbytes(4096), block * 4096)
            except PoolFullError:
                return block
        return 4096

    def kill(self) -> None:
        os.close(self.member._fd)
        del self.member, self.made

    def end(self) -> None:
        self.member.leave(self.device)
        self.kill()


def shown(folder: Path) -> file.Shown:
    found = file.look(f"{folder}/{file.NAME}")
    assert found is not None
    return found


def test_one_file_for_a_folder(folder: Path) -> None:
    one, two = Server(folder, "one"), Server(folder, "two")
    path = folder / file.NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert {one.member.core.slot, two.member.core.slot} == {0, 1}
    assert one.fill() > 1000
    assert shown(folder).devices == 2
    assert shown(folder).budget == 8 * MIB
    assert two.device.counters()["budget_used"] == shown(folder).used
    one.end()
    two.end()
    assert file.look(str(path)) is None


def test_a_killed_server_without_a_state_frees_its_part(folder: Path) -> None:
    """The next one that starts finds it, and so does one that runs, within ten seconds."""
    one, two = Server(folder, "one"), Server(folder, "two")
    one.fill()
    assert two.fill() < 100
    one.kill()
    two.member.tidy(two.device)
    assert two.fill() > 1800
    two.kill()
    three = Server(folder, "three")
    assert three.member.core.taken == 0
    three.end()


def test_a_state_counts_until_it_is_removed(folder: Path) -> None:
    one, two = Server(folder, "one", state=True), Server(folder, "two")
    written = one.fill()
    used = one.device.counters()["mem_used_total"]
    one.kill()
    two.member.tidy(two.device)
    assert two.fill() < 100
    assert shown(folder).left_behind >= used
    os.unlink(folder / "one.state")
    two.member._swept = -budget.SWEEP  # ten seconds later
    two.member.tidy(two.device)
    assert two.fill() >= written - 100
    two.end()


@pytest.mark.parametrize("how", ["kill", "end"])
def test_the_next_server_goes_on_with_the_slot(folder: Path, how: str) -> None:
    """Of the same state, whatever it is called; so nothing is counted twice."""
    one = Server(folder, "one", state=True, budget_floor="1M")
    one.fill()
    used, slot = one.device.counters()["mem_used_total"], one.member.core.slot
    two = Server(folder, "two")
    one.kill() if how == "kill" else one.end()
    again = Server(folder, "again", state=f"{folder}/one.state")
    assert again.member.core.slot == slot
    assert again.device.counters()["mem_used_total"] == used
    assert used <= again.member.core.mine <= 8 * MIB
    assert two.fill() < 100
    assert shown(folder).devices == 2
    again.end()
    two.end()


def test_what_is_there_counts_though_the_budget_comes_later(folder: Path) -> None:
    """And though it is smaller: nothing is lost, nobody grows."""
    one = Server(folder, "one", state=True)
    one.fill()
    one.end()
    os.unlink(folder / file.NAME)
    again = Server(folder, "one", state=True, budget="4M")
    used = again.device.counters()["mem_used_total"]
    assert used > 7 * MIB
    assert again.member.core.mine >= used
    other = Server(folder, "two", budget="4M")
    assert other.fill() == 0
    other.end()
    again.end()


def test_floors_must_fit(folder: Path) -> None:
    one = Server(folder, "one", budget_floor="5M")
    with pytest.raises(BudgetError, match="the budget of 8388608 bytes is less than all floors together"):
        Member(settings(folder, "two", budget_floor="4M"))
    with pytest.raises(
        BudgetError, match="less than all floors together, 5242880 bytes: lower a budget_floor"
    ):
        Member(settings(folder, "two", budget="4M"))
    assert one.member.core.budget == 8 * MIB
    with pytest.raises(ConfigError, match="less than all floors together"):
        one.member.set(4 * MIB)
    with pytest.raises(ConfigError, match="would leave the others without one"):
        one.member.set(0)
    one.member.set(16 * MIB)
    assert one.member.core.budget == 16 * MIB
    two = Server(folder, "two", budget="16M", budget_floor="4M")
    two.end()
    one.end()


def test_the_last_one_counts(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = Server(folder, "one")
    two = Server(folder, "two", budget="16M", budget_floor="1M")
    assert one.member.core.budget == 16 * MIB
    assert "the budget of this host is 16777216 bytes now, it was 8388608" not in capfd.readouterr().err
    one.member.core.claim(MIB)
    three = Server(folder, "three", budget="32M")
    assert "zramd: the budget of this host is 33554432 bytes now, it was 16777216" in capfd.readouterr().err
    for server in one, two, three:
        server.end()


def test_one_on_standby_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told long ago what the budget was."""
    one = Server(folder, "one", state=True)
    one.fill()
    one.kill()
    other = Server(folder, "two", budget="16M")
    monkeypatch.setenv(handover.TAKES_OVER, handover.order(-1, 0, True, standby=True))
    again = Server(folder, "one", state=True)
    assert again.member.core.budget == 16 * MIB
    again.end()
    other.end()


def test_who_takes_over_serves_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What can be known before is told before; later nothing is to keep the clients from their data."""
    one = Server(folder, "one", state=True)
    one.kill()
    budget.look(settings(folder, "one", state=True))
    (folder / file.NAME).write_bytes(b"something else")
    with pytest.raises(BudgetError, match="is damaged, or no budget of zramd"):
        opening.look(settings(folder, "one", state=True))
    monkeypatch.setenv(handover.TAKES_OVER, handover.order(-1, 0, True))
    made = opening.make_device(settings(folder, "one", state=True))
    assert made.member is None
    assert "until the next restart the device has no part in the budget" in capfd.readouterr().err


def test_all_slots_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "SLOTS", 2)
    monkeypatch.setattr(file, "BYTES", 1 << 21)
    one, two = Server(folder, "one"), Server(folder, "two")
    with pytest.raises(BudgetError, match=r"all 2 slots of budget '.*' are in use: stop a device"):
        Member(settings(folder, "three"))
    two.kill()
    Server(folder, "three").end()
    one.end()


def test_a_state_with_a_path_that_is_too_long(folder: Path) -> None:
    deep = folder.joinpath(*["d" * 200] * 5)
    with pytest.raises(BudgetError, match="has too long a path to be noted in a budget"):
        Member(settings(folder, "one", state=f"{deep}/x"))


def test_a_file_that_is_not_ours(folder: Path) -> None:
    path = folder / file.NAME
    path.write_bytes(b"")
    path.chmod(0o666)
    with pytest.raises(BudgetError) as caught:
        Member(settings(folder, "one"))
    said = f"budget '{path}' is not used: other users may write to '{path}': "
    mend = f"chown {os.geteuid()} '{path}'; chmod 600 '{path}'"
    assert str(caught.value) == f'{said}run "{mend}", or use no budget'
    subprocess.run(mend, shell=True, check=True)
    Server(folder, "one").end()
    path.unlink()
    path.mkdir()
    with pytest.raises(BudgetError, match=r"budget '.*' cannot be opened: is a directory: remove it"):
        Member(settings(folder, "one"))


def test_a_file_that_is_removed(folder: Path) -> None:
    """Who starts then has another one, and is not bounded by ours: we say so."""
    one = Server(folder, "one")
    (folder / file.NAME).unlink()
    with pytest.raises(OSError, match="its file was removed"):
        one.member.tidy(one.device)
    one.end()


def test_a_device_that_is_left_out_has_no_part(folder: Path) -> None:
    """Though servers before had one, with its state."""
    one, two = Server(folder, "one", state=True), Server(folder, "two")
    written = one.fill()
    one.kill()
    without = settings(folder, "one", state=True, budget="0")
    made = opening.make_device(without)
    assert made.member is None
    assert made.device.counters()["mem_used_total"] > 0
    budget.leave_out(without)
    assert (shown(folder).devices, shown(folder).left_behind) == (1, 0)
    assert two.fill() >= written - 100
    two.end()


def test_a_device_without_a_budget_makes_none(folder: Path) -> None:
    budget.leave_out(settings(folder, "one", state=True, budget="0"))
    assert not (folder / file.NAME).exists()


def test_a_new_file_that_was_not_finished(folder: Path) -> None:
    """Whoever was killed while making it has not put its head there."""
    path = folder / file.NAME
    path.touch(mode=0o600)
    os.truncate(path, 1 << 16)
    one = Server(folder, "one")
    assert path.stat().st_size == file.BYTES
    one.end()


def test_somebody_holds_the_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Server(folder, "one")
    monkeypatch.setattr(budget, "LOCK_TIMEOUT", 0.05)
    fd = os.open(folder / file.NAME, os.O_RDWR)
    assert lockfile.ofd_take(fd, 0)
    with pytest.raises(BudgetError, match=r"is held by a process that does not go on: 'fuser .*' shows it"):
        Member(settings(folder, "two"))
    one.member.tidy(one.device)  # waits for nobody
    os.close(fd)
    one.end()


def test_what_the_service_manager_has_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps one file for each device: with another one of the same name, the first is gone."""
    monkeypatch.setattr(file, "_is_kept", lambda state: True)  # nobody may look
    files = [os.memfd_create("kept") for _ in range(2)]
    slots = []
    for fd, taken in zip(files, (2 * MIB, 0), strict=True):
        monkeypatch.setenv(handover.KEPT_FD, str(fd))
        member = Member(settings(folder, "one", state=handover.SYSTEMD))
        assert member.core.taken == 0
        member.join(Device(MIB))
        assert member.core.claim(taken)
        slots.append(member.core.slot)
        os.close(member._fd)
        del member  # what is mapped holds the lock as well
    assert slots == [0, 0]
