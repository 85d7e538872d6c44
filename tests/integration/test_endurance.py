"""What a server has to stand for long: it ends with the memory that it had early on."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import support.server
from support.client import NbdSocket
from support.run import SANITIZED, SEED, run_threads, wait_until
from support.server import PLUGIN, NbdkitProcess

Serve = Callable[..., NbdkitProcess]
MIB = 1 << 20
BLOCK = 4096
REQUEST = 128 << 10
DEPTH = 16
TOLERANCE = 0.02
# The plugin with swap=local for who may not set these two, in a container: neither has to do with its memory.
WITHOUT_RIGHTS = f"""
import sys
sys.path.insert(0, {str(PLUGIN.parent)!r})
from zramd.kernel import protection
protection._io_flusher = protection._oom_score_adj = lambda: None
exec(compile(open({str(PLUGIN)!r}).read(), {str(PLUGIN)!r}, "exec"))
"""


def minor_faults(served: NbdkitProcess) -> int:
    """Page faults of the whole process, threads that have ended too."""
    text = Path(f"/proc/{served.process.pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[7])  # field 10; the second one may hold blanks


def faults_of_threads(served: NbdkitProcess) -> dict[str, int]:
    """Page faults of each thread, those in the kernel too, by the thread's number and name."""
    found = {}
    for task in Path(f"/proc/{served.process.pid}/task").iterdir():
        number, _, rest = (task / "stat").read_text().partition(" (")
        name, _, words = rest.rpartition(") ")
        found[f"{number} {name}"] = int(words.split()[7])
    return found


def requests(served: NbdkitProcess) -> int:
    """Requests answered so far."""
    stats = served.stats()
    return int(sum(stats[kind] for kind in ("reads", "writes", "trims", "zeroes")))


def compare(what: str, early: int, late: int) -> None:
    """Fail when the memory differs by more than the tolerance; say the numbers either way."""
    change = late / early - 1
    print(f"resident {what}: {early / MIB:.2f} MiB, then {late / MIB:.2f} MiB ({change:+.2%})")
    assert abs(change) <= TOLERANCE


class TestConnections:
    def serve_clients(self, served: NbdkitProcess, count: int) -> None:
        """Connect, read one block and leave, `count` times from four threads; then nobody is there."""

        def visit(number: int) -> None:
            for turn in range(number, count, 4):
                client = NbdSocket(served)
                block = turn % 256
                assert client.read(block * BLOCK, BLOCK) == bytes([block]) * BLOCK
                client.close()

        run_threads(partial(visit, number) for number in range(4))
        wait_until(lambda: served.clients() == 0)

    @pytest.mark.parametrize(
        ("model", "first", "count"),
        [
            ("auto", 500, 2_000),
            pytest.param("auto", 1_000, 10_000, marks=pytest.mark.slow),
            pytest.param("parallel", 1_000, 10_000, marks=pytest.mark.slow),
        ],
    )
    def test_served_and_closed(self, serve: Serve, model: str, first: int, count: int) -> None:
        served = serve(thread_model=model)
        client = NbdSocket(served)
        blocks = b"".join(bytes([block]) * BLOCK for block in range(256))
        assert client.ask(client.WRITE, 0, len(blocks), blocks) == 0
        client.close()
        wait_until(lambda: served.clients() == 0)
        time.sleep(0.2)  # the connection that just told the number of clients is closed a little later
        open_before, threads_before = served.descriptors(), served.threads()
        self.serve_clients(served, first)
        early = served.resident()
        self.serve_clients(served, count - first)
        wait_until(lambda: served.descriptors() <= open_before)
        wait_until(lambda: served.threads() <= threads_before)
        compare(f"after {first} and {count} connections", early, served.resident())
        assert served.log.read_text() == ""


class Rewriter:
    """Writes a whole device again and again: other data each round, of the same compressed sizes."""

    def __init__(self, served: NbdkitProcess) -> None:
        self.served = served
        self.client = NbdSocket(served)
        self.dice = random.Random(SEED)
        blocks = self.client.size // BLOCK
        # From nearly empty to what is stored raw, as many of each in every round.
        self.sizes = [self.dice.randrange(16, BLOCK) for _ in range(blocks)]
        self.written: list[bytes] = []

    def _blocks(self) -> Iterator[bytes]:
        """One round of requests, in the order of the device."""
        noise = self.dice.randbytes(MIB + BLOCK)
        self.dice.shuffle(self.sizes)
        per_request = REQUEST // BLOCK
        for first in range(0, len(self.sizes), per_request):
            parts = []
            for size in self.sizes[first : first + per_request]:
                start = self.dice.getrandbits(20)
                parts.append(noise[start : start + size].ljust(BLOCK, b"\0"))
            yield b"".join(parts)

    def round(self) -> None:
        """Rewrite the device, in an order that is another one each time."""
        self.written = list(self._blocks())
        order = list(range(len(self.written)))
        self.dice.shuffle(order)
        for turn, index in enumerate(order):
            self.client.send(self.client.WRITE, index * REQUEST, REQUEST, self.written[index])
            if turn >= DEPTH:
                self._answer()
        for _ in range(min(DEPTH, len(order))):
            self._answer()

    def overwrite(self, count: int) -> None:
        """Overwrite single blocks at random, one at a time."""
        noise = self.dice.randbytes(MIB + BLOCK)
        for _ in range(count):
            index, start = self.dice.randrange(len(self.sizes)), self.dice.getrandbits(20)
            block = noise[start : start + self.sizes[index]].ljust(BLOCK, b"\0")
            assert self.client.ask(self.client.WRITE, index * BLOCK, BLOCK, block) == 0

    def check(self) -> None:
        """The last round is what is there."""
        for index, data in enumerate(self.written):
            assert self.client.read(index * REQUEST, REQUEST) == data

    def _answer(self) -> None:
        error, _ = self.client.reply()
        assert error == 0


class TestRewriting:
    @pytest.mark.parametrize("rounds", [20, pytest.param(100, marks=pytest.mark.slow)])
    def test_whole_device(self, serve: Serve, rounds: int) -> None:
        """Rewriting leaves nothing behind, left alone or told to compact."""
        served = serve(disksize=64 * MIB)
        rewriter = Rewriter(served)
        rewriter.round()
        early = self.settled(served), self.compacted(served)
        for _ in range(rounds - 1):
            rewriter.round()
        late = self.settled(served), self.compacted(served)
        rewriter.check()
        assert served.log.read_text() == ""
        compare(f"compacted, after 1 and {rounds} rounds", early[1], late[1])
        compare(f"left alone, after 1 and {rounds} rounds", early[0], late[0])

    def settled(self, served: NbdkitProcess) -> int:
        """Resident memory when background compaction has done what it finds worth doing."""
        time.sleep(3)  # a look each second: one may compact, the next gives back the pages that were kept
        wait_until(lambda: '"running"' not in served.request("GET", "/health")[1])
        return served.resident()

    def compacted(self, served: NbdkitProcess) -> int:
        """Resident memory when everything freeable has been freed."""
        assert served.request("POST", "/compact")[0] == 200
        assert served.stats()["freeable_pages"] == 0
        return served.resident()

    def test_faults(self, serve: Serve) -> None:
        """A request in steady state takes no page that it has to be given first.

        (While it waits for the processor, the pages that are kept for it go: a twentieth on a machine with
        six times the work that it can do. Without them it would be each time.)
        """
        served = serve(disksize=32 * MIB)
        rewriter = Rewriter(served)
        rewriter.round()
        rewriter.overwrite(10_000)
        faults, answered = minor_faults(served), requests(served)
        rewriter.overwrite(30_000)
        faults, answered = minor_faults(served) - faults, requests(served) - answered
        print(f"{faults} minor faults in {answered} requests: {faults / answered:.4f} each")
        assert answered == 30_000
        assert faults / answered < 0.2


class TestFullPool:
    def test_failed_writes_leave_nothing(self, serve: Serve) -> None:
        """nbdkit keeps what a callback raises, and a kernel whose swap is full sends thousands of such."""
        served = serve(mem_limit="1M", compaction="off")
        client = NbdSocket(served)
        noise = os.urandom(BLOCK)

        def fail(count: int) -> int:
            return sum(
                client.ask(client.WRITE, turn % 8192 * BLOCK, BLOCK, noise) == 28 for turn in range(count)
            )

        shown = served.rundir / "metrics.prom"
        for _ in range(3):  # what is shown takes its memory at the first few times
            before = shown.stat().st_mtime_ns
            fail(2_000)
            wait_until(lambda: shown.stat().st_mtime_ns != before)  # noqa: B023
        early = served.resident()
        failed = fail(20_000)
        late = served.resident()
        print(f"{failed} failed writes: {(late - early) / failed:.1f} bytes each")
        assert failed > 19_000
        assert late - early < 4 * failed  # as a Python function: 1100 to 1600 bytes each


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may lock memory and be real-time")
class TestFullPoolOfASwap:
    """With swap=local a write is refused with what is there: the kernel sends it because memory is short."""

    def full(
        self, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int = MIB
    ) -> tuple[NbdkitProcess, NbdSocket]:
        """A server whose next writes are refused, none was yet; and a client that it has met."""
        plugin = tmp_path / "plugin.py"
        plugin.write_text(WITHOUT_RIGHTS)
        monkeypatch.setattr(support.server, "PLUGIN", plugin)
        monkeypatch.setenv("PYTHONMALLOC", "malloc")
        served = serve(swap="local", reserve="4M", mem_limit=str(limit))
        client = NbdSocket(served)
        client.read(0, BLOCK)
        assert self.writes(client, range(100)) == 0
        wait_until(lambda: served.stats()["reserve_bytes"] >= 4 * MIB)
        return served, client

    @staticmethod
    def writes(client: NbdSocket, blocks: range) -> int:
        """Write to blocks; how many were refused."""
        noise = os.urandom(BLOCK)
        return sum(client.ask(client.WRITE, block % 8192 * BLOCK, BLOCK, noise) == 28 for block in blocks)

    @pytest.mark.parametrize(
        "limit", [MIB, MIB + BLOCK, MIB + 7 * BLOCK, 3 * MIB, 4 * MIB], ids=lambda limit: f"{limit >> 10}K"
    )
    def test_no_page(self, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        """No thread takes one, for the last pages and from the first refusal on, but that of the reserve.

        The limit need not be a number of whole zspages of raw blocks.
        """
        served, client = self.full(serve, tmp_path, monkeypatch, limit)
        maps = Path(f"/proc/{served.process.pid}/maps")
        mapped, before = maps.read_text(), faults_of_threads(served)
        refused = self.writes(client, range(100, 12_000))
        after = faults_of_threads(served)
        assert refused > 12_000 - limit // BLOCK - 100
        (refills,) = (thread for thread in before if thread.endswith(" zramd-refill"))
        after[refills] = before[refills]
        assert after == before
        assert maps.read_text() == mapped
        stats = served.stats()
        assert (stats["failed_writes"], stats["reserve_misses"]) == (refused, 0)

    @pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
    def test_no_call(self, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No mmap, brk or the like, not even for what is given back at once."""
        served, client = self.full(serve, tmp_path, monkeypatch)
        calls, tasks = tmp_path / "calls", Path(f"/proc/{served.process.pid}/task")
        words = ["strace", "-f", "-qq", "-e", "trace=%memory", "-o", calls, "-p", str(served.process.pid)]
        with subprocess.Popen(words) as strace:
            wait_until(
                lambda: all("TracerPid:\t0" not in (t / "status").read_text() for t in tasks.iterdir())
            )
            assert self.writes(client, range(100, 1000)) > 600
            strace.terminate()
        (refills,) = (task.name for task in tasks.iterdir() if "refill" in (task / "comm").read_text())
        lines = calls.read_text().splitlines()
        assert [line for line in lines if line.split()[0] != refills] == []
