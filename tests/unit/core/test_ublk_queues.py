"""The core's ublk: queues that serve a kernel's disk, and the commands that make one; see shim_ublk.c."""

import os
import shutil
from pathlib import Path

import pytest
from support.backings import Disk
from support.run import run_in_fake_kernel, wait_until

from zramd import Device
from zramd.core.ublk.control import Control, available
from zramd.core.ublk.queues import Queues
from zramd.errors import UblkError

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")


@pytest.mark.parametrize(
    ("script", "scenes"),  # of one process
    [
        ("refusals", "commands silence no_rings refusals"),
        ("io", "requests model extremes calls frugal full held urgent short_of_memory"),
        ("away", "out damage readers"),
        ("lives", "again rounds forked successor another another_with_backing broken abort"),
        ("crowds", "emptied"),
    ],
)
def test_scenes(script: str, scenes: str, ublk_shim: Path) -> None:
    assert run_in_fake_kernel(ublk_shim, f"ublkscenes/{script}.py", *scenes.split(), timeout=120) == ""


def test_no_driver(tmp_path: Path) -> None:
    """Each reason has its sentence."""
    missing = tmp_path / "ublk-control"
    assert "load the kernel's module with 'modprobe ublk_drv'" in available(missing)
    with pytest.raises(UblkError, match=f"there is no '{missing}'") as caught:
        Control(missing)
    assert caught.value.errno == 2
    (folder := tmp_path / "folder").mkdir()
    assert "cannot be opened: is a directory" in available(folder)


@pytest.mark.parametrize(
    "geometry", [(0, 4, 4096), (1, 0, 4096), (1, 4097, 4096), (5000, 1, 4096), (1, 1, 0), (1, 1, 5000)]
)
def test_what_no_disk_can_be(geometry: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="requests"):
        Queues(Device(1 << 20), *geometry)


@pytest.mark.parametrize("backed", [False, True])
def test_a_priority_that_there_is_not(backed: bool) -> None:
    before = os.listdir("/proc/self/task")
    device = Disk().device(1 << 20) if backed else Device(1 << 20)
    with pytest.raises(UblkError, match=r"priority 1000 .*: it takes CAP_SYS_NICE"):
        Queues(device, 2, 4, urgent=1000)
    wait_until(lambda: os.listdir("/proc/self/task") == before)  # who has waited for a thread may see it yet


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right")
def test_threads_without_the_right_to_everything() -> None:
    """For such a thread's disk the kernel looks for no partitions; the others keep the right."""
    queues = Queues(Device(1 << 20), 2, 4)
    found = {}
    for task in Path("/proc/self/task").iterdir():
        words = dict(line.partition(":\t")[::2] for line in (task / "status").read_text().splitlines())
        found[words["Name"]] = {int(words[key], 16) >> 21 & 1 for key in ("CapPrm", "CapEff", "CapInh")}
    assert found.pop("zramd-ublk0") == found.pop("zramd-ublk1") == {0}
    assert all(1 in rights for rights in found.values())
    del queues


def test_a_file_of_no_disk() -> None:
    """The kernel of this machine refuses it, whatever it is."""
    queues = Queues(Device(1 << 20), 2, 4)
    for place in ("/dev/null", "/dev/zero"):
        with open(place) as file, pytest.raises(UblkError, match=r"cannot .* of queue 0 of a ublk disk"):
            queues.serve(file.fileno())
        assert not queues.serving
