"""The latency of clients while compaction runs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from bench.corpus import requests
from bench.processes import Measured, ZramdServer, fio, p99_rows, timed, whole
from bench.results import NotMeasuredError, Row, ratio_at_most, take_turns
from bench.setup import BLOCK, MIB, REQUEST, Setup

PIECE = 10 * BLOCK  # trimmed or written at once: more holes for each request than single blocks would give
PIECES_A_SECOND = 1000
BATCH_SECONDS = 0.02
PAUSE = 0.01  # seconds between two requests to the control socket


class Churn:
    """A client that keeps making holes: it trims pieces all over its half and writes them again."""

    def __init__(self, setup: Setup, server: ZramdServer, start: int, size: int) -> None:
        """Connect and fill `size` bytes from `start` with memory pages; raises NotMeasuredError."""
        try:
            import nbd  # type: ignore[import-untyped]
        except ImportError:
            raise NotMeasuredError("p99 while compaction runs needs Debian's python3-libnbd") from None
        self._client: Any = nbd.NBD()
        self._client.connect_uri(server.uri)
        self._data = requests(setup)
        self._dice = random.Random(21)
        self._start = start
        self._pieces = [start + at for at in range(0, size - PIECE + 1, PIECE)]
        self._todo = self._requests()
        for at in range(0, size, REQUEST):
            self._client.pwrite(self._data[at // REQUEST % len(self._data)], start + at)

    def _requests(self) -> Iterator[Callable[[], None]]:
        """Yield requests without end: half of the pieces go, then they come back, with other data."""
        while True:
            gone = self._dice.sample(self._pieces, len(self._pieces) // 2)
            for at in gone:
                yield lambda at=at: self._client.trim(PIECE, at)  # type: ignore[misc]
            for at in gone:
                data = self._dice.choice(self._data)[:PIECE]
                yield lambda at=at, data=data: self._client.pwrite(data, at)  # type: ignore[misc]

    def step(self) -> None:
        """Make the requests of a fiftieth of a second, and wait until that is over."""
        end = time.monotonic() + BATCH_SECONDS
        for _ in range(int(PIECES_A_SECOND * BATCH_SECONDS)):
            next(self._todo)()
        time.sleep(max(end - time.monotonic(), 0))

    def close(self) -> None:
        """Disconnect."""
        self._client.shutdown()


@contextmanager
def _repeating(*steps: Callable[[], object]) -> Iterator[None]:
    """Call each of `steps` over and over, each in a thread of its own, until the `with` ends.

    Raises NotMeasuredError at the end if one of them failed.
    """
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(step: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                step()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise NotMeasuredError(f"the load beside fio failed: {failures[0]}")


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    half = setup.pick(256 * MIB, 16 * MIB)
    seconds = 0.0
    moved = busy = freed = 0
    with ExitStack() as stack:
        servers: dict[str, tuple[ZramdServer, Churn]] = {}
        for name in ("on", "off"):
            server = stack.enter_context(ZramdServer(setup, f"compaction {name}", 2 * half, compaction=name))
            churn = Churn(setup, server, half, half)
            stack.callback(churn.close)
            fio(setup, server.device, whole("write", half))
            servers[name] = server, churn

        def run(name: str) -> Measured:
            nonlocal seconds, moved, busy, freed
            server, churn = servers[name]
            # The requests themselves cost clients latency: the server that does not compact gets as many.
            ask = ("POST", "/compact") if name == "on" else ("GET", "/health")

            def control() -> None:
                server.request(*ask)
                time.sleep(PAUSE)

            load: list[Callable[[], object]] = [churn.step, control]
            before, started = server.stats(), time.monotonic()
            with _repeating(*load):
                job = timed(setup, "randrw", "4k", 4, half)
                measured = fio(setup, server.device, job)
            after = server.stats()
            if name == "on":
                seconds += time.monotonic() - started
                moved += after["objects_migrated"] - before["objects_migrated"]
                busy += after["compact_ns"] - before["compact_ns"]
                freed += after["pages_compacted"] - before["pages_compacted"]
            elif after["objects_migrated"] != before["objects_migrated"]:
                raise NotMeasuredError("p99 while compaction runs: compaction=off compacted")
            return measured

        setup.say("compaction")
        runs = take_turns(setup.rounds, {name: lambda name=name: run(name) for name in servers})  # type: ignore[misc]
    if not moved:
        raise NotMeasuredError("p99 while compaction runs: compaction moved nothing")
    note = (
        f"randrw QD4 on one half; on the other, a client trims and rewrites "
        f"{PIECES_A_SECOND} pieces of 40K a second. "
        f"With compaction on and asked for {PAUSE * 1000:.0f} ms after each answer, "
        f"{moved / seconds:,.0f} objects moved and {freed / seconds:,.0f} pages freed a second, "
        f"{busy / 1e7 / seconds:.1f} % of the time spent "
        "compacting; peer: compaction=off, its control socket asked as often for /health"
    )
    on, off = ([run.p99 for run in runs[name]] for name in ("on", "off"))
    return [
        Row("p99 of 4K I/O during compaction", "µs", on, ratio_at_most(1.5), "without", off, note),
        *p99_rows("4K {}s during compaction", runs["on"], runs["off"], note),
    ]
