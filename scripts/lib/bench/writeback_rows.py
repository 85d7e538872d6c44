"""The out tier: what it writes, what reading that back costs, and what writing out costs others."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Self

import psutil  # type: ignore[import-untyped]

from bench.corpus import pages, requests
from bench.processes import Measured, ZramdServer, fio, p99_rows, timed
from bench.results import (
    NotMeasuredError,
    Row,
    Table,
    at_least,
    at_most,
    at_most_more,
    ratio_at_most,
    take_turns,
)
from bench.setup import BLOCK, GIB, MIB, REQUEST, Setup
from bench.state_rows import memory_file
from zramd import Device
from zramd.contract import superblock
from zramd.core.device.backing import EXTENT, Backing
from zramd.core.device.writeback import Writeback as Hands
from zramd.errors import ZramdError
from zramd.kernel import backingdevice
from zramd.server.writeback import Writeback, WritePass
from zramd.settings import config

LEVEL = 4  # the default of recompression=
RECORD = 1.02  # bytes on the backing for each of payload: a record's head, its padding, the end of an extent
ROOMY = (1.5, 2, 3, 4)  # sizes of a backing, of what lives
USUAL = 2
TURN = 1 / 8  # share of the blocks that are written anew before the next ones go out
EARLY = 1 / 4  # share of these that die before they went out
AROUND = 4  # times its size that a backing is written
TOGETHER = 200  # requests of 32K that are timed in a round
AT_ONCE = 64  # of a device, one in so many blocks is in memory while all go out, one after the other
POLL = 0.05  # seconds
PATIENCE = 300.0  # seconds that a pass may take
Counters = dict[str, int]

KERNEL_PAGE = 4096  # bytes that the kernel's zram writes for each page, whatever it compresses to


def _disk_file(setup: Setup, name: str, size: int) -> Path:
    """Return a new file, preallocated for a backing; raises NotMeasuredError."""
    path = setup.disk / name
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(fd, 0, size // EXTENT * EXTENT + EXTENT)
        finally:
            os.close(fd)
    except OSError as error:
        raise NotMeasuredError(f"no file for a backing: {error}") from None
    return path


class _Disk:
    """A file as the backing of devices of this process; use it in a `with`, whose end removes it."""

    def __init__(self, setup: Setup, name: str, size: int) -> None:
        self.path = _disk_file(setup, name, size)
        try:
            self._opened = backingdevice.open_alone(str(self.path))
        except ZramdError as error:
            self.path.unlink()
            raise NotMeasuredError(str(error)) from None

    def read(self, room: mmap.mmap, offset: int) -> None:
        """Read from it, as anybody would."""
        os.preadv(self._opened.fd, [room], offset)

    def core(self) -> Backing:
        """Return a backing that has its own table of extents."""
        opened = self._opened
        return Backing(opened.fd, opened.size, superblock.granule_of(opened.size), opened.sector)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._opened.fd)
        self.path.unlink()


def _put_out(device: Device, blocks: int) -> None:
    """Write out the first blocks of a device, in order. Raises NotMeasuredError."""
    hands, at = Hands(device), 0
    while at < blocks or hands.pending:
        at, _, full = hands.gather(at, blocks, 0)
        if (full or at >= blocks) and (stopped := hands.flush()[4]):
            raise NotMeasuredError(f"the backing cannot be written: {os.strerror(stopped)}")


# ----------------------------------------------------------------------------------------------------
# what is written


class _Memory:
    """How memory stands, for the policy: wanted all the time."""

    mode = "wanted"
    census = None


class _Swap:
    """A device whose cold blocks go out, die and are written anew, at random."""

    def __init__(self, data: Sequence[bytes], blocks: int, disk: _Disk) -> None:
        self.backing = disk.core()
        self.device = Device(blocks * BLOCK, cold_level=LEVEL, backing=self.backing)
        self.device.claim_backing()
        self._blocks = blocks
        settings = {"size": str(blocks * BLOCK), "rundir": "/run/none", "backing": str(disk.path)}
        wanted = config.parse({**settings, "writeback_limit": "off"}.items())
        self._part = Writeback(self.device, Hands(self.device), wanted, _Memory())
        self._data, self._next = data, 0
        self._dice = random.Random(18)

    def turn(self, share: float) -> None:
        """Write some blocks anew, let a few of them die, and have all that are left written out."""
        chosen = self._dice.sample(range(self._blocks), int(share * self._blocks))
        for block in chosen:
            self.device.write(self._data[self._next % len(self._data)], block * BLOCK)
            self.device.cool(block, 1)
            self._next += 1
        for block in self._dice.sample(chosen, int(EARLY * len(chosen))):
            self.device.trim(block * BLOCK, BLOCK)
        self._part.submit(WritePass(ranges=((0, self._blocks),)))
        while self._part.numbers()["reason"] == "a pass by hand is under way":
            self._part.tick()


def _written(setup: Setup, data: Sequence[bytes], roomy: float) -> tuple[Counters, Counters, float]:
    """Return the counters once the backing was full, and in the end; its size by what lives."""
    blocks = setup.pick(16 << 10, 4 << 10)
    alive = blocks * (1 - EARLY)
    with _Disk(setup, f"written {roomy:g}", int(_cold_bytes(data) * RECORD * alive * roomy)) as disk:
        swap = _Swap(data, blocks, disk)
        swap.turn(1)
        size, before = swap.backing.size, None
        lives: list[int] = []
        while (now := swap.device.counters())["bd_writes"] < AROUND * size:
            if before is None and now["bd_writes"] >= size:
                before = now
            swap.turn(TURN)
            lives.append(swap.device.counters()["backing_live"])
            if now["pages_stored"] - now["out_pages"] > blocks / 2:
                raise NotMeasuredError("blocks do not go out")
        assert before is not None
        return before, now, size / (sum(lives) / len(lives))


def _cold_bytes(data: Sequence[bytes]) -> float:
    """Return the mean payload of a page that is cold."""
    device = Device(len(data) * BLOCK, cold_level=LEVEL)
    for number, page in enumerate(data):
        device.write(page, number * BLOCK)
        device.cool(number, 1)
    return float(device.counters()["compr_data_size"] / len(data))


def _bytes_written(setup: Setup, data: Sequence[bytes]) -> list[Row]:
    payload = _cold_bytes(data)
    table = Table(
        "Bytes written for each page that goes out, by the size of the backing",
        f"Memory pages, all cold, payloads of {payload:.0f} bytes; each turn an eighth of the blocks is "
        f"written anew, a quarter of these dies before it went out; the backing is written {AROUND} times "
        "over, counted from the moment when it was full; reclaim included. The kernel's zram writes 4096.",
        ["backing, of what lives", "bytes for each page", "of its payload", "moved by reclaim"],
    )
    usual = usual_size = 0.0
    for roomy in ROOMY:
        before, after, size = _written(setup, data, roomy)
        new = {name: after[name] - before[name] for name in ("bd_writes", "written_out", "reclaimed_bytes")}
        each = new["bd_writes"] / new["written_out"]
        if roomy == USUAL:
            usual, usual_size = each, size
        moved = f"{100 * new['reclaimed_bytes'] / new['bd_writes']:.0f} %"
        table.rows.append([f"{size:.1f}", f"{each:,.0f}", f"{each / payload:.2f}", moved])
    setup.report.tables.append(table)
    note = (
        f"backing of {usual_size:.1f} times what lives, which dies at random, payloads of {payload:.0f} "
        f"bytes: {usual / payload:.2f} of these; reclaim included"
    )
    kernel = "kernel zram, by its format,"
    return [
        Row(
            "written for each page that goes out",
            "B",
            [usual],
            at_most(1150, "B"),
            kernel,
            [KERNEL_PAGE],
            note,
        )
    ]


# ----------------------------------------------------------------------------------------------------
# what is in memory, and taking it over


def _memory_of_out(setup: Setup, data: Sequence[bytes]) -> list[Row]:
    blocks = setup.pick(512 << 10, 16 << 10)
    with _Disk(setup, "memory", int(_cold_bytes(data) * 2 * blocks)) as disk:
        empty = Device(blocks * BLOCK, cold_level=LEVEL).counters()
        device = Device(blocks * BLOCK, cold_level=LEVEL, backing=disk.core())
        device.claim_backing()
        step = blocks // AT_ONCE
        for first in range(0, blocks, step):
            for block in range(first, first + step):
                device.write(data[block % len(data)], block * BLOCK)
            _put_out(device, first + step)
        device.compact()
        found = device.counters()
    if found["out_pages"] != blocks:
        raise NotMeasuredError("not all blocks went out")

    all_out, at_first = (each["metadata_bytes"] + each["mem_used_total"] for each in (found, empty))
    extents = found["backing_extents"] * 8 / blocks
    note = (
        f"metadata_bytes and mem_used_total of {blocks:,} blocks, all of them out, beyond those of an empty "
        f"device without a backing: 8 B for the slot, 1 for the age, 0.125 for whether it was read, "
        f"{extents:.2f} of the table of extents; the rest are handles of the blocks that were in memory at "
        f"once, 1 in {AT_ONCE}"
    )
    value = (all_out - at_first) / blocks
    return [Row("memory of a block that is out", "B", [value], at_most(10, "B"), note=note)]


def _read_in_process(setup: Setup, data: Sequence[bytes]) -> list[Row]:
    """Read blocks that are out, and the file that they are in, in turns, so that both meet the same load."""
    blocks = setup.pick(32 << 10, 2 << 10)
    dice = random.Random(3)
    order = dice.sample(range(blocks), blocks)
    room, page, several = mmap.mmap(-1, BLOCK), bytearray(BLOCK), bytearray(32 << 10)
    alone: list[list[float]] = []
    out: list[list[float]] = []
    together: list[float] = []
    with _Disk(setup, "in process", int(_cold_bytes(data) * 2 * blocks)) as disk:
        device = Device(blocks * BLOCK, cold_level=LEVEL, backing=disk.core())
        device.claim_backing()
        for block in range(blocks):
            device.write(data[block % len(data)], block * BLOCK)
            device.cool(block, 1)
        _put_out(device, blocks)
        written = device.counters()["bd_writes"] // BLOCK
        for first in range(setup.rounds):
            alone.append([])
            out.append([])
            for block in order[first :: setup.rounds]:
                place = EXTENT + dice.randrange(written) * BLOCK
                started = time.perf_counter_ns()
                disk.read(room, place)
                between = time.perf_counter_ns()
                device.read(page, block * BLOCK)
                out[-1].append((time.perf_counter_ns() - between) / 1e3)
                alone[-1].append((between - started) / 1e3)
            times = []
            for block in dice.sample(range(0, blocks, len(several) // BLOCK), TOGETHER):
                started = time.perf_counter_ns()
                device.read(several, block * BLOCK)
                times.append((time.perf_counter_ns() - started) / 1e3)
            together.append(median(times))
    p99 = {
        name: [quantiles(run, n=100)[98] for run in runs] for name, runs in (("out", out), ("disk", alone))
    }
    middle = [median(number for run in runs for number in run) for runs in (out, alone)]
    note = (
        f"{blocks:,} blocks, each read once, and as many random 4K of the same file, in turns; medians "
        f"{middle[0]:.0f} and {middle[1]:.0f} µs"
    )
    aim = at_most_more(50, "µs")
    disk = [median(run) for run in alone]
    several_note = (
        f"{TOGETHER} random requests a round for neighbours that went out together; peer: one 4K of the file"
    )
    return [
        Row("read of a block that is out, in process, p99", "µs", p99["out"], aim, "disk", p99["disk"], note),
        Row(
            "read of 32K that is out, in process, p50",
            "µs",
            together,
            ratio_at_most(3),
            "disk's 4K",
            disk,
            several_note,
        ),
    ]


class _State:
    """A state, from its first half out or nothing, that is taken over again and again."""

    def __init__(self, setup: Setup, disk: _Disk | None, size: int, half_out: int) -> None:
        data = requests(setup)
        self._size, self._disk = size, disk
        self.fd = memory_file(size)
        device = self._device()
        device.claim_backing()
        for number in range(size // REQUEST):
            device.write(data[number % len(data)], number * REQUEST)
        if half_out:
            _put_out(device, half_out)
            device.compact()
        self.out = device.counters()["out_pages"]
        self._id = device.backing_id

    def _device(self, backing_id: str = "") -> Device:
        backing = self._disk.core() if self._disk else None
        return Device(self._size, state=self.fd, backing=backing, backing_id=backing_id)

    def take_over(self) -> float:
        """Return the milliseconds."""
        return float(self._device(self._id).counters()["recovery_ms"])


def _recovery(setup: Setup) -> list[Row]:
    size = setup.pick(8 * GIB, 256 * MIB)
    if psutil.virtual_memory().available < size:
        size = 2 * GIB
    with _Disk(setup, "recovery", size // 4) as disk:
        all_in = _State(setup, disk, size, 0)
        half_out = _State(setup, disk, size, size // BLOCK // 2)
        times = take_turns(
            max(3, setup.rounds), {"half out": half_out.take_over, "none out": all_in.take_over}
        )
        for state in (all_in, half_out):
            os.close(state.fd)
    share = 100 * half_out.out * BLOCK / size
    note = f"{size / GIB:g} GiB stored by lz4 alone, {share:.0f} % of the blocks out; recovery_ms"
    return [
        Row(
            "recovery with half of the blocks out",
            "ms",
            times["half out"],
            ratio_at_most(1.2),
            "none out",
            times["none out"],
            note,
        )
    ]


# ----------------------------------------------------------------------------------------------------
# over NBD


class _Filled:
    """A server with a backing, memory pages in all of it."""

    def __init__(self, setup: Setup, stack: ExitStack, name: str, size: int, **settings: str) -> None:
        try:
            import nbd  # type: ignore[import-untyped]
        except ImportError:
            raise NotMeasuredError("the out tier over NBD needs Debian's python3-libnbd") from None
        self.size = size
        self.path = _disk_file(setup, name.replace(" ", "-"), size // 2)
        stack.callback(self.path.unlink)
        ways = {"backing": str(self.path), "writeback_limit": "off", "recompression": "off", **settings}
        self.server = stack.enter_context(ZramdServer(setup, name, size, **ways))
        data = requests(setup)
        client: Any = nbd.NBD()
        client.connect_uri(self.server.uri)
        for at in range(0, size, REQUEST):
            client.pwrite(data[at // REQUEST % len(data)], at)
        client.shutdown()

    def numbers(self) -> dict[str, Any]:
        """Return the section writeback of the statistics."""
        found: dict[str, Any] = self.server.stats()["writeback"]
        return found

    def write_out(self, first: int, end: int) -> None:
        """Ask for blocks to go out."""
        self.server.request("POST", "/writeback", f"page_indexes={first}-{end - 1}")

    def bring_back(self) -> None:
        """Bring everything back, and wait for it."""
        self.server.request("POST", "/bring_back")
        self.wait(lambda found: not found["out_pages"], "blocks do not come back")

    def wait(self, is_done: Callable[[dict[str, Any]], bool], otherwise: str) -> dict[str, Any]:
        """Wait until the numbers are as wanted; raises NotMeasuredError."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if is_done(found := self.numbers()):
                return found
            time.sleep(POLL)
        raise NotMeasuredError(f"the out tier: {otherwise}")

    def cpu_seconds(self) -> float:
        """Return what the thread that writes out has taken of a processor."""
        for task in Path(f"/proc/{self.server.pid}/task").iterdir():
            if (task / "comm").read_text().strip() == "zramd-out":
                return int((task / "schedstat").read_text().split()[0]) / 1e9
        raise NotMeasuredError("the out tier: its thread does not run")


def _reads(setup: Setup) -> list[Row]:
    """What a read of a block that is out waits for, beside the disk itself."""
    size = setup.pick(1024 * MIB, 32 * MIB)
    with ExitStack() as stack:
        filled = _Filled(setup, stack, "read out", 2 * size)
        filled.write_out(0, size // BLOCK)
        found = filled.wait(lambda found: found["out_pages"] * BLOCK >= size, "blocks do not go out")
        disk = ["--ioengine=psync", "--direct=1", "--readonly", f"--filename={filled.path}"]
        written = found["bd_writes"] // EXTENT * EXTENT
        rounds = iter(range(setup.rounds + 1))
        part = size // (setup.rounds + 1) // MIB * MIB  # none is read twice: it would come back

        def run(device: list[str], first: int, length: int) -> Measured:
            return fio(setup, device, timed(setup, "randread", "4k", 1, length, f"--offset={first}"))

        def out() -> Measured:
            first, length = next(rounds) * part, str(part)
            job = ["--rw=randread", "--bs=4k", "--iodepth=1", f"--size={length}", f"--offset={first}"]
            return fio(setup, filled.server.device, [*job, f"--runtime={setup.seconds * 1000:.0f}ms"])

        out()  # the first reads of a new file are slower
        runs = take_turns(
            setup.rounds,
            {
                "out": out,
                "disk": lambda: run(disk, EXTENT, written),
                "hot": lambda: run(filled.server.device, size, size),
            },
        )
        after = filled.numbers()
        if after["out_pages"] < found["out_pages"] * 0.9:
            raise NotMeasuredError("the out tier: blocks came back while they were read")
    alone = [run.p99 for run in runs["disk"]]
    over_nbd = [run.p99 for run in runs["hot"]]
    values = [run.p99 for run in runs["out"]]
    middle = {name: sorted(run.p50 for run in found)[len(found) // 2] for name, found in runs.items()}
    note = (
        f"one client, each block read once; peer: p99 of the same file through fio with direct=1, "
        f"{min(alone):.0f} to {max(alone):.0f} µs, and p99 of a hot block over NBD; medians: out "
        f"{middle['out']:.0f}, disk {middle['disk']:.0f}, hot {middle['hot']:.0f} µs"
    )
    peer = [disk + hot for disk, hot in zip(alone, over_nbd, strict=True)]
    return [Row("4K QD1 read p99, all out", "µs", values, at_most_more(50, "µs"), "disk and NBD", peer, note)]


def _beside(setup: Setup) -> list[Row]:
    """What clients feel while blocks go out."""
    hot, cold = setup.pick(128 * MIB, 32 * MIB), setup.pick(1024 * MIB, 64 * MIB)
    with ExitStack() as stack:
        filled = _Filled(setup, stack, "beside out", hot + cold)
        went: list[float] = []

        def run() -> Measured:
            return fio(setup, filled.server.device, timed(setup, "randrw", "4k", 4, hot))

        def beside() -> Measured:
            filled.bring_back()
            before = filled.numbers()["written_out"]
            filled.write_out(hot // BLOCK, (hot + cold) // BLOCK)
            filled.wait(lambda found: found["written_out"] > before, "blocks do not go out")
            started, first = time.monotonic(), filled.numbers()["written_out"]
            measured = run()
            now = filled.numbers()["written_out"]
            went.append((now - first) / (time.monotonic() - started))
            shares.append((now - before) * BLOCK / cold)
            filled.bring_back()
            return measured

        shares: list[float] = []
        run()
        runs = take_turns(setup.rounds, {"with": beside, "without": run})
    speed, share = sorted(went)[len(went) // 2], 100 * max(shares)
    note = (
        f"memory pages; randrw QD4 on {hot >> 20} MiB, while {cold >> 20} MiB go out: {speed:,.0f} blocks a "
        f"second, {share:.0f} % of them at most in the time of a run; peer: none goes out"
    )

    return p99_rows("hot 4K {}s while blocks go out", runs["with"], runs["without"], note)


def _speed(setup: Setup) -> list[Row]:
    """How fast blocks go out when nobody asks for anything, and the statistics meanwhile."""
    size = setup.pick(2048 * MIB, 64 * MIB)
    speeds, costs, answers = [], [], []
    with ExitStack() as stack:
        filled = _Filled(setup, stack, "speed out", size)
        for _ in range(setup.rounds):
            filled.bring_back()
            cpu, before = filled.cpu_seconds(), filled.numbers()
            started = now = time.monotonic()
            filled.write_out(0, size // BLOCK)
            found = before
            while found["out_pages"] * BLOCK < size:
                asked = time.monotonic()
                if asked - started > PATIENCE:
                    raise NotMeasuredError("the out tier: blocks do not go out")
                found = filled.numbers()
                now = time.monotonic()
                answers.append(now - asked)
                time.sleep(POLL)
            speeds.append((found["bd_writes"] - before["bd_writes"]) / 1e6 / (now - started))
            blocks = found["written_out"] - before["written_out"]
            costs.append((filled.cpu_seconds() - cpu) * 1e6 / blocks)
    note = f"{size >> 20} MiB of memory pages, compressed by lz4 alone, no client; bytes on the device"
    slowest = f"the slowest of {len(answers)} answers of the control socket while blocks went out"
    return [
        Row("blocks go out, memory wanted", "MB/s", speeds, at_least(50, "MB/s"), note=note),
        Row("CPU for a block that goes out", "µs", costs, at_most(10, "µs"), note=note),
        Row("stats answer while blocks go out", "ms", [1e3 * max(answers)], at_most(10, "ms"), note=slowest),
    ]


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    data = pages(setup)
    parts = {
        "bytes": lambda: _bytes_written(setup, data),
        "reads in process": lambda: _read_in_process(setup, data),
        "reads": lambda: _reads(setup),
        "beside": lambda: _beside(setup),
        "speed": lambda: _speed(setup),
        "memory": lambda: _memory_of_out(setup, data),
        "recovery": lambda: _recovery(setup),
    }
    return setup.all_of("writeback", parts)
