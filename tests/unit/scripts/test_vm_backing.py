"""A disk for what leaves memory in scripts/vm-swap: what goes together, and what is compared."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "lib"))

from vm import __main__ as vm_swap
from vm import backing, plan, report, writeback
from vm.attach import KernelZram
from vm.errors import VmError

GUEST = Path(__file__).resolve().parents[3] / "scripts/lib/vm/guest"
MIB = 1 << 20


class FakeGuest:
    """Notes what it is told, and answers from a table."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.told = answers, list[str]()
        self.machine = self.images = self
        self.dm_modules, self.zram_modules = ["/lib/modules/dm-mod.ko"], ["/lib/modules/zram.ko"]

    def run(self, command: str, timeout: float = 0) -> str:
        self.told.append(command)
        return next((answer for word, answer in self.answers.items() if word in command), "")


def test_what_is_asked_for_is_planned() -> None:
    words = "--attach local --writeback --backing 1G --iops 500 --timer 30 --pace 7 --memory 256M --compare"
    asked = vm_swap.arguments(words.split())
    vm_swap.refuse(asked)
    ours, kernels = (vm_swap.plan(asked, mode) for mode in ("local", plan.KERNEL_ZRAM))
    assert (ours.backing, ours.iops, ours.timer, ours.pages_a_second) == (1 << 30, 500, 30.0, 7)
    assert ours.zramd_settings == {
        "swap": "local",
        "reserve": "4M",
        "mem_limit": str(128 * MIB),
        "writeback_age": "30",
        "writeback_limit": "off",
    }
    assert kernels.zramd_settings["mem_limit"] == str(128 * MIB)
    # What is compared is alike.
    assert (ours.memory, ours.device_size) == (kernels.memory, kernels.device_size)
    # What is swapped in two rounds of the script, and what makes room for the pool, fits into the pool.
    this = plan.Plan(plan.KERNEL_ZRAM, 256 * MIB, writeback=True, timer=10.0)
    swapped = this.pages_a_second * 4096 * 2 * this.timer / (1 - plan.STORED)
    assert 0.4 * this.pool_limit < swapped * plan.STORED < 0.7 * this.pool_limit
    assert plan.Plan("local", 256 * MIB).pool_limit == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--writeback --attach local", "wants a disk"),
        ("--iops 5", "--iops is of the guest's own disk"),
        ("--iops 5 --backing 1G --attach qemu", "--iops is of the guest's own disk"),
        ("--backing 1G --attach zram", "writes nothing out by itself"),
        ("--writeback --backing 1G --rest 5", "a run of its own"),
        ("--writeback --backing 1G --minutes 5 --attach zram", "a run of its own"),
        ("--compare --backing 1G --attach local", "--compare is of --writeback"),
        ("--compare --writeback --backing 1G --attach qemu", "--compare is of --writeback"),
        ("--writeback --backing 1G --timer 0", "--timer 0 is not"),
    ],
)
def test_what_cannot_be_is_refused(words: str, why: str) -> None:
    with pytest.raises(VmError, match=why):
        vm_swap.refuse(vm_swap.arguments(words.split()))


def test_a_disk_has_all_its_room_and_goes(tmp_path: Path) -> None:
    disk = backing.Disk(tmp_path, 3 * MIB)
    status = disk.path.stat()
    assert (status.st_size, status.st_blocks * 512 >= 3 * MIB) == (3 * MIB, True)
    assert "throttle" not in " ".join(disk.qemu_options())
    slow = backing.Disk(tmp_path, MIB, 300)
    assert "x-iops-total=300" in " ".join(slow.qemu_options())
    assert "drive=backing-slow," in slow.qemu_options()[-1]
    disk.remove()
    slow.remove()
    assert os.listdir(tmp_path) == []
    with pytest.raises(VmError, match="no room for a disk"):
        backing.Disk(tmp_path, 1 << 60)
    assert os.listdir(tmp_path) == []


def test_a_disk_is_made_to_fail_without_being_away() -> None:
    """Each table is loaded beside the one in use and put in its place by one command."""
    guest: Any = FakeGuest({"/size": "2048\n"})
    disk = backing.Mapped(guest)
    assert guest.told[-1].startswith("/usr/sbin/dmsetup create mapped --table '0 2048 linear /dev/vdb 0'")
    for change, table in (
        (disk.fail, "0 2048 error"),
        (disk.fail_writes, "0 2048 flakey /dev/vdb 0 0 3600 1 error_writes"),
        (
            lambda: disk.lie("corrupt_bio_byte 40 r 77 0"),
            "flakey /dev/vdb 0 0 3600 5 corrupt_bio_byte 40 r 77 0",
        ),
        (lambda: disk.delay(100), "0 2048 delay /dev/vdb 0 100"),
        (disk.heal, "0 2048 linear /dev/vdb 0"),
    ):
        change()
        assert f"{table}'" in guest.told[-2]
        assert guest.told[-1].startswith("/usr/sbin/dmsetup resume mapped")


def test_what_a_disk_was_asked_for() -> None:
    guest: Any = FakeGuest({"vdb/stat": "  11  2  33  4  55  6  77  8 0 0 0\n"})
    assert backing.traffic(guest) == (33 * 512, 77 * 512)


def test_the_kernels_zram_has_the_same_settings() -> None:
    guest: Any = FakeGuest(
        {
            "mm_stat": "8192 100 4096 0 4096 0 0 0 0",
            "io_stat": "0 3 0 9",
            "bd_stat": "5 6 7",
            "vmallocinfo": "",
        }
    )
    device = KernelZram(4 * MIB, {"mem_limit": str(MIB), "backing": "/dev/vdb", "writeback_age": "10"})
    device.attach(guest)
    writes = [words.split()[1:] for words in guest.told if words.startswith("echo")]
    names = [target.rpartition("/")[2] for _, target in writes]
    assert names.index("backing_dev") < names.index("disksize") < names.index("mem_limit")
    numbers = device.stats()
    assert numbers["failed_writes"] == 3
    assert numbers["writeback"] == {
        "out_pages": 5,
        "bd_reads": 6 * 4096,
        "bd_writes": 7 * 4096,
        "written_out": 7,
    }
    device.write_back_by_timer(20)
    assert "sleep 20" in guest.told[-1]


def test_comparison() -> None:
    kernels, ours = report.Result("zram"), report.Result("local")
    shared = {"seconds": 100.0, "waited_seconds": 50.0}
    kernels.writeback = {**shared, "disk_MiB_written": 400.0, "bytes_a_block": 4096}
    ours.writeback = {**shared, "seconds": 90.0, "disk_MiB_written": 100.0, "bytes_a_block": 1500}
    found = writeback.comparison(kernels, ours)
    assert found["bytes written"] == "100 of 400 MiB, 0.25 for 1"
    assert found["time of the workload"] == "90 of 100 s, 0.90 for 1"
    assert "0.25 for 1" in report.comparison(found)


def test_a_pace_is_kept(tmp_path: Path) -> None:
    """The workload touches no more pages a second, and then as many as it can."""
    # (Who may not lower a score need not here.)
    others = [path for path in GUEST.glob("*.c") if path.name != "pattern.c"]
    subprocess.run(["cc", "-O1", "-c", "-Dset_oom_score=lower", *others], check=True, cwd=tmp_path)
    (tmp_path / "score.c").write_text("void set_oom_score(int score) { (void)score; }\n")
    program = ["cc", "-o", "tool", GUEST / "pattern.c", "score.c", *tmp_path.glob("*.o")]
    subprocess.run(program, check=True, cwd=tmp_path)
    with subprocess.Popen(
        [tmp_path / "tool", "pattern", "1", "7"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as tool:
        assert tool.stdin
        assert tool.stdout
        tool.stdin.write("pace 512\nfill\npace 0\nverify\nquit\n")
        tool.stdin.flush()
        answers = [json.loads(line) for line in tool.stdout]
    by_phase = {answer["phase"]: answer for answer in answers}
    assert by_phase["fill"]["written"] == by_phase["verify"]["verified"] == 256
    assert by_phase["fill"]["seconds"] >= 0.4  # it may be ahead by a twentieth of a second
    assert by_phase["fill"]["busy"] < by_phase["fill"]["seconds"]
    assert by_phase["verify"]["bad"] == 0
