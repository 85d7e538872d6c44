"""Runs in the guest of test_ublk_attach.py: plays its scenes, and the rows of its table (interruptions.py).

ublkattach.py ASK TELL: two fifos. A line "scene NAME", or a row, is answered by one line of JSON.
"""

import errno
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set

import interruptions
from interruptions import PATIENCE, Command

from zramd.contract import rundir
from zramd.core.ublk.control import Control
from zramd.kernel import attached, ublk

BLOCK = 4096
BLKRRPART = 0x125F
OPTIONS = {
    "one": ["--size", "32M", "state=/dev/shm/one", "compaction=off", "front=ublk"],
    "two": ["--size", "16M", "compaction=off", "front=ublk"],
}
# Has so many MiB of memory, and says whether all is as it was when it is told to look.
HOG = """
import sys
pages = [bytearray(number.to_bytes(8, "little") * 512) for number in range(int(sys.argv[1]) * 256)]
print("ready", flush=True)
sys.stdin.readline()
print(all(page[:8] == number.to_bytes(8, "little") for number, page in enumerate(pages)), flush=True)
"""
GROUP = "/run/group"


def zramd(*words: str) -> tuple[int, str]:
    """Run a command to its end; its status, and all that it said."""
    status, out, err = Command(list(words)).ended()
    return status, (out + err).strip()


def good(*words: str) -> str:
    """Run a command that must succeed; what it said."""
    status, said = zramd(*words)
    assert status == 0, (words, said)
    return said


def bad(*words: str) -> str:
    """Run a command that must fail with one sentence; that."""
    status, said = zramd(*words)
    assert status in (1, 2), (words, status, said)
    assert said.startswith("zramd"), said
    assert "\n" not in said, said
    return said


def start(name: str) -> None:
    """Start a server, unless it lives."""
    if not rundir.holder(f"/run/zramd/{name}"):
        good("start", name, *OPTIONS[name])


def kill(name: str) -> None:
    """Kill a server; it is gone when this returns."""
    pid = rundir.holder(f"/run/zramd/{name}")
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: not rundir.holder(f"/run/zramd/{name}"))


def until(what: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def write(device: str, block: int, word: bytes) -> None:
    """Fill a block with a word, past the page cache."""
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, BLOCK) as page:
        page[:] = word * (BLOCK // len(word))
        assert os.pwritev(fd, [page], block * BLOCK) == BLOCK
    os.close(fd)


def read(device: str, block: int) -> bytes:
    """The beginning of a block."""
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as page:
            os.preadv(fd, [page], block * BLOCK)
            return page[:8]
    finally:
        os.close(fd)


def scanned(device: str) -> str:
    """What the kernel says when it is asked to look for partitions, '' if it does."""
    fd = os.open(device, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, BLKRRPART)
    except OSError as error:
        return errno.errorcode[error.errno]
    finally:
        os.close(fd)
    return ""


def swaps() -> list[str]:
    """What is swapped to."""
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    return [" ".join((line.split()[0], line.split()[4])) for line in lines]


def log(sentence: str, since: int) -> None:
    """Wait until the kernel's log says something."""
    until(lambda: any(sentence in line for line in kernel_log()[since:]))


def kernel_log() -> list[str]:
    """The kernel's log."""
    return subprocess.run(["/bin/busybox", "dmesg"], capture_output=True, text=True).stdout.splitlines()


def left() -> list[Any]:
    """What is there of devices, records and keepers."""
    records = [name for name in os.listdir("/run/zramd") if name.endswith(".attached")]
    return [ublk.numbers(), records, interruptions.keepers(), swaps()]


# ---- Scenes


def without_the_module() -> dict[str, Any]:
    start("one")
    return {"attach": bad("attach", "one"), "left": left()}


def without_io_uring() -> dict[str, Any]:
    Path("/proc/sys/kernel/io_uring_disabled").write_text("2")
    try:
        return {"attach": bad("attach", "one"), "start": bad("start", "two", *OPTIONS["two"]), "left": left()}
    finally:
        Path("/proc/sys/kernel/io_uring_disabled").write_text("0")


def two() -> dict[str, Any]:
    """Two zramds, and another program's device, which is not touched."""
    start("one")
    start("two")
    found: dict[str, Any] = {}
    with Control() as kernel:
        foreign = kernel.add(7, queues=1, depth=8, max_io_bytes=65536).number
        try:
            found["foreign"] = bad("attach", "one", "--device", "/dev/ublkb7")
            found["nbd"] = bad("attach", "one", "--device", "/dev/nbd0")
            found["option"] = bad("attach", "one", "--connections", "2")
            found["first"] = good("attach", "one")
            found["in use"] = bad("attach", "two", "--device", found["first"])
            found["second"] = good("attach", "two", "--device", "ublkb5")
            found["again"] = bad("attach", "one")
            write(found["first"], 1, b"one.")
            write(found["second"], 1, b"two.")
            found["read"] = [read(found[which], 1).decode() for which in ("first", "second")]
            found["list"] = good("list", "--output", "name,front,attached")
            found["stop"] = zramd("stop", "two")
            start("two")
            good("detach", found["first"])
            found["is two's"] = not attached.find("two")
            found["there"] = kernel.info(foreign).number == foreign and not kernel.info(foreign).mark
        finally:
            kernel.delete(foreign)
    found["numbers"] = ublk.numbers()
    for name in ("one", "two"):
        if attached.find(name):
            good("detach", name)
    found["left"] = left()
    return found


def swapped() -> dict[str, Any]:
    """Swap, in areas too; and what is in use is not taken away."""
    start("one")
    found: dict[str, Any] = {"on": good("attach", "one", "--swap", "--priority", "7"), "swaps": swaps()}
    found["detach"], found["stop"] = bad("detach", "one"), bad("stop", "one")
    good("detach", "one", "--swapoff")
    good("attach", "one", "--swap", "--areas", "3")
    found["areas"] = swaps()
    found["detach areas"] = bad("detach", "one")
    good("refresh", "one")
    good("detach", "one", "--swapoff")
    device = good("attach", "one")
    os.makedirs("/run/place", exist_ok=True)
    subprocess.run(["/bin/busybox", "mke2fs", "-b", "4096", device], check=True, capture_output=True)
    subprocess.run(["/bin/busybox", "mount", "-t", "ext4", device, "/run/place"], check=True)
    found["mounted"] = bad("detach", "one")
    subprocess.run(["/bin/busybox", "umount", "/run/place"], check=True)
    good("detach", "one")
    found["left"] = left()
    return found


def dies() -> dict[str, Any]:
    """A server is killed while somebody reads; one with other data is refused, the next has the device."""
    start("one")
    device = good("attach", "one")
    write(device, 3, b"kept")
    found: dict[str, Any] = {"scan": scanned(device)}
    mark = len(kernel_log())
    kill("one")
    reader = os.fork()
    if not reader:
        try:
            os._exit(read(device, 3) != b"keptkept")
        finally:
            os._exit(2)
    found["doctor"] = zramd("doctor")[1]
    os.rename("/dev/shm/one", "/dev/shm/kept")
    start("one")
    log("it does not hold the data that was there before", mark)
    found["waits"] = os.waitpid(reader, os.WNOHANG) == (0, 0)
    kill("one")
    os.rename("/dev/shm/kept", "/dev/shm/one")
    start("one")
    found["reader"] = os.waitpid(reader, 0)[1]
    log("served again after", mark)
    # And now for good.
    kill("one")
    good("detach", "one")
    found["left"] = left()
    return found


def without_a_state() -> dict[str, Any]:
    """The data is gone with the server, and so is the device."""
    start("two")
    device = good("attach", "two")
    write(device, 0, b"lost")
    mark = len(kernel_log())
    kill("two")
    log("its server has ended, and the data with it: the device is removed", mark)
    until(lambda: left() == [[], [], [], []])
    return {"disk": os.path.exists(device), "detach": bad("detach", "two")}


def forced() -> dict[str, Any]:
    """Pages are out on a server that is gone: only --force gives them up."""
    start("one")
    good("attach", "one", "--swap", "--no-standby")
    os.makedirs(GROUP, exist_ok=True)
    subprocess.run(["/bin/busybox", "mount", "-t", "cgroup2", "none", GROUP], check=True)
    Path(f"{GROUP}/cgroup.subtree_control").write_text("+memory")
    os.makedirs(f"{GROUP}/hog", exist_ok=True)
    Path(f"{GROUP}/hog/memory.max").write_text(str(14 << 20))
    hog = subprocess.Popen(
        ["sh", "-c", f'echo $$ >{GROUP}/hog/cgroup.procs; exec "$@"', "sh", sys.executable, "-c", HOG, "16"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert hog.stdout
    assert hog.stdin
    found: dict[str, Any] = {"ready": hog.stdout.readline().decode().strip()}
    found["out"] = int(Path("/proc/swaps").read_text().split()[-2])
    kill("one")
    found["refused"] = bad("detach", "one", "--swapoff")
    found["forced"] = good("detach", "one", "--swapoff", "--force")
    found["left"] = left()
    try:
        hog.communicate(b"look\n", timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        hog.kill()
    found["hog"] = hog.wait()
    return found


def begin() -> dict[str, Any]:
    """A server with a device, for what the test does itself."""
    start("one")
    return {"device": good("attach", "one")}


def end() -> dict[str, Any]:
    """Take that device away."""
    good("detach", "one")
    return {"left": left()}


def restarts_in_vain() -> dict[str, Any]:
    """Restarts with a device attached that cannot be: the server goes on."""
    before = rundir.holder("/run/zramd/one")
    return {
        "bad": bad("restart", "one", "size=64M"),
        "fails": bad("restart", "one", "backing=/dev/shm/no-such-folder/file"),
        "front": bad("restart", "one", "front=nbd"),
        "same": rundir.holder("/run/zramd/one") == before,
    }


def restarts() -> dict[str, Any]:
    """Restarts with a device attached, one with another setting; what they say."""
    return {"away": [good("restart", "one", *words) for words in ([], ["compaction=on"])]}


SCENES: dict[str, Callable[[], dict[str, Any]]] = {
    scene.__name__: scene
    for scene in (
        *(without_the_module, without_io_uring, two, swapped, dies, without_a_state, forced),
        *(begin, restarts_in_vain, restarts, end),
    )
}


def main(ask: str, tell: str) -> None:
    """Do what is asked until nothing more is."""
    interruptions.prepare()
    for name in ("listing", "doctor"):
        __import__(f"zramd.commands.{name}")
    interruptions.front = "ublk"
    holder, begun = interruptions.Holder(), False
    while True:
        with open(ask) as file:
            words = file.read().split()
        started = time.monotonic()
        if words[0] == "scene":
            try:
                answer = SCENES[words[1]]()
            except BaseException as error:
                traceback.print_exc()
                answer = {"error": repr(error), "left": left()}
            answer["seconds"] = round(time.monotonic() - started, 1)
        else:
            if not begun:
                interruptions.by_ublk()
                begun = True
            answer = interruptions.answer(holder, words)
        with open(tell, "w") as file:
            file.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
