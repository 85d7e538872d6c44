"""What the kernel says of swap areas and disks, and of memory."""

from collections.abc import Callable

import pytest
from support.swapareas import FakeMachine

from zramd.guest import areas, memory
from zramd.guest.areas import Area, default_count, disk_of, disks, part
from zramd.guest.files import PAGE

MIB = 1 << 20
Make = Callable[..., FakeMachine]


def test_areas_come_in_the_order_in_which_they_are_filled(machine: Make) -> None:
    there = machine(1000, 2000, 500)
    there.swap_out(1200)
    swaps = there.folder / "proc/swaps"
    swaps.write_text(swaps.read_text() + "/swap\\040file                           file\t4096\t\t8\t\t-2\n")
    assert areas.areas() == [
        Area("/dev/vdb1", 1000, 1000, 100),
        Area("/dev/vdb2", 2000, 200, 99),
        Area("/dev/vdb3", 500, 0, 98),
        Area("/swap\\040file", 4096 * 1024 // PAGE, 8 * 1024 // PAGE, -2),
    ]
    assert [area.path for area in areas.areas("/dev/vdb")] == ["/dev/vdb1", "/dev/vdb2", "/dev/vdb3"]
    assert areas.areas("/dev/vdc") == []


def test_a_kernel_without_swap_has_no_areas(machine: Make) -> None:
    (machine(1).folder / "proc/swaps").unlink()
    assert areas.areas() == []


def test_a_partition_belongs_to_its_disk(machine: Make) -> None:
    machine(1000)
    assert disk_of("/dev/vdb1") == "/dev/vdb"
    assert disk_of("/dev/vdb") == "/dev/vdb"
    assert disk_of("/swapfile1") == "/swapfile1"


@pytest.mark.parametrize(("disk", "third"), [("/dev/vdb", "/dev/vdb3"), ("/dev/nbd0", "/dev/nbd0p3")])
def test_partitions_are_named_as_the_kernel_does(disk: str, third: str) -> None:
    assert part(disk, 3) == third


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("serial", "zramd-swap0\n", True),
        ("backend", "zramd/swap0\n", False),
        ("device/serial", "zramd-swap0     \n", True),  # NVMe
        ("device/vpd_pg80", "\0\x80\0\x0bzramd-swap0", True),  # SCSI: four bytes before
        ("device/vpd_pg80", "\0\x80\0\x09QM00001", False),
        ("serial", "my-zramd\n", False),
        ("serial", "", False),
    ],
)
def test_disks_are_known_by_their_serial_number(machine: Make, file: str, content: str, found: bool) -> None:
    path = machine(1000).folder / "sys/block/vdb" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    assert disks() == (["/dev/vdb"] if found else [])


@pytest.mark.parametrize(
    ("size", "count"), [(MIB, 1), (64 * MIB, 1), (128 * MIB, 2), (512 * MIB, 8), (1 << 30, 8), (1 << 40, 8)]
)
def test_a_disk_has_as_many_areas_as_are_of_use(size: int, count: int) -> None:
    assert default_count(size) == count


def test_memory_is_read_from_the_kernel(machine: Make) -> None:
    there = machine(1000)
    there.waiting, there.stalls, there.cached = 12.5, 7, 1 << 20
    there.write()
    assert memory.memory() == (there.total, there.available, 1 << 20, 12.5, 8)


def test_a_kernel_without_psi_does_not_tell_who_waits(machine: Make) -> None:
    (machine(1000).folder / "proc/pressure/memory").unlink()
    assert memory.memory().waiting is None


def test_no_time_to_bring_pages_back(machine: Make) -> None:
    there = machine(1000)
    there.total, there.available = 100 * MIB, 40 * MIB
    there.write()
    room = (40 - 16) * MIB // PAGE  # 16 MiB stay available
    assert memory.hindrance(memory.memory(), room) == ""
    why = memory.hindrance(memory.memory(), room + 1)
    assert why == "24.0 MiB of memory are needed, and of 40.0 MiB available 16.0 stay so"
    there.waiting = 10.0
    there.write()
    assert memory.hindrance(memory.memory(), 0) == ""  # that was before so much became available
    there.available = 29 * MIB
    there.write()
    assert memory.hindrance(memory.memory(), 0) == "programs wait for memory (10 % of the last 10 s)"


def test_a_step_is_given_up_when_memory_gets_short(machine: Make) -> None:
    there, wanted = machine(1000), ""
    watch = memory.Watch(lambda: wanted)
    assert watch.reason() == ""
    there.stalls += memory.STALLS
    there.write()
    assert watch.reason() == "programs wait for memory"
    assert watch.reason() == ""  # nobody more has waited since
    there.available = there.total // 50
    there.write()
    assert watch.reason().startswith("only 20 MiB of memory are available")
    there.cached = 30 * MIB  # of what was wiped: the kernel takes it when it needs it
    there.write()
    assert watch.reason() == ""
    there.available = there.total
    there.write()
    wanted = "another command waits"
    assert watch.reason() == "another command waits"
