"""A ublk device with a server of the core's own, and its disk, in a guest: for ublkguest.py's scenes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from zramd.core.device.device import Device
from zramd.core.ublk.control import Control
from zramd.core.ublk.queues import Queues
from zramd.errors import UblkError, ZramdError

BLOCK = 4096
KIB, MIB = 1 << 10, 1 << 20
SIZE = 32 * MIB + 3 * BLOCK  # the last request of each kind is a part of what one may be
BLKDISCARD, BLKSECDISCARD, BLKZEROOUT = 0x1277, 0x127D, 0x127F
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16  # of fallocate
TOOL = "/bin/guest_tool"


class Geometry(NamedTuple):
    """What queues and device agree on."""

    queues: int = 2
    depth: int = 32
    max_io_bytes: int = 64 * KIB


GEOMETRY = Geometry()


class Server:
    """A process that has a device and its queues, and does what it is told; see `_serve` for what that is."""

    def __init__(
        self, size: int = SIZE, geometry: Geometry = GEOMETRY, state: int = -1, **limits: Any
    ) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            ours.close()
            try:
                _serve(theirs, size, geometry, state, limits)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        theirs.close()
        self._socket = ours
        self._alive = True
        self.tell("made")

    def tell(self, what: str, fd: int = -1, timeout: float = 60) -> dict[str, Any]:
        """Have it do something, and return its answer; raises ZramdError for its error."""
        self.send(what, fd)
        self._socket.settimeout(timeout)
        answer: dict[str, Any] = json.loads(self._socket.recv(65536))
        if "error" in answer:
            raise UblkError(answer["error"], answer["errno"])
        return answer

    def send(self, what: str, fd: int = -1) -> None:
        """Have it do something, and do not wait for it."""
        socket.send_fds(self._socket, [what.encode()], [] if fd < 0 else [fd])

    def kill(self) -> None:
        """Kill it; when this returns it is gone."""
        if self._alive:
            self._alive = False
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._socket.close()


def _serve(told: socket.socket, size: int, geometry: Geometry, state: int, limits: dict[str, Any]) -> None:
    """What the process does: `serve` and `map` are sent with a descriptor of /dev/ublkcN."""
    device = Device(size, state=state, **limits)
    queues = Queues(device, *geometry)
    mapped = []
    while True:
        words, fds, _, _ = socket.recv_fds(told, 64, 1)
        answer: dict[str, Any] = {}
        try:
            if not words:
                return
            if words == b"serve":
                queues.serve(fds[0])
            elif words == b"map":
                length = -(-geometry.depth * 24 // mmap.PAGESIZE) * mmap.PAGESIZE
                mapped.append(mmap.mmap(fds[0], length, mmap.MAP_SHARED, mmap.PROT_READ))
            elif words == b"join":
                queues.join()
            elif words == b"check":
                device.check()
            elif words == b"stats":
                answer = {**device.counters(), **queues.stats(), "serving": queues.serving}
        except (ZramdError, OSError) as error:
            answer = {"error": str(error), "errno": error.errno}  # type: ignore[union-attr]
        for fd in fds:
            os.close(fd)
        told.send(json.dumps(answer).encode())


@contextmanager
def made(
    recovers: bool = False, number: int = -1, size: int = SIZE, geometry: Geometry = GEOMETRY
) -> Iterator[int]:
    """A device that is not started yet: its number. In the end it is gone, whatever became of it."""
    with Control() as kernel:
        queues, depth, most = geometry
        found = kernel.add(number, queues=queues, depth=depth, max_io_bytes=most, recovers=recovers).number
        try:
            kernel.set_params(found, size, max_io_bytes=most)
            yield found
        finally:
            remove(found)


def remove(number: int) -> None:
    """Stop and delete a device, if it is there."""
    with Control() as kernel, suppress(UblkError):
        kernel.delete(number)


@contextmanager
def opened(number: int) -> Iterator[int]:
    """The device for its server, opened; it appears a moment after it was made."""
    end = time.monotonic() + 10
    while not os.path.exists(f"/dev/ublkc{number}"):
        assert time.monotonic() < end
        time.sleep(0.01)
    fd = os.open(f"/dev/ublkc{number}", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def hand_over(number: int, server: Server, what: str = "serve") -> None:
    """Give the device to a server."""
    with opened(number) as fd:
        server.tell(what, fd)


@contextmanager
def attached(
    recovers: bool = False, size: int = SIZE, geometry: Geometry = GEOMETRY, number: int = -1, **limits: Any
) -> Iterator[tuple[int, Server]]:
    """A device that is served: its number, and its server."""
    with made(recovers, number, size, geometry) as found:
        server = Server(size, geometry, **limits)
        try:
            hand_over(found, server)
            with Control() as kernel:
                kernel.start(found, server.pid)
            yield found, server
            with Control() as kernel:
                kernel.stop(found)
            server.tell("join")
            server.tell("check")
        finally:
            server.kill()


# ---- What a user of the disk does


@contextmanager
def disk(number: int) -> Iterator[int]:
    """The disk, opened with O_DIRECT."""
    fd = os.open(f"/dev/ublkb{number}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def write(fd: int, data: bytes, offset: int) -> None:
    """Write, from memory that suits O_DIRECT."""
    with mmap.mmap(-1, len(data)) as buffer:
        buffer[:] = data
        assert os.pwritev(fd, [buffer], offset) == len(data)


def read(fd: int, length: int, offset: int) -> bytes:
    """Read, into memory that suits O_DIRECT."""
    with mmap.mmap(-1, length) as buffer:
        if os.preadv(fd, [buffer], offset) != length:
            raise OSError(errno.ENODATA, "there is less")  # a disk that is gone ends where it begins
        return buffer[:]


def ranged(fd: int, request: int, offset: int, length: int) -> None:
    """Do one of the ioctls that take a range."""
    fcntl.ioctl(fd, request, struct.pack("QQ", offset, length))


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_int64
    if libc.fallocate(fd, mode | KEEP_SIZE, number(offset), number(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def content(chance: random.Random, blocks: int) -> bytes:
    """Blocks of all kinds: of one word, compressible to some degree, not at all."""
    made = bytearray()
    for _ in range(blocks):
        kind = chance.randrange(3)
        if kind == 0:
            made += struct.pack("Q", chance.getrandbits(64)) * (BLOCK // 8)
        else:
            some = chance.randbytes(BLOCK if kind == 1 else chance.randrange(1, BLOCK))
            made += some + bytes(BLOCK - len(some))
    return bytes(made)


def failing(action: Callable[[], object]) -> dict[str, Any]:
    """What an action that must fail fails with."""
    try:
        action()
    except (ZramdError, OSError, ValueError) as error:
        code = getattr(error, "errno", None)
        return {"errno": errno.errorcode.get(code, code), "says": str(error), "kind": type(error).__name__}
    return {"errno": None, "says": "", "kind": ""}


def gone(number: int, within: float = 20) -> bool:
    """Whether the disk goes within so many seconds."""
    return until(lambda: not os.path.exists(f"/sys/block/ublkb{number}"), within)


def until(true: Callable[[], object], within: float = 20) -> bool:
    """Whether something becomes true within so many seconds."""
    end = time.monotonic() + within
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


# ---- Helpers


def run(*command: str) -> str:
    """Run a program and return what it prints; raises CalledProcessError."""
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout


def load(number: int, what: str, depth: int, seconds: int) -> dict[str, Any]:
    """Load the disk; see the guest's tool."""
    answer: dict[str, Any] = json.loads(
        run(TOOL, "load", f"/dev/ublkb{number}", what, str(depth), str(seconds), "7")
    )
    return answer


def in_flight(number: int) -> int:
    """How many requests the disk has not answered."""
    with open(f"/sys/block/ublkb{number}/inflight") as file:
        return sum(map(int, file.read().split()))


def put(path: str, word: str) -> None:
    """Write a word to a file of the kernel's."""
    with open(path, "w") as file:
        file.write(word)


def in_child(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do something in a process of its own, which may give up its rights, and return what it returns."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            os.write(theirs, json.dumps(action()).encode())
        os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with os.fdopen(ours, "rb") as file:
        answer: dict[str, Any] = json.loads(file.read() or b"{}")
    return answer
