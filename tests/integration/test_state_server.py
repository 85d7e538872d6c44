"""A server with state=: what the next one has, what it says when it cannot, and what verify=on tells."""

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.run import wait_until
from support.server import PACKAGE_PARENT, PLUGIN, NbdkitProcess

from zramd.core.device.device import state_layout

BLOCK = 4096
SIZE = 64 << 20
Serve = Callable[..., NbdkitProcess]


def pattern(seed: int) -> bytes:
    return random.Random(seed).randbytes(900) + bytes(BLOCK - 900)


@pytest.mark.parametrize("number", [9, 15])
def test_the_next_server_carries_on(serve: Serve, memory_folder: Path, tmp_path: Path, number: int) -> None:
    settings = {"state": memory_folder / "state", "rundir": tmp_path / "run", "mem_limit": "8M"}
    first = serve(**settings)
    nbd = NbdSocket(first)
    for block in range(64):
        assert nbd.ask(nbd.WRITE, block * BLOCK, BLOCK, pattern(block)) == 0
    assert nbd.ask(nbd.TRIM, 0, BLOCK) == 0
    assert first.request("PUT", "/mem_limit", "16M")[0] == 200
    before = first.stats()
    first.stop(number)
    second = serve(**settings)
    nbd = NbdSocket(second)
    assert nbd.read(0, BLOCK) == bytes(BLOCK)
    for block in range(1, 64):
        assert nbd.read(block * BLOCK, BLOCK) == pattern(block)
    after = second.stats()
    for name in (
        "pages_stored",
        "compr_data_size",
        "writes",
        "written_bytes",
        "trims",
        "mem_used_max",
        "mem_limit",
    ):
        assert after[name] == before[name] > 0, name
    assert after["recovered_blocks"] == 63
    assert "took over 63 blocks from state" in second.log.read_text()
    assert "zramd_recovered_blocks" in second.request("GET", "/metrics")[1]


def test_as_a_daemon(memory_folder: Path, tmp_path: Path) -> None:
    """nbdkit forks: the child has the mapping and the lock."""
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    command = ["nbdkit", "-U", str(run / "nbd.sock"), "-P", str(tmp_path / "pid"), "python", str(PLUGIN)]
    command += [f"rundir={run}", "disksize=64M", f"state={memory_folder / 'state'}"]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, check=True, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    # The process that was started has ended, the one that serves begins.
    wait_until(lambda: (run / "control.sock").exists() and (tmp_path / "pid").exists())
    pid = int((tmp_path / "pid").read_text())
    try:
        words = [*command[:2], str(tmp_path / "other.sock"), *command[5:7], f"rundir={tmp_path / 'other'}"]
        other = subprocess.run(
            words + command[8:],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert other.returncode == 1
        assert "is in use by a running server: stop that first" in other.stderr
        assert "Traceback" not in other.stderr
    finally:
        os.kill(pid, 9)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"disksize": "32M"}, "is of a device of 67108864 bytes, not 33554432: use disksize=67108864"),
        ({"verify": "on"}, "was made with verify=off: use verify=off"),
    ],
)
def test_refused_with_one_sentence(
    serve: Serve, memory_folder: Path, settings: dict[str, str], message: str
) -> None:
    path = memory_folder / "state"
    serve(state=path).stop(9)
    refused = serve(wait=False, **{"state": path, "disksize": SIZE, **settings})
    assert refused.process.wait(20) == 1
    shown = refused.log.read_text()
    assert message in shown
    assert "Traceback" not in shown
    assert len([line for line in shown.splitlines() if "error" in line]) == 1


def test_a_contradiction_is_refused_with_one_sentence(serve: Serve, memory_folder: Path) -> None:
    path = memory_folder / "state"
    first = serve(state=path, disksize=SIZE)
    nbd = NbdSocket(first)
    assert nbd.ask(nbd.WRITE, 0, BLOCK, pattern(1)) == 0
    first.stop(9)
    with path.open("r+b") as file:
        file.seek((1 << 16) + 4)
        file.write(b"\x40")
    refused = serve(wait=False, state=path, disksize=SIZE)
    assert refused.process.wait(20) == 1
    shown = refused.log.read_text()
    assert "contradicts itself (block 0: its " in shown
    assert "Traceback" not in shown


def test_a_changed_block_is_an_error_that_is_reported(serve: Serve, memory_folder: Path) -> None:
    path = memory_folder / "state"
    served = serve(state=path, disksize=SIZE, verify="on", stats_interval="0.1")
    nbd = NbdSocket(served)
    assert nbd.ask(nbd.WRITE, 7 * BLOCK, BLOCK, pattern(1)) == 0
    layout = state_layout(SIZE)
    fd = os.open(path, os.O_RDWR)
    at = os.lseek(fd, layout["bytes"] - layout["spans"] * layout["span_size"], os.SEEK_DATA) + 100
    byte = os.pread(fd, 1, at)[0]
    os.pwrite(fd, bytes([byte ^ 4]), at)
    assert nbd.ask(nbd.READ, 7 * BLOCK, BLOCK) == 5
    assert served.stats()["checksum_errors"] == 1
    told = "1 reads found a block that had changed in memory, most recently block 7"
    wait_until(lambda: told in served.log.read_text())
    os.pwrite(fd, bytes([byte]), at)
    os.close(fd)
    assert nbd.read(7 * BLOCK, BLOCK) == pattern(1)
    assert nbd.ask(nbd.WRITE, 7 * BLOCK, BLOCK, pattern(2)) == 0
    assert nbd.read(7 * BLOCK, BLOCK) == pattern(2)
    time.sleep(0.3)
    assert served.log.read_text().count("changed in memory") == 1
