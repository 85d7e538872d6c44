"""Swap in a real virtual machine, through the script that users run: each way to attach, and a full pool."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm.kernel import SUITES

VM_SWAP = Path(__file__).resolve().parents[2] / "scripts" / "vm-swap"

pytestmark = pytest.mark.timeout(600)


def vm_swap(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run the script at its shortest; what it found."""
    found = tmp_path / "found.json"
    ran = subprocess.run(
        [VM_SWAP, *arguments, "--short", "--json", found],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    print(ran.stdout.decode())
    assert found.exists()
    (result,) = json.loads(found.read_text())
    failed = [each for each in result["expectations"] if not each["met"]]
    assert (result["error"], failed, ran.returncode) == ("", [], 0)
    return dict(result)


def held(result: dict[str, Any], what: str) -> bool:
    """Whether an expectation was looked at, and met."""
    return any(each["met"] for each in result["expectations"] if each["what"].startswith(what))


@pytest.mark.parametrize(
    ("way", "suite"),
    [
        # slow: test_network.py has a guest of qemu's that swaps each time, over TLS
        *(pytest.param("qemu", suite, marks=pytest.mark.slow) for suite in SUITES),
        # slow: a guest's own client; test_vm_attach.py has the kernel's each time
        *(pytest.param("guest", suite, marks=pytest.mark.slow) for suite in SUITES),
        # slow: as qemu with this kernel: its part, qemu's command line, is in test_libvirt.py
        pytest.param("libvirt", SUITES[0], marks=pytest.mark.slow),
        # slow: ublk below is asked for the same; test_local_at_the_limit is by this way
        *(pytest.param("local", suite, marks=pytest.mark.slow) for suite in SUITES),
        ("ublk", SUITES[1]),
    ],
)
def test_swap(way: str, suite: str, tmp_path: Path) -> None:
    result = vm_swap(tmp_path, "--attach", way, "--suite", suite)
    assert result["pages_bad"] == 0
    assert result["pages_verified"] > 10_000
    assert result["swap_outs"] > 5_000
    assert result["swap_ins"] > 1_000
    moments = result["moments"]
    # Frees come through as trims and shrink the pool; then compaction frees pages.
    assert moments["full"]["total"] > moments["before"]["total"] > moments["after"]["total"]
    assert moments["full"]["frag_ratio"] > moments["before"]["frag_ratio"] < moments["after"]["frag_ratio"]
    assert result["compaction"]["num_migrated"] > 0
    assert result["swapoff"]["bad"] == 0
    if way in ("local", "ublk"):
        assert held(result, "requests need no memory")
        assert held(result, "no system call takes memory")
        assert held(result, "the pool takes what the server says")
        assert held(result, "a stop waits for swapoff")
        assert result["requests"]["reserve_misses"] == 0
        joined(result)


def joined(result: dict[str, Any]) -> None:
    """The guest's kernel could move what is in memory, the pool too: its free memory lies in long blocks."""
    found = result["guest_compaction"]
    assert found["compact_unevictable_allowed"] == 1
    assert found["pages_moved"] > 100
    assert found["not_moved"] <= 10 + found["pages_moved"] // 100
    free = {name: moment["guest"] for name, moment in result["moments"].items()}
    assert free["joined"]["huge_pages"] > free["after"]["huge_pages"]
    for each in free.values():
        assert each["free"] == 4096 * sum(count << order for order, count in enumerate(each["blocks"]))


@pytest.mark.slow  # it waits until blocks are cold
def test_local_with_a_cold_tier(tmp_path: Path) -> None:
    """A machine that swaps to itself: recompression takes no memory that requests may need."""
    cold = ("--set", "recompression=zstd(level=3)", "--set", "cold_age=10", "--idle", "40")
    result = vm_swap(tmp_path, "--attach", "local", "--suite", SUITES[0], *cold)
    assert held(result, "what rests becomes cold")
    assert held(result, "requests need no memory")
    assert held(result, "no system call takes memory")
    assert held(result, "the pool takes what the server says")
    assert result["requests"]["reserve_misses"] == 0
    # A block of it: what the workload has written goes on being swapped out after it has done so.
    filled, rested = (result["moments"][when] for when in ("filled", "rested"))
    assert rested["used"] / rested["stored"] < filled["used"] / filled["stored"]
    assert result["pages_bad"] == 0
    assert result["pages_verified"] > 10_000
    assert result["swapoff"]["bad"] == 0


@pytest.mark.slow  # minutes, in which nothing of zramd runs
def test_kernel_zram(tmp_path: Path) -> None:
    """The same with the kernel's own zram, so that there is something to compare with."""
    result = vm_swap(tmp_path, "--attach", "zram")
    assert result["pages_bad"] == 0
    assert result["swap_outs"] > 5_000
    moments = result["moments"]
    assert moments["full"]["total"] > moments["before"]["total"] >= moments["after"]["total"] > 0
    assert moments["full"]["spent"] > moments["full"]["total"] + moments["full"]["stored"] // 4096 * 8
    assert result["swapoff"]["bad"] == 0
    joined(result)


@pytest.mark.slow  # more than a minute; test_ublk.py has a full pool under a kernel each time
def test_full_pool(tmp_path: Path) -> None:
    """A swap write fails, its page stays in memory, the guest lives on, and nothing is lost."""
    result = vm_swap(tmp_path, "--attach", "qemu", "--limit")
    assert result["hog"]["failed_writes"] > 0
    assert result["write_errors"] > 0
    assert result["pages_bad"] == 0


@pytest.mark.slow  # a minute of what qemu does by itself
def test_qemu_pauses_when_the_pool_is_full(tmp_path: Path) -> None:
    """qemu's own policy for ENOSPC: the guest is paused, and goes on once there is room."""
    result = vm_swap(tmp_path, "--attach", "qemu", "--pause")
    assert result["hog"]["pauses"] > 0
    assert result["write_errors"] == 0
    assert result["pages_verified"] > 10_000


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.slow) for way in ("qemu", "guest")],  # slow: a minute of waiting
)
def test_server_stands_still(way: str, tmp_path: Path) -> None:
    """A server that is only slow is waited for, and nothing is lost."""
    result = vm_swap(tmp_path, "--attach", way, "--stall", "12")
    assert held(result, "a server that stands still is waited for")
    assert result["stall"]["churn_seconds"] >= 12


@pytest.mark.parametrize(
    "limit",
    [
        pytest.param((), id="memory"),
        # slow: minutes; a full pool is tried each time by test_full_pool
        pytest.param(("--mem-limit", "20M"), id="pool", marks=pytest.mark.slow),
    ],
)
def test_local_at_the_limit(limit: tuple[str, ...], tmp_path: Path) -> None:
    """A machine that swaps to its own zramd, all memory used or all of the pool: half a minute of it."""
    result = vm_swap(tmp_path, "--attach", "local", "--minutes", "0.5", *limit)
    assert held(result, "the guest never hangs")
    assert held(result, "the server survives")
    assert held(result, "swap writes fail" if limit else "the hog reached the limit")
    assert result["pages_verified"] > 5_000


@pytest.mark.parametrize(
    ("way", "how"),
    [
        # slow: a minute; each time: test_network.py has qemu and a restart, test_vm_attach.py has kills
        pytest.param("qemu", (), marks=pytest.mark.slow),
        # slow: restarts under swap are in test_vm_attach.py, too
        pytest.param("qemu", ("--restart",), marks=pytest.mark.slow),
        pytest.param("ublk", ("--standby",), marks=pytest.mark.slow),
        pytest.param("ublk", (), marks=pytest.mark.slow),
        pytest.param(
            "ublk",
            ("--standby", "--minutes", "10"),
            marks=[pytest.mark.slow, pytest.mark.timeout(1800)],
        ),
        pytest.param("ublk", ("--restart",), marks=pytest.mark.slow),
        pytest.param("ublk", ("--hold-gil",), marks=pytest.mark.slow),
    ],
)
def test_server_that_ends_again_and_again(way: str, how: tuple[str, ...], tmp_path: Path) -> None:
    """Under swap; with the same state the next one goes on, and no page is lost."""
    result = vm_swap(tmp_path, "--attach", way, "--kill", "3" if way == "qemu" else "5", *how)
    assert result["kills"]["times"] >= (4 if way == "qemu" else 2)
    assert held(result, "no request fails")
    assert held(result, "each new server has what the last one held")
    assert result["pages_verified"] > 10_000
    assert result["swap_outs"] > 5_000


@pytest.mark.slow  # a minute; a row of test_vm_interruption.py refreshes each time
def test_programs_that_come_and_go(tmp_path: Path) -> None:
    """What they leave in swap when they end is given back by a refresh, and no page is lost."""
    result = vm_swap(tmp_path, "--attach", "qemu", "--churn", "0.2", "--areas", "8", "--refresh", "10")
    assert held(result, "no program is killed")
    assert held(result, "no request fails")
    assert result["pages_bad"] == 0
    assert result["pages_verified"] > 10_000
    churn = result["churn"]
    assert max(sample["dead"] for sample in churn["samples"]) > 1000
    refreshed = [each for each in churn["refreshes"] if each["freed"] > 0]
    assert refreshed, churn["refreshes"]
    assert churn["after"]["dead_share"] < 20
    assert {sample["stored"] >= sample["same"] for sample in churn["samples"]} == {True}


REST = ("--rest", "30", "--pageout", "--set", "cold_age=10")


@pytest.mark.slow  # it rests: until a block is cold
def test_a_guest_that_rests(tmp_path: Path) -> None:
    """What it has swapped out becomes cold by itself and takes less; every page is read back as it was."""
    result = vm_swap(tmp_path, "--attach", "qemu", *REST)
    assert result["pages_bad"] == 0
    assert result["pages_verified"] > 10_000
    assert held(result, "what rests")
    rest = result["rest"]
    assert rest["cold"] > rest["blocks"] // 4
    assert rest["samples"][-1]["cold"] > rest["samples"][0]["cold"]
