"""Drives the core's side of ublk in a guest, as root, without zramd's server and keeper: run by test_ublk.py.

ublkguest.py SCENE runs one of the scenes below and prints what it found, one line of JSON. What serves is a
process of its own, which gets the device's descriptor as a server does, and can be killed.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from ublkdevice import (
    BLKDISCARD,
    BLKSECDISCARD,
    BLKZEROOUT,
    BLOCK,
    GEOMETRY,
    KIB,
    MIB,
    PUNCH_HOLE,
    SIZE,
    TOOL,
    ZERO_RANGE,
    Geometry,
    Server,
    allocate,
    attached,
    content,
    disk,
    failing,
    gone,
    hand_over,
    in_child,
    in_flight,
    load,
    made,
    opened,
    put,
    ranged,
    read,
    run,
    until,
    write,
)

from zramd.core.device.device import Device, state_layout
from zramd.core.ublk import control
from zramd.core.ublk.control import Control
from zramd.core.ublk.queues import Queues

RANDOM = 5
# Tags by which more requests are sent than the device has: each is in flight then.
FEW = 8
TRACING = "/sys/kernel/tracing"
TRIGGER = "hist:keys=common_pid:size=2048"
# What is counted in the server's threads. The guest is booted with these events on: to switch one on changes
# the kernel's code, and an emulated processor that runs it meanwhile may see half of that.
EVENTS = {
    "calls": ["raw_syscalls/sys_enter"],
    "objects": ["kmem/kmalloc", "kmem/kmem_cache_alloc"],
    "pages": ["kmem/mm_page_alloc"],
}


# ---- The scenes: requests


def kinds() -> dict[str, Any]:
    """Each kind of request, at places where the kernel splits it and where it does not, against a model."""
    chance = random.Random(RANDOM)
    sizes = (BLOCK, 2 * BLOCK, 64 * KIB, 64 * KIB + BLOCK, MIB)
    with attached() as (number, server), disk(number) as fd:
        model = bytearray(SIZE)
        done = dict.fromkeys(("write", "read", "discard", "zero", "punch", "range", "flush"), 0)
        for _ in range(250):
            length = chance.choice(sizes)
            offset = chance.choice((0, SIZE - length, chance.randrange((SIZE - length) // BLOCK) * BLOCK))
            what = chance.choice(("write", "write", "write", *done))
            done[what] += 1
            if what == "write":
                data = content(chance, length // BLOCK)
                write(fd, data, offset)
                model[offset : offset + length] = data
            elif what == "read":
                assert read(fd, length, offset) == model[offset : offset + length]
            elif what == "flush":
                os.fsync(fd)
            else:
                if what == "discard":
                    ranged(fd, BLKDISCARD, offset, length)
                elif what == "zero":
                    ranged(fd, BLKZEROOUT, offset, length)
                else:
                    allocate(fd, PUNCH_HOLE if what == "punch" else ZERO_RANGE, offset, length)
                model[offset : offset + length] = bytes(length)
        pieces = [(at, min(MIB, SIZE - at)) for at in range(0, SIZE, MIB)]
        wrong = [at for at, length in pieces if read(fd, length, at) != model[at : at + length]]
        stats = server.tell("stats")
        ranged(fd, BLKDISCARD, 0, SIZE)
        empty = server.tell("stats")
        return {
            "done": done,
            "wrong": wrong,
            "stats": stats,
            "stored after all is discarded": empty["pages_stored"],
            "zeroed": read(fd, MIB, SIZE - MIB) == bytes(MIB),
            "unaligned": failing(lambda: os.preadv(fd, [mmap.mmap(-1, BLOCK)], 512)),
            "past the end": os.preadv(fd, [mmap.mmap(-1, BLOCK)], SIZE),
            "secure": failing(lambda: ranged(fd, BLKSECDISCARD, 0, BLOCK)),
        }


def parameters() -> dict[str, Any]:
    """The disk as its users see it, and the device as the control device tells."""
    with attached() as (number, server), Control() as kernel:
        root = f"/sys/block/ublkb{number}"
        names = (
            "logical_block_size physical_block_size minimum_io_size optimal_io_size rotational write_cache"
            " fua discard_granularity discard_max_bytes write_zeroes_max_bytes max_hw_sectors_kb nr_requests"
        )
        found: dict[str, Any] = {}
        for name in names.split():
            with open(f"{root}/queue/{name}") as file:
                found[name] = file.read().strip()
        with open(f"{root}/size") as file:
            size = int(file.read()) * 512
        with open(f"{root}/dev") as file:
            major, minor = map(int, file.read().split(":"))
        told = kernel.params(number)
        return {
            "queue": found,
            "size": size == SIZE == told["disksize"],
            "hardware queues": len(os.listdir(f"{root}/mq")),
            "disk": told["disk"] == os.makedev(major, minor),
            "params": told,
            "info": kernel.info(number)._asdict(),
            "pid": server.pid,
            "features": sorted(kernel.features()),
        }


def swap() -> dict[str, Any]:
    """swapon --discard has all but the first page trimmed; swapoff and on again keep working."""
    with attached() as (number, server):
        path = f"/dev/ublkb{number}"
        with disk(number) as fd:
            for offset in range(0, SIZE, MIB):
                write(fd, content(random.Random(offset), min(MIB, SIZE - offset) // BLOCK), offset)
        full = server.tell("stats")["pages_stored"]
        run("/usr/sbin/mkswap", path)
        run("/usr/sbin/swapon", "--discard", path)
        with open("/proc/swaps") as file:
            on = path in file.read()
        stored = server.tell("stats")["pages_stored"]
        with Control() as kernel:
            again = failing(lambda: kernel.start(number, server.pid))
        run("/usr/sbin/swapoff", path)
        return {"full": full, "on": on, "stored": stored, "started again": again}


def full() -> dict[str, Any]:
    """A pool that is full: a write fails with ENOSPC, what was written stays, trims make room again."""
    with attached(mem_limit=MIB) as (number, server), disk(number) as fd:
        data = random.Random(RANDOM).randbytes(64 * KIB)
        written, failed = 0, {"errno": None}
        while written < SIZE and not failed["errno"]:
            failed = failing(partial(write, fd, data, written))
            written += 64 * KIB
        kept = all(read(fd, 64 * KIB, at) == data for at in range(0, written - 64 * KIB, 64 * KIB))
        ranged(fd, BLKDISCARD, 0, SIZE)
        after = failing(lambda: write(fd, data, 0))
        return {
            "failed": failed,
            "written": written,
            "kept": kept,
            "after": after,
            "stats": server.tell("stats"),
        }


def calls() -> dict[str, Any]:
    """System calls and allocations of the server's threads for each request, at depths of 1 and 16.

    By the queues' own numbers, and by the kernel's events.
    """
    run("/bin/busybox", "mount", "-t", "tracefs", "none", TRACING)
    for event in (event for events in EVENTS.values() for event in events):
        put(f"{TRACING}/events/{event}/trigger", TRIGGER)
    found: dict[str, Any] = {}
    with attached(geometry=Geometry(2, 128)) as (number, server):
        load(number, "fill", 16, 0)
        for what in ("read", "write"):
            for depth in (1, 16):
                before = server.tell("stats")
                for event in (event for events in EVENTS.values() for event in events):
                    with open(f"{TRACING}/events/{event}/trigger", "a") as file:
                        file.write(f"{TRIGGER}:clear")
                requests = load(number, what, depth, 1)["requests"]
                threads = {int(name) for name in os.listdir(f"/proc/{server.pid}/task")} - {server.pid}
                row: dict[str, Any] = {"requests": requests}
                for kind, events in EVENTS.items():
                    count = 0
                    for event in events:
                        with open(f"{TRACING}/events/{event}/hist") as file:
                            hits = re.findall(r"common_pid: +(\d+) .*hitcount: +(\d+)", file.read())
                        count += sum(int(many) for thread, many in hits if int(thread) in threads)
                    row[kind] = count / requests
                after = server.tell("stats")
                served = after["ublk_requests"] - before["ublk_requests"]
                row["enters"] = (after["ublk_enters"] - before["ublk_enters"]) / served
                row["served"] = served
                found[f"{what} {depth}"] = row
    return found


# ---- The scenes: who may, and what is refused


def refusals() -> dict[str, Any]:
    """What cannot be, each with its sentence."""
    found: dict[str, Any] = {}
    with Control() as kernel:
        found["nobody's"] = failing(lambda: kernel.info(40))
        found["no queues"] = failing(lambda: kernel.add(queues=0))
        found["too deep"] = failing(lambda: kernel.add(depth=5000))
        found["too short"] = failing(lambda: kernel.add(max_io_bytes=1000))
        with made(number=3) as number:
            found["number in use"] = failing(lambda: kernel.add(number))
            found["odd size"] = failing(lambda: kernel.set_params(number, 1000))
        with made() as number:
            # What still waits goes when its Control is closed, and only then can the device be deleted.
            with Control() as waits:
                found["start without a server"] = failing(lambda: waits.start(number, os.getpid(), timeout=2))
                found["once it waits"] = failing(lambda: waits.info(number))
            found["delete after that"] = failing(lambda: kernel.delete(number))
        with made() as number, opened(number):
            found["second opener"] = failing(lambda: os.open(f"/dev/ublkc{number}", os.O_RDWR))
        with attached() as (number, _):
            found["params once started"] = failing(lambda: kernel.set_params(number, SIZE))
            found["recovery of what does not recover"] = failing(lambda: kernel.start_recovery(number))
        with attached(recovers=True) as (number, server):
            found["recovery of what is served"] = failing(lambda: kernel.start_recovery(number))
            found["end of none"] = failing(lambda: kernel.end_recovery(number, server.pid))
    with Control() as kernel:
        found["left"] = os.listdir("/sys/class/ublk-char")
    return found


def rights() -> dict[str, Any]:
    """Without the module's device, without io_uring, and without root."""
    found = {"as root": control.available(), "no device": control.available("/dev/no-such-control")}
    put("/proc/sys/kernel/io_uring_disabled", "2")
    try:
        found["no io_uring"] = control.available()
        found["no io_uring: control"] = failing(Control)["says"]
        found["no io_uring: queues"] = failing(lambda: Queues(Device(SIZE), *GEOMETRY))["says"]
    finally:
        put("/proc/sys/kernel/io_uring_disabled", "0")

    def as_nobody() -> dict[str, Any]:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        return {"available": control.available(), "control": failing(Control)["says"]}

    def may_open() -> dict[str, Any]:
        os.setresuid(65534, 65534, 65534)
        with Control() as kernel:
            return failing(kernel.add)

    found["nobody"] = in_child(as_nobody)
    os.chmod("/dev/ublk-control", 0o666)
    try:
        found["nobody, but may open it"] = in_child(may_open)
    finally:
        os.chmod("/dev/ublk-control", 0o600)
    return found


def two() -> dict[str, Any]:
    """Two devices at once, each with its own data; the one goes, the other stays."""
    with attached() as (one, _), disk(one) as fd:
        write(fd, b"1" * BLOCK, 0)
        with attached() as (other, _), disk(other) as second:
            write(second, b"2" * BLOCK, 0)
            numbers = sorted((one, other))
            apart = (read(fd, BLOCK, 0), read(second, BLOCK, 0)) == (b"1" * BLOCK, b"2" * BLOCK)
        return {
            "numbers": numbers,
            "apart": apart,
            "stays": read(fd, BLOCK, 0) == b"1" * BLOCK,
            "gone": gone(other),
        }


# ---- The scenes: a server that dies


def dies_for_good() -> dict[str, Any]:
    """Without recovery: what is asked for fails, and the disk goes by itself."""
    with made() as number:
        server = Server()
        hand_over(number, server)
        with Control() as kernel:
            kernel.start(number, server.pid)
        with disk(number) as fd:
            write(fd, b"1" * BLOCK, 0)
            os.kill(server.pid, signal.SIGSTOP)
            waits = subprocess.Popen(
                [TOOL, "load", f"/dev/ublkb{number}", "read", "4", "60", "1"], stderr=subprocess.PIPE
            )
            until(lambda: in_flight(number))
            server.kill()
            _, said = waits.communicate(timeout=60)
            later = failing(lambda: read(fd, BLOCK, 0))
        return {"said": said.decode(), "status": waits.returncode, "later": later, "gone": gone(number)}


def numbered(offset: int) -> bytes:
    """What stands at an offset: the offset."""
    return struct.pack("Q", offset) * (BLOCK // 8)


class Death:
    """A device that recovers, with requests that verify all the while, and a server that is killed.

    What it holds outlives each server, and `successor` is the next.
    """

    def __init__(self, number: int, geometry: Geometry) -> None:
        self.number, self.geometry = number, geometry
        self.state = os.memfd_create("state")
        os.ftruncate(self.state, state_layout(SIZE)["bytes"])
        self.server = self.successor()
        self.kernel = Control()
        hand_over(number, self.server)
        self.kernel.start(number, self.server.pid)
        put(f"/sys/block/ublkb{number}/queue/io_timeout", "500")
        with disk(number) as fd:
            for offset in range(0, MIB, BLOCK):
                write(fd, numbered(offset), offset)

    def successor(self) -> Server:
        """Return a server that has what the last one held."""
        return Server(geometry=self.geometry, state=os.dup(self.state))

    def ask(self) -> subprocess.Popen[bytes]:
        """Ask for a block, which is answered once there is a server."""
        script = (
            "import mmap, os, sys; b = mmap.mmap(-1, 4096);"
            "f = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT);"
            "os.preadv(f, [b], 40960); sys.exit(b[:8] != (40960).to_bytes(8, 'little'))"
        )
        path = f"/dev/ublkb{self.number}"
        return subprocess.Popen([sys.executable, "-S", "-E", "-c", script, path], stderr=subprocess.PIPE)

    def begin(self) -> dict[str, Any]:
        """Start the recovery, as soon as the kernel lets: how often it did not, or the error that stays."""
        busy, end = 0, time.monotonic() + 20
        while True:
            failed = failing(lambda: self.kernel.start_recovery(self.number))
            if failed["errno"] != "EBUSY" or time.monotonic() > end:
                return {"busy": busy, **failed}
            busy += 1
            time.sleep(0.005)

    def take_over(self, server: Server) -> dict[str, Any]:
        """Give the device to the next server: the error, if it cannot be; then see that all is there."""
        failed = failing(lambda: hand_over(self.number, server))
        if failed["says"]:
            return failed
        failed = failing(lambda: self.kernel.end_recovery(self.number, server.pid))
        if failed["says"]:
            return failed
        with disk(self.number) as fd:
            right = all(
                read(fd, BLOCK, offset) == struct.pack("Q", offset) * (BLOCK // 8)
                for offset in range(0, MIB, BLOCK)
            )
        return {"says": "", "right": right, "state": self.kernel.info(self.number).state}

    def end(self, server: Server) -> dict[str, Any]:
        """Stop and delete it: whether that leaves nothing. A server that has it must let it go between."""
        stopped = failing(lambda: self.kernel.stop(self.number))
        server.tell("join")
        deleted = failing(lambda: self.kernel.delete(self.number))
        return {"stopped": stopped["says"], "deleted": deleted["says"], "gone": gone(self.number)}


def death(at: str) -> dict[str, Any]:
    """Kill a server at one step of serving or of taking over, and see what way out there is."""
    # With one queue: while another has a free tag, the kernel notices at once.
    geometry = Geometry(1, FEW) if at == "all in flight" else GEOMETRY
    with made(True, geometry=geometry) as number:
        this = Death(number, geometry)
        second = this.successor()
        found: dict[str, Any] = {}
        try:
            if at == "all in flight":
                os.kill(this.server.pid, signal.SIGSTOP)
                load = subprocess.Popen([TOOL, "load", f"/dev/ublkb{number}", "read", "64", "1", "1"])
                until(lambda: in_flight(number) >= geometry.queues * geometry.depth)
            this.server.kill()
            found["quiesced"] = until(lambda: this.kernel.info(number).state == "quiesced", 40)
            asks = this.ask()
            if at in ("serving", "all in flight"):
                found["begin"] = this.begin()
            elif at == "begun":
                found["begin"] = this.begin()
                second.kill()
                found["begin again"] = this.begin()
                second = this.successor()
            elif at == "mapped":
                found["begin"] = this.begin()
                hand_over(number, second, "map")
                second.kill()
                found["begin again"] = this.begin()
                second = this.successor()
            elif at == "some fetched":
                found["begin"] = this.begin()
                part = Server(geometry=geometry._replace(queues=1), state=os.dup(this.state))
                hand_over(number, part)
                part.kill()
                # Not begun again: Linux 6.12 falls over the queue that has had no server (a null pointer).
            elif at == "all fetched":
                found["begin"] = this.begin()
                hand_over(number, second)
                second.kill()
                found["begin again"] = this.begin()
                second = this.successor()
            found["take over"] = this.take_over(second)
            if at == "all in flight":
                found["load"] = load.wait(60)
            if not found["take over"]["says"]:
                found["asked"] = asks.wait(60)
            found["end"] = this.end(second)
            found["asked in the end"] = asks.wait(60)
        finally:
            second.kill()
            this.server.kill()
            this.kernel.close()
        return found


SCENES: dict[str, Callable[[], dict[str, Any]]] = {
    scene.__name__: scene
    for scene in (kinds, parameters, swap, full, calls, refusals, rights, two, dies_for_good)
}


def main() -> None:
    """Run the scene that was asked for."""
    name, _, at = sys.argv[1].partition(":")
    try:
        found = death(at) if name == "death" else SCENES[name]()
    except BaseException as error:
        traceback.print_exc()
        found = {"error": repr(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
