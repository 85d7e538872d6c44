"""Programs that come and go in a guest: what is planned, counted and told of it, without a guest."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "lib"))

from vm import __main__ as vm_swap
from vm import attach, churn, dead, plan, report, session
from vm.dead import Sample
from vm.errors import VmError

GUEST = Path(__file__).resolve().parents[3] / "scripts/lib/vm/guest"
MIB = 1 << 20


def sample(time: float, used: int, stored: int, same: int = 0, total: int = MIB) -> Sample:
    return Sample(time, used, stored, same, 0, total, 0, 0, 0)


def test_the_last_part_has_no_programs() -> None:
    busy, calm = churn.timeline(plan.Plan("qemu", 256 * MIB, churn_seconds=100))
    assert (busy.programs, busy.seconds) == (churn.PROGRAMS, churn.WARM_UP + 100)
    assert (calm.programs, calm.seconds) == (0, churn.AFTER)


@pytest.mark.parametrize("seconds", [1, 20, 60, 137])
def test_breaks(seconds: int) -> None:
    """In turn, for as long as asked, and the last calm is the one after all."""
    *parts, last = churn.timeline(plan.Plan("qemu", 256 * MIB, churn_seconds=seconds, breaks=True))
    assert [bool(part.programs) for part in parts] == [number % 2 == 0 for number in range(len(parts))]
    assert parts[-1].programs
    assert last.programs == 0
    assert last.seconds >= churn.AFTER
    whole = sum(part.seconds for part in (*parts, last))
    assert whole == churn.WARM_UP + seconds + churn.AFTER
    assert all(0 < part.seconds <= churn.BUSY for part in parts)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--breaks --attach qemu", "are of --churn"),
        ("--refresh 10 --attach qemu", "are of --churn"),
        ("--churn 1 --refresh 10 --attach zram", "--refresh is zramd's"),
        ("--churn 1 --refresh 10 --attach qemu --order equal", "has its own"),
        ("--churn 1 --refresh 10 --attach qemu --discard none", "has its own"),
        ("--churn 1 --attach zram --areas 2", "takes no partitions"),
        ("--churn 1 --attach qemu --areas 0", "not a number from 1 to 24"),
        ("--churn 1 --attach qemu --areas 25", "not a number from 1 to 24"),
        ("run.json", "'run.json' is for --draw"),
    ],
)
def test_what_does_not_go_together_is_refused(words: str, why: str) -> None:
    with pytest.raises(VmError, match=why):
        vm_swap.refuse(vm_swap.arguments(words.split()))


def test_what_is_asked_for_is_planned() -> None:
    words = ["--attach", "qemu", "--churn", "2.5", "--breaks", "--refresh", "30", "--areas", "8"]
    asked = vm_swap.arguments([*words, "--page-cluster", "3", "--sysctl", "a=1", "--sysctl", "b=2"])
    vm_swap.refuse(asked)
    this = vm_swap.plan(asked, "qemu")
    assert (this.churn_seconds, this.breaks, this.refresh, this.areas) == (150, True, 30.0, 8)
    assert (this.page_cluster, this.sysctls) == (3, ("a=1", "b=2"))
    assert (this.memory, this.device_size) == (plan.CHURN_MEMORY, plan.CHURN_DEVICE)
    # The pool in the guest has memory of its own, so that as much is swapped.
    assert vm_swap.plan(asked, "zram").memory == vm_swap.plan(asked, "local").memory > this.memory


def test_a_device_is_divided_into_equal_parts() -> None:
    assert session.partitions("/dev/vdb", 100 * MIB, 1) == {"/dev/vdb": (0, 100 * MIB)}
    parts = session.partitions("/dev/nbd0", 100 * MIB + 4096, 3)
    assert list(parts) == ["/dev/nbd0p1", "/dev/nbd0p2", "/dev/nbd0p3"]
    assert list(parts.values()) == [(0, 33 * MIB), (33 * MIB, 33 * MIB), (66 * MIB, 33 * MIB)]
    assert list(session.partitions("/dev/vdb", 100 * MIB, 2)) == ["/dev/vdb1", "/dev/vdb2"]


def test_same_filled_blocks_are_not_dead() -> None:
    """They take no memory, whether swap uses them or not."""
    alive = sample(0, used=1000, stored=1000, same=90)
    assert (alive.dead, alive.dead_share) == (0, 0.0)
    half = sample(0, used=1000, stored=2000, same=180)
    assert (half.dead, half.dead_share) == (910, 50.0)
    wiped = sample(0, used=1000, stored=2000, same=1090)
    assert (wiped.dead, wiped.dead_share) == (0, 0.0)
    assert sample(0, 0, 0).dead_share == 0.0


def test_as_many_pages_are_same_filled_as_is_said(tmp_path: Path) -> None:
    """The share that dead blocks are computed with is the one of what the workload writes."""
    subprocess.run(["cc", "-O1", "-Dmain=guest_tool", "-c", *GUEST.glob("*.c")], check=True, cwd=tmp_path)
    (tmp_path / "count.c").write_text(
        '#include "tool.h"\n#include <stdio.h>\n'
        "int main(void) { uint64_t out[512]; int same = 0;\n"
        "for (int page = 0; page < 20000; page++) { page_content(out, 7, page, page % 5);\n"
        "int i = 1; while (i < 512 && out[i] == out[0]) i++; same += i == 512; }\n"
        'printf("%d", same); }\n'
    )
    command = ["cc", f"-I{GUEST}", "-o", "count", "count.c", *tmp_path.glob("*.o")]
    subprocess.run(command, check=True, cwd=tmp_path)
    counted = int(subprocess.run([tmp_path / "count"], capture_output=True, check=True).stdout)
    assert counted / 20000 == pytest.approx(dead.SAME_FILLED, abs=0.01)


def test_means_are_of_areas() -> None:
    """A moment at which hardly anything is stored says little of the share."""
    found = dead.means([sample(1, 0, 10, total=MIB), sample(2, 1000, 1000, same=90, total=3 * MIB)])
    assert found["dead_share"] == round(100 * 10 / 920, 1)
    assert found["total_bytes"] == 2 * MIB
    assert found["bytes_per_page"] == round(4 * MIB / 1000)
    assert (found["seconds"], found["used"]) == (2, 500)
    assert dead.means([]) == {}


def bucket(nanoseconds: int) -> int:
    """The bucket of churn.c."""
    exponent = nanoseconds.bit_length() - 1
    return exponent * 8 + (nanoseconds >> (exponent - 3) & 7)


@pytest.mark.parametrize("nanoseconds", [8, 15, 16, 1000, 123_456, 2**31 - 1])
def test_times_are_known_to_an_eighth(nanoseconds: int) -> None:
    told = dead.slowest({bucket(nanoseconds): 1}) * 1e9
    assert nanoseconds < told <= nanoseconds * 9 / 8 + 1


def test_percentiles() -> None:
    fast, slow = bucket(10_000), bucket(50_000_000)
    histogram = {fast: 98}
    dead.add(histogram, {slow: 2})
    assert histogram == {fast: 98, slow: 2}
    assert dead.percentile(histogram, 50) == dead.percentile(histogram, 98) == dead.slowest({fast: 1})
    assert dead.percentile(histogram, 99) == dead.slowest(histogram) == dead.slowest({slow: 1})
    assert (dead.percentile({}, 50), dead.slowest({})) == (0.0, 0.0)


def found() -> dict[str, Any]:
    samples = [sample(second, 1000, 2000, 180) for second in range(30)]
    clusters = {"time": 20.0, "programs": 8, "total": 511, "clusters": 9, "slots": 900, "tenths": [1] * 10}
    return {
        "samples": [each.as_dict() for each in samples],
        "steady": dead.means(samples[:20]),
        "after": dead.means(samples[-5:]),
        "faults": {"calm": dead.times({bucket(1000): 5}), "refresh": dead.times({bucket(2000): 7})},
        "clusters": [clusters, {**clusters, "programs": 0, "clusters": 11}],
        "refreshes": [{"time": 5.0, "seconds": 2.0, "read_back": 30, "freed": 100, "faults": 7, "said": ""}],
        "put_off": 3,
        "killed": 0,
    }


def test_report_of_churn(tmp_path: Path) -> None:
    result = report.Result("qemu", settings={"kernel": "6.1", "accel": "tcg", "command": "--churn 2"})
    result.churn = found()
    text = report.text(result)
    assert "1000 pages used, 910 blocks dead (50.0 %)" in text
    assert re.search(r"not begun at the limit +3\n", text)
    assert "30 pages read back, 100 blocks freed, 0.30 for each" in text
    assert "502 free, 9 hold 900 slots" in text
    assert "500 free, 11 hold 900 slots" in text
    path = tmp_path / "report.md"
    report.write_markdown(path, result)
    assert "<!-- qemu-churn -->" in path.read_text()
    json.dumps(result.as_dict())


def test_numbers_of_the_kernels_zram() -> None:
    """Told by each heartbeat, so that nobody need ask a guest that is at its limit."""
    zram = attach.KernelZram(MIB)
    beat: dict[str, Any] = {"zramd": None}
    assert zram.sample(beat) is None
    beat |= {"mm_stat": [40960, 9000, 16384, 0, 16384, 3, 0, 0, 0], "io_stat": [0, 0, 0, 12]}
    zram._table = 160  # what the guest's kernel tells of it
    numbers = zram.sample(beat)
    assert numbers is not None
    assert (numbers["pages_stored"], numbers["same_pages"], numbers["notify_free"]) == (10, 3, 12)
    assert numbers["total_bytes"] == 16384 + 160 + 8 * 10


class FakeGuest:
    """A guest that swaps more and more while programs run; a second passes with each one asked for."""

    def __init__(self) -> None:
        self.now, self.used, self.programs, self.stored = 50.0, 0, 0, 0
        self.beats: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.tool: list[str] = []

    def start(self, workload: str) -> None:
        self.said.append(workload)

    def phase(self, words: str, timeout: float) -> dict[str, Any]:
        self.said.append(words)
        verb, *numbers = words.split()
        if verb == "programs":
            self.programs = int(numbers[0])
            self.used = self.used if self.programs else 100
        for _ in range(int(numbers[0]) if verb == "run" else 0):
            self.pass_second()
        if verb == "clusters":
            return {"clusters": 1, "slots": self.used, "tenths": [1] + 9 * [0]}
        counts = dict.fromkeys(("written", "verified", "bad", "lost", "killed", "faults"), 0)
        return {**counts, "verified": 1, "took": {"160": 1}}

    def pass_second(self) -> None:
        self.now += 1
        self.used += 10 * self.programs
        self.stored = max(self.stored, self.used)
        memory = {"MemAvailable": 50 if self.programs else 1000, "MemTotal": 1000}
        swap = {
            "SwapTotal": 4096 * 512_000,
            "SwapFree": 4096 * (512_000 - self.used),
            "pswpin": 0,
            "pswpout": 0,
        }
        zramd = {**self.stats(), "notify_free": 0, "total_bytes": 1000 * self.stored}
        self.beats.append({"time": self.now, **memory, **swap, "zramd": zramd})

    def stats(self) -> dict[str, int]:
        return {"pages_stored": self.stored, "same_pages": 0}

    def refresh(self) -> str:
        self.tool.append("refresh")
        self.stored = self.used
        return "vdb1: all became free"

    def kernel_log(self) -> list[str]:
        return []


@pytest.mark.parametrize("refresh", [0.0, 10.0])
def test_a_run(refresh: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first program to the last: what is counted when, and when swap is refreshed."""
    guest, result = FakeGuest(), report.Result("qemu")
    guest.pass_second()
    this = plan.Plan("qemu", 256 * MIB, churn_seconds=60, breaks=True, refresh=refresh, areas=8)
    fake = SimpleNamespace(
        plan=this,
        guest=guest,
        result=result,
        live=SimpleNamespace(step=lambda text: None),
        attachment=SimpleNamespace(sample=lambda beat: beat["zramd"], stats=guest.stats),
        swap_on=lambda: None,
        beat=lambda: guest.beats[-1],
        guest_tool=lambda words, timeout: getattr(guest, words)(),
    )
    monkeypatch.setattr(churn, "booted", lambda *_: nullcontext(fake))
    monkeypatch.setattr(churn.time, "monotonic", lambda: guest.now)
    churn.churn(this, None, result)  # type: ignore[arg-type]  # boots nothing
    found = result.churn
    assert guest.said[0] == "churn 1"
    assert guest.said.count(f"programs {churn.PROGRAMS} {churn.PROGRAM_MIB}") == 2
    # Means begin once it is warm, and end with the programs; 40 s of them, 25 without, and 40 again.
    assert found["samples"][0]["time"] == 0
    assert found["steady"]["seconds"] == churn.WARM_UP + 60 - churn.WARM_UP + 1
    assert result.pages_verified == sum(not words.startswith(("churn", "clusters")) for words in guest.said)
    assert sum(took["faults"] for took in found["faults"].values()) == result.pages_verified
    assert set(found["faults"]) == {"busy", "calm", "refresh"} - (set() if refresh else {"refresh"})
    assert bool(found["refreshes"]) is bool(found["put_off"]) is bool(refresh)
    assert len(guest.tool) == len(found["refreshes"])
    assert (found["after"]["dead_share"] < 10) is bool(refresh)
    assert result.ok


def test_runs_are_read_again(tmp_path: Path) -> None:
    """For their curves; what is none with --churn is said."""
    run, other = tmp_path / "run.json", tmp_path / "other.json"
    run.write_text(json.dumps([{"churn": found()}]))
    other.write_text(json.dumps([{"churn": {}, "rest": {}}]))
    assert dead.read([f"a={run}", f"b={run}"]) == dict.fromkeys("ab", found()["samples"])
    rested = tmp_path / "rested.json"
    rested.write_text(json.dumps([{"churn": {}, "rest": {"samples": [{"time": 1.0, "cold": 3}]}}]))
    assert dead.read([f"a={rested}"]) == {"a": [{"time": 1.0, "cold": 3}]}
    for word in (str(run), f"a={other}", f"a={tmp_path}/none.json", f"a={tmp_path}"):
        with pytest.raises(VmError, match="does not name a run of --churn or --rest"):
            dead.read([word])
