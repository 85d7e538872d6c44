"""Servers that share a budget, as their administrator sees them: list, kills, restarts, other budgets."""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.run import PATIENCE, wait_until, zramd_command

from zramd.commands import listing
from zramd.contract import budget, rundir
from zramd.launch import standby

MIB = 1 << 20


class Host:
    """Servers whose run folders lie in one folder."""

    def __init__(self, base: Path, states: Path) -> None:
        self.base, self.states = base, states
        self.pids: set[int] = set()

    def start(self, name: str, *words: str) -> str:
        """Start a server; what it says on standard error."""
        words = (f"rundir={self.base}/{name}", *words)
        done = zramd_command("start", name, "--size", "16M", *words)
        if pid := self.pid(name):
            self.pids.add(pid)
        return done.stderr

    def state(self, name: str) -> str:
        return f"state={self.states}/{name}.state"

    def pid(self, name: str) -> int:
        return rundir.holder(f"{self.base}/{name}") or 0

    def kill(self, name: str) -> None:
        server = self.pid(name)
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: self.pid(name) != server)  # one on standby may be there at once

    def fill(self, name: str, size: int) -> None:
        """Write what does not compress."""
        data = self.states / "data"
        data.write_bytes(random.randbytes(size))
        uri = f"nbd+unix:///{name}?socket={self.base}/{name}/nbd.sock"
        subprocess.run(["nbdcopy", str(data), uri], check=True, timeout=60 * PATIENCE)

    def list(self, **options: object) -> tuple[int, str]:
        """The status of `zramd list` in this folder, and what it prints."""
        names = ("bytes", "noheadings", "output_all", "raw", "json")
        given = {"names": [], "rundir": [], "output": "NAME,DISKSIZE", **dict.fromkeys(names, False)}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = listing.run(argparse.Namespace(**given | options))
        return status, printed.getvalue()

    def shown(self) -> budget.Shown:
        found = budget.look(f"{self.base}/{budget.NAME}")
        assert found is not None
        return found


@pytest.fixture
def host(tmp_path: Path, memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    base = tmp_path / "zramd"
    monkeypatch.setattr(rundir, "base", lambda: str(base))
    found = Host(base, memory_folder)
    yield found
    for name in os.listdir(base):
        if pid := found.pid(name):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda name=name: not found.pid(name))


def test_what_list_says(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    """Below the table, in JSON, and nowhere else; a server that died still counts by its state."""
    assert host.start("one", host.state("one"), "budget=8M") == ""
    table = "NAME DISKSIZE\none       16M\n"
    assert host.list() == (0, f"{table}budget 8M: 0B taken by 1 device, 8M left\n")
    assert host.start("two", "budget=8M", "budget_floor=2M") == ""
    table = f"{table}two       16M\n"
    assert host.list() == (0, f"{table}budget 8M: 2M taken by 2 devices, 6M left\n")
    host.fill("one", 4 * MIB)
    used = host.shown().used
    assert 6 * MIB <= used < 7 * MIB
    in_bytes = "NAME DISKSIZE\none  16777216\ntwo  16777216\n"
    line = f"budget {8 * MIB}: {used} taken by 2 devices, {8 * MIB - used} left\n"
    assert host.list(bytes=True) == (0, in_bytes + line)
    for only in ({"raw": True}, {"noheadings": True}, {"rundir": [f"{host.base}/two"]}):
        status, printed = host.list(**only)
        assert (status, "two" in printed, "budget" in printed) == (0, True, False), only
    status, printed = host.list(json=True, bytes=True)
    found = json.loads(printed)
    assert found["budget"] == {"budget": 8 * MIB, "used": used, "left_behind": 0, "devices": 2}
    assert [one["name"] for one in found["devices"]] == ["one", "two"]
    assert json.loads(host.list(json=True)[1])["budget"]["budget"] == "8M"
    assert "budget" not in json.loads(host.list(json=True, rundir=[f"{host.base}/two"])[1])
    capfd.readouterr()
    host.kill("one")
    left = host.shown().left_behind
    assert 4 * MIB <= left < 5 * MIB
    status, printed = host.list(bytes=True)
    used = left + 2 * MIB
    assert (status, printed) == (
        1,
        f"NAME DISKSIZE\ntwo  16777216\nbudget {8 * MIB}: {used} taken by 1 device, {left} of it by what "
        f"servers have left that do not run, {8 * MIB - used} left\n",
    )
    assert capfd.readouterr().err.count("\n") == 1
    assert json.loads(host.list(json=True, bytes=True)[1])["budget"]["left_behind"] == left
    host.kill("two")
    capfd.readouterr()
    assert host.list(bytes=True) == (1, "")
    assert f"budget {8 * MIB}: {left} taken by 0 devices" in capfd.readouterr().err


def test_starts_and_restarts_with_another_budget(host: Host) -> None:
    """The last one counts for all; a device that leaves it does not count."""
    assert host.start("one", host.state("one"), "budget=8M", "budget_floor=1M") == ""
    assert host.start("two", host.state("two"), "budget=8M") == ""
    host.fill("two", 3 * MIB)
    said = host.start("three", "budget=8M", "budget_floor=8M")
    assert said == (
        f"zramd: three does not start: the budget of {8 * MIB} bytes is less than all floors together, "
        f"{9 * MIB} bytes: lower a budget_floor, or raise the budget\n"
    )
    done = zramd_command("restart", "--rundir", f"{host.base}/two", "budget=16M")
    assert done.returncode == 0, done.stderr
    assert (host.shown().budget, host.shown().devices) == (16 * MIB, 2)
    # A budget that is less than what is there: nothing is lost, nobody grows.
    done = zramd_command("restart", "--rundir", f"{host.base}/one", "budget=2M")
    assert done.returncode == 0, done.stderr
    assert host.shown().budget == 2 * MIB
    assert host.shown().used > 4 * MIB
    done = zramd_command("restart", "--rundir", f"{host.base}/one", "budget=512K")
    assert done.returncode != 0
    assert "budget_floor" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (host.shown().budget, host.shown().devices) == (2 * MIB, 2)
    # One that is killed counts by its state, until it starts again without.
    host.kill("two")
    assert host.shown().left_behind >= 3 * MIB
    assert host.start("two", host.state("two")) == ""
    wait_until(lambda: not host.shown().left_behind)
    shown = host.shown()
    assert (shown.devices, shown.budget) == (1, 2 * MIB)
    assert host.start("three", "budget=0") == ""
    assert host.shown() == shown
    # And with it again: what is there counts.
    done = zramd_command("restart", "--rundir", f"{host.base}/two", "budget=8M")
    assert done.returncode == 0, done.stderr
    shown = host.shown()
    assert (shown.devices, shown.budget, shown.left_behind) == (2, 8 * MIB, 0)
    assert 4 * MIB <= shown.used < 6 * MIB


def test_one_on_standby_has_no_part(host: Host) -> None:
    """Until its turn comes; then it goes on with the slot of the one before it."""
    assert host.start("one", host.state("one"), "budget=8M", "budget_floor=1M") == ""
    host.fill("one", 2 * MIB)
    before = host.shown()
    waiting = standby.start(None, f"{host.base}/one")
    try:
        assert rundir.standby(f"{host.base}/one") == waiting
        assert host.shown() == before
        host.kill("one")
        wait_until(lambda: host.pid("one") == waiting, timeout=60)
        wait_until(lambda: host.shown().devices == 1, timeout=60)
        after = host.shown()
        assert (after.budget, after.left_behind) == (before.budget, 0)
        assert 2 * MIB <= after.used <= before.used + MIB
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(waiting, signal.SIGKILL)
