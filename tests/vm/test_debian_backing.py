"""A service with a disk for what leaves memory, on Debian 12 and 13 with systemd.

The disk is there, comes late, or never; and it must not go before the service has ended. One machine of each
lives through all of it, and is booted four times. Each test needs those before it.
"""

import json
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from support.run import PATIENCE
from test_debian import (
    SETUP,
    SLOW,
    TROUBLE,
    Debian,
    end_system,
    restarted,
    swap,
    swapped_out,
    verified,
    with_the_wheel,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm import backing, kernel
from vm.guest import Guest

from zramd.launch import backingunit

ROOT = Path(__file__).resolve().parents[2]
# slow: two Debians with systemd, each booted four times
pytestmark = [pytest.mark.timeout(1800 * PATIENCE), pytest.mark.slow]

MIB = 1 << 20
DISK = "/dev/disk/by-id/virtio-out"
KEPT_DISK = "/dev/disk/by-id/virtio-kept"
LATE_DISK = "/dev/mapper/late"
LATE = 10  # seconds after which that comes
BOOT_WAITS = 15  # seconds, instead of systemd's 90, for a disk that never comes
CONFIGURATION = f"""\
[zram0]
zram-size = ram * 2
backing = {DISK}
writeback_age = 10
[zram1]
zram-size = 64
attach = no
state = systemd
backing = {KEPT_DISK}
writeback_age = 10
"""


@pytest.fixture(scope="module", params=kernel.SUITES)
def computer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    folder = tmp_path_factory.mktemp("debian")
    disks = [backing.Disk(folder, 64 * MIB, name=name) for name in ("out", "kept")]
    yield with_the_wheel(request.param, folder, [word for disk in disks for word in disk.qemu_options()])
    for disk in disks:
        disk.remove()


def write(guest: Guest, path: str, text: str) -> None:
    words = shlex.quote(text.replace("\\", "\\\\").replace("\n", "\\n"))  # a command is one line
    guest.run(f"mkdir -p {Path(path).parent} && printf %b {words} >{path}")


def late_unit() -> str:
    """What makes a disk at each boot, as docs/backing.md has it, but slowly, and without encryption."""
    found = re.search(r"<!-- unit: disk -->\n((?:    .*\n)+)", (ROOT / "docs/backing.md").read_text())
    assert found
    make = f"ExecStartPre=sleep {LATE}\nExecStart=dmsetup create late --table '0 131072 linear {DISK} 0'"
    unit, count = re.subn(r"ExecStart=cryptsetup open (.*\\\n)*.*", make, dedent(found[1]))
    assert count == 1
    for documented, instead in (
        ("cryptsetup close swap0", "dmsetup remove late"),
        ("mapper-swap0", "mapper-late"),
        ("mapper/swap0", "mapper/late"),
        ("dev-sdb1", backingunit.unit_name(DISK)),
    ):
        assert documented in unit
        unit = unit.replace(documented, instead)
    return unit


def status(guest: Guest, name: str) -> str:
    """What an administrator is shown of a service, on one line."""
    return " ".join(guest.try_run(f"systemctl status --no-pager --full zramd@{name}", SLOW)[1].split())


def out(guest: Guest, name: str) -> int:
    """How many blocks are out."""
    stats = guest.run(f"guest_tool control /run/zramd/{name}/control.sock GET /stats", SLOW)
    return int(json.loads(stats)["writeback"]["out_pages"])


def gone_out(guest: Guest, name: str, least: int = 100) -> None:
    end = time.monotonic() + SLOW * guest.machine.patience
    while (found := out(guest, name)) < least:
        assert time.monotonic() < end, f"{found} blocks of {name} are out: {status(guest, name)}"
        time.sleep(2)


def wait_for_swap(guest: Guest) -> None:
    end = time.monotonic() + SLOW * guest.machine.patience
    while "/dev/nbd0" not in swap(guest):
        assert time.monotonic() < end, status(guest, "zram0")
        time.sleep(1)


def used(guest: Guest, seed: int) -> None:
    """A workload that does not fit is swapped out, further out to the disk, and in again."""
    swapped_out(guest, seed)
    gone_out(guest, "zram0")
    verified(guest, "churn pages 3000")
    gone_out(guest, "zram0")


def test_a_disk_that_is_there(computer: Debian) -> None:
    with computer.on() as guest:
        for line in SETUP.splitlines()[1:]:
            guest.run(line, SLOW)
        write(guest, "/etc/zramd.conf", CONFIGURATION)
        guest.run("zramd install-units", SLOW)
        for unit in ("zramd@", "zramd-attach@"):
            patience = f"[Service]\nTimeoutStartSec={90 * guest.machine.patience:.0f}\n"
            write(guest, f"/etc/systemd/system/{unit}.service.d/patience.conf", patience)
        not_allowed(guest)
        for name in ("zram0", "zram1"):
            assert f"next: systemctl restart zramd@{name}" in guest.run(f"zramd backing allow {name}", SLOW)
        mark = len(computer.log())
        guest.run("systemctl enable --quiet --now zramd@zram0 zramd@zram1", SLOW)
        guest.run("systemctl start zramd-attach@zram0", SLOW)
        kept(guest)
        used(guest, 1)
        restart(guest)
        used_again = out(guest, "zram0")
        print(f"{used_again} blocks are out at the reboot")
        end_system(guest, "reboot")
        print(f"reboot took {guest.wait_for_end(SLOW):.1f} s")
        meant = "zramd@zram1.service: Failed with result 'signal'"  # it was killed
        assert [line for line in computer.log()[mark:] if TROUBLE.search(line) and meant not in line] == []


def not_allowed(guest: Guest) -> None:
    """A service sees no disk that it was not allowed, and says what to do."""
    assert guest.try_run("systemctl start zramd@zram0", SLOW)[0] == 1
    assert (
        f"backing '{DISK}' cannot be opened: no such file or directory: the service may not have it yet: run "
        "'zramd backing allow' with the device's name as root (docs/systemd.md, 'Backing')"
    ) in guest.run("journalctl -b -u zramd@zram0 -o cat", SLOW)
    guest.run("systemctl stop zramd@zram0; systemctl reset-failed zramd@zram0; true", SLOW)


def kept(guest: Guest) -> None:
    """With a state, what is out is there after a restart and after a kill."""
    device = guest.run("zramd attach zram1", SLOW).strip()
    guest.run("seq 1 2000000 | head -c 8M >/run/data")
    guest.run(f"dd if=/run/data of={device} bs=64k oflag=direct status=none", SLOW)
    for how in ("systemctl restart zramd@zram1", "kill -9 $(cat /run/zramd/zram1/pid)"):
        gone_out(guest, "zram1", 1000)
        restarted(guest, how, "zram1")
        assert out(guest, "zram1") >= 1000, how
        guest.run(f"dd if={device} bs=64k count=128 iflag=direct status=none | cmp - /run/data", SLOW)
    guest.run("zramd detach zram1", SLOW)
    guest.run("systemctl stop zramd@zram1 && rm /run/data", SLOW)  # the other needs the memory


def restart(guest: Guest) -> None:
    """What is out on the disk comes back before the server ends; then blocks go out as before."""
    assert guest.phase("free 85", SLOW)["freed"] > 0
    guest.phase("pageout", SLOW)
    gone_out(guest, "zram0")
    before = guest.run("cat /run/zramd/zram0/pid")
    guest.run("systemctl restart zramd@zram0", SLOW)
    guest.run("systemctl start zramd-attach@zram0", SLOW)
    assert guest.run("cat /run/zramd/zram0/pid") != before
    verified(guest)
    guest.phase("pageout", SLOW)
    gone_out(guest, "zram0")


def test_of_an_earlier_boot(computer: Debian) -> None:
    """The memory that knew what is on the disks is gone: each is taken again, and nobody is asked."""
    with computer.on() as guest:
        assert computer.trouble() == []
        for name, disk in (("zram0", DISK), ("zram1", KEPT_DISK)):
            shown = guest.run(f"zramd backing show {disk}", SLOW)
            assert f"blocks of {name}, " in shown
            assert "since this machine was booted" in shown
        used(guest, 2)
        verified(guest)
        guest.end_workload()
        write(guest, "/etc/zramd.conf", CONFIGURATION.replace(DISK, LATE_DISK))
        write(guest, "/etc/systemd/system/late.service", late_unit())
        guest.run("zramd backing allow zram0 && systemctl enable --quiet late.service", SLOW)
        computer.turn_off("poweroff")


def test_a_disk_that_comes_late(computer: Debian) -> None:
    """The server waits for it at boot; at shutdown it is the disk that waits for the server."""
    with computer.on() as guest:
        assert computer.trouble() == []
        computer.order("Finished late.service", "Started zramd@zram0.service", "Reached target swap.target")
        assert "/dev/nbd0" in swap(guest)
        used(guest, 3)
        guest.run("systemctl disable --quiet late.service", SLOW)
        wait = f"[Unit]\nJobRunningTimeoutSec={BOOT_WAITS}\n"
        write(guest, "/etc/systemd/system/dev-mapper-late.device.d/wait.conf", wait)
        computer.turn_off("poweroff")
        computer.order(
            "Deactivated swap dev-nbd0p1.swap",
            "Stopped zramd-attach@zram0.service",
            "Stopped zramd@zram0.service",
            "Stopped late.service",
            "Reached target shutdown.target",
        )


def test_a_disk_that_never_comes(computer: Debian) -> None:
    """The machine boots without its swap, and is told why; once the disk is there, it can have it."""
    with computer.on() as guest:
        assert swap(guest) == {}
        assert "Dependency failed for zramd@zram0.service" in status(guest, "zram0")
        assert any("Timed out waiting for device" in line for line in computer.log())
        missing = f"{LATE_DISK} cannot be opened: no such file or directory"
        assert missing in guest.try_run("zramd doctor", SLOW)[1]
        guest.run("systemctl is-active zramd@zram1")
        guest.run("systemctl start late.service && systemctl start zramd@zram0", SLOW)
        wait_for_swap(guest)
        end_system(guest, "poweroff")
        print(f"poweroff took {guest.wait_for_end(SLOW):.1f} s")
        computer.order("Stopped zramd@zram0.service", "Stopped late.service")
