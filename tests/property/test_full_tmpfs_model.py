"""The model of test_device_model with a state on a small tmpfs that gets full at any moment.

The device is in a process of its own: a page that is touched though there is no room for it ends that by
SIGBUS. Then Hypothesis shows the shortest way there.
"""

import ctypes
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import initialize, rule
from support.run import SANITIZED, SCALE
from test_device_model import BLOCK, SIZE, DeviceModel

from zramd import Device, PoolFullError
from zramd.core.device import saving
from zramd.core.device.device import state_layout

TMPFS = 1 << 20
CLONE_NEWNS = 0x00020000
FORK = multiprocessing.get_context("fork")


class Server:
    """What runs in the other process: a device over a state on a tmpfs, and what fills that."""

    def __init__(self, folder: str) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "zramd-test", folder], check=True)
        self.folder = folder
        self.verify = False
        self.fd = os.open(f"{folder}/state", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.fd, state_layout(SIZE)["bytes"])
        self.device: Device
        self.refiller: threading.Thread | None = None

    def make(self, verify: bool) -> None:
        self.device = Device(SIZE, state=self.fd, verify=verify, cold_level=3)

    def fill(self, left: int) -> None:
        """Leave so many pages free in the tmpfs."""
        with suppress(FileNotFoundError):
            os.unlink(f"{self.folder}/filler")
        with open(f"{self.folder}/filler", "wb", buffering=0) as filler:
            while (room := os.statvfs(self.folder).f_bavail - left) > 0:
                try:
                    filler.write(bytes(min(room, 256) * BLOCK))
                except OSError as error:  # the reserve's thread has taken it meanwhile
                    if error.errno != errno.ENOSPC:
                        raise

    def empty(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(f"{self.folder}/filler")

    def read(self, offset: int, length: int) -> bytes:
        buf = bytearray(length)
        self.device.read(buf, offset)
        return bytes(buf)

    def reserve_start(self, size: int) -> None:
        self.device.reserve_start(size)
        self.refiller = threading.Thread(target=self.device.reserve_keep)
        self.refiller.start()

    def reserve_stop(self) -> None:
        if self.refiller is not None:
            self.device.reserve_stop()
            self.refiller.join()
            self.refiller = None

    def save_and_load(self, left: int) -> bool:
        """Whether the device is again what was saved; else it is empty: `left` pages were not enough."""
        with tempfile.TemporaryFile(dir="/dev/shm") as stream:
            saving.save(self.device, stream.fileno())
            stream.seek(0)
            try:
                self.device.reset()  # a reserve's thread may take what the tables of an empty one need
                self.fill(left)
                saving.load(self.device, stream.fileno())
            except (PoolFullError, MemoryError):
                return False
        return True

    def serve(self, pipe: Connection) -> None:
        while (call := pipe.recv()) is not None:
            where, name, arguments = call
            target = self if where == "server" else self.device
            try:
                if name.startswith("="):
                    setattr(target, name[1:], *arguments)
                    answer = None
                else:
                    found = getattr(target, name)
                    answer = found(*arguments) if callable(found) else found
                pipe.send((None, answer))
            except Exception as error:
                pipe.send((type(error).__name__, getattr(error, "strerror", None) or str(error)))
        self.reserve_stop()


def run(folder: str, pipe: Connection) -> None:
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # pytest's faulthandler would print every stack
    Server(folder).serve(pipe)


class Proxy:
    """The device in the other process, as far as the model uses it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="zramd-test-")
        self._pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(target=run, args=(self._folder.name, theirs))
        self._process.start()
        theirs.close()

    def call(self, where: str, name: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((where, name, arguments))
            error, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise AssertionError(f"the server died in {name}: {self._process.exitcode}") from None
        if error == "PoolFullError":
            raise PoolFullError(answer)
        if error == "MemoryError":
            raise MemoryError(answer)
        assert error is None, f"{error}: {answer}"
        return answer

    def read(self, buf: bytearray, offset: int) -> None:
        buf[:] = self.call("server", "read", offset, len(buf))

    @property
    def mem_limit(self) -> int:
        return int(self.call("device", "mem_limit"))

    @mem_limit.setter
    def mem_limit(self, limit: int) -> None:
        self.call("device", "=mem_limit", limit)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.call("device", name, *arguments)

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(10)
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._folder.cleanup()
        assert self._process.exitcode == 0


class FullTmpfsModel(DeviceModel):
    @initialize(
        full=st.booleans(),
        reserve=st.booleans(),
        kept=st.just(True),
        verify=st.booleans(),
        data=st.data(),
    )
    def start(self, full: bool, reserve: bool, kept: bool, verify: bool, data: st.DataObject) -> None:
        self.verify = verify
        self.device: Any = Proxy()
        self.device.call("server", "make", verify)
        self.fd = 0  # there is a state
        if reserve:
            self.device.call("server", "reserve_start", SIZE // 8)
        if full:
            self.write((0, SIZE), data)

    def make(self) -> Any:
        self.device.call("server", "make", self.verify)
        return self.device

    def stop_refiller(self) -> None:
        self.device.call("server", "reserve_stop")

    def refused(self) -> None:
        """By the limit or by the tmpfs, where there may have been no room to compact in either."""

    @rule(left=st.integers(0, 5))
    def fill(self, left: int) -> None:
        self.device.call("server", "fill", left)

    @rule()
    def empty(self) -> None:
        self.device.call("server", "empty")

    @rule(left=st.one_of(st.integers(0, 20), st.just(200)))
    def save_and_load(self, left: int) -> None:
        limit = self.device.mem_limit
        if not self.device.call("server", "save_and_load", left):
            self.model = bytearray(SIZE)
        assert self.device.mem_limit == limit

    @rule(
        size=st.sampled_from((200, 1050, 1490, 1690, 1860, 2900)),
        kept=st.integers(3, 30),
        left=st.integers(0, 3),
        budget=st.one_of(st.just(0), st.integers(1, 20_000)),
        rnd=st.randoms(use_true_random=True),
    )
    def compact_what_is_alike(self, size: int, kept: int, left: int, budget: int, rnd: random.Random) -> None:
        """Many holes in few zspages, of one class, and next to no room to fill them."""
        self.device.call("server", "empty")
        self.device.mem_limit = 0
        for offset in range(0, SIZE, BLOCK):
            content = rnd.randbytes(size).ljust(BLOCK, b"\0")
            self.device.write(content, offset)
            self.model[offset : offset + BLOCK] = content
        for offset in rnd.sample(range(0, SIZE, BLOCK), SIZE // BLOCK - kept):
            self.trim((offset, BLOCK))
        self.device.call("server", "fill", left)
        self.device.compact(budget)
        self.read((0, SIZE))

    @rule(data=st.data())
    def write_when_there_is_room_again(self, data: st.DataObject) -> None:
        """What failed for lack of room does not fail any more."""
        self.device.call("server", "empty")
        self.device.mem_limit = 0
        self.write((0, SIZE), data)
        content = data.draw(st.binary(min_size=BLOCK, max_size=BLOCK))
        self.device.write(content, 5 * BLOCK)
        self.model[5 * BLOCK : 6 * BLOCK] = content

    @rule()
    def reset(self) -> None:
        with suppress(PoolFullError, MemoryError):
            self.device.reset()
        self.model = bytearray(SIZE)

    def teardown(self) -> None:
        if not isinstance(self.device, Proxy):
            return
        try:
            now = bytearray(SIZE)
            self.device.read(now, 0)
            assert now == self.model
        finally:
            self.device.end()


TestFullTmpfsModel = FullTmpfsModel.TestCase
TestFullTmpfsModel.settings = settings(
    deadline=None, stateful_step_count=30, max_examples=15 if SANITIZED else int(60 * max(SCALE, 1))
)
TestFullTmpfsModel = pytest.mark.skipif(os.geteuid() != 0, reason="may not mount a tmpfs")(TestFullTmpfsModel)


def test_the_tmpfs_is_smaller_than_the_device() -> None:
    """Or the model would hardly ever meet its end."""
    assert TMPFS <= 4 * SIZE
    assert Path("/proc/self/ns/mnt").exists()
