"""`zramd attach` and `detach` in a real virtual machine, with its kernel's NBD client; and servers that die.

What a server holds must survive it here, so the server is nbdkit's file plugin, on a file in memory, in a run
folder as zramd's server has it.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from guests import small_guest
from vm import kernel, probe
from vm.guest import Guest

pytestmark = pytest.mark.timeout(600)

ZRAMD = "/usr/bin/python3 -m zramd"

# Becomes nbdkit, holding a run folder: serve.py NAME DATA_ID SIZE [swap]. "swap": it is swapped to.
SERVE = """
import fcntl, os, sys
name, data, size, *swapped = sys.argv[1:]
if swapped:
    from zramd.kernel import protection
    protection.prepare()
folder = f"/run/zramd/{name}"
os.makedirs(folder, exist_ok=True)
fd = os.open(f"{folder}/pid", os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
os.set_inheritable(fd, True)
os.pwrite(fd, b"%d" % os.getpid(), 0)
with open(f"{folder}/data_id", "w") as file:
    file.write(data)
with open(f"/run/{data}", "a") as file:
    file.truncate(int(size))
if os.path.exists(f"{folder}/nbd.sock"):
    os.unlink(f"{folder}/nbd.sock")
os.execv("/usr/sbin/nbdkit", ["nbdkit", "-f", "-U", f"{folder}/nbd.sock", "file", f"/run/{data}"])
"""


@pytest.fixture(
    scope="module",
    # slow: all of it again, by another kernel
    params=[kernel.SUITES[0], *(pytest.param(suite, marks=pytest.mark.slow) for suite in kernel.SUITES[1:])],
)
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A booted guest with the kernel of each suite, its module nbd not loaded yet."""
    with small_guest(request.param) as guest:
        guest.put("/tmp/serve.py", SERVE.encode())
        yield guest


@pytest.fixture(scope="module")
def loaded(guest: Guest) -> Guest:
    """The guest with its module nbd."""
    guest.run(f"insmod {guest.machine.images.later_modules[-1]}")
    return guest


def refused(guest: Guest, command: str, status: int = 1) -> str:
    """What a command says that must fail with one sentence."""
    found, words = guest.try_run(f"{ZRAMD} {command}")
    assert found == status, words
    assert words.startswith("zramd"), words
    assert "\n" not in words, words
    return words


def start(guest: Guest, name: str, data: str, size: int = 32 << 20, swap: str = "") -> None:
    """Start nbdkit on /run/DATA as the server of `name`."""
    guest.run(f"setsid /usr/bin/python3 /tmp/serve.py {name} {data} {size} {swap} >>/run/{name}.log 2>&1 &")
    guest.run(f"while ! [ -S /run/zramd/{name}/nbd.sock ]; do sleep 0.02; done")


def kill(guest: Guest, name: str) -> None:
    """Kill the server of `name`."""
    guest.run(f"kill -9 $(cat /run/zramd/{name}/pid)")


def end(guest: Guest, name: str) -> None:
    """Kill the server of `name` if it lives, and remove what it held."""
    guest.try_run(f"kill -9 $(cat /run/zramd/{name}/pid)")
    guest.run(f"rm -rf /run/{name} /run/zramd/{name}")


def said(guest: Guest, sentence: str, count: int = 1) -> None:
    """Wait until the kernel's log has a sentence so many times."""
    end = time.monotonic() + 20
    while sum(sentence in line for line in guest.kernel_log()) < count:
        assert time.monotonic() < end, f"nobody says '{sentence}'"
        time.sleep(0.05)


def test_before_the_module_is_loaded(guest: Guest) -> None:
    start(guest, "early", "early")
    assert "module nbd cannot be loaded (modprobe is not installed)" in refused(guest, "attach early")
    end(guest, "early")


def test_bad_input(loaded: Guest) -> None:
    guest = loaded
    start(guest, "early", "early")
    kill(guest, "early")
    assert "there is no device 'nobody'" in refused(guest, "attach nobody")
    assert "nobody is not attached" in refused(guest, "detach nobody")
    assert "the server of early has died" in refused(guest, "attach early")
    start(guest, "bad", "bad", 1000)
    assert "has 1000 bytes in blocks of 1 or more: the kernel needs blocks of 4096" in refused(
        guest, "attach bad"
    )
    end(guest, "bad")
    end(guest, "early")
    for words, sentence in (
        ("--device sda", "'sda' is not an NBD device, such as /dev/nbd0, or a ublk device"),
        ("--priority 32768", "'32768' is not a priority from -1 to 32767"),
        ("--connections 0", "'0' is not a number of connections from 1 to 16"),
        ("--timeout x", "'x' is not a number of seconds, such as 0.5 or 30"),
        ("--dead-conn-timeout -1", "'-1' is not a number of seconds from 0 to 1000000"),
    ):
        assert sentence in refused(guest, f"attach bad {words}", 2)
    assert guest.run("cat /sys/block/nbd0/size").strip() == "0"


def test_swap(loaded: Guest) -> None:
    """Attached, swapped to, refused while in use, swapped off, detached; without /usr/sbin in PATH."""
    guest = loaded
    start(guest, "one", "one")
    command = f"PATH=/usr/bin:/bin {ZRAMD} attach one --device /dev/nbd3 --swap --priority 7"
    assert guest.run(command).strip() == "/dev/nbd3"
    assert guest.run("cat /sys/block/nbd3/backend").strip() == "zramd/one"
    assert guest.run("tail -n 1 /proc/swaps").split()[0:5:4] == ["/dev/nbd3", "7"]
    said(guest, "swap on /dev/nbd3.  Priority:7 extents:1 across:32764k SSDsc")  # c: discards clusters
    assert "one is attached as /dev/nbd3 already" in refused(guest, "attach one")
    start(guest, "two", "two")
    assert "does not give us /dev/nbd3: device or resource busy" in refused(guest, "attach two --device nbd3")
    assert "/dev/nbd3 is in use as swap: 'zramd detach --swapoff one'" in refused(guest, "detach one")
    keeper = guest.run("cut -d' ' -f1 /run/zramd/one.attached").strip()
    guest.run(f"kill -0 {keeper}")
    guest.run(f"PATH=/usr/bin:/bin {ZRAMD} detach one --swapoff")
    assert "nbd3" not in guest.run("cat /proc/swaps")
    guest.run(f"! kill -0 {keeper} && ! [ -e /sys/block/nbd3/pid ] && ! [ -e /run/zramd/one.attached ]")
    end(guest, "one")
    end(guest, "two")


@pytest.mark.slow  # half a minute, by four ways to name one device
def test_by_folder_and_by_device(loaded: Guest) -> None:
    """A server in another folder is attached and detached by that; and the kernel's name is a name, too."""
    guest, path = loaded, "PATH=/usr/sbin:$PATH"
    guest.run(f"{path} {ZRAMD} start apart --size 16M rundir=/run/elsewhere", 60)
    device = guest.run(f"{ZRAMD} attach --rundir /run/elsewhere").strip()
    assert guest.run(f"cat /sys/block/{device.removeprefix('/dev/')}/backend").strip() == "zramd/apart"
    assert "apart is attached as" in refused(guest, "attach --rundir /run/elsewhere")
    guest.run(f"{ZRAMD} detach --rundir /run/elsewhere")
    assert guest.run(f"{ZRAMD} attach --rundir /run/elsewhere --swap").strip() == device
    assert f"{device} is in use as swap" in refused(guest, f"detach {device}")
    guest.run(f"{ZRAMD} detach {device} --swapoff")
    guest.run("! [ -e /run/zramd/apart.attached ]")
    guest.run(f"{ZRAMD} stop --rundir /run/elsewhere", 60)


def test_swap_on_the_server_of_another_user(loaded: Guest) -> None:
    """Its owner could read and change what is swapped out. Without swap it is like any disk."""
    guest = loaded
    become = "import os, sys; os.setgid(1000); os.setuid(1000); os.execv(sys.executable, sys.argv)"
    words = "start his --size 16M rundir=/tmp/his"
    guest.run(f"PATH=/usr/sbin:$PATH /usr/bin/python3 -c '{become}' -m zramd {words}", 60)
    assert "the server of his belongs to" in refused(guest, "attach --rundir /tmp/his --swap")
    assert "nbd" not in guest.run("cat /proc/swaps")
    guest.run("! [ -e /run/zramd/his.attached ]")
    device = guest.run(f"{ZRAMD} attach --rundir /tmp/his").strip()
    guest.run(f"dd if={device} of=/dev/null bs=4k count=1 iflag=direct && {ZRAMD} detach his")
    guest.run(f"{ZRAMD} stop --rundir /tmp/his", 60)


def test_mounted(loaded: Guest) -> None:
    guest = loaded
    start(guest, "disk", "disk")
    device = guest.run(f"{ZRAMD} attach disk").strip()
    guest.run(f"mkdir -p /run/place && mke2fs -b 4096 {device} && mount -t ext4 {device} /run/place")
    assert f"{device} is mounted on '/run/place': run 'umount /run/place' first" in refused(
        guest, "detach disk"
    )
    guest.run(f"umount /run/place && {ZRAMD} detach disk")
    end(guest, "disk")


@pytest.mark.parametrize("connections", [1, pytest.param(3, marks=pytest.mark.slow)])  # slow: the same again
def test_server_dies_under_io(loaded: Guest, connections: int) -> None:
    """Killed in the middle and started again three times: requests wait, none fails, all data is right."""
    guest, name = loaded, f"many{connections}"
    start(guest, name, name)
    device = guest.run(f"{ZRAMD} attach {name} --connections {connections} --timeout 1").strip()
    log = f"{device.removeprefix('/dev/')}: connected to {name} again"
    before = faults(guest, name)
    probe.start(guest, name, device, 20)
    for _ in range(3):
        time.sleep(2)
        dead = sum("connected to" in line for line in guest.kernel_log())
        kill(guest, name)
        start(guest, name, name)
        said(guest, "connected to", dead + 1)
        print([line for line in guest.kernel_log() if log in line][-1])
    found = probe.wait(guest, name)
    assert found["bad"] == []
    assert found["done"] > 200
    assert found["longest"][-1] < 15  # seconds, on a machine that is busy
    assert faults(guest, name) == before
    guest.run(f"{ZRAMD} detach {name}")
    end(guest, name)


@pytest.mark.slow  # two minutes of restarts; those under swap are tried each time
def test_restart_under_io(loaded: Guest) -> None:
    """`zramd restart` of a real server, again and again: no request fails, none waits for the timeout.

    That is far longer here than any restart, however busy the machine is.
    """
    guest, restarts, timeout = loaded, 12, 10
    guest.run("mkdir /run/states && mount -t tmpfs none /run/states")
    guest.run(f"PATH=/usr/sbin:$PATH {ZRAMD} start next --size 32M state=/run/states/next")
    device = guest.run(f"{ZRAMD} attach next --timeout {timeout}").strip()
    queue = f"cat /sys/block/{device.removeprefix('/dev/')}/queue/nr_requests"
    length = guest.run(queue)
    probe.start(guest, "next", device)
    time.sleep(1)
    away = []
    for number in range(restarts):
        away.append(guest.run(f"PATH=/usr/sbin:$PATH {ZRAMD} restart next", 60).split()[-2])
        said(guest, "connected to next again", number + 1)
        time.sleep(0.3)
    found = probe.stop(guest, "next")
    pauses = probe.pauses(guest.kernel_log(), "next", found)
    print(f"away for {', '.join(away)} ms; connected again after {[after for after, _ in pauses]} s")
    slowest = sorted(took for _, took in pauses)
    print(f"slowest request of each restart: {slowest}, median {slowest[restarts // 2]} s")
    assert found["bad"] == []
    assert found["done"] > 200
    assert found["longest"][-1] < timeout - 1
    assert guest.run(queue) == length
    guest.run(f"{ZRAMD} detach next && {ZRAMD} stop next && umount /run/states && rmdir /run/states")


def faults(guest: Guest, name: str) -> list[str]:
    """The page faults of a keeper so far, minor and major."""
    return guest.run(f"cut -d' ' -f10,12 /proc/$(cut -d' ' -f1 /run/zramd/{name}.attached)/stat").split()


def test_other_data_is_not_connected(loaded: Guest) -> None:
    """A server that comes up empty gets no requests; the one with the data does, when it comes back."""
    guest = loaded
    start(guest, "data", "first")
    device = guest.run(f"{ZRAMD} attach data").strip()
    probe.start(guest, "data", device, 6)
    time.sleep(1)
    kill(guest, "data")
    start(guest, "data", "second")
    said(guest, "data serves, but cannot be used: it does not hold the data that was there before")
    kill(guest, "data")
    start(guest, "data", "first", 64 << 20)
    said(guest, f"it has {64 << 20} bytes instead of {32 << 20}")
    kill(guest, "data")
    guest.run("truncate -s 32M /run/first")
    start(guest, "data", "first")
    found = probe.wait(guest, "data")
    assert found["bad"] == []
    assert guest.run("tr -d '\\0' </run/second | wc -c").strip() == "0"
    guest.run(f"{ZRAMD} detach data")
    end(guest, "data")
    guest.run("rm /run/first /run/second")


def test_dead_conn_timeout(loaded: Guest) -> None:
    """When no server comes back in time, requests fail; one that comes later still serves."""
    guest = loaded
    start(guest, "late", "late")
    device = guest.run(f"{ZRAMD} attach late --dead-conn-timeout 2").strip()
    kill(guest, "late")
    said(guest, "connections to late are dead")
    status, words = guest.try_run(f"dd if={device} of=/dev/null bs=4k count=1 iflag=direct", 60)
    assert status
    assert "Input/output error" in words
    start(guest, "late", "late")
    said(guest, "connected to late again")
    guest.run(f"dd if={device} of=/dev/null bs=1M count=8 iflag=direct && {ZRAMD} detach late")
    end(guest, "late")


def test_detach_without_a_server(loaded: Guest) -> None:
    """A device whose server has gone for good goes at once."""
    guest = loaded
    start(guest, "gone", "gone")
    guest.run(f"{ZRAMD} attach gone")
    kill(guest, "gone")
    said(guest, "connections to gone are dead")
    started = time.monotonic()
    guest.run(f"{ZRAMD} detach gone")
    assert time.monotonic() - started < 20  # requests would wait for 120
    guest.run("! [ -e /run/zramd/gone.attached ] && rm -r /run/gone /run/zramd/gone")


def test_keeper_dies(loaded: Guest) -> None:
    """The device lives on; attaching again gives it another keeper, which does its work."""
    guest = loaded
    start(guest, "kept", "kept")
    device = guest.run(f"{ZRAMD} attach kept").strip()
    keeper = guest.run("cut -d' ' -f1 /run/zramd/kept.attached").strip()
    guest.run(f"kill -9 {keeper}")
    assert guest.run(f"{ZRAMD} attach kept 2>/dev/null").strip() == device
    assert guest.run("cut -d' ' -f1 /run/zramd/kept.attached").strip() != keeper
    probe.start(guest, "kept", device, 5)
    time.sleep(1)
    kill(guest, "kept")
    start(guest, "kept", "kept")
    assert probe.wait(guest, "kept")["bad"] == []
    guest.run(f"{ZRAMD} detach kept")
    end(guest, "kept")


def test_server_dies_under_swap(loaded: Guest) -> None:
    """A workload's memory is out on a server that is killed, again and again: every page comes back."""
    guest, size, log = loaded, 64 << 20, len(loaded.kernel_log())
    # What is in a ramfs is not swapped itself; and only the workload is short of memory, which nbdkit's file
    # plugin would not survive.
    guest.run("mkdir -p /run/ram && mount -t ramfs ram /run/ram")
    guest.run(f"dd if=/dev/zero of=/run/ram/pages bs=1M count={size >> 20}")
    start(guest, "swap", "ram/pages", size, "swap")
    device = guest.run(f"{ZRAMD} attach swap --swap").strip()
    start_load(guest)
    with ThreadPoolExecutor(1) as pool:
        churn = pool.submit(guest.phase, "churn seconds 12", 240)
        for _ in range(3):
            time.sleep(2)
            dead = sum("connected to swap" in line for line in guest.kernel_log())
            kill(guest, "swap")
            start(guest, "swap", "ram/pages", size, "swap")
            said(guest, "connected to swap", dead + 1)
        found = [churn.result(), guest.phase("verify", 240)]
    used = int(guest.run("tail -n 1 /proc/swaps").split()[3])
    print(found, used)
    assert [each["bad"] for each in found] == [0, 0]
    assert used > 10 << 10
    errors = [line for line in guest.kernel_log()[log:] if "I/O error" in line or "Read-error" in line]
    assert errors == []
    guest.run("echo max >/run/cgroup/load/memory.max")
    interrupted(guest)
    guest.run(f"{ZRAMD} detach swap --swapoff", 120)
    assert guest.phase("verify", 240)["bad"] == 0
    guest.end_workload()
    end(guest, "swap")
    guest.run("umount /run/ram")
    assert device not in guest.run("cat /proc/swaps")


def start_load(guest: Guest) -> None:
    """A workload of 48 MiB that may have 24: nothing else is short of memory."""
    load = "/run/cgroup/load"
    guest.run("mkdir -p /run/cgroup; [ -e /run/cgroup/cgroup.procs ] || mount -t cgroup2 none /run/cgroup")
    guest.run("echo +memory >/run/cgroup/cgroup.subtree_control")
    guest.run(f"mkdir -p {load} && echo 24M >{load}/memory.max")
    guest.start_workload(48, 1)
    is_load = "grep -q pattern /proc/$pid/cmdline"
    guest.run(f"for pid in $(pidof guest_tool); do ! {is_load} || echo $pid >{load}/cgroup.procs; done")
    guest.phase("fill", 240)


@pytest.mark.slow  # more than a minute; a server that dies under swap is tried each time
def test_restart_under_swap(loaded: Guest) -> None:
    """`zramd restart` while a workload's memory is out: every page comes back, and none takes long."""
    guest, log, restarts, timeout = loaded, len(loaded.kernel_log()), 5, 10
    guest.run("mkdir /run/states && mount -t tmpfs none /run/states")
    settings = "swap=local reserve=4M state=/run/states/back"
    guest.run(f"PATH=/usr/sbin:$PATH {ZRAMD} start back --size 64M {settings}")
    *warning, device = guest.run(f"{ZRAMD} attach back --swap --timeout {timeout}").split()
    assert "may be swapped out itself" in " ".join(warning)
    start_load(guest)
    with ThreadPoolExecutor(1) as pool:
        churn = pool.submit(guest.phase, "churn seconds 25", 240)
        for number in range(restarts):
            time.sleep(1)
            guest.run(f"PATH=/usr/sbin:$PATH {ZRAMD} restart back", 60)
            said(guest, "connected to back again", number + 1)
        found = [churn.result(), guest.phase("verify", 240)]
    print(found)
    assert [each["bad"] for each in found] == [0, 0]
    assert found[0]["slowest"] < timeout - 1
    assert device in guest.run("cat /proc/swaps")
    errors = [line for line in guest.kernel_log()[log:] if "I/O error" in line or "Read-error" in line]
    assert errors == []
    guest.run("echo max >/run/cgroup/load/memory.max")
    guest.run(f"{ZRAMD} detach back --swapoff", 120)
    assert guest.phase("verify", 240)["bad"] == 0
    guest.end_workload()
    guest.run(f"{ZRAMD} stop back && umount /run/states && rmdir /run/states")


def areas(guest: Guest, device: str) -> dict[str, int]:
    """The swap areas of a device and their priorities."""
    lines = (line.split() for line in guest.run("cat /proc/swaps").splitlines())
    return {words[0]: int(words[4]) for words in lines if words[0].startswith(device)}


def partitions(guest: Guest, device: str) -> list[str]:
    """The partitions that the kernel has of a device."""
    name = device.removeprefix("/dev/")
    return guest.run(f"cd /sys/block/{name} && ls -d {name}p* 2>/dev/null || true").split()


@pytest.mark.slow  # a minute and a half of refreshes; each step of one is a row of test_vm_interruption.py
def test_areas(loaded: Guest) -> None:
    """Swap in areas, refreshed while its server is restarted and killed; nothing stays behind afterwards."""
    guest, log, path = loaded, len(loaded.kernel_log()), "PATH=/usr/sbin:$PATH"
    guest.run("mkdir /run/states && mount -t tmpfs none /run/states")
    start_server = f"{path} {ZRAMD} start parts --size 64M swap=local reserve=4M state=/run/states/parts"
    guest.run(start_server, 60)
    assert "4 areas need a priority of at least 3" in refused(
        guest, "attach parts --swap --areas 4 --priority 2", 2
    )
    device = guest.run(f"{ZRAMD} attach parts --swap --areas 4 --timeout 10").split()[-1]
    there = {f"{device}p{number}": 101 - number for number in (1, 2, 3, 4)}
    assert areas(guest, device) == there
    assert f"{device} is in use as swap: 'zramd detach --swapoff parts'" in refused(guest, "detach parts")
    assert "run 'zramd detach --swapoff parts' first" in refused(guest, "stop parts")
    start_load(guest)
    with ThreadPoolExecutor(1) as pool:
        churn = pool.submit(guest.phase, "churn seconds 30", 240)
        for number in range(3):
            time.sleep(1)
            if number == 1:
                kill(guest, "parts")
                guest.run(start_server, 60)
            else:
                guest.run(f"{path} {ZRAMD} restart parts", 60)
            said(guest, "connected to parts again", number + 1)
            assert areas(guest, device) == there
            assert len(partitions(guest, device)) == 4
            print(guest.run(f"{ZRAMD} refresh parts", 60))
            assert areas(guest, device) == there
        found = [churn.result(), guest.phase("verify", 240)]
    print(found)
    assert [each["bad"] for each in found] == [0, 0]
    errors = [line for line in guest.kernel_log()[log:] if "I/O error" in line or "Read-error" in line]
    assert errors == []
    guest.end_workload()
    guest.run("echo max >/run/cgroup/load/memory.max")
    before = stored(guest, "parts")
    end = time.monotonic() + 180
    while "left for later" in (told := guest.run(f"{ZRAMD} refresh parts", 60)):  # until memory is at ease
        assert time.monotonic() < end, told
        time.sleep(2)
    print(told)
    print(before, stored(guest, "parts"), guest.run("cat /proc/swaps /run/zramd-guest/*.json"))
    assert areas(guest, device) == there
    stats = numbers(guest, "parts")
    assert stored(guest, "parts") < before / 2
    assert stats["dead_blocks"] <= stored(guest, "parts")
    assert stats["refreshed_blocks"] >= stats["refresh_last_blocks"] > 0
    guest.run(f"{ZRAMD} list -o NAME,SWAP-USED,DEAD,REFRESHED")
    guest.run(f"{ZRAMD} detach parts --swapoff", 120)
    assert areas(guest, device) == {}
    assert partitions(guest, device) == []
    assert guest.run("ls /run/zramd-guest").split() == ["lock"]
    guest.run(f"{ZRAMD} stop parts && umount /run/states && rmdir /run/states")


def stored(guest: Guest, name: str) -> int:
    """The blocks that a server holds and that take memory."""
    stats = numbers(guest, name)
    return int(stats["pages_stored"] - stats["same_pages"])


def numbers(guest: Guest, name: str) -> dict[str, int]:
    """What `zramd stats` has of a device."""
    found: dict[str, int] = json.loads(guest.run(f"{ZRAMD} stats {name} --json"))
    return found


def interrupted(guest: Guest) -> None:
    """Ctrl-C ends swapoff, and the device stays in use. The server stands still until then."""
    mark = len(guest.kernel_log())
    server = guest.run("cat /run/zramd/swap/pid").strip()
    guest.run(f"kill -STOP {server}")
    # A shell's background jobs ignore the signal of Ctrl-C; a terminal's do not.
    listens = "import os, signal, sys; signal.signal(2, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = f'/usr/bin/python3 -c "{listens}" {ZRAMD} detach swap --swapoff'
    guest.run(f"{command} >/tmp/detach 2>&1 & echo $! >/tmp/detach.pid")
    guest.run("while ! pidof swapoff; do sleep 0.1; done; sleep 0.5; kill -INT $(cat /tmp/detach.pid)")
    time.sleep(0.5)
    guest.run(f"kill -CONT {server}; while [ -d /proc/$(cat /tmp/detach.pid) ]; do sleep 0.1; done")
    words = guest.run("cat /tmp/detach")
    assert re.search(
        r"^zramd: interrupted: swap is attached as /dev/nbd\d, and swapped to: \d+ MiB are out$", words, re.M
    ), words
    assert "/dev/nbd" in guest.run("cat /proc/swaps")
    assert guest.phase("verify", 240)["bad"] == 0
    cut = [line for line in guest.kernel_log()[mark:] if re.search("shutting down sockets|are dead", line)]
    assert cut == []


def test_nbd_client(loaded: Guest) -> None:
    guest = loaded
    start(guest, "plain", "plain")
    words = guest.run(f"{ZRAMD} attach plain --nbd-client")
    assert "plain has no keeper, and when its server ends, requests fail" in words
    device = words.split()[-1]
    assert "plain is attached as" in refused(guest, "attach plain")
    guest.run(f"dd if={device} of=/dev/null bs=1M count=8 iflag=direct && {ZRAMD} detach plain")
    guest.run(f"! [ -e /sys/block/{device.removeprefix('/dev/')}/pid ]")
    end(guest, "plain")
