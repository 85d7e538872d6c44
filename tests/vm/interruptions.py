"""Runs in the guest of test_vm_interruption.py: does the rows of its table, and tells what each has left.

interruptions.py ASK TELL: two fifos. A row comes as one line, DURING AT WHOM WHAT END, and is answered by one
line of JSON. For servers by ublk, `by_ublk` is called before: see ublkattach.py.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zramd import commands
from zramd.contract import rundir
from zramd.control import life
from zramd.kernel import attached, netlink, swap, swapareas, ublk
from zramd.launch import spawn
from zramd.process import steps

NAME = "held"
RUNDIR = f"/run/zramd/{NAME}"
RECORD = f"/run/zramd/{NAME}.attached"
STATE = "/dev/shm/held"
NOTES = "/run/zramd-guest"
AREAS = 3
STEPS = "/tmp/steps"
BLOCK = b"what was answered" * 240 + bytes(16)
PATIENCE = 60.0 * float(os.environ.get("ZRAMD_PATIENCE", "1"))  # seconds, in a guest that is emulated
SETTLE = 15.0  # seconds in which what is left must be what is promised; a keeper looks again after less
COMMANDS = {
    "attach": ["attach", NAME],
    "swap": ["attach", NAME, "--swap"],
    "areas": ["attach", NAME, "--swap", "--areas", str(AREAS)],
    "refresh": ["refresh", NAME],
    "detach": ["detach", NAME],
    "swapoff": ["detach", NAME, "--swapoff"],
    "areasoff": ["detach", NAME, "--swapoff"],
    "stop": ["stop", NAME],
    "restart": ["restart", NAME],
    "start": ["start", NAME, "--size", "16M", f"state={STATE}", "compaction=off"],
}
KEEPERS = {"nbd": b"zramd.kernel.keeper", "ublk": b"zramd.kernel.ublkkeeper"}
READS = ("attach", "detach", "recovery")  # after these the block is read; what swaps writes over it
front = "nbd"
stored = False  # whether the block is, by ublk


def by_ublk() -> None:
    """Have servers be reached by ublk from now on."""
    global front
    front = "ublk"
    COMMANDS["start"] = [*COMMANDS["start"], "front=ublk"]


def store(during: str) -> None:
    """See that the block is stored before a row that reads it."""
    global stored
    if front == "nbd":
        request(1, BLOCK)
        return
    if during in READS and not stored:  # by the kernel: there is no other client
        status, device, err = run("attach")
        assert status == 0, err
        with open(device.strip(), "r+b", buffering=0) as disk:
            disk.write(BLOCK)
            os.fsync(disk.fileno())
        status, _, err = run("detach")
        assert status == 0, err
    stored = during in READS


class Command:
    """A command of zramd that runs: in a copy of this process, for Python takes seconds to start here."""

    def __init__(self, words: list[str], held: bool = False) -> None:
        self._said = [os.memfd_create("out"), os.memfd_create("err")]
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            os.dup2(self._said[0], 1)
            os.dup2(self._said[1], 2)
            # A shell's background jobs ignore SIGINT, a terminal's do not.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            steps._path = STEPS if held else ""
            try:
                status = commands.main(words)
            except SystemExit as error:
                status = int(error.code or 0)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """Return its status, minus the signal that ended it, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, seconds: float) -> bool:
        """Wait for its end, so long; say whether it came."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def ended(self) -> tuple[int, str, str]:
        """Wait for its end; its status, and what it said."""
        if not self.wait(2 * PATIENCE):  # it may wait so long for others, and then says so
            os.kill(self.pid, signal.SIGKILL)
            self.wait(PATIENCE)
            self._status = 99
        said = []
        for fd in self._said:
            said.append(os.pread(fd, 1 << 16, 0).decode())
            os.close(fd)
        return self._status or 0, said[0], said[1]


class Holder:
    """Holds processes at one of their steps: see zramd.process.steps."""

    def __init__(self) -> None:
        self.at = ""
        self.seen: list[tuple[int, str]] = []
        self._links: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(STEPS)
        self._listener.listen(64)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            link, _ = self._listener.accept()
            pid, name = link.makefile().readline().split()
            self.seen.append((int(pid), name))
            if name == self.at:
                self._links.append(link)
            else:
                _let_go(link)

    @property
    def held(self) -> int:
        """How many are held."""
        return len(self._links)

    def wait(self, process: Command) -> int:
        """Return who is held; raises AssertionError when the command ends before that."""
        end = time.monotonic() + PATIENCE
        while not self._links:
            assert process.poll() is None, ("the step was never reached", self.seen, process.ended())
            assert time.monotonic() < end, ("the step was never reached", self.seen)
            time.sleep(0.005)
        return next(pid for pid, name in reversed(self.seen) if name == self.at)

    def release(self) -> None:
        """Let all go on."""
        self.at = ""
        for link in self._links:
            _let_go(link)
        self._links.clear()


def _let_go(link: socket.socket) -> None:
    """Have the other end go on, though a command that was forked meanwhile has this socket too."""
    with contextlib.suppress(OSError):  # it may have been killed
        link.shutdown(socket.SHUT_RDWR)
    link.close()


def run(what: str) -> tuple[int, str, str]:
    """Run one of the commands to its end."""
    return Command(COMMANDS[what]).ended()


def serve() -> None:
    """See that there is a server."""
    if rundir.holder(RUNDIR):
        return
    status, _, err = run("start")
    assert status == 0, err


def request(kind: int, data: bytes) -> None:
    """Write or read the block, as a client of the server."""
    link = netlink.dial(f"{RUNDIR}/nbd.sock")
    netlink.handshake(link, NAME)
    link.settimeout(PATIENCE)
    link.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, 0, len(BLOCK)) + data)
    answer = b""
    wanted = 16 if kind else 16 + len(BLOCK)
    while len(answer) < wanted:
        part = link.recv(65536)
        assert part
        answer += part
    link.close()
    assert answer[4:8] == bytes(4)
    return answer[16:]


def keepers() -> list[int]:
    """All keepers that there are."""
    return [pid for pid, words in processes() if KEEPERS[front] in words]


def processes() -> list[tuple[int, list[bytes]]]:
    """All processes, with their command lines."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found.append((int(pid), Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")))
    return found


def connected() -> list[str]:
    """The devices that the kernel has."""
    if front == "ublk":
        return [ublk.device_of(number) for number in ublk.numbers()]
    names = [name for name in os.listdir("/sys/block") if name.startswith("nbd")]
    return [f"/dev/{name}" for name in names if attached.is_connected(f"/dev/{name}")]


def state() -> tuple[str, object]:
    """How it stands, by the table's names, and what that is seen by."""
    devices, there, alive = connected(), attached.find(NAME), keepers()
    record = os.path.exists(RECORD)
    swaps = sorted((area.path, area.priority) for area in swap.swaps())
    names = ("ublkb0", "ublkb1") if front == "ublk" else ("nbd0", "nbd1")
    parts = [path for name in names for path in swapareas.parts(f"/dev/{name}").values()]
    notes = [name for name in os.listdir(NOTES) if name != "lock"] if os.path.exists(NOTES) else []
    facts = (devices, there, alive, record, swaps, parts, notes)
    if not devices and not alive and not record and not swaps and not parts and not notes:
        return "nothing", facts
    if len(devices) == 1 and there and there.device == devices[0]:
        served = there.stage in ("", attached.STARTED)
        if alive == [there.keeper] and rundir.holder(RUNDIR) and served:
            return _swapped(devices[0], swaps, parts), facts
        if not alive and not there.keeper and not swaps and not parts:
            return "alone", facts
    return "broken", facts


def _swapped(device: str, swaps: list[tuple[str, int]], parts: list[str]) -> str:
    """How an attached device is swapped to."""
    areas = [(f"{device}p{number}", 101 - number) for number in range(1, AREAS + 1)]
    if not parts:
        return {(): "attached", ((device, 100),): "swapped"}.get(tuple(swaps), "broken")
    return "areas" if swaps == areas else "half" if set(swaps) < set(areas) else "broken"


def settled(wanted: str) -> tuple[str, object]:
    """The same, once it is what is wanted, or it is too late."""
    end = time.monotonic() + SETTLE
    while (found := state())[0] not in wanted.split("|") and time.monotonic() < end:
        time.sleep(0.05)
    return found


def row(holder: Holder, during: str, at: str, whom: str, what: str, end: str) -> dict[str, Any]:
    """Do one row."""
    if during == "recovery":
        return recovery(holder, at, whom, what, end)
    serve()
    store(during)
    before = {"detach": "attach", "swapoff": "swap", "areasoff": "areas", "refresh": "areas"}.get(during)
    if before:
        status, _, err = run(before)
        assert status == 0, err
    if during == "refresh":  # an area of which nothing is known counts as full of what is dead
        notes = f"{NOTES}/{os.path.basename(connected()[0])}.json"
        Path(notes).write_text('{"areas": {}, "counts": {}, "last": {}}')
    server = rundir.holder(RUNDIR)
    holder.seen.clear()
    holder.at = at
    command = Command(COMMANDS[during], held=True)
    held = holder.wait(command)
    second = None
    if whom == "second":
        second = Command(COMMANDS[what])
        second.wait(3)  # it gets as far as it can
    else:
        number = getattr(signal, f"SIG{what}")
        there = attached.find(NAME)
        targets = {
            "command": [command.pid],
            "server": [server],
            "process": [held],
            "keeper": [there.keeper if there else 0],
            "both": [command.pid, held],
        }[whom]
        for target in targets:
            assert target, f"there is no {whom}"
            os.kill(target, number)
        if whom == "keeper":
            _until_alone()
        if whom == "server":
            _until(lambda: rundir.holder(RUNDIR) != server)
    time.sleep(0.2)
    holder.release()
    if whom == "server" and during in ("swap", "swapoff", "areas", "areasoff", "refresh"):
        time.sleep(0.3)
        serve()  # what is swapped to waits for it
    status, out, err = command.ended()
    other = second.ended() if second else (0, "", "")
    if what != "stop":
        serve()
    found, facts = settled(end)
    answer = {"status": status, "out": out, "err": err, "other": other, "found": found, "facts": facts}
    answer["seen"] = [name for _, name in holder.seen]
    if found == "half" and during == "refresh":  # the next one makes good
        answer["again"] = run("refresh")
        answer["whole"] = settled("areas")[0]
    if found == "attached" and during in READS:
        with open(connected()[0], "rb", buffering=0) as device:
            answer["right"] = device.read(len(BLOCK)) == BLOCK
    return answer


def recovery(holder: Holder, at: str, whom: str, what: str, end: str) -> dict[str, Any]:
    """Do a row whose step a keeper reaches when its server was killed, and another is there."""
    serve()
    store("recovery")
    command = Command(COMMANDS["attach"], held=True)  # so that its keeper is
    status, _, err = command.ended()
    assert status == 0, err
    there = attached.find(NAME)
    server = rundir.holder(RUNDIR)
    assert there
    assert server
    holder.seen.clear()
    holder.at = at
    os.kill(server, signal.SIGKILL)
    _until(lambda: rundir.holder(RUNDIR) != server)  # a crowded machine takes its time
    serve()
    _until(lambda: bool(holder.held))
    server = rundir.holder(RUNDIR)
    for target in {"server": [server], "keeper": [there.keeper], "both": [server, there.keeper]}[whom]:
        assert target
        os.kill(target, getattr(signal, f"SIG{what}"))
    if whom != "keeper":
        _until(lambda: rundir.holder(RUNDIR) != server)
    time.sleep(0.2)
    holder.release()
    serve()
    answer: dict[str, Any] = {"seen": [name for _, name in holder.seen]}
    if whom != "server":  # the next attach gives it a keeper, and that one goes on
        _until_alone()
        answer["again"] = run("attach")
    answer["found"], answer["facts"] = settled(end)
    if answer["found"] == "attached":
        with open(connected()[0], "rb", buffering=0) as device:
            answer["right"] = device.read(len(BLOCK)) == BLOCK
    return answer


def clean(answer: dict[str, Any]) -> None:
    """Take away what is left, as a user would: nothing may be in the way of that."""
    serve()
    if answer["found"] == "alone":
        answer["again"] = run("attach")
    if answer["found"] not in ("nothing",):
        answer["detached"] = run("swapoff")
    answer["after"] = settled("nothing")


def _until(what: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def _until_alone() -> None:
    """Wait until no keeper holds the device any more: SIGTERM takes a moment here."""
    end = time.monotonic() + PATIENCE
    while (there := attached.find(NAME)) and there.keeper and time.monotonic() < end:
        time.sleep(0.05)


def warm() -> None:
    """Import what commands do as they go, and have them wait for each other for longer: all is slow here."""
    for name in ("attach", "serve", "restart", "refresh"):
        importlib.import_module(f"zramd.commands.{name}")
    for name in (
        "zramd.process.interrupts",
        "zramd.control.life",
        "zramd.kernel.keeper",
        "zramd.kernel.ublkkeeper",
        "zramd.core.ublk.control",
        "zramd.settings.devices",
        "zramd.kernel.swapunit",
        "zramd.trusted",
        "zramd.control.peer",
    ):
        importlib.import_module(name)
    life.PATIENCE = attached.TURN_TIMEOUT = spawn.READY_TIMEOUT = PATIENCE


def main(ask: str, tell: str) -> None:
    """Do rows until there are no more."""
    prepare()
    holder = Holder()
    while True:
        with open(ask) as file:
            words = file.read().split()
        with open(tell, "w") as file:
            file.write(json.dumps(answer(holder, words)) + "\n")


def prepare() -> None:
    """Make ready for commands."""
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    warm()


def answer(holder: Holder, words: list[str]) -> dict[str, Any]:
    """Do a row and clean up; what it has found."""
    started = time.monotonic()
    try:
        during, at, whom, what, end = words
        found = row(holder, during, at, whom, what, end)
    except Exception as error:
        found = {"error": repr(error), "found": "broken", "facts": state()}
    holder.release()
    try:
        clean(found)
    except Exception as error:
        found["error"] = f"{found.get('error', '')} cleaning: {error!r}"
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
