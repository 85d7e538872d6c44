"""Servers of one budget that are killed at any moment: the sum is never above it, and nothing is lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.run import SCALE, SEED, SETTINGS, wait_until

import zramd
from zramd.contract import budget as file
from zramd.server.budget import Member
from zramd.settings import config

MIB = 1 << 20
BUDGET = 12 * MIB
SERVERS = 4
TABLES = MIB  # of each state: what is in it beside the pool
ROUNDS = int(16 * SCALE)
READY = "serves"

# What is of a server for the budget: its device, its part, and its housekeeping, at a hundred times the pace.
SERVER = """
import random, sys, time
from zramd.errors import PoolFullError
from zramd.server import budget, opening
from zramd.settings import config
budget.SWEEP = 0.05
settings = config.parse(word.split("=", 1) for word in sys.argv[2:])
made = opening.make_device(settings)
made.device.check()
rnd = random.Random(int(sys.argv[1]))
print("serves", flush=True)
due = 0.0
while True:
    block = rnd.randrange(2500)
    try:
        if rnd.random() < 0.8:
            made.device.write(rnd.randbytes(4096), block * 4096)
        else:
            made.device.trim(block * 4096, 4096 * rnd.randrange(1, 200))
    except PoolFullError:
        made.device.trim(block * 4096, 4096 * rnd.randrange(1, 200))
    if time.monotonic() > due:
        due = time.monotonic() + 0.01
        made.member.tidy(made.device)
    if made.device.counters()["mem_used_total"] > made.member.core.mine:
        sys.exit("more is used than granted")
"""


class Server:
    """A process that serves nobody, but fills and frees its device."""

    def __init__(self, folder: Path, number: int) -> None:
        self.state = folder / f"{number}.state"
        self._words = [
            *(f"disksize={16 * MIB}", f"budget={BUDGET}", f"name=d{number}", f"rundir={folder}/d{number}"),
            *(f"budget_floor={MIB}", f"state={self.state}") * (number % 2),
        ]
        self.process: subprocess.Popen[str] | None = None

    def start(self, seed: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVER, str(seed), *self._words],
            env={**os.environ, **SETTINGS, "PYTHONPATH": str(Path(zramd.__file__).parents[1])},
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == READY

    def stand_still(self) -> None:
        assert self.process is not None
        assert self.process.poll() is None, "it has ended by itself"
        self.process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


def in_states(servers: list[Server]) -> int:
    """What the states take, by the file system's word."""
    return sum(
        max(0, server.state.stat().st_blocks * 512 - TABLES) for server in servers if server.state.exists()
    )


def granted(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return sum(slot.granted for slot in file.slots(fd))
    finally:
        os.close(fd)


@pytest.mark.slow
def test_killed_at_any_moment(memory_folder: Path) -> None:
    """Two of them have a state and a floor, two have neither."""
    rnd = random.Random(SEED)
    path = memory_folder / file.NAME
    servers = [Server(memory_folder, number) for number in range(SERVERS)]
    try:
        for server in servers:
            server.start(rnd.randrange(1 << 30))
            server.wait()
        for _ in range(ROUNDS):
            time.sleep(rnd.random() * 0.3)
            victim = rnd.choice(servers)
            victim.kill()
            for server in servers:
                if server is not victim:
                    server.stand_still()
            # One that stands still, or was killed, in the middle of a claim has it in its slot: twice at most
            # what is claimed at once, of each.
            assert in_states(servers) <= BUDGET
            assert granted(path) <= BUDGET + SERVERS * BUDGET // 64
            for server in servers:
                if server.process is not None:
                    server.process.send_signal(signal.SIGCONT)
            victim.start(rnd.randrange(1 << 30))
            victim.wait()
    finally:
        for server in servers:
            server.kill()
    # Nothing is lost: with the states all of it is free again, but for who looks.
    for server in servers:
        if server.state.exists():
            server.state.unlink()
    words = {"disksize": "1M", "budget": str(BUDGET), "name": "last", "rundir": f"{memory_folder}/last"}
    last = Member(config.parse(words.items()))
    assert last.core.taken == 0
    assert last.core.claim(BUDGET)
    os.close(last._fd)
