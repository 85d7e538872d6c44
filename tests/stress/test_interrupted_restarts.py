"""Restarts that are interrupted at random steps, while clients write and verify: nothing answered is lost.

Scaled by ZRAMD_STRESS: 40 makes 200 restarts. The seed is printed and can be given as ZRAMD_SEED.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.content import block_content
from support.run import PATIENCE, SANITIZED, SCALE, SEED, wait_until
from support.steps import Steps

from zramd.contract import rundir

RESTARTS = max(5, int(5 * SCALE))
CLIENTS = 4
BLOCKS = 500  # of each
BLOCK = 4096
BEFORE = ("restart.turn", "restart.sockets", "restart.spawned", "restart.ready")
AFTER = ("successor.go", "server.leaves", "successor.told", "server.left", "successor.alone")
NEW = ("server.device", "server.published", "server.serves")


class Device:
    """A device that is started whenever nobody serves it."""

    def __init__(self, folder: Path, state: Path, steps: Steps) -> None:
        self.name = "shaken"
        self.rundir = folder / "run"
        self.socket = self.rundir / "nbd.sock"
        self.state = state
        self.env = {**os.environ, **steps.env, "PYTHONDONTWRITEBYTECODE": "1"}

    @property
    def pid(self) -> int:
        return rundir.holder(str(self.rundir)) or 0

    def begin(self, verb: str) -> "subprocess.Popen[str]":
        words = ["--rundir", str(self.rundir)]
        if verb == "start":
            words = [self.name, "--size", "64M", f"rundir={self.rundir}", f"state={self.state}"]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "zramd", verb, *words],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (
                [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)] and None
            ),
        )

    def start(self) -> None:
        process = self.begin("start")
        _, said = process.communicate(timeout=60 * PATIENCE)
        assert (process.returncode, said) == (0, "")


class Client(threading.Thread):
    """Writes and reads blocks of its own, and connects again whenever it is cut off."""

    def __init__(self, device: Device, number: int) -> None:
        super().__init__(daemon=True)
        self.device = device
        self.first = number * BLOCKS
        self.may: dict[int, set[int]] = {}  # the versions that a block may have: one, if that was answered
        self.dice = random.Random(SEED + number)
        self.requests = self.connections = 0
        self.failure: BaseException | None = None
        self.stopping = False

    def run(self) -> None:
        try:
            while not self.stopping:
                with suppress(OSError, EOFError):
                    nbd = NbdSocket(self.device)  # type: ignore[arg-type]
                    self.connections += 1
                    while not self.stopping:
                        self.work(nbd)
                time.sleep(0.002)
        except BaseException as error:
            self.failure = error

    def work(self, nbd: NbdSocket) -> None:
        block = self.first + self.dice.randrange(BLOCKS)
        if self.dice.random() < 0.5:
            self.requests += 1
            version = self.requests
            self.may.setdefault(block, {0}).add(version)
            error = nbd.ask(nbd.WRITE, block * BLOCK, BLOCK, block_content(block, version))
            assert error == 0, f"a write was answered by {error}"
            self.may[block] = {version}
        else:
            self.verify(nbd, block)

    def verify(self, nbd: NbdSocket, block: int) -> None:
        error = nbd.ask(nbd.READ, block * BLOCK, BLOCK)
        assert error == 0, f"a read was answered by {error}"
        found = nbd.receive(BLOCK)
        versions = self.may.get(block, {0})
        matches = [version for version in versions if found == block_content(block, version)]
        assert matches, f"block {block} has none of the versions {versions}"
        self.may[block] = set(matches[:1])


@pytest.mark.skipif(
    SANITIZED, reason="a server under a sanitizer takes longer to start than the command waits"
)
@pytest.mark.timeout((60 + 20 * RESTARTS) * PATIENCE)
def test_restarts_interrupted_at_random(tmp_path: Path, memory_folder: Path, steps: Steps) -> None:
    device = Device(tmp_path, memory_folder / "state", steps)
    dice = random.Random(SEED)
    device.start()
    clients = [Client(device, number) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    ends: Counter[str] = Counter()
    try:
        for _ in range(RESTARTS):
            ends[interrupt(device, steps, dice)] += 1
            for client in clients:
                assert client.failure is None, client.failure
            if not device.pid:
                device.start()
            seen = [client.requests for client in clients]
            wait_until(
                lambda seen=seen: all(
                    c.requests > n + 2 or c.failure for c, n in zip(clients, seen, strict=True)
                ),
                60,
            )  # type: ignore[misc]
    finally:
        for client in clients:
            client.stopping = True
            client.join(30 * PATIENCE)
        try:
            for client in clients:
                assert client.failure is None, client.failure
            if not device.pid:
                device.start()
            nbd = NbdSocket(device)  # type: ignore[arg-type]
            for client in clients:
                for block in client.may:
                    client.verify(nbd, block)
            nbd.close()
        finally:
            if device.pid:
                os.kill(device.pid, signal.SIGKILL)
    assert os.listdir(memory_folder) == ["state"]
    requests, connections = sum(c.requests for c in clients), sum(c.connections for c in clients)
    told = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
    print(f"{RESTARTS} restarts: {told}; {requests} writes, {connections} connections, none lost")


def interrupt(device: Device, steps: Steps, dice: random.Random) -> str:
    """Restart, and hit one of those who take part; see that all ends as it may, and return how."""
    old = device.pid
    at = dice.choice(BEFORE + AFTER + NEW)
    whom = dice.choice(("command", "command", "old", "process"))
    what = (
        dice.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)) if whom == "command" else signal.SIGKILL
    )
    if whom == "command" and dice.random() < 0.4:
        what = signal.SIGKILL
    steps.held.add(at)
    command = device.begin("restart")
    held = steps.wait(at)
    target = {"command": command.pid, "old": old, "process": held}[whom]
    with suppress(ProcessLookupError):
        os.kill(target, what)
    time.sleep(dice.random() * 0.02)
    steps.release()
    out, said = command.communicate(timeout=60 * PATIENCE)
    context = f"{what.name} to {whom} at {at}: {command.returncode} {out!r} {said!r}"
    assert "Traceback" not in said, context
    told = whom == "command" and at in BEFORE
    if whom == "command" and not told:
        wait_until(lambda: device.pid not in (0, old), 20)
    end = "old" if device.pid == old else "new" if device.pid else "nobody"
    if told:
        assert end == "old", context
    elif whom == "command":
        assert end == "new", context
    else:
        # The old one may be killed before it has passed on what another needs; one that serves, at any time.
        assert end != "nobody" or at in BEFORE or (whom, at) == ("process", "server.serves"), context
    if command.returncode == 0 and end != "nobody":
        assert f"pid           {device.pid}\n" in out, context
    return end
