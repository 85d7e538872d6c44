"""Debian 13 with systemd, its units, and swap by ublk: as test_debian.py has it by NBD.

One machine lives through all of it, and is booted twice. The second test needs the first.
"""

import re
import time

import pytest
import test_debian as debian
from test_debian import SLOW, TROUBLE, Debian, verified, wait_for
from vm.guest import Guest

pytestmark = [pytest.mark.timeout(2400), pytest.mark.slow]

CONFIGURATION = "[zram0]\\nzram-size = ram * 2\\nfront = auto\\nstate = systemd\\n"
MEMORY_MIB = 320  # one on standby has 44 of it
WORKLOAD_MIB = 190  # with the system's own it does not fit
MIB_OUT = 10  # at least, of what the workload has written
KILLS = 3
DEVICE = "/dev/ublkb0"
SERVER = "systemctl show -P MainPID zramd@zram0"
AGAIN = "ublkb0: served again after"
PRESSURE = 60.0  # seconds


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Debian:
    return debian.with_the_wheel("trixie", tmp_path_factory.mktemp("debian"), mib=MEMORY_MIB)


def test_from_nothing_to_a_reboot(computer: Debian) -> None:
    with computer.on() as guest:
        for line in debian.SETUP.splitlines()[1:]:
            guest.run(line, SLOW)
        guest.run(f"printf '{CONFIGURATION}' >/etc/zramd.conf")
        for step in (debian.install, enable, killed, upgrade, restart):
            started = time.monotonic()
            step(guest)
            print(f"{step.__name__} took {time.monotonic() - started:.1f} s", flush=True)
        # The server was killed, and systemd says so.
        trouble = [line for line in computer.log() if TROUBLE.search(line)]
        assert [
            line for line in trouble if "zramd@zram0.service: Failed with result 'signal'" not in line
        ] == []
        swapped_out(guest, 2)
        mark = len(computer.log())
        debian.end_system(guest, "reboot")
        print(f"reboot took {guest.wait_for_end(debian.SHUTDOWN_TIMEOUT):.1f} s")
        assert [line for line in computer.log()[mark:] if TROUBLE.search(line)] == []
        assert guest.alarms() == []


def test_active_again(computer: Debian) -> None:
    """After the reboot, without a hand; a minute of pressure; off with pages swapped out, in order."""
    with computer.on() as guest:
        active(guest)
        assert computer.trouble() == []
        swapped_out(guest, 3)
        end = time.monotonic() + PRESSURE
        while time.monotonic() < end:
            verified(guest, "churn pages 6000")
        computer.turn_off("poweroff")
        computer.order(
            "Stopped target sysinit.target",
            "Stopped target swap.target",
            "Deactivated swap dev-ublkb0p1.swap",
            "Stopped zramd-attach@zram0.service",
            "Stopped zramd@zram0.service",
            "Reached target shutdown.target",
        )
        assert guest.alarms() == []


def enable(guest: Guest) -> None:
    assert debian.swap(guest) == {}
    assert guest.try_run("ls /sys/module/ublk_drv")[0]  # it is loaded by what the service wants
    guest.run("systemctl enable --now zramd@zram0", SLOW)
    guest.run("systemctl start zramd-attach@zram0", SLOW)
    active(guest)
    said = guest.run("journalctl -b -o cat -u zramd@zram0", SLOW)
    assert "front=auto: ublk" in said.splitlines()[1]


def active(guest: Guest) -> None:
    """Swap is on, by ublk, and nothing of NBD's or nbdkit's has a part in it."""
    units = "zramd@zram0 zramd-attach@zram0 zramd-refresh.timer"
    assert guest.run(f"systemctl is-active {units}").split() == ["active"] * 3
    rows = [line.split() for line in guest.run("cat /proc/swaps").splitlines()[1:]]
    memory = int(guest.run("grep MemTotal /proc/meminfo").split()[1]) >> 10
    areas = [f"{DEVICE}p{number}" for number in range(1, memory * 2 // 64 + 1)]
    assert {row[0]: row[4] for row in rows} == {area: str(100 - place) for place, area in enumerate(areas)}
    names = " ".join(f"{area.removeprefix('/').replace('/', '-')}.swap" for area in areas)
    assert guest.run(f"systemctl is-active {names}").split() == ["active"] * len(areas)
    assert guest.run("ls /run/zramd/zram0/nbd.sock /sys/block/nbd0/pid 2>/dev/null; pgrep nbdkit; true") == ""
    assert (
        guest.run("cat /sys/block/ublkb0/queue/wbt_lat_usec /sys/block/ublkb0/queue/io_timeout").split()[0]
        == "0"
    )
    for pid in ("/run/zramd/zram0/pid", "/run/zramd/zram0.attached"):
        assert guest.run(f"cat /proc/$(cut -d' ' -f1 {pid})/oom_score_adj").strip() == "-1000"
    on_standby(guest)


def on_standby(guest: Guest) -> None:
    """There is one, which outlives the service's server; neither has a right to more than it was handed."""
    # One that was ended leaves its number there.
    wait_for(guest, "test -e /proc/$(cat /run/zramd/zram0/standby)/status && echo there", "there")
    waiting = guest.run("cat /run/zramd/zram0/standby").strip()
    for pid, unit in ((guest.run(SERVER).strip(), "zramd@zram0"), (waiting, "zramd-attach@zram0")):
        found = re.search(r"CapPrm:\s+([0-9a-f]+)", guest.run(f"cat /proc/{pid}/status"))
        assert found
        assert not int(found[1], 16) >> 21 & 1  # CAP_SYS_ADMIN
        assert guest.run(f"cat /proc/{pid}/cgroup").strip().endswith(f"/zramd.slice/{unit}.service")


def swapped_out(guest: Guest, seed: int) -> None:
    guest.start_workload(WORKLOAD_MIB, seed)
    assert guest.phase("fill", SLOW)["written"] == WORKLOAD_MIB * 256
    assert debian.swap(guest)[DEVICE] > MIB_OUT


def killed(guest: Guest) -> None:
    """At the limit of memory, parts of systemd swapped out: the one on standby takes over, and from that the
    next one of the service, with all data. Swap stays on, and who reads it only waits.
    """
    swapped_out(guest, 1)
    keeper = guest.run("cut -d' ' -f1 /run/zramd/zram0.attached")
    for _ in range(KILLS):
        known = len(served_again(guest))
        waiting = guest.run("cat /run/zramd/zram0/standby").strip()
        debian.restarted(guest, f"kill -9 $({SERVER})", seconds=SLOW)  # at its limit Python starts slowly
        verified(guest)
        wait_for(guest, "systemctl is-active zramd-attach@zram0", "active")
        # By the one on standby, and by the next one of the service.
        wait_for(guest, f"dmesg | grep '{AGAIN}' | tail -n +{known + 1} | wc -l", "2")
        print("; ".join(served_again(guest)[known:]), flush=True)
        assert guest.try_run(f"test -e /proc/{waiting}")[0]  # it has ended
        active(guest)
        assert guest.run("cat /run/zramd/zram0/standby").strip() != waiting
    assert guest.run("cut -d' ' -f1 /run/zramd/zram0.attached") == keeper
    # The memory file had nobody's lock on it between a death and the take-over; the slice's rule held.
    assert guest.run("cat /sys/fs/cgroup/zramd.slice/memory.swap.current").strip() == "0"
    said = guest.run("journalctl -b -o cat -u zramd-attach@zram0", SLOW)
    assert (
        said.count(f"{DEVICE} stays, and waits for the server that is started again after a crash") == KILLS
    )


def served_again(guest: Guest) -> list[str]:
    """What the keeper said when a server had the device again."""
    return [
        line.partition("ublkb0: ")[2] for line in guest.try_run(f"dmesg | grep '{AGAIN}'")[1].splitlines()
    ]


def upgrade(guest: Guest) -> None:
    """What a package does after its files have changed leaves a service alone whose swap is on."""
    before = guest.run(SERVER)
    said = guest.run("zramd restart --all", SLOW)
    assert re.match("zram0 +goes on as it is: this machine uses it", said), said
    assert guest.run(SERVER) == before


def restart(guest: Guest) -> None:
    """What is out comes back first, for which there must be memory; then it is as before."""
    guest.end_workload()
    before = guest.run(SERVER)
    guest.run("systemctl restart zramd@zram0", SLOW)
    guest.run("systemctl start zramd-attach@zram0", SLOW)
    assert guest.run(SERVER) != before
    active(guest)
