"""zramd-guest on Debian 12 and 13, which swap to the host's zramd: what swap has freed, the host gets back.

One machine of each lives through all of it. Each test needs those before it.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import zramd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm import attach, debian, debian_image, image, kernel
from vm.guest import Guest, Machine, choose_accel

ROOT = Path(__file__).resolve().parents[2]
# slow: two Debians that are booted, and swap until memory has gone to the host and back
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

MIB = 1 << 20
MEMORY_MIB = 256
DISK_MIB = 512
AREAS = [(f"/dev/vdb{number}", 101 - number) for number in range(1, DISK_MIB // 64 + 1)]
WORKLOAD_MIB = 200
BOOT_TIMEOUT = 240.0  # seconds
SLOW = 300.0
SHUTDOWN_TIMEOUT = 180.0  # seconds; systemd itself says so where something hangs
DEAD = 0.05  # of what is stored may be dead, at most
LEFT = 256  # blocks of an area are too few to do anything about
IN_TIME = 300.0  # seconds after the programs ended
REFRESH = "zramd-guest-refresh"
TROUBLE = re.compile(
    r"\[FAILED\]|timed out|ordering cycle|dependency failed|failed with result|sigkill\.$|traceback|"
    r"(?:zramd|swap).*(?:fail|error)|I/O error|out of memory",
    re.IGNORECASE,
)


class Computer(debian.Computer):
    """A machine with zramd on its host, on or off."""

    def __init__(self, machine: Machine, folder: Path, host: attach.QemuWithState) -> None:
        super().__init__(machine, folder, BOOT_TIMEOUT)
        self.host = host

    def trouble(self) -> list[str]:
        return [line for line in self.guest.kernel_log() if TROUBLE.search(line)]

    def turn_off(self) -> None:
        self.guest.run("(sleep 1; systemctl poweroff) &")  # the answer comes before the end
        print(f"poweroff took {self.guest.wait_for_end(SHUTDOWN_TIMEOUT):.1f} s", flush=True)
        assert self.trouble() == []

    def blocks(self) -> tuple[int, int]:
        """How many blocks the host has stored, and of how many swap knows; each area has a head."""
        stats = self.host.stats()
        used = sum(used for _, _, used in areas(self.guest)) // 4 + len(AREAS)
        return stats["pages_stored"] - stats["same_pages"], used

    def refreshed(self) -> None:
        """The timer does it, and nobody else."""
        began = time.monotonic()
        stored, used = self.blocks()
        first = f"{stored - used} of {stored}"
        most = max(DEAD * stored, LEFT * len(AREAS))
        while stored - used > most:
            assert time.monotonic() - began < IN_TIME, journal(self.guest)
            time.sleep(5)
            stored, used = self.blocks()
        seconds = time.monotonic() - began
        print(f"dead blocks: {first}, after {seconds:.0f} s {stored - used} of {stored}", flush=True)


@pytest.fixture(scope="module", params=kernel.SUITES)
def computer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    """A machine that is off, with the package on a disk of its own; another disk is for files."""
    folder = tmp_path_factory.mktemp("guest")
    subprocess.run([ROOT / "scripts/package"], check=True)
    (package,) = (ROOT / "build").glob("zramd-guest_*.deb")
    cloud = kernel.prepare(ROOT / "build/vm", request.param)
    small = image.prepare(ROOT / "build/vm", cloud, Path(zramd.__file__).parent.parent)
    accel = choose_accel(Machine(cloud, small, 256 * MIB, 2, "tcg"), folder)
    images = debian_image.prepare(ROOT / "build/vm", request.param, cloud, small)
    host = attach.QemuWithState(DISK_MIB * MIB, {}, folder, Path(f"/dev/shm/zramd-test-{folder.name}.state"))
    try:
        base = Machine(cloud, images, MEMORY_MIB * MIB, 2, accel, host.qemu_options())
        machine = debian.machine(base, folder, {"zramd-guest.deb": package})
        others = [*disk(folder, "files", "serial=zramd-files"), *disk(folder, "plain", "discard=off")]
        image.output("mke2fs", "-q", "-t", "ext4", str(folder / "files.img"))
        yield Computer(replace(machine, devices=[*machine.devices, *others]), folder, host)
    finally:
        host.stop()


def disk(folder: Path, name: str, options: str) -> list[str]:
    """qemu's words for an empty disk of 64 MiB."""
    path = folder / f"{name}.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    drive = f"driver=raw,node-name={name},discard=unmap,file.driver=file,file.filename={path}"
    return ["-blockdev", drive, "-device", f"virtio-blk-pci,drive={name},{options}"]


def areas(guest: Guest) -> list[tuple[str, int, int]]:
    """The swap areas on zramd's disk as the kernel fills them: path, priority, KiB in use."""
    rows = [line.split() for line in guest.run("cat /proc/swaps").splitlines()[1:]]
    found = [(row[0], int(row[4]), int(row[3])) for row in rows if row[0].startswith("/dev/vdb")]
    return sorted(found, key=lambda area: -area[1])


def journal(guest: Guest, unit: str = REFRESH) -> str:
    """All that a unit has said, and what the service manager says of it."""
    return guest.run(f"journalctl -b -o cat --no-pager -u {unit}", SLOW)


def active(guest: Guest) -> None:
    """Swap is on, as it should be."""
    assert [(path, priority) for path, priority, _ in areas(guest)] == AREAS
    assert guest.run("cat /sys/block/vdb/queue/rotational /proc/sys/vm/page-cluster").split() == ["0", "0"]
    assert guest.run(f"systemctl is-active zramd-guest {REFRESH}.timer").split() == ["active"] * 2


def swapped_out(guest: Guest, seed: int) -> None:
    """A program that lives on has its pages all over the areas; much beside them is free."""
    guest.start_workload(WORKLOAD_MIB, seed)
    guest.phase("fill", SLOW)
    for _ in range(2):
        guest.phase("pageout", SLOW)
        assert guest.phase("churn pages 8000", SLOW)["bad"] == 0
    guest.phase("pageout", SLOW)
    assert sum(used for _, _, used in areas(guest)) > WORKLOAD_MIB << 9


def verified(guest: Guest) -> None:
    found = guest.phase("verify", SLOW)
    assert found["bad"] == 0
    assert found["verified"] > 0


def until(guest: Guest, condition: str, seconds: float = SLOW) -> None:
    """Wait in the guest, which sees what lasts for a moment only."""
    guest.run(f"until {condition}; do sleep 0.02; done", seconds)


def begun(guest: Guest) -> None:
    """A refresh is in the middle of a step, which a process of its own does."""
    processes = f"cat /sys/fs/cgroup/system.slice/{REFRESH}.service/cgroup.procs 2>/dev/null"
    start = f"systemctl start --no-block {REFRESH}"
    guest.run(f'until [ "$({processes} | wc -l)" -ge 2 ]; do {start}; sleep 0.1; done', SLOW)


def test_installed(computer: Computer) -> None:
    with computer.on() as guest:
        guest.run("tar -xf /dev/vdc -C /", SLOW)
        guest.run("mkdir /srv/files")
        guest.run("echo '/dev/vdd /srv/files ext4 noauto 0 0' >>/etc/fstab")
        said = guest.run("dpkg -i /payload/zramd-guest.deb 2>&1 >/dev/null", SLOW)
        assert re.fullmatch("Created symlink .*/swap.target.wants/zramd-guest.service.*", said)
        active(guest)
        assert "/dev/vdd holds something (ext4) and is not for swap" in journal(guest, "zramd-guest")
        for unit, most in (("zramd-guest.service", 40), (f"{REFRESH}.service", 40)):
            exposure = guest.run(f"systemd-analyze security --no-pager --threshold={most} {unit}", SLOW)
            print(exposure.splitlines()[-1])
        assert guest.run(f"systemd-analyze verify --man=no zramd-guest.service {REFRESH}.timer", SLOW) == ""
        guest.run("mount /srv/files")
        for disk, why in (
            ("/dev/vdd", "is mounted on '/srv/files'"),
            ("/dev/vde", "takes no discards: give the disk discard=unmap"),
            ("/dev/vdz", "there is no disk '/dev/vdz'"),
        ):
            status, said = guest.try_run(f"zramd-guest setup --disk {disk} 2>&1", SLOW)
            assert (status, why in said) == (1, True), said
        computer.turn_off()


def test_what_programs_leave_behind_comes_back_by_itself(computer: Computer) -> None:
    with computer.on() as guest:
        active(guest)
        quiet(guest)
        swapped_out(guest, 1)
        guest.phase("free 85", SLOW)
        stored, used = computer.blocks()
        assert stored - used > 0.3 * stored
        computer.refreshed()
        verified(guest)
        guest.end_workload()
        computer.refreshed()
        active(guest)
        assert "pages became free" in journal(guest)
        print(journal(guest), guest.run("zramd-guest status", SLOW), sep="\n")
        computer.turn_off()


def quiet(guest: Guest) -> None:
    """What has nothing to do says nothing, nor does the service manager."""
    since = guest.run("date +%s").strip()
    last = f"systemctl show -P ExecMainStartTimestampMonotonic {REFRESH}"
    for _ in range(2):
        until(guest, f'test "$({last})" -gt {int(guest.run(last))}')
    words = f"journalctl -b -o cat --no-pager --since=@{since} -g zramd-guest"
    assert guest.try_run(words, SLOW)[1].replace("-- No entries --", "").strip() == ""


def test_interrupted(computer: Computer) -> None:
    """Swap is on again, and no page is lost."""
    with computer.on() as guest:
        guest.run(f"systemctl stop {REFRESH}.timer", SLOW)
        swapped_out(guest, 2)
        guest.phase("free 40", SLOW)
        killed(guest)
        server_killed(computer)
        restarted(guest)
        pressed(guest)
        # Power fails in the middle.
        guest.phase("pageout", SLOW)
        guest.phase("free 30", SLOW)
        begun(guest)
    with computer.on() as guest:
        active(guest)
        assert computer.trouble() == []
        computer.refreshed()
        computer.turn_off()


def killed(guest: Guest) -> None:
    """The whole service at once; then its first process alone, whose child ends what it has begun."""
    for whom in ("", "--kill-whom=main"):
        begun(guest)
        guest.run(f"systemctl kill {whom} -s KILL {REFRESH}")
        until(guest, f'test "$(systemctl is-active {REFRESH})" = failed')
        guest.run(f"systemctl reset-failed {REFRESH}; systemctl start {REFRESH}", SLOW)
        assert [(path, priority) for path, priority, _ in areas(guest)] == AREAS
        verified(guest)
        guest.phase("pageout", SLOW)
        guest.phase("free 20", SLOW)


def server_killed(computer: Computer) -> None:
    guest = computer.guest
    begun(guest)
    computer.host.kill()
    until(guest, f'test "$(systemctl is-active {REFRESH})" = inactive')
    assert [(path, priority) for path, priority, _ in areas(guest)] == AREAS
    verified(guest)


def restarted(guest: Guest) -> None:
    """All comes back; also while a refresh is under way."""
    guest.phase("free 40", SLOW)
    guest.phase("pageout", SLOW)
    guest.run("systemctl restart zramd-guest", SLOW)
    active(guest)
    verified(guest)
    guest.phase("pageout", SLOW)
    guest.run(f"systemctl start --no-block {REFRESH}; systemctl restart zramd-guest", SLOW)
    active(guest)
    verified(guest)
    guest.run(f"systemctl stop {REFRESH}.timer", SLOW)


def pressed(guest: Guest) -> None:
    """Programs take all memory while a refresh runs: the workload and the areas stay."""
    guest.phase("fill", SLOW)
    guest.phase("pageout", SLOW)
    guest.phase("free 40", SLOW)
    begun(guest)
    guest.phase("fill", SLOW)
    guest.phase("churn pages 8000", SLOW)
    until(guest, f'test "$(systemctl is-active {REFRESH})" != activating')
    print(journal(guest).splitlines()[-3:])
    assert [(path, priority) for path, priority, _ in areas(guest)] == AREAS
    verified(guest)
    assert "oom_kill 0" in guest.run("cat /proc/vmstat")


@pytest.mark.parametrize("priority", [5, 200])
def test_beside_other_swap(computer: Computer, priority: int) -> None:
    with computer.on() as guest:
        guest.run(
            "dd if=/dev/zero of=/swap bs=1M count=64 status=none; chmod 600 /swap; mkswap -q /swap", SLOW
        )
        guest.run(f"swapon -p {priority} /swap")
        swapped_out(guest, priority)
        guest.phase("free 85", SLOW)
        computer.refreshed()
        active(guest)
        verified(guest)
        guest.end_workload()
        computer.turn_off()


def test_removed(computer: Computer) -> None:
    """Refused while memory cannot hold what is out; then nothing is left."""
    with computer.on() as guest:
        swapped_out(guest, 4)
        guest.phase("churn pages 20000", SLOW)
        status, said = guest.try_run("dpkg --remove zramd-guest 2>&1", SLOW)
        assert status == 1, said
        assert re.search(
            r"zramd-guest: \d+ MiB are swapped out to /dev/vdb and only \d+ MiB of memory are", said
        )
        active(guest)
        guest.phase("free 70", SLOW)
        guest.run("dpkg --purge zramd-guest", SLOW)
        assert areas(guest) == []
        verified(guest)
        names = "-name '*zramd-guest*' -not -path '/var/log/*' -not -path '/payload/*'"
        assert guest.run(f"find / -xdev {names}; ls -d /run/zramd-guest 2>&1; true", SLOW).splitlines() == [
            "ls: cannot access '/run/zramd-guest': No such file or directory"
        ]
        assert guest.run("systemctl --failed -q; systemctl list-units --plain -q 'zramd*'").strip() == ""
