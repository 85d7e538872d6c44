"""What the server says that its pool takes, against what the kernel says that the pool's mapping takes."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.content import block_content
from support.run import wait_until
from support.server import NbdkitProcess

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm import smaps

from zramd.core.device.device import state_layout

BLOCK = 4096
SIZE = 64 << 20
BLOCKS = 10_000  # that are written: 19 MiB in the pool
FREED = 0.65  # of them
CLOSE = 0.01  # by how much of what the server says the kernel may say more or less
TABLES = 64 << 10  # bytes: where pages are anonymous, small tables may be in the same mapping
GIVEN_BACK = 1.0  # seconds from the end of a compaction
Serve = Callable[..., NbdkitProcess]


def pool(server: NbdkitProcess) -> tuple[int, int]:
    """Rss and Pss of the pool's pages."""
    layout = state_layout(SIZE)
    return smaps.arena(
        Path(f"/proc/{server.process.pid}/smaps").read_text(), layout["spans"] * layout["span_size"]
    )


def agrees(server: NbdkitProcess, kind: str) -> bool:
    """Whether the server and the kernel say the same of the pool."""
    used = server.stats()["mem_used_total"]
    tables = TABLES if kind == "anonymous" else 0
    return all(used * (1 - CLOSE) <= there <= used * (1 + CLOSE) + tables for there in pool(server))


def fill(nbd: NbdSocket) -> None:
    """Write blocks of all sizes after compression, from one repeated word to those that do not compress."""
    for block in range(BLOCKS):
        assert nbd.ask(nbd.WRITE, block * BLOCK, BLOCK, block_content(block, 1)) == 0


def free(nbd: NbdSocket) -> None:
    """Trim most of what `fill` wrote, one block here and one there."""
    for block in random.Random(1).sample(range(BLOCKS), int(FREED * BLOCKS)):
        assert nbd.ask(nbd.TRIM, block * BLOCK, BLOCK) == 0


@pytest.mark.parametrize("kind", ["anonymous", "state"])
def test_the_stats_say_what_the_kernel_says(serve: Serve, memory_folder: Path, kind: str) -> None:
    settings = {"state": memory_folder / "state"} if kind == "state" else {}
    server = serve(disksize=SIZE, compaction="off", **settings)
    nbd = NbdSocket(server)
    fill(nbd)
    full = server.stats()
    assert full["mem_used_total"] > 16 << 20
    assert full["huge_pages"] > BLOCKS // 20
    assert agrees(server, kind)

    free(nbd)
    assert server.stats()["mem_used_total"] < 0.8 * full["mem_used_total"]
    assert agrees(server, kind)

    before, resident = server.stats()["mem_used_total"], server.resident()
    assert server.request("POST", "/compact")[0] == 200
    wait_until(lambda: agrees(server, kind), GIVEN_BACK)
    given_back = before - server.stats()["mem_used_total"]
    assert given_back > before // 4
    # The process as a whole has lost it, but for what Python takes to compact: it is not elsewhere now.
    assert resident - server.resident() > given_back - (1 << 20)

    assert nbd.ask(nbd.TRIM, 0, SIZE) == 0
    assert server.stats()["mem_used_total"] < 1 << 20
    assert agrees(server, kind)

    fill(nbd)
    assert server.stats()["mem_used_total"] > 16 << 20
    assert agrees(server, kind)
    nbd.close()
    # It is refused until the server has seen the client leave.
    wait_until(lambda: server.request("POST", "/reset")[0] == 200)
    assert server.stats()["mem_used_total"] == 0
    assert agrees(server, kind)


@pytest.mark.parametrize("kind", ["anonymous", "state"])
def test_compaction_in_the_background_gives_back(serve: Serve, memory_folder: Path, kind: str) -> None:
    """By itself, and all that it says it has."""
    settings = {"state": memory_folder / "state"} if kind == "state" else {}
    server = serve(disksize=SIZE, compaction_interval="0.1", **settings)
    nbd = NbdSocket(server)
    fill(nbd)
    full = server.stats()["mem_used_total"]
    free(nbd)
    wait_until(lambda: server.stats()["frag_ratio"] > 90, 30)
    wait_until(lambda: agrees(server, kind), GIVEN_BACK)
    assert pool(server)[0] < full * 0.5
    nbd.close()
