"""A disk for what leaves memory, in virtual machines: one that fails, lies or is slow; and guests that swap.

The disk is a virtio disk of the guest, which serves its own kernel, behind the kernel's device mapper.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.run import wait_until
from test_vm_swap import held, vm_swap

import zramd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm import backing, image, kernel
from vm.attach import Local
from vm.guest import Guest, Machine, choose_accel

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
BLOCKS = 1200  # that are written; each that cannot be read is a line on the console of an emulated guest
SLOW_READS = 50  # of these, where each waits
pytestmark = pytest.mark.timeout(900)

# In the guest: writes the first blocks of the device, or reads blocks and says what each was.
PROGRAM = """
import json, mmap, os, random, socket, sys, time
BLOCK, DEVICE = 4096, "/dev/nbd0"

def content(block):
    rnd = random.Random(block)
    return b"%8d" % block + rnd.randbytes(rnd.randrange(200, 3000)).ljust(BLOCK - 8, b"\\0")

def states():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("/run/zramd/zram0/control.sock")
        sock.sendall(b"GET /block_state HTTP/1.1\\r\\nHost: zramd\\r\\n\\r\\n")
        text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    rows = [line.split() for line in text.splitlines() if line[:1] in " 0123456789"]
    return {int(row[0]): row[2] for row in rows if len(row) == 3}

def write(count):
    fd = os.open(DEVICE, os.O_WRONLY)
    for block in range(count):
        os.pwrite(fd, content(block), block * BLOCK)
    os.fsync(fd)
    return {"written": count}

def read(blocks):
    fd, buffer = os.open(DEVICE, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, BLOCK)
    found = {"right": [], "failed": [], "other": [], "seconds": {}}
    for block in blocks:
        started = time.monotonic()
        try:
            size = os.preadv(fd, [buffer], block * BLOCK)
            kind = "right" if size == BLOCK and buffer[:] == content(block) else "other"
        except OSError as error:
            kind = "failed" if error.errno == 5 else "other"
        found["seconds"][block] = time.monotonic() - started
        found[kind].append(block)
    return found

os.sched_setaffinity(0, {int(os.environ.get("CPU", 0))})
verb, *numbers = sys.argv[1:]
numbers = [int(number) for number in numbers]
if verb == "states":
    print(json.dumps(states()))
elif verb == "write":
    print(json.dumps(write(*numbers)))
elif verb == "read":
    print(json.dumps(read(range(*numbers))))
"""


class Served:
    """A guest with a device whose backing can be made to fail."""

    def __init__(self, guest: Guest, disk: backing.Mapped, server: Local) -> None:
        self.guest, self.disk, self.server = guest, disk, server

    def program(self, words: str) -> Any:
        """Let the guest's program do something; what it says."""
        return json.loads(self.guest.run(f"/usr/bin/python3 /tmp/blocks.py {words}", 300))

    def write(self) -> None:
        assert self.program(f"write {BLOCKS}") == {"written": BLOCKS}

    def read(self, count: int = BLOCKS) -> dict[str, Any]:
        found = self.program(f"read {count}")
        assert found["other"] == []  # whatever happens, never other data
        return dict(found)

    def writeback(self) -> dict[str, Any]:
        return dict(self.server.stats()["writeback"])

    def wait_until(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the section of the statistics is as wanted; what it is then."""
        wait_until(lambda: what(self.writeback()), timeout=180)
        return self.writeback()

    def out(self) -> set[int]:
        """The numbers of the blocks that are out."""
        return {int(block) for block, flags in self.program("states").items() if "w" in flags}


@pytest.fixture(
    scope="module",
    params=[
        kernel.SUITES[0],
        pytest.param(kernel.SUITES[1], marks=pytest.mark.slow),
    ],  # slow: all of it again
)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    folder = ROOT / "build/vm"
    cloud = kernel.prepare(folder, request.param)
    images = image.prepare(folder, cloud, Path(zramd.__file__).parent.parent)
    machine = Machine(cloud, images, 320 * MIB, 2, "tcg")
    return replace(machine, accel=choose_accel(machine, tmp_path_factory.mktemp("accel")))


@pytest.fixture
def served(machine: Machine, tmp_path: Path) -> Iterator[Served]:
    """A server whose blocks go out after ten seconds to a disk that is as it should be."""
    disk = backing.Disk(ROOT / "build/vm", 64 * MIB)
    try:
        with Guest(replace(machine, devices=disk.qemu_options()), tmp_path) as guest:
            guest.wait_for_boot()
            mapped = backing.Mapped(guest)
            settings = {"swap": "local", "reserve": "4M", "writeback_age": "10", "writeback_limit": "off"}
            server = Local(64 * MIB, {**settings, "backing": mapped.device}, "")
            server.attach(guest)
            guest.put("/tmp/blocks.py", PROGRAM.encode())
            yield Served(guest, mapped, server)
            print(server.log())
            assert guest.alarms() == []
    finally:
        disk.remove()


def test_a_disk_that_refuses_writes(served: Served) -> None:
    """Blocks stay in memory, and are read there; it is left alone for a while, and health tells of it."""
    served.disk.fail_writes()
    served.write()
    found = served.wait_until(lambda now: now["bd_write_errors"] >= 8)
    assert (found["out_pages"], found["mode"]) == (0, "paused")
    assert found["reason"]
    assert len(served.read()["right"]) == BLOCKS
    assert "degraded" in served.server.request("GET", "/health")


@pytest.mark.slow  # a minute and a half; tests/integration has read errors without a guest
def test_a_disk_that_cannot_be_read(served: Served) -> None:
    """What is out cannot be read, and the log says which block; what is in memory can."""
    served.write()
    served.wait_until(lambda now: now["out_pages"] > BLOCKS // 2)
    served.disk.fail()
    out = served.out()
    found = served.read()
    assert set(found["failed"]) <= out | served.out()
    assert len(found["failed"]) >= len(out) * 0.9  # the others may be in memory again
    assert len(found["right"]) + len(found["failed"]) == BLOCKS
    assert served.writeback()["bd_read_errors"] > 0
    log = served.server.log()
    why = "it is out, and the backing cannot be read"
    assert any(f"block {block}: {why}" in log for block in found["failed"])
    served.disk.heal()
    assert len(served.read()["right"]) == BLOCKS


@pytest.mark.parametrize(
    "lie",
    [
        # slow: a minute each, for what tests/property/test_backing_damage.py holds without a guest
        pytest.param("drop_writes", id="drops", marks=pytest.mark.slow),
        pytest.param("corrupt_bio_byte 500 w 77 0", id="corrupts", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_lies(served: Served, lie: str) -> None:
    """It says it wrote what it dropped, or wrote another byte: such a block is EIO, never other data."""
    # (Linux 6.1 cannot give back another byte than it wrote.)
    served.disk.lie(lie)
    served.write()
    served.wait_until(lambda now: now["out_pages"] > BLOCKS // 2)
    found = served.read()
    assert found["failed"]
    assert len(found["right"]) + len(found["failed"]) == BLOCKS
    assert served.writeback()["bd_read_errors"] > 0
    assert "the backing does not have it as it was written" in served.server.log()


@pytest.mark.slow  # because the disk is, and a reader of it has to wait for seconds, again and again
def test_a_slow_disk(served: Served) -> None:
    """Only reads of what is out wait for it, and who uses the same connection where nbdkit is old."""
    guest, zramd_in_guest = served.guest, "/usr/bin/python3 -m zramd"
    guest.run(f"{zramd_in_guest} detach zram0")
    guest.run(f"{zramd_in_guest} attach zram0 --device /dev/nbd0 --connections 2 --timeout 300")
    served.write()
    served.wait_until(lambda now: now["out_pages"] > BLOCKS // 2)
    served.disk.delay(100)
    out = served.out()
    found = served.read(SLOW_READS)
    slow = [seconds for seconds in found["seconds"].values() if seconds > 0.1]
    assert len(found["right"]) == SLOW_READS
    assert len(slow) >= len(out & set(range(SLOW_READS))) * 0.9
    # A reader of what is out waits for the disk; another one, of what is in memory, is done long before.
    served.disk.delay(90_000)  # below the two minutes after which a kernel says that somebody hangs
    wanted = max(served.out())
    served.program(f"write {SLOW_READS}")
    # Each of the two processors has a connection of its own.
    guest.run(f"CPU=1 /usr/bin/python3 /tmp/blocks.py read {wanted} {wanted + 1} >/tmp/slow 2>&1 &")
    assert len(served.read(SLOW_READS)["right"]) == SLOW_READS
    assert guest.run("cat /tmp/slow") == ""
    served.disk.heal()  # this ends the wait, too
    wait_until(lambda: guest.run("cat /tmp/slow") != "", timeout=60)
    assert json.loads(guest.run("cat /tmp/slow"))["right"] == [wanted]


# All that swaps is slow: what goes out has to rest first, in a guest that is emulated. What one that swaps to
# itself does without a disk is tried each time, by test_vm_swap.py.
SWAPS = ("--backing", "512M", "--writeback", "--timer", "10")


def swaps(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Let a guest swap, with a pool of half of its memory: every page is as it was, some are on the disk."""
    result = vm_swap(tmp_path, *SWAPS, *arguments)
    assert result["pages_bad"] == 0
    assert held(result, "blocks go out to the disk")
    assert held(result, "no program is killed")
    assert result["pages_verified"] > result["workload_mib"] * 256
    return result


@pytest.mark.slow
def test_a_guest_that_swaps_to_itself(tmp_path: Path) -> None:
    result = swaps(tmp_path, "--attach", "local", "--workload", "104M", "--pace", "3000")
    assert held(result, "the disk is written what the server says")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_guest_that_swaps_more_than_memory_holds(tmp_path: Path) -> None:
    """Four times its memory."""
    result = swaps(tmp_path, "--attach", "local")
    assert held(result, "the disk is written what the server says")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_beside_the_kernels_own(tmp_path: Path) -> None:
    """The same with the kernel's zram and a script that writes back: there is something to compare with."""
    result = swaps(tmp_path, "--attach", "zram")
    assert result["writeback"]["bytes_a_block"] == 4096


@pytest.mark.slow
def test_a_guest_with_a_disk_on_the_host(tmp_path: Path) -> None:
    """The same where zramd serves a guest from outside, its backing a file."""
    swaps(tmp_path, "--attach", "qemu", "--workload", "192M", "--pace", "3000")


@pytest.mark.slow
def test_at_the_limit_with_a_disk(tmp_path: Path) -> None:
    """A machine that swaps to its own zramd, all memory used, with blocks going out: half a minute of it."""
    result = vm_swap(
        tmp_path, "--attach", "local", "--minutes", "0.5", "--backing", "512M", "--set", "writeback_age=10"
    )
    assert held(result, "the guest never hangs")
    assert held(result, "the server survives")
    assert held(result, "blocks go out to the disk")
    assert result["pages_bad"] == 0
