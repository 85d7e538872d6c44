"""Servers that are killed at random moments, and what the next one finds in the state they leave behind.

30 kills of each kind; ZRAMD_STRESS multiplies that. The seed is printed and can be given as ZRAMD_SEED.
"""

import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NbdSocket, Served

from zramd import Device, state
from zramd.core.device import state_layout

BLOCK = 4096
SCALE = float(os.environ.get("ZRAMD_STRESS", "1"))
SEED = int(os.environ.get("ZRAMD_SEED", str(random.SystemRandom().randrange(1 << 32))))
KILLS = max(1, int(30 * SCALE))
WORKERS = 4
BLOCKS = 2048  # of each worker
SIZE = WORKERS * BLOCKS * BLOCK


@pytest.fixture(autouse=True)
def seed(record_property: Callable[[str, object], None]) -> None:
    print(f"ZRAMD_SEED={SEED}")
    record_property("seed", SEED)


def content(block: int, version: int) -> bytes:
    """What only this version of this block holds, of every kind; version 0: a hole."""
    if version == 0:
        return bytes(BLOCK)
    rnd = random.Random(block << 32 | version)
    kind = rnd.randrange(8)
    if kind == 0:
        return (block << 32 | version).to_bytes(8, "little") * 512
    head = b"%08d %08d " % (block, version)
    size = 4000 if kind == 1 else rnd.randrange(50, 3600)
    return (head + rnd.randbytes(size) + bytes(BLOCK))[: BLOCK - 18] + head


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
            if found != content(block, version):
                assert index in self.pending, f"block {block}: version {version} is lost"
                assert found == content(block, self.pending[index]), f"block {block} is torn"
                self.known[index] = self.pending[index]
        self.pending = {}


def client(served: Served, ledger: Ledger, rnd: random.Random, errors: list[BaseException]) -> None:
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
                data = b"".join(content(ledger.first + start + i, version) for i in range(count))
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
                    expected = content(ledger.first + start + i, ledger.known[start + i])
                    assert data[i * BLOCK : (i + 1) * BLOCK] == expected
    except OSError:
        pass  # ConnectionError: killed
    except BaseException as error:
        errors.append(error)


def take_over(path: Path, verify: bool) -> Device:
    fd = state.open_state(str(path), SIZE, verify)
    try:
        return Device(SIZE, state=fd, verify=verify)
    finally:
        os.close(fd)


@pytest.mark.timeout(120 + 10 * KILLS)
def test_a_killed_server_loses_nothing(
    serve: Callable[..., Served], memory_folder: Path, tmp_path: Path
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

            for ledger in ledgers:
                ledger.settle(read)
            device.compact()
            device.check()
            del device, read
    print(f"{KILLS} kills: {counts}")
    assert counts["objects_migrated"] > 0
    assert counts["writes"] > 10 * KILLS
    assert counts["recovered_blocks"] > 1000


# Without nbdkit, so that far more happens between two kills.


def work(fd: int, told: mmap.mmap, versions: list[int], seed: int) -> None:
    """Threads that write, trim and read blocks of their own, and tell what they begin and what is done."""
    device = Device(SIZE, state=fd)

    def worker(me: int) -> None:
        rnd = random.Random(seed + me)
        version = versions[me]
        while True:
            version += 1
            index = rnd.randrange(64) if rnd.random() < 0.5 else rnd.randrange(BLOCKS)
            block = me * BLOCKS + index
            shown = 0 if rnd.random() < 0.3 else version
            data = content(block, shown)
            at = block * 16
            told[at : at + 8] = struct.pack("<Q", shown)
            if shown:
                device.write(data, block * BLOCK)
            else:
                device.trim(block * BLOCK, BLOCK)
            told[at + 8 : at + 16] = struct.pack("<Q", shown)
            if rnd.random() < 0.2:
                buf = bytearray(BLOCK)
                device.read(buf, block * BLOCK)
                assert buf == data

    for me in range(WORKERS):
        threading.Thread(target=worker, args=(me,), daemon=True).start()
    while True:
        device.compact(65536)
        device.trim_stock()


@pytest.mark.timeout(120 + 10 * KILLS)
def test_threads_that_are_killed() -> None:
    rnd = random.Random(SEED)
    fd = os.memfd_create("zramd")
    os.ftruncate(fd, state_layout(SIZE)["bytes"])
    told = mmap.mmap(-1, WORKERS * BLOCKS * 16)  # of each block: the version begun, the version done
    versions = [0] * WORKERS
    leaked = pinned = 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                work(fd, told, versions, rnd.randrange(1 << 30))
            finally:
                os._exit(1)
        time.sleep(rnd.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it died by itself"
        device = Device(SIZE, state=fd)
        device.check()
        leaked += device.counters()["leaked_objects"]
        buf = bytearray(SIZE)
        device.read(buf, 0)
        for block in range(WORKERS * BLOCKS):
            begun, done = struct.unpack_from("<QQ", told, block * 16)
            found = buf[block * BLOCK : (block + 1) * BLOCK]
            if found != content(block, done):
                assert begun != done, f"block {block}: version {done} is lost"
                assert found == content(block, begun), f"block {block} is torn"
                done = begun
                pinned += 1
            struct.pack_into("<QQ", told, block * 16, done, done)
            versions[block // BLOCKS] = max(versions[block // BLOCKS], begun)
        device.check()
        del device
    print(f"{KILLS} kills: {leaked} objects leaked, {pinned} blocks in flight were new")
    assert max(versions) > KILLS
    os.close(fd)
