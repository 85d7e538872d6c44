"""Debian 12 and 13 with systemd, as administrators have them: the wheel, a configuration, `enable --now`.

One machine of each lives through all of it, and is booted four times. Each test needs those before it.
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import zramd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm import debian, debian_image, image, kernel, probe
from vm.guest import Guest, Machine, choose_accel

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]

MIB = 1 << 20
MEMORY_MIB = 256
WORKLOAD_MIB = 130  # with the system's own it does not fit
BOOT_TIMEOUT = 240.0  # seconds; 10 to 15 on an idle machine, more on one that emulates two others
SLOW = 300.0
SHUTDOWN_TIMEOUT = 60.0  # seconds; systemd gives up on what hangs after 90
SETUP = """\
set -e
tar -xf /dev/vdb -C /
/opt/zramd/bin/pip install --no-deps --no-index --quiet /payload/*.whl
ln -s /opt/zramd/bin/zramd /usr/local/bin/
printf '[zram0]\\nzram-size = ram * 2\\n' >/etc/zramd.conf
echo vm.page-cluster=0 >/etc/sysctl.d/zramd.conf
sysctl --quiet --system
[ -e /usr/lib/systemd/system/tmp.mount ] || cp /usr/share/systemd/tmp.mount /etc/systemd/system/
systemctl enable --quiet tmp.mount"""
# What systemd says when units hang, fail, or wait for each other.
TROUBLE = re.compile(
    r"\[FAILED\]|timed out|ordering cycle|dependency failed|failed with result|sigkill\.$", re.IGNORECASE
)
OURS = re.compile(r"zramd|nbd|swap", re.IGNORECASE)
AGAIN = "connected to zram0 again"
NO_SWAP = "Filename				Type		Size		Used		Priority"


class Debian(debian.Computer):
    """The machine with its disk, on or off; `guest` is it while it is on."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        super().__init__(machine, folder, BOOT_TIMEOUT)

    def log(self) -> list[str]:
        """The console: all that systemd and services say, to the very end."""
        return [line for line in self.guest.kernel_log() if line.strip()]

    def trouble(self) -> list[str]:
        return [
            line
            for line in self.log()
            if TROUBLE.search(line) or (OURS.search(line) and re.search("fail|error", line, re.IGNORECASE))
        ]

    def turn_off(self, how: str) -> None:
        """Power off or reboot; nothing may hang or fail."""
        end_system(self.guest, how)
        seconds = self.guest.wait_for_end(SHUTDOWN_TIMEOUT)
        print(f"{how} took {seconds:.1f} s")
        assert self.trouble() == []
        assert any("All swaps deactivated" in line for line in self.log())

    def order(self, *sentences: str) -> None:
        """The console has the sentences in this order; of each the last occurrence counts."""
        log = self.log()
        places = []
        for sentence in sentences:
            found = [number for number, line in enumerate(log) if sentence in line]
            assert found, f"nobody says '{sentence}'"
            places.append(found[-1])
        assert places == sorted(places), [log[place] for place in places]


def with_the_wheel(suite: str, folder: Path, devices: Sequence[str] = (), mib: int = MEMORY_MIB) -> Debian:
    """A machine that is off, with zramd's wheel on its second disk, and `mib` of memory.

    `devices` are further options of qemu.
    """
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True,
    )
    wheel = debian.wheel(folder)
    cloud = kernel.prepare(ROOT / "build/vm", suite)
    small = image.prepare(ROOT / "build/vm", cloud, Path(zramd.__file__).parent.parent)
    accel = choose_accel(Machine(cloud, small, 256 * MIB, 2, "tcg"), folder)
    images = debian_image.prepare(ROOT / "build/vm", suite, cloud, small)
    machine = debian.machine(Machine(cloud, images, mib * MIB, 2, accel), folder, {wheel.name: wheel})
    return Debian(replace(machine, devices=[*machine.devices, *devices]), folder)


@pytest.fixture(scope="module", params=kernel.SUITES)
def computer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Debian:
    return with_the_wheel(request.param, tmp_path_factory.mktemp("debian"))


def swap(guest: Guest) -> dict[str, int]:
    """What is swapped to: MiB in use, by device, of all of its areas."""
    found: dict[str, int] = {}
    for line in guest.run("cat /proc/swaps").splitlines()[1:]:
        path, _, _, used, _ = line.split()
        device = re.sub(r"p[0-9]+$", "", path)
        found[device] = found.get(device, 0) + int(used)
    return {device: used >> 10 for device, used in found.items()}


def wait_for(guest: Guest, command: str, wanted: str, seconds: float = SLOW) -> None:
    end = time.monotonic() + seconds * guest.machine.patience
    while (found := guest.try_run(command)[1].strip()) != wanted:
        assert time.monotonic() < end, f"'{command}' says '{found}', never '{wanted}'"
        time.sleep(0.5)


def test_from_nothing_to_a_reboot(computer: Debian) -> None:
    with computer.on() as guest:
        for line in SETUP.splitlines()[1:]:
            guest.run(line, SLOW)
        steps = (install, enable, pressure, stop_that_cannot_be, restart, stop_and_start, broken_off)
        for step in steps:
            started = time.monotonic()
            step(guest)
            print(f"{step.__name__} took {time.monotonic() - started:.1f} s", flush=True)
        computer.guest.run("systemctl start zramd@zram0 && systemctl start zramd-attach@zram0", SLOW)
        # Two steps mean trouble for the attachment, and take the server from an attached device, of which the
        # kernel says what it thinks (EPIPE, ESHUTDOWN). That no page was lost is verified in each step.
        assert [
            line for line in computer.log() if TROUBLE.search(line) and "zramd-attach@zram0" not in line
        ] == []
        swapped_out(guest, 2)
        mark = len(computer.log())
        end_system(computer.guest, "reboot")
        seconds = guest.wait_for_end(SHUTDOWN_TIMEOUT)
        print(f"reboot took {seconds:.1f} s")
        end = computer.log()[mark:]
        assert [line for line in end if TROUBLE.search(line)] == []


def install(guest: Guest) -> None:
    said = guest.run("zramd install-units", SLOW)
    assert "installed  /usr/local/lib/systemd/system/zramd@.service" in said
    assert "kept       /etc/zramd.conf" in said
    units = (
        "zramd@zram0.service zramd-attach@zram0.service zramd-refresh.service zramd-refresh.timer zramd.slice"
    )
    assert guest.run(f"systemd-analyze verify --man=no {units}", SLOW) == ""
    for unit, most in (("zramd@zram0", 10), ("zramd-attach@zram0", 40), ("zramd-refresh", 40)):
        exposure = guest.run(f"systemd-analyze security --no-pager --threshold={most} {unit}", SLOW)
        print(exposure.splitlines()[-1])


def enable(guest: Guest) -> None:
    assert swap(guest) == {}
    guest.run("systemctl enable --now zramd@zram0", SLOW)
    guest.run("systemctl start zramd-attach@zram0", SLOW)  # waits for what is under way
    active(guest)


def active(guest: Guest) -> None:
    """Swap is on, by zramd, as it should be."""
    assert (
        guest.run("systemctl is-active zramd@zram0 zramd-attach@zram0 zramd-refresh.timer").split()
        == ["active"] * 3
    )
    rows = [line.split() for line in guest.run("cat /proc/swaps").splitlines()[1:]]
    memory = int(guest.run("grep MemTotal /proc/meminfo").split()[1]) >> 10
    count = memory * 2 // 64  # one area for each 64 MiB, each of whole clusters
    assert {row[0]: row[4] for row in rows} == {
        f"/dev/nbd0p{number}": str(101 - number) for number in range(1, count + 1)
    }
    assert memory * 2 - 3 * count < sum(int(row[2]) >> 10 for row in rows) <= memory * 2
    units = " ".join(f"dev-nbd0p{number}.swap" for number in range(1, count + 1))
    assert guest.run(f"systemctl is-active {units}").split() == ["active"] * count
    columns, row = guest.run("zramd", SLOW).splitlines()
    shown = dict(zip(columns.split(), row.split(), strict=True))  # with swap on it, no cell is empty
    assert [shown[name] for name in ("NAME", "ALGORITHM", "MOUNTPOINT")] == ["zram0", "lz4", "[SWAP]"]
    assert int(guest.run("cat /proc/sys/vm/min_free_kbytes")) >> 10 == memory * 3 // 100
    assert guest.run("cat /sys/fs/cgroup/zramd.slice/memory.swap.max").strip() == "0"
    for pid in ("/run/zramd/zram0/pid", "/run/zramd/zram0.attached"):
        assert guest.run(f"cat /proc/$(cut -d' ' -f1 {pid})/oom_score_adj").strip() == "-1000"


def end_system(guest: Guest, how: str) -> None:
    """Ask for poweroff or reboot: a second later, as the machine may be off before its shell has answered."""
    guest.run(f"(sleep 1; systemctl {how}) >/dev/null &")


def swapped_out(guest: Guest, seed: int) -> None:
    """More memory is written to than there is."""
    guest.start_workload(WORKLOAD_MIB, seed)
    assert guest.phase("fill", SLOW)["written"] == WORKLOAD_MIB * 256
    assert swap(guest)["/dev/nbd0"] > 10


def verified(guest: Guest, phase: str = "verify") -> None:
    found = guest.phase(phase, 3 * SLOW)  # all pages of a workload, each of which takes milliseconds
    assert found["bad"] == 0
    assert found["verified"] > 0


def churned(guest: Guest) -> None:
    """Random pages are read back, verified, and written again: a part of all, for each takes milliseconds."""
    before = int(guest.run("grep -w pswpin /proc/vmstat").split()[1])
    verified(guest, "churn pages 6000")
    assert int(guest.run("grep -w pswpin /proc/vmstat").split()[1]) - before > 200


def pressure(guest: Guest) -> None:
    """A workload that does not fit is swapped out and in, page by page as it was written."""
    swapped_out(guest, 1)
    churned(guest)
    stored = guest.run("zramd stats zram0 --json", SLOW)
    assert int(re.findall(r'"orig_data_size": ([0-9]+)', stored)[0]) > 10 * MIB
    wait_for(
        guest,
        "systemctl show -P StatusText zramd@zram0 | sed 's/^[1-9][0-9]* MiB stored in .*/stored/'",
        "stored",
        60,
    )


def stop_that_cannot_be(guest: Guest) -> None:
    """What is out does not fit in memory: a stop waits, says for what, and loses nothing."""
    guest.phase("pageout", SLOW)
    guest.run("systemctl stop --no-block zramd@zram0")
    told = "stopping as soon as 'zramd detach --swapoff zram0' has run"
    wait_for(guest, "systemctl show -P StatusText zramd@zram0", told)
    assert guest.run("systemctl show -P ActiveState zramd@zram0").strip() == "deactivating"
    assert "of memory are available: end programs first" in guest.run(
        "journalctl -u zramd-attach@zram0 -o cat", SLOW
    )
    assert guest.phase("free 80", SLOW)["freed"] > 0
    guest.run("zramd detach --swapoff zram0", SLOW)
    wait_for(guest, "systemctl show -P ActiveState zramd@zram0", "inactive")
    verified(guest)
    guest.run("systemctl start zramd@zram0 && systemctl start zramd-attach@zram0", SLOW)
    active(guest)


def restart(guest: Guest) -> None:
    """What is out comes back first; then it is as before."""
    guest.phase("pageout", SLOW)
    assert swap(guest)["/dev/nbd0"] > 10
    before = guest.run("cat /run/zramd/zram0/pid")
    guest.run("systemctl restart zramd@zram0", SLOW)
    guest.run("systemctl start zramd-attach@zram0", SLOW)
    assert guest.run("cat /run/zramd/zram0/pid") != before
    active(guest)
    verified(guest)


def stop_and_start(guest: Guest) -> None:
    guest.phase("pageout", SLOW)
    guest.run("systemctl stop zramd@zram0", SLOW)
    off(guest)
    verified(guest)
    guest.end_workload()
    assert guest.run("zramd remove-units 2>&1; true", SLOW).startswith(
        "zramd: zramd@zram0.service is enabled or active: 'systemctl disable --now zramd@zram0.service' first"
    )
    guest.run("systemctl start zramd@zram0 && systemctl start zramd-attach@zram0", SLOW)
    active(guest)


def off(guest: Guest) -> None:
    """Nothing is left."""
    assert guest.run("cat /proc/swaps") == NO_SWAP
    units = "zramd@zram0 zramd-attach@zram0"
    assert guest.try_run(f"systemctl is-active {units}")[1].split() == ["inactive"] * 2
    wait_for(guest, "pgrep 'zramd|nbdkit'", "")  # each minute there may be a refresh
    for look in ("ls /run/zramd", "ls /sys/block/nbd0/pid", "systemctl --failed -q"):
        assert guest.run(f"{look} 2>/dev/null; true") == "", look


def broken_off(guest: Guest) -> None:
    """Stopped while it starts, at any moment, it leaves nothing behind."""
    for seconds in (0.5, 3.0, 5.0):  # a server starts in 2 to 4, its device in another 2 or 3
        guest.run("systemctl stop zramd@zram0", SLOW)
        guest.run(
            f"systemctl start --no-block zramd@zram0; sleep {seconds}; systemctl stop zramd@zram0",
            SLOW,
        )
        # An attachment that was broken off because its server went may be called failed; no more is left.
        guest.try_run("systemctl reset-failed zramd-attach@zram0")
        off(guest)


def test_active_again(computer: Debian) -> None:
    """After the reboot, without a hand; off with pages swapped out, in an order that cannot lose them."""
    with computer.on() as guest:
        active(guest)
        assert computer.trouble() == []
        swapped_out(guest, 3)
        churned(guest)
        assert "tmpfs" in guest.run("findmnt /tmp")
        computer.turn_off("poweroff")
        computer.order(
            "Stopped target sysinit.target",
            "Unmounted tmp.mount",
            "Stopped target swap.target",
            "Deactivated swap dev-nbd0p1.swap",
            "Stopped zramd-attach@zram0.service",
            "Stopped zramd@zram0.service",
            "Reached target shutdown.target",
        )


def test_kept(computer: Debian) -> None:
    """With state=systemd the server is restarted and killed, and what is attached goes on with its data."""
    with computer.on() as guest:
        guest.run("systemctl stop zramd@zram0", SLOW)
        elsewhere(guest)
        guest.run("printf 'state = systemd\\nattach = no\\n' >>/etc/zramd.conf")
        guest.run("systemctl start zramd@zram0", SLOW)
        device = guest.run("zramd attach zram0", SLOW).strip()
        guest.run("head -c 16M /dev/urandom >/run/data")
        guest.run(f"dd if=/run/data of={device} bs=64k oflag=direct status=none", SLOW)
        for how in ("systemctl restart zramd@zram0", "kill -9 $(cat /run/zramd/zram0/pid)") * 2:
            restarted(guest, how)
            guest.run(f"dd if={device} bs=64k count=256 iflag=direct status=none | cmp - /run/data", SLOW)
            stats = guest.run("zramd stats zram0 --json", SLOW)
            assert int(re.findall(r'"recovered_blocks": ([0-9]+)', stats)[0]) == 4096, how
        under_io(guest, device)
        guest.run("zramd detach zram0", SLOW)
        guest.run("rm /run/data; sed -i '/^state\\|^attach/d' /etc/zramd.conf")
        guest.run("systemctl restart zramd@zram0", SLOW)
        guest.run("systemctl start zramd-attach@zram0", SLOW)
        active(guest)
        assert int(re.findall(r'"orig_data_size": ([0-9]+)', guest.run("zramd stats zram0 --json"))[0]) < MIB
        # What the test did: killed, and stopped while it was about to attach.
        meant = ("zram0.service: Failed with result 'signal'", "zramd@zram1", "zramd-attach@zram1")
        trouble = [line for line in computer.log() if TROUBLE.search(line)]
        assert [line for line in trouble if not any(words in line for words in meant)] == []
        end_system(guest, "poweroff")
        print(f"poweroff took {guest.wait_for_end(SHUTDOWN_TIMEOUT):.1f} s")


def elsewhere(guest: Guest) -> None:
    """What zramd.conf has outside the sandbox: refused, and with the documented drop-ins written and kept."""
    folder, unit = "/var/lib/prometheus/node-exporter", "zramd@zram1"
    paths = {"metrics_file": f"{folder}/zram1.prom", "state": "/srv/ram/zram1.state"}
    drop_ins = f"/etc/systemd/system/{unit}.service.d"
    guest.run(f"mkdir -p {folder} {drop_ins} /etc/zramd.conf.d /srv/ram; chown 65534:65534 {folder}")
    guest.run("mount -t tmpfs -o mode=755 none /srv/ram")
    for key, path in paths.items():
        described = f"[zram1]\\nzram-size = 16\\nattach = no\\n{key} = {path}\\n"
        guest.run(f"printf '{described}' >/etc/zramd.conf.d/{key}.conf")
        status, _ = guest.try_run(f"systemctl start {unit}", SLOW)
        guest.run(f"systemctl stop {unit}; systemctl reset-failed {unit}; true", SLOW)
        said = guest.run(f"journalctl -b -u {unit} -o cat", SLOW)
        assert status == 1, said
        assert re.search(f"{path}'.*: docs/systemd.md, 'Paths'", said), said
        lines = shlex.quote(documented_drop_in(key).replace("\n", "\\n"))  # a command is one line
        guest.run(f"printf %b {lines} >{drop_ins}/{key}.conf")
        guest.run("systemctl daemon-reload", SLOW)
    guest.run(f"systemctl start {unit}", SLOW)
    device = guest.run("zramd attach zram1", SLOW).strip()
    guest.run(f"head -c 1M /dev/urandom >/run/data && dd if=/run/data of={device} oflag=direct bs=64k")
    restarted(guest, f"systemctl restart {unit}", "zram1")
    guest.run(f"dd if={device} bs=64k count=16 iflag=direct status=none | cmp - /run/data", SLOW)
    wait_for(guest, f"grep -c '^zramd_orig_data_bytes.* 1048576' {paths['metrics_file']}", "1", 60)
    guest.run("zramd detach zram1", SLOW)
    guest.run(f"systemctl stop {unit}", SLOW)
    assert guest.run(f"ls {' '.join(paths.values())} 2>/dev/null; true").split() == [paths["state"]]
    guest.run(f"umount /srv/ram; rm -r {drop_ins} /etc/zramd.conf.d /run/data {folder} /srv/ram")
    guest.run("systemctl daemon-reload", SLOW)


def documented_drop_in(name: str, document: str = "systemd") -> str:
    """What a document has an administrator write."""
    text = (ROOT / f"docs/{document}.md").read_text()
    found = re.search(rf"<!-- drop-in: {name} -->\n((?:    .*\n)+)", text)
    assert found
    return found[1]


def restarted(guest: Guest, how: str, name: str = "zram0", seconds: float = 60) -> None:
    """End the server, and return when the next one is active."""
    server = f"systemctl show -P MainPID zramd@{name}"
    before = guest.run(server).strip()
    guest.run(how, SLOW)
    wait_for(guest, f'test "$({server})" != {before} && systemctl is-active zramd@{name}', "active", seconds)


def under_io(guest: Guest, device: str) -> None:
    """Restarted and killed while eight threads write and read: nothing fails, nothing is lost."""
    for how in ("systemctl restart zramd@zram0", "kill -9 $(cat /run/zramd/zram0/pid)"):
        known = len(again(guest))
        probe.start(guest, "zram0", device)
        time.sleep(1)
        for number in range(5):
            restarted(guest, how)
            # Where the machine is so busy that the kernel gives up waiting, the keeper connects more often.
            wait_for(guest, f"[ $(dmesg | grep -c '{AGAIN}') -gt {known + number} ] && echo yes", "yes", 60)
            time.sleep(2)
        found = probe.stop(guest, "zram0")
        assert found["bad"] == []
        assert found["done"] > 200
        pauses = probe.pauses(again(guest)[known:], "zram0", found)
        assert len(pauses) >= 5
        print(f"{how}: connected again after {[after for after, _ in pauses]} s")
        print(f"{how}: the slowest request took {[took for _, took in pauses]} s", flush=True)


def again(guest: Guest) -> list[str]:
    """What the keeper said when it had connected the kernel to a new server."""
    return guest.try_run(f"dmesg | grep '{AGAIN}'")[1].splitlines()


def test_removed(computer: Debian) -> None:
    with computer.on() as guest:
        active(guest)
        guest.run("systemctl disable --now zramd@zram0", SLOW)
        said = guest.run("zramd remove-units", SLOW)
        assert said.count("removed  /usr/local/lib/systemd/system/zramd") == 6
        assert "kept     /etc/zramd.conf: it is yours" in said
        off(guest)
        names = "-name 'zramd*.service*' -o -name 'zramd*.timer*' -o -name 'zramd*.slice*'"
        assert guest.run(f"find / -xdev -path /opt/zramd -prune -o \\( {names} \\) -print").strip() == ""
        computer.turn_off("poweroff")
