"""Servers that are killed while blocks leave memory for a backing, move on it, and come back.

20 kills; ZRAMD_STRESS multiplies that. The seed is printed and can be given as ZRAMD_SEED.
"""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.client import NbdSocket
from support.run import SCALE, SEED
from support.server import NbdkitProcess
from test_crash import BLOCK, SIZE, WORKERS, Ledger, client

from zramd.core.device.backing import EXTENT
from zramd.core.device.writeback import Writeback
from zramd.server import opening
from zramd.settings import config

KILLS = max(1, int(20 * SCALE))
BLOCKS = SIZE // BLOCK
EXTENTS = 96  # so few that others are emptied all the time
CALLS = {"17": "read", "18": "write"} if os.uname().machine == "x86_64" else {"67": "read", "68": "write"}
COUNTED = ("written_out", "brought_back", "reclaimed_bytes", "bd_reads")


class Resting(random.Random):
    """Of clients that rest: beside others hardly anything goes out in so short a life."""

    def random(self) -> float:
        time.sleep(0.1 * super().random())
        return super().random()


def mover(served: NbdkitProcess, rnd: random.Random, errors: list[BaseException]) -> None:
    """Ask for passes, and now and then for everything to come back, until the server is gone."""
    try:
        while True:
            first = rnd.randrange(BLOCKS)
            last = min(first + rnd.randrange(1, BLOCKS // 2), BLOCKS - 1)
            path, body = rnd.choice(
                (
                    ("/writeback", f"page_indexes={first}-{last}"),
                    ("/writeback", f"page_indexes=0-{BLOCKS - 1}"),
                    ("/writeback", "type=huge"),
                    ("/idle", "all"),
                    ("/recompress", "type=huge"),
                    ("/writeback", "type=idle"),
                    ("/bring_back", ""),
                )
            )
            status, answer = served.request("POST", path, body)
            assert status in (200, 409, 503), answer
            time.sleep(rnd.uniform(0, 0.05))
    except (OSError, IndexError):
        pass  # killed; perhaps before it had answered
    except BaseException as error:
        errors.append(error)


def at_work(pid: int) -> str:
    """Say what the thread that moves blocks does with the backing at this moment; "" if nothing is seen."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            words = (task / "syscall").read_text().split()
            if (task / "comm").read_text() == "zramd-out\n" and words[0] in CALLS:
                kind = CALLS[words[0]]
                # Only reclaim reads a whole extent at once.
                return "reclaim_read" if kind == "read" and int(words[3], 16) == EXTENT else kind
    return ""


def settle_alone(settings: dict[str, Any], ledgers: list[Ledger], rnd: random.Random) -> None:
    """Look at what a server left without one, and move some of it."""
    pairs = {key: str(value) for key, value in settings.items() if key != "disksize"}
    made = opening.make_device(config.parse({**pairs, "size": str(SIZE)}.items()))
    device = made.device
    assert made.backing is not None
    try:
        device.check()

        def read(offset: int, length: int) -> bytes:
            buf = bytearray(length)
            device.read(buf, offset)
            return bytes(buf)

        for ledger in ledgers:
            ledger.settle(read)
        hands = Writeback(device)
        hands.reclaim(1.0)
        hands.gather(rnd.randrange(BLOCKS), BLOCKS, 0)
        hands.flush()
        device.check()
        for ledger in ledgers:
            ledger.settle(read)
    finally:
        os.close(made.backing._opened.fd)


@pytest.mark.timeout(120 + 15 * KILLS)
def test_a_killed_server_loses_nothing_of_what_is_out(
    serve: Callable[..., NbdkitProcess], memory_folder: Path, disk_folder: Path, tmp_path: Path
) -> None:
    rnd = random.Random(SEED)
    backing = disk_folder / "backing"
    fd = os.open(backing, os.O_CREAT | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, EXTENTS * EXTENT)
    os.close(fd)
    ledgers = [Ledger(me) for me in range(WORKERS)]
    settings = {
        "rundir": tmp_path / "run",
        "disksize": SIZE,
        "state": memory_folder / "state",
        "backing": backing,
        "writeback_limit": "off",
        "recompression": "zstd(level=1)",
        "verify": "on",
        "compaction_interval": "0.01",
    }
    counts = dict.fromkeys(("out_found", *COUNTED), 0)
    # What kills met: a pass under way, a life that has emptied extents, a call that has not returned.
    met = dict.fromkeys(("pass", "reclaim", "write", "read", "reclaim_read"), 0)
    before: dict[str, int] = dict.fromkeys(COUNTED, 0)
    for kill in range(KILLS):
        served = serve(**settings)
        errors: list[BaseException] = []
        kind = Resting if kill % 2 else random.Random
        found = served.stats()["writeback"]
        counts["out_found"] += found["out_pages"]
        assert all(found[name] >= before[name] for name in COUNTED), "the statistics do not carry on"
        nbd = NbdSocket(served)
        for ledger in ledgers:
            ledger.settle(nbd.read)
        nbd.close()
        threads = [
            threading.Thread(target=client, args=(served, ledger, kind(rnd.random()), errors))
            for ledger in ledgers
        ]
        threads.append(threading.Thread(target=mover, args=(served, random.Random(rnd.random()), errors)))
        for thread in threads:
            thread.start()
        time.sleep(rnd.uniform(0.02, 0.8))
        after = served.stats()["writeback"]
        before = {name: after[name] for name in COUNTED}
        assert after["bd_read_errors"] == after["bd_write_errors"] == 0
        assert json.loads(served.request("GET", "/health")[1])["causes"] == []
        met["pass"] += "under way" in after["reason"] or "being brought back" in after["reason"]
        met["reclaim"] += after["reclaimed_bytes"] > found["reclaimed_bytes"]
        if doing := at_work(served.process.pid):
            met[doing] += 1
        served.stop(signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert not errors, errors
        if kill % 2:
            settle_alone(settings, ledgers, rnd)
    for name in COUNTED:
        counts[name] = after[name]
    print(f"{KILLS} kills, {BLOCKS} blocks compared after each: {counts}; met {met}")
    assert met["pass"] > KILLS // 4
    assert met["reclaim"] > 0
    assert counts["out_found"] > 10 * KILLS
    assert counts["written_out"] > 10 * KILLS
    assert counts["reclaimed_bytes"] > 0
    assert counts["brought_back"] > 0
