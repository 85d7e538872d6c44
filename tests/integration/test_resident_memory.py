"""What the server says that its pool takes, against what the kernel says that the pool's mapping takes."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import NbdSocket, Served, block_content, wait_until

BLOCK = 4096
SIZE = 64 << 20
BLOCKS = 10_000  # that are written: 19 MiB in the pool
FREED = 0.65  # of them
CLOSE = 0.01  # by how much of what the server says the kernel may say more or less
# In bytes: where pages are anonymous, tables that lie next to the arena's become one mapping with them.
TABLES = 64 << 10
GIVEN_BACK = 1.0  # seconds from the end of a compaction
Serve = Callable[..., Served]


@dataclass(frozen=True)
class Mapping:
    """One mapping of a process; in bytes."""

    start: int
    end: int
    readable: bool
    rss: int
    pss: int


def mappings(pid: int) -> Iterator[Mapping]:
    """The process's mappings in the order of their addresses."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)[1:]:
        head, *lines = part.splitlines()
        place, rights = head.split()[:2]
        start, end = (int(word, 16) for word in place.split("-"))
        sizes = {words[0]: int(words[1]) * 1024 for line in lines if (words := line.split())[-1] == "kB"}
        yield Mapping(start, end, rights[0] == "r", sizes["Rss:"], sizes["Pss:"])


def arena(pid: int) -> tuple[int, int]:
    """Rss and Pss of the pool's pages.

    The pool has by far the largest address space, of which only the beginning, its pages, can be read.
    """
    found = list(mappings(pid))
    unused = max((each for each in found if not each.readable), key=lambda each: each.end - each.start)
    assert unused.end - unused.start > SIZE
    (used,) = (each for each in found if each.end == unused.start)
    return used.rss, used.pss


def agrees(server: Served, kind: str) -> bool:
    """Whether the server and the kernel say the same of the pool."""
    used = server.stats()["mem_used_total"]
    rss, pss = arena(server.process.pid)
    tables = TABLES if kind == "anonymous" else 0
    return all(used * (1 - CLOSE) <= there <= used * (1 + CLOSE) + tables for there in (rss, pss))


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
    assert server.stats()["mem_used_total"] < full["mem_used_total"]
    assert agrees(server, kind)

    before, resident = server.stats()["mem_used_total"], server.resident()
    assert server.request("POST", "/compact")[0] == 200
    wait_until(lambda: agrees(server, kind), GIVEN_BACK)
    given_back = before - server.stats()["mem_used_total"]
    assert given_back > before // 2
    # The process as a whole has lost what the server says, so it has not become anything else.
    assert resident - server.resident() > given_back * (1 - CLOSE) - TABLES

    assert nbd.ask(nbd.TRIM, 0, SIZE) == 0
    assert server.stats()["mem_used_total"] < 1 << 20
    assert agrees(server, kind)

    fill(nbd)
    assert server.stats()["mem_used_total"] > 16 << 20
    assert agrees(server, kind)
    nbd.close()
    wait_until(lambda: server.request("POST", "/reset")[0] == 200)  # once the server has seen the client leave
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
    assert arena(server.process.pid)[0] < full * 0.5
    nbd.close()
