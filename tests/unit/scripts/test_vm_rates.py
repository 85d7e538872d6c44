"""What scripts/vm-swap --rates makes of what it finds in the guest."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "lib"))

from vm import rates, report
from vm.guest import Guest

LOADED = """10.00 15.00
1000000 5 10
2000000 5 20

{"requests": 1000, "seconds": 2.000, "p50": 150, "p99": 900}

12.00 16.00
11000000 5 510
12000000 5 520
"""


class FakeGuest:
    """Answers with what a guest says."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def run(self, command: str) -> str:
        return next((answer for part, answer in self.answers.items() if part in command), "")


def door(name: str, pid: int | None) -> rates.Door:
    return rates.Door(name, f"/dev/{name}", pid)


def test_one_load() -> None:
    """Of two processors one was idle for a second of two; the two threads ran 10 ms each, 500 times each."""
    guest = cast("Guest", FakeGuest({"load.sh": LOADED}))
    assert rates._load(guest, door("ublk", 7), ("read", 1), 2) == {
        "rate": 500.0,
        "p50": 150,
        "p99": 900,
        "busy": 3000.0,
        "cpu": 20.0,
        "switches": 1.0,
    }


@pytest.mark.parametrize(("threads", "calls", "chores"), [("", 1.0, 0), ("zramd-ublk", 0.9, 50)])
def test_counts_are_of_the_servers_threads_alone(threads: str, calls: float, chores: int) -> None:
    """Of those that answer, for each request; of the others, for each of two seconds."""
    hist = "".join(
        f"{{ common_pid:       {thread:>4} }} hitcount:       {count}\n"
        for thread, count in ((7, 100), (71, 900), (500, 70000))
    )
    answers = {
        "/proc/7/task": "7 zramd\n71 zramd-ublk0\n",
        "guest_tool": '{"requests": 1000}',
        "sys_enter/hist": hist,
    }
    one = replace(door("ublk", 7), threads=threads)
    assert rates._count(cast("Guest", FakeGuest(answers)), one, ("read", 1)) == {
        "system calls": calls,
        "system calls of others": chores,
        "allocations": 0.0,
        "allocations of others": 0,
    }


def rows(calls: float) -> list[dict[str, Any]]:
    doors = [door("zram", None), door("nbd", 1), door("ublk", 2)]
    for factor, each in zip((10, 1, 3), doors, strict=True):
        for load in rates.LOADS:
            found = {"rate": 100.0 * factor, "p50": 300.0 / factor, "p99": 900.0, "busy": 5.0}
            each.found[load] = [found | ({"cpu": 1.0, "switches": 1.0} if each.pid else {})]
            if each.pid:
                each.counted[load] = {"system calls": calls, "allocations": 0.0}
                each.counted[load] |= {f"{kind} of others": 7.0 for kind in rates.EVENTS}
    return rates._rows(doors)


@pytest.mark.parametrize(("calls", "right"), [(0.1, True), (0.5, False)])
def test_ratios_and_what_must_hold(calls: float, right: bool) -> None:
    """Half a call for a request is too many where 16 come at a time, and not where each comes alone."""
    result = report.Result("ublk", rates=rows(calls))
    row = result.rates[0]
    assert (row["ublk to nbd"], row["p50 of ublk to nbd"], row["zram to ublk"]) == (3.0, 0.33, 3.33)
    rates._expect(result)
    assert result.ok == right
    text = report.text(result)
    assert "read QD1" in text
    assert "7 system calls and 7 allocations a second at most" in text
    assert "swapped out" not in text
