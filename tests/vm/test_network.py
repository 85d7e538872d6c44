"""Guests whose swap is the memory of other hosts, over TLS: restarts, cuts, dead hosts. No page is lost."""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import zramd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm import image, kernel
from vm.guest import Guest, GuestError, Machine, choose_accel
from vm.network import HostHere, HostMachine, MemoryHost, Network, has_root

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "docs/network"
MIB = 1 << 20
WORKLOAD, CONFINED = 40, 20  # MiB that the workload has, and that it may have in memory
SIZE = 96 * MIB  # of each host's device
NEAR, FAR = "delay 100us", "delay 1ms loss 1%"
# Seconds for which requests wait for a server. qemu looks for one after 1, 3, 7, 15, 31 and 47: a delay of 30
# may be over before one is found that came after 16.
PATIENT = 120

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not has_root(), reason="makes a network namespace, which only root can"),
]


@pytest.fixture(scope="module")
def base() -> Iterator[Machine]:
    """The machine that hosts and guests are: Debian 13's kernel, which has netem, WireGuard and md."""
    folder = ROOT / "build/vm"
    cloud = kernel.prepare(folder, "trixie")
    images = image.prepare(folder, cloud, Path(zramd.__file__).parent.parent)
    machine = Machine(cloud, images, 256 * MIB, 1, "tcg")
    with tempfile.TemporaryDirectory(prefix="zramd-vm-") as name:
        yield Machine(cloud, images, machine.memory, machine.cpus, choose_accel(machine, Path(name)))


class Lab:
    """A guest and the hosts that lend it memory."""

    def __init__(self, base: Machine, folder: Path, stack: ExitStack) -> None:
        self.base = base
        self.folder = folder
        self.network = stack.enter_context(Network(folder))
        self.hosts: list[MemoryHost] = []
        self.guest: Guest
        self._stack = stack

    def add_here(self, rate: str = "") -> HostHere:
        """Switch on another host, as near as can be, on a cable that carries so much."""
        host = HostHere(self.network, self.folder, "abc"[len(self.hosts)], SIZE, rate)
        self._stack.callback(host.close)
        self._add(host)
        return host

    def add_machine(self, netem: str) -> HostMachine:
        """Switch on another host, which is a virtual machine, on a network that is as `netem` says."""
        host = HostMachine(self.network, self.folder, "abc"[len(self.hosts)], SIZE, self.base, netem)
        self._stack.callback(host.switch_off)
        self._add(host)
        return host

    def _add(self, host: MemoryHost) -> None:
        self.hosts.append(host)
        host.switch_on()
        print(f"host {host.name} serves", flush=True)

    def boot(self, reconnect_delay: int, pinned: bool = True) -> Guest:
        """Boot the guest, with a disk of each host: /dev/vdb and so on.

        Disks that are not `pinned` take what a host has that was switched off meanwhile.
        """
        words = [word for host in self.hosts for word in host.disk_words(reconnect_delay, pinned)]
        folder = self.folder / "guest"
        folder.mkdir()
        guest = self._stack.enter_context(Guest(self.network.machine(self.base, 256 * MIB, words), folder))
        guest.wait_for_boot()
        print(f"the guest has booted in {guest.booted:.1f} s", flush=True)
        images = guest.machine.images
        for path in (*images.md_modules, *images.dm_modules):
            guest.run(f"grep -q ^{Path(path).stem.replace('-', '_')} /proc/modules || insmod {path}")
        guest.run(
            "sysctl -w vm.page-cluster=0; for q in /sys/block/vd*/queue; do echo 0 >$q/rotational; done"
        )
        for script in SCRIPTS.glob("*.sh"):
            guest.put(f"/run/{script.name}", script.read_bytes())
        self.guest = guest
        return guest

    def start(self) -> None:
        """Start a workload that is larger than the memory that it may have."""
        self.guest.confine(CONFINED * MIB)
        self.guest.start_workload(WORKLOAD, 20)
        self.phase("fill")

    def phase(self, phase: str, timeout: float = 300.0) -> dict[str, Any]:
        """Let the workload do something: no page may be bad."""
        answer = self.guest.phase(phase, timeout)
        print(f"{phase}: {answer}", flush=True)
        assert answer["bad"] == 0
        return answer

    def meanwhile(self, work: Callable[[], object], seconds: int) -> dict[str, Any]:
        """Do something while the workload churns for so many seconds; its answer."""
        failed: list[BaseException] = []

        def run() -> None:
            time.sleep(1)  # the workload has its command by then: before, nobody counts what it waits for
            try:
                work()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            return self.phase(f"churn seconds {seconds}")
        finally:
            thread.join()
            assert not failed, failed

    def end(self) -> None:
        """Every page is what it should be, and the kernel has had nothing to complain of."""
        answer = self.phase("verify")
        assert answer["verified"] == WORKLOAD * 256
        assert self.guest.alarms() == []


@pytest.fixture
def lab(base: Machine, tmp_path: Path) -> Iterator[Lab]:
    with ExitStack() as stack:
        made = Lab(base, tmp_path, stack)
        yield made
        for host in made.hosts:
            print(f"host {host.name}: {host.log()}")


def script(guest: Guest, name: str, *words: str, fails: bool = False, variables: str = "") -> str:
    """Run a script of docs/network in the guest, whose shell would take busybox's programs for Debian's."""
    programs = {program: program for program in ("mkswap", "swapon", "swapoff", "blkdiscard", "blkid")}
    programs |= {verb: f"lvm {verb}" for verb in ("pvcreate", "pvs", "vgcreate", "lvcreate", "vgremove")}
    debian = " ".join(f'{verb}() {{ /usr/sbin/{program} "$@"; }};' for verb, program in programs.items())
    exports = "export MDADM_NO_UDEV=1 DM_DISABLE_UDEV=1 LVM_SYSTEM_DIR=/run/lvm LVM_SUPPRESS_FD_WARNINGS=1"
    exports = f"{exports} {variables}"
    status, output = guest.try_run(f"({exports}; {debian} set -- {' '.join(words)}; . /run/{name})", 300)
    print(f"{name} {' '.join(words)}: {output}", flush=True)
    assert (status != 0) == fails, output
    return output


def swap_on(guest: Guest) -> None:
    """Swap to the guest's first disk."""
    guest.run("/usr/sbin/mkswap /dev/vdb && /usr/sbin/swapon --discard --priority 100 /dev/vdb", 60)


def speeds(guest: Guest, disk: str) -> dict[str, float]:
    """Return how fast 24 MiB that do not compress go to a disk and come back in MiB/s: medians of five."""
    ways = {"write": f"if=/run/data of={disk} oflag=direct", "read": f"if={disk} of=/dev/null iflag=direct"}
    found = {}
    for way, words in ways.items():
        taken = []
        for _ in range(5):
            begin = time.monotonic()
            guest.run(f"dd {words} bs=1M count=24 2>/dev/null", 120)
            taken.append(time.monotonic() - begin)
        found[way] = 24 / statistics.median(taken)
    return found


def test_a_guest_over_tls(lab: Lab) -> None:
    """Its server is replaced, then killed and started again with its state: nobody notices but by a wait."""
    host = lab.add_here()
    swap_on(lab.boot(PATIENT))
    lab.start()
    assert host.stored() > (WORKLOAD - CONFINED) * 256 // 2
    lab.meanwhile(host.restart, 10)
    lab.meanwhile(host.kill_server, 10)
    lab.end()


@pytest.mark.slow
@pytest.mark.parametrize("netem", ["", NEAR, FAR])
def test_a_network_that_is_cut(lab: Lab, netem: str) -> None:
    """A restart, a kill, and 20 seconds in which nothing gets through: the workload waits, and goes on."""
    host = lab.add_machine(netem) if netem else lab.add_here()
    seconds = 40 if netem else 10  # an emulated host takes long to start a server
    swap_on(lab.boot(PATIENT))
    lab.start()
    lab.meanwhile(host.restart, seconds)
    lab.meanwhile(host.kill_server, seconds)
    assert lab.meanwhile(lambda: host.cut(20), 60)["slowest"] > 10
    lab.end()


@pytest.mark.slow
def test_a_host_alone_is_switched_off(lab: Lab) -> None:
    """It comes back empty: what it had is lost. The guest is told so, and never takes other data for it."""
    host = lab.add_here()
    guest = lab.boot(20)
    swap_on(guest)
    lab.start()
    host.switch_off()
    host.switch_on()
    with pytest.raises(GuestError, match="could not be read back"):
        lab.phase("verify")
    assert "I/O error" in guest.run("dmesg")
    assert "is no more" in host.log()  # what the guest has asked for
    assert host.stored() == 0  # nothing was written to it either
    assert guest.alarms() == []


@pytest.mark.parametrize(
    "rounds",
    [
        1,
        pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(6 * 3600)]),
    ],
)
def test_a_mirror_loses_both_halves_one_after_the_other(lab: Lab, rounds: int) -> None:
    """A host is switched off, comes back empty, and is filled again; then the other one is."""
    seconds = 10
    if rounds > 1:  # a dead host is noticed after 7 s then, instead of 13
        lab.network.run("sysctl", "-q", "-w", "net.ipv4.tcp_retries2=3")
        seconds = 3
    first, second = lab.add_here(), lab.add_here()
    guest = lab.boot(2, pinned=False)
    script(guest, "mirror.sh", "make", "/dev/vdb", "/dev/vdb", fails=True)  # which is no mirror
    script(guest, "mirror.sh", "make", "/dev/vdb", "/dev/vdc")
    lab.start()
    halves = [(first, "/dev/vdb"), (second, "/dev/vdc")]
    for number in range(rounds):
        host, disk = halves[number % 2]
        lab.meanwhile(host.switch_off, seconds)
        script(guest, "mirror.sh", "look", fails=True)
        host.switch_on()
        assert host.stored() == 0
        lab.meanwhile(lambda disk=disk: script(guest, "mirror.sh", "back", disk), seconds)
        print(f"round {number + 1}", flush=True)
        script(guest, "mirror.sh", "look")
    halves[rounds % 2][0].switch_off()
    lab.end()
    guest.end_workload()
    said = script(guest, "mirror.sh", "end")
    assert said.count(f"the host of '{halves[rounds % 2][1]}' is gone") == 1
    assert halves[(rounds + 1) % 2][0].stored() == 0


@pytest.mark.slow
def test_a_half_whose_network_failed_gets_what_it_lacks(lab: Lab) -> None:
    """It has its memory still: by the bitmap md knows what was written meanwhile.

    The other one is write-mostly, so it is read from only then.
    """
    first, second = lab.add_here(), lab.add_here()
    guest = lab.boot(2)
    script(guest, "mirror.sh", "make", "/dev/vdb", "/dev/vdc", variables="WRITE_MOSTLY=1")
    assert "[1](W)" in guest.run("cat /proc/mdstat")
    lab.start()
    reads = [guest.run(f"cat /sys/block/{disk}/stat").split()[0] for disk in ("vdb", "vdc")]
    lab.phase("churn seconds 5")
    assert int(guest.run("cat /sys/block/vdb/stat").split()[0]) > int(reads[0])
    assert guest.run("cat /sys/block/vdc/stat").split()[0] == reads[1]
    stored = first.stored()
    assert lab.meanwhile(lambda: first.cut(30), 40)["slowest"] > 10
    script(guest, "mirror.sh", "look", fails=True)
    assert first.stored() > stored // 2  # its memory is there still
    said: list[str] = []
    lab.meanwhile(lambda: said.append(script(guest, "mirror.sh", "back", "/dev/vdb")), 10)
    assert "re-added /dev/vdb" in said[0]
    second.switch_off()
    lab.end()


@pytest.mark.parametrize("way", ["md", pytest.param("lvm", marks=pytest.mark.slow)])
def test_stripes(lab: Lab, way: str) -> None:
    """Three hosts are as large as their sum, and each has its part; how fast they are is printed.

    Their cables are slow, else the emulated guest's one processor would be what limits it.
    """
    hosts = [lab.add_here("100mbit") for _ in range(3)]
    guest = lab.boot(PATIENT)
    guest.run("dd if=/dev/urandom of=/run/data bs=1M count=24 2>/dev/null")
    alone = speeds(guest, "/dev/vdb")
    guest.run("/usr/sbin/blkdiscard /dev/vdb")
    script(guest, "stripe.sh", way, "/dev/vdb", "/dev/vdb", fails=True)
    script(guest, "stripe.sh", way, "/dev/vdb", "/dev/vdc", "/dev/vdd")
    kib = int(guest.run("cat /proc/swaps").splitlines()[1].split()[2])
    assert 0.9 * 3 * SIZE < kib * 1024 <= 3 * SIZE
    lab.start()
    parts = [host.stored() for host in hosts]
    assert min(parts) > max(parts) // 2, parts
    lab.meanwhile(hosts[1].kill_server, 10)
    lab.end()
    guest.end_workload()
    disk = {"md": "/dev/md0", "lvm": "/dev/zramd/swap"}[way]
    guest.run(f"/usr/sbin/swapoff {disk}", 120)
    together = speeds(guest, disk)
    guest.run(f"/usr/sbin/mkswap {disk} && /usr/sbin/swapon {disk}")
    for what, speed in together.items():
        print(f"{what}: {speed:.1f} MiB/s, of one host alone {alone[what]:.1f}", flush=True)
    script(guest, "stripe.sh", "end")
    assert [host.stored() for host in hosts] == [0, 0, 0]


def test_swap_moves_to_another_host(lab: Lab) -> None:
    """While it is in use; the first host gets its memory back, and is switched off then."""
    first, second = lab.add_here(), lab.add_here()
    guest = lab.boot(PATIENT)
    script(guest, "move.sh", "make", "/dev/vdb")
    lab.start()
    stored = first.stored()
    lab.meanwhile(lambda: script(guest, "move.sh", "to", "/dev/vdc"), 20)
    assert first.stored() < stored // 10
    assert second.stored() > stored // 2
    first.switch_off()
    lab.end()
    guest.end_workload()
    script(guest, "move.sh", "end")
    assert second.stored() == 0
