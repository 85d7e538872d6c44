"""`zramd attach nbd://HOST/NAME`: a kernel swaps to another host's memory, through WireGuard, in one guest.

The other host is a network namespace of the guest: what goes between the two is encrypted by the kernel, and
goes over a cable that is slow and loses packets.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import zramd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm import image, kernel
from vm.guest import Guest, Machine, choose_accel

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
ZRAMD = "/usr/bin/python3 -m zramd"
WORKLOAD, CONFINED = 24, 14  # MiB that the workload has, and that it may have in memory
FAR = "/usr/sbin/ip netns exec far"
URI, NAME = "nbd://10.8.0.2/zram0", "zram0@10.8.0.2:10809"
AGAIN = f"connected to {NAME} again"

pytestmark = pytest.mark.timeout(900)

# Two hosts: this one and `far`, with a cable, and a tunnel on it whose ends know each other's keys.
TUNNEL = """
set -e
/usr/sbin/ip netns add far
/usr/sbin/ip link add cable type veth peer name cable netns far
for end in 1 2; do
    run=$FAR
    [ $end = 2 ] || run=
    $run /usr/sbin/ip addr add 10.7.0.$end/24 dev cable
    $run /usr/sbin/ip link set cable up
    $run /usr/sbin/ip link set lo up
    $run /usr/sbin/tc qdisc add dev cable root netem $NETEM
    (umask 077; wg genkey >/run/key$end)
    wg pubkey </run/key$end >/run/public$end
done
for end in 1 2; do
    run=$FAR other=$((3 - end))
    [ $end = 2 ] || run=
    $run /usr/sbin/ip link add wg0 type wireguard
    $run wg set wg0 private-key /run/key$end listen-port 51820 peer $(cat /run/public$other) \\
        endpoint 10.7.0.$other:51820 allowed-ips 10.8.0.$other/32
    $run /usr/sbin/ip addr add 10.8.0.$end/24 dev wg0
    $run /usr/sbin/ip link set wg0 up
done
"""


@pytest.fixture(
    scope="module",
    params=["delay 50us", pytest.param("delay 500us loss 1%", marks=pytest.mark.slow)],
    ids=["0.1 ms", "1 ms, loss"],
)
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest with a tunnel to its other half; netem is at both ends of the cable."""
    folder = ROOT / "build/vm"
    cloud = kernel.prepare(folder, "trixie")
    images = image.prepare(folder, cloud, Path(zramd.__file__).parent.parent)
    with tempfile.TemporaryDirectory(prefix="zramd-vm-") as name:
        machine = Machine(cloud, images, 512 * MIB, 2, "tcg")
        machine = Machine(cloud, images, machine.memory, machine.cpus, choose_accel(machine, Path(name)))
        with Guest(machine, Path(name)) as guest:
            guest.wait_for_boot()
            for path in (*images.later_modules, *images.network_modules):
                guest.run(f"grep -q ^{Path(path).stem.replace('-', '_')} /proc/modules || insmod {path}")
            guest.put("/run/tunnel.sh", TUNNEL.encode())
            guest.run(f"NETEM='{request.param}' FAR='{FAR}' sh /run/tunnel.sh")
            guest.run("sysctl -w vm.page-cluster=0 vm.min_free_kbytes=16384")
            guest.confine(CONFINED * MIB)
            guest.run("mkdir /run/state && mount -t tmpfs -o noswap none /run/state")
            yield guest
            assert guest.alarms() == []


def serve(guest: Guest, *settings: str) -> None:
    """Have the other host serve a device, on its end of the tunnel."""
    where = ("rundir=/run/far", "listen=10.8.0.2", "tls=off")
    words = " ".join(("--name", "zram0", "--size", str(64 * MIB), *where, *settings))
    guest.run(f"{{ setsid {FAR} {ZRAMD} serve {words} >>/run/log 2>&1; }} &")
    looks = "/bin/guest_tool control /run/far/control.sock GET /health >/dev/null"
    guest.run(
        f"i=0; until {looks}; do i=$((i + 1)); [ $i -lt 90 ] || {{ cat /run/log; exit 1; }}; sleep 1; done"
    )


def kill(guest: Guest) -> None:
    """Kill the server."""
    guest.run("kill -9 $(cat /run/far/pid)")


def said(guest: Guest, sentence: str, count: int = 1) -> None:
    """Wait until the kernel's log has a sentence so many times."""
    end = time.monotonic() + 60 * guest.machine.patience
    while sum(sentence in line for line in guest.kernel_log()) < count:
        assert time.monotonic() < end, f"nobody says '{sentence}'"
        time.sleep(0.05)


def churn(guest: Guest, seconds: int, work: object) -> float:
    """Let the workload run while `work` is done, and return the seconds that its slowest page took."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        answer = guest.phase(f"churn seconds {seconds}", 300)
    finally:
        thread.join()
    assert not failed, failed
    print(answer, flush=True)
    assert answer["bad"] == 0
    return float(answer["slowest"])


def swap_there(guest: Guest) -> None:
    """Swap to the other host, and have a workload that needs it."""
    serve(guest, "state=/run/state/zram0")
    assert guest.run(f"{ZRAMD} attach {URI} --swap", 180) == "/dev/nbd0"
    assert NAME in guest.run(f"{ZRAMD} list", 60)
    guest.start_workload(WORKLOAD, 20)
    assert guest.phase("fill", 300)["bad"] == 0
    stored = int(guest.run("cat /run/far/mm_stat").split()[0])
    assert stored > (WORKLOAD - CONFINED) * MIB // 2


def swap_no_more(guest: Guest) -> None:
    """Every page is what it should be; nothing is left."""
    answer = guest.phase("verify", 900)
    print(answer, flush=True)
    assert (answer["bad"], answer["verified"]) == (0, WORKLOAD * 256)
    # What went over the cable was the tunnel's.
    assert int(guest.run("/usr/sbin/wg show wg0 transfer").split()[2]) > MIB
    guest.end_workload()
    guest.run(f"{ZRAMD} detach --swapoff {URI}", 180)
    assert NAME not in guest.run(f"{ZRAMD} list", 60)
    guest.run("kill $(cat /run/far/pid); while [ -e /run/far/pid ]; do sleep 0.1; done")
    guest.run("rm -f /run/state/zram0")


# Slow: two hosts and WireGuard in one emulated guest, whose last look at all pages takes minutes.
@pytest.mark.slow
def test_swap_on_another_host(guest: Guest) -> None:
    """Its server is killed and started again with its state: the keeper connects the kernel again."""
    swap_there(guest)

    def another() -> None:
        kill(guest)
        serve(guest, "state=/run/state/zram0")

    before = sum(AGAIN in line for line in guest.kernel_log())
    churn(guest, 10, another)
    said(guest, AGAIN, before + 1)
    swap_no_more(guest)


@pytest.mark.slow
def test_a_cable_that_is_cut(guest: Guest) -> None:
    """For 20 seconds: the connection ends by its silence, and there is another one when the cable is back."""
    swap_there(guest)

    def cut() -> None:
        guest.run(f"{FAR} /usr/sbin/ip link set cable down; sleep 20; {FAR} /usr/sbin/ip link set cable up")

    before = sum(AGAIN in line for line in guest.kernel_log())
    assert churn(guest, 40, cut) > 10
    said(guest, AGAIN, before + 1)
    swap_no_more(guest)


def test_other_data_is_never_used(guest: Guest) -> None:
    """A server that has lost all comes in the place of the first: requests wait, and then fail."""
    serve(guest)
    device = guest.run(f"{ZRAMD} attach {URI} --dead-conn-timeout 5", 180)
    guest.run(f"echo hello | dd of={device} conv=fsync 2>/dev/null")
    kill(guest)
    serve(guest)
    said(guest, f"{NAME} serves, but cannot be used: it does not hold the data that was there before")
    assert guest.try_run(f"dd if={device} of=/dev/null bs=4096 count=1 iflag=direct", 60)[0]
    guest.run(f"{ZRAMD} detach {device}", 180)
    kill(guest)
