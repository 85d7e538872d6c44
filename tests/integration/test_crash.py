"""Servers that are killed at random moments under load, and what clients find at the next one.

30 kills; ZRAMD_STRESS multiplies that. The seed is printed and can be given as ZRAMD_SEED.
"""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.content import block_content
from support.run import PATIENCE, SCALE, SEED
from support.server import NbdkitProcess

from zramd import Device
from zramd.core.device import device as core
from zramd.server import statefile

BLOCK = 4096
KILLS = max(1, int(30 * SCALE))
WORKERS = 4
BLOCKS = 2048  # of each worker
SIZE = WORKERS * BLOCKS * BLOCK
CORE = Path(core.__file__)
BUILT = CORE.stat()


class Ledger:
    """What one client knows of its blocks: the version acknowledged, and those that may be there instead."""

    def __init__(self, me: int) -> None:
        self.first = me * BLOCKS
        self.known = [0] * BLOCKS
        self.pending: dict[int, int] = {}
        self.version = 0

    def begin(self, start: int, count: int, version: int) -> None:
        self.pending = dict.fromkeys(range(start, start + count), version)

    def done(self) -> None:
        for index, version in self.pending.items():
            self.known[index] = version
        self.pending = {}

    def settle(self, read: Callable[[int, int], bytes]) -> None:
        """Compare all blocks with what was acknowledged; what was in flight may be old or new, but whole."""
        data = read(self.first * BLOCK, BLOCKS * BLOCK)
        for index, version in enumerate(self.known):
            found = data[index * BLOCK : (index + 1) * BLOCK]
            block = self.first + index
            if found != block_content(block, version):
                there = found[:18] if any(found) else "nothing"
                assert index in self.pending, f"block {block}: version {version} is lost, {there!r} is there"
                assert found == block_content(block, self.pending[index]), f"block {block} is torn"
                self.known[index] = self.pending[index]
        self.pending = {}


@contextmanager
def evidence(state: Path, folder: Path) -> Iterator[None]:
    """Keep the state in which something is lost, and tell when servers ran another build than this test."""
    try:
        yield
    except AssertionError as error:
        shutil.copyfile(state, folder / "lost.state")
        error.add_note(f"the state: {folder}/lost.state")
        now = CORE.stat()
        if (now.st_ino, now.st_mtime_ns) != (BUILT.st_ino, BUILT.st_mtime_ns):
            error.add_note("zramd has been built again meanwhile: this shows nothing of either build")
        raise


def client(served: NbdkitProcess, ledger: Ledger, rnd: random.Random, errors: list[BaseException]) -> None:
    """Write, trim and read until the server is gone."""
    try:
        nbd = NbdSocket(served)
        while True:
            start = rnd.randrange(BLOCKS - 16)
            count = rnd.choice((1, 1, 1, 2, 5, 16))
            offset, length = (ledger.first + start) * BLOCK, count * BLOCK
            action = rnd.random()
            if action < 0.55:
                ledger.version += 1
                version = ledger.version
                data = b"".join(block_content(ledger.first + start + i, version) for i in range(count))
                ledger.begin(start, count, version)
                assert nbd.ask(nbd.WRITE, offset, length, data) == 0
                ledger.done()
            elif action < 0.8:
                ledger.begin(start, count, 0)
                assert nbd.ask(rnd.choice((nbd.TRIM, nbd.WRITE_ZEROES)), offset, length) == 0
                ledger.done()
            else:
                data = nbd.read(offset, length)
                for i in range(count):
                    expected = block_content(ledger.first + start + i, ledger.known[start + i])
                    assert data[i * BLOCK : (i + 1) * BLOCK] == expected
    except OSError:
        pass  # ConnectionError: killed
    except BaseException as error:
        errors.append(error)


def take_over(path: Path, verify: bool) -> Device:
    fd = statefile.open_state(str(path), SIZE, verify)
    try:
        return Device(SIZE, state=fd, verify=verify)
    finally:
        os.close(fd)


@pytest.mark.timeout((120 + 10 * KILLS) * PATIENCE)
def test_a_killed_server_loses_nothing(
    serve: Callable[..., NbdkitProcess], memory_folder: Path, tmp_path: Path
) -> None:
    rnd = random.Random(SEED)
    path = memory_folder / "state"
    ledgers = [Ledger(me) for me in range(WORKERS)]
    settings = {
        "rundir": tmp_path / "run",
        "disksize": SIZE,
        "state": path,
        "verify": "on",
        "compaction_interval": "0.01",
        "compaction_threshold": "0.1",
    }
    counts = {"recovered_blocks": 0, "leaked_objects": 0, "objects_migrated": 0, "writes": 0}
    for kill in range(KILLS):
        served = serve(**settings)
        errors: list[BaseException] = []
        before = served.stats()
        assert before["writes"] >= counts["writes"], "the statistics do not carry on"
        counts["recovered_blocks"] = before["recovered_blocks"]
        counts["leaked_objects"] += before["leaked_objects"]
        # What the last one left: some of it over NBD, as a client sees it.
        nbd = NbdSocket(served)
        with evidence(path, tmp_path):
            for ledger in ledgers:
                ledger.settle(nbd.read)
        nbd.close()
        clients = [
            threading.Thread(target=client, args=(served, ledger, random.Random(rnd.random()), errors))
            for ledger in ledgers
        ]
        for thread in clients:
            thread.start()
        time.sleep(rnd.uniform(0.02, 0.6))
        after = served.stats()
        counts["objects_migrated"], counts["writes"] = after["objects_migrated"], after["writes"]
        served.stop(signal.SIGKILL)
        for thread in clients:
            thread.join()
        assert not errors, errors
        if kill % 2:
            device = take_over(path, True)
            device.check()
            counts["leaked_objects"] += device.counters()["leaked_objects"]

            def read(offset: int, length: int, device: Device = device) -> bytes:
                buf = bytearray(length)
                device.read(buf, offset)
                return bytes(buf)

            with evidence(path, tmp_path):
                for ledger in ledgers:
                    ledger.settle(read)
            device.compact()
            device.check()
            del device, read
    print(f"{KILLS} kills: {counts}")
    assert counts["objects_migrated"] > 0
    assert counts["writes"] > 10 * KILLS
    assert counts["recovered_blocks"] > 1000
