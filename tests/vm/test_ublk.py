"""The core's side of ublk against a real kernel: requests, parameters, rights, and servers that die.

Each test plays one scene of ublkguest.py in a guest with Debian 13's kernel.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from guests import MIB, small_guest
from vm.guest import Guest

SUITE = "trixie"  # the first whose kernel has ublk
# On from the boot: see EVENTS of ublkguest.py.
COUNTED = "trace_event=raw_syscalls:sys_enter,kmem:kmalloc,kmem:kmem_cache_alloc,kmem:mm_page_alloc"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    """A booted guest with the module, and with the scenes."""
    with small_guest(SUITE, parameters=COUNTED) as guest:
        for path in guest.machine.images.ublk_modules:
            guest.run(f"insmod {path}")
        for program in ("ublkdevice.py", "ublkguest.py"):
            guest.put(f"/tmp/{program}", Path(__file__).with_name(program).read_bytes())
        yield guest


def play(guest: Guest, scene: str, patience: float = 120) -> dict[str, Any]:
    """What a scene found."""
    words = guest.run(f"/usr/bin/python3 /tmp/ublkguest.py {scene}", patience)
    print(words)
    found: dict[str, Any] = json.loads(words.splitlines()[-1])
    assert "error" not in found
    return found


def test_each_kind_of_request(guest: Guest) -> None:
    """Written, read, discarded and zeroed in all sizes, at the ends too: every block is as a model has it."""
    found = play(guest, "kinds")
    assert found["wrong"] == []
    assert min(found["done"].values()) > 5
    stats = found["stats"]
    assert min(stats[name] for name in ("reads", "writes", "trims", "zeroes")) > 0
    assert found["stored after all is discarded"] == 0
    assert found["zeroed"]
    # The kernel lets nothing through that is no whole block.
    assert found["unaligned"]["errno"] == "EINVAL"
    assert found["past the end"] == 0
    assert found["secure"]["errno"] in ("EOPNOTSUPP", "ENOTSUP")


def test_what_the_kernel_is_told(guest: Guest) -> None:
    found = play(guest, "parameters")
    assert found["queue"] == {
        "logical_block_size": "4096",
        "physical_block_size": "4096",
        "minimum_io_size": "4096",
        "optimal_io_size": "4096",
        "rotational": "0",
        "write_cache": "write through",
        "fua": "0",
        "discard_granularity": "4096",
        "discard_max_bytes": str(1 << 30),
        "write_zeroes_max_bytes": str(1 << 30),
        "max_hw_sectors_kb": "64",
        "nr_requests": "32",
    }
    assert found["size"]
    assert found["disk"]
    assert found["hardware queues"] == 2
    info = found["info"]
    assert (info["queues"], info["depth"], info["max_io_bytes"]) == (2, 32, 64 << 10)
    assert (info["state"], info["recovers"]) == ("live", False)
    assert {"user_recovery", "user_recovery_reissue"} <= set(found["features"])


def test_swap(guest: Guest) -> None:
    """swapon --discard frees all that the device held; a second start of a device is refused."""
    found = play(guest, "swap")
    assert found["full"] > 8000
    assert found["on"]
    assert found["stored"] <= 1
    assert found["started again"]["errno"] == "EEXIST"


def test_full_pool(guest: Guest) -> None:
    found = play(guest, "full")
    assert found["failed"]["errno"] == "ENOSPC"
    assert found["kept"]
    assert found["written"] > MIB // 2
    assert found["after"]["errno"] is None
    assert found["stats"]["failed_writes"] > 0


def test_system_calls_and_memory_of_requests(guest: Guest) -> None:
    """One call for a request, or for many of them; and they take no memory, but for the pool.

    How many come together is a matter of the guest's clocks, which vm-swap --rates measures: 0.15 calls a
    request on an idle machine, up to 0.21 beside other work.
    """
    found = play(guest, "calls")
    for name, row in found.items():
        assert row["requests"] > 100, name
        assert row["served"] > 0.99 * row["requests"], name  # the kernel makes one of two that are neighbours
        most = 1.1 if name.endswith(" 1") else 0.5
        assert row["calls"] <= most, (name, row)
        assert row["enters"] <= most, (name, row)
        assert row["objects"] < 0.01, (name, row)
        assert row["pages"] < (0.01 if name.startswith("read") else 1), (name, row)


def test_two_devices(guest: Guest) -> None:
    found = play(guest, "two")
    assert len(set(found["numbers"])) == 2
    assert found["apart"]
    assert found["stays"]
    assert found["gone"]


def test_what_is_refused(guest: Guest) -> None:
    found = play(guest, "refusals")
    assert {
        name: each["errno"] or each["kind"] or None for name, each in found.items() if name != "left"
    } == {
        "nobody's": "ENODEV",
        "no queues": "ValueError",
        "too deep": "ValueError",
        "too short": "ValueError",
        "number in use": "EEXIST",
        "odd size": "ValueError",
        "start without a server": "ETIME",
        "once it waits": "EBADF",
        "delete after that": None,
        "second opener": "EBUSY",
        "params once started": "EACCES",
        "recovery of what does not recover": "EINVAL",
        "recovery of what is served": "EBUSY",
        "end of none": "EBUSY",
    }
    assert "/dev/ublkb3 exists already" in found["number in use"]["says"]
    assert "there is no such device" in found["nobody's"]["says"]
    assert found["left"] == []


def test_rights(guest: Guest) -> None:
    """Without ublk, without io_uring, and without root there is one sentence that says so."""
    found = play(guest, "rights")
    assert found["as root"] == ""
    assert "modprobe ublk_drv" in found["no device"]
    assert "io_uring_disabled" in found["no io_uring"]
    assert "io_uring_disabled" in found["no io_uring: control"]
    assert "io_uring_disabled" in found["no io_uring: queues"]
    assert "only root" in found["nobody"]["available"]
    assert "only root" in found["nobody"]["control"]
    assert found["nobody, but may open it"]["errno"] == "EPERM"
    assert "only root" in found["nobody, but may open it"]["says"]


def test_a_server_dies_for_good(guest: Guest) -> None:
    """Without recovery what was asked for fails, and the disk goes by itself."""
    found = play(guest, "dies_for_good")
    assert found["status"] == 1
    assert "Input/output error" in found["said"]
    assert found["later"]["errno"] in ("EIO", "ENXIO", "ENODEV", "ENODATA")
    assert found["gone"]


@pytest.mark.parametrize("at", ["serving", "all in flight", "begun", "all fetched"])
def test_a_server_dies_and_another_takes_over(at: str, guest: Guest) -> None:
    """What was asked for is answered by the next server, with what the last one held; nothing fails."""
    found = play(guest, f"'death:{at}'")
    assert found["quiesced"]
    assert found["begin"]["errno"] is None
    if at == "begun":  # and not a second time: the next server goes on from there
        assert found["begin again"]["errno"] == "EINVAL"
    elif at == "all fetched":
        assert found["begin again"]["errno"] is None
    assert found["take over"] == {"says": "", "right": True, "state": "live"}
    assert found.get("load", 0) == 0
    assert found["asked"] == 0
    assert found["end"] == {"stopped": "", "deleted": "", "gone": True}


@pytest.mark.parametrize("at", ["mapped", "some fetched"])
def test_a_server_dies_while_it_takes_over(at: str, guest: Guest) -> None:
    """No other can on these kernels, and it says so; stopped, the device fails what waits, and is gone."""
    found = play(guest, f"'death:{at}'")
    assert found["begin"]["errno"] is None
    if at == "mapped":
        assert found["begin again"]["errno"] == "EINVAL"
    assert found["take over"]["says"]
    assert found["end"] == {"stopped": "", "deleted": "", "gone": True}
    assert found["asked in the end"] == 1
