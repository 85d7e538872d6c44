"""Other people's NBD clients and testers against the server, each while compaction runs. Zero errors."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.run import SEED, wait_until
from support.server import NbdkitProcess

from zramd.settings.values import MAX_DISKSIZE

nbd = pytest.importorskip("nbd")

Serve = Callable[..., NbdkitProcess]
MIB = 1 << 20
BLOCK = 4096
PRIVATE = 8 * MIB  # at the end of the device: the churn's own
SIZE = 64 * MIB  # before it: the recipe's
DATA, ZERO, HOLE = 0, nbd.STATE_ZERO, nbd.STATE_HOLE | nbd.STATE_ZERO


class Churn:
    """Keeps compaction busy from a region of its own at the end of the device.

    It fills the region with objects of all sizes, trims two thirds, asks for compaction, and starts again.
    What it kept must be what it reads. A process of its own: the recipes in Python need this one's time.
    """

    def __init__(self, served: NbdkitProcess) -> None:
        self.served = served
        context = multiprocessing.get_context("fork")
        self.rounds = context.Value("i", 0)
        self._stopping = context.Event()
        self._process = context.Process(target=self._run, daemon=True)

    def __enter__(self) -> "Churn":
        self._moved = self.moved()
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:  # a recipe may be over sooner than one round
                wait_until(lambda: self.rounds.value >= 2 or not self._process.is_alive(), 60)
        finally:
            self._stopping.set()
            self._process.join(60)
            if self._process.is_alive():
                self._process.kill()
        if kind is None:
            assert self._process.exitcode == 0, "see what it wrote to stderr"
            moved = self.moved() - self._moved
            print(f"{self.rounds.value} rounds of churn, {moved} objects migrated")
            assert moved > 200

    def moved(self) -> int:
        """Objects that compaction has moved so far."""
        count: int = self.served.stats()["objects_migrated"]
        return count

    def _run(self) -> None:
        handle = self.served.connect()
        dice = random.Random(SEED)
        start = handle.get_size() - PRIVATE
        while not self._stopping.is_set():
            kept = self._round(handle, dice, start)
            status, body = self.served.request("POST", "/compact")
            assert status == 200, body
            for offset, block in kept.items():
                assert handle.pread(BLOCK, offset) == block, f"the block at {offset} has changed"
            self.rounds.value += 1
        handle.shutdown()

    def _round(self, handle: Any, dice: random.Random, start: int) -> dict[int, bytes]:
        kept: dict[int, bytes] = {}
        # 128 KiB a request: writing takes little of the time, compacting most of it.
        for first in range(start, start + PRIVATE, 128 << 10):
            sizes = [dice.randrange(8, 3500) for _ in range(32)]
            blocks = [dice.randbytes(size).ljust(BLOCK, b"\0") for size in sizes]
            handle.pwrite(b"".join(blocks), first)
            kept |= {first + index * BLOCK: block for index, block in enumerate(blocks)}
        for offset in [offset for offset in kept if dice.random() < 0.65]:
            handle.trim(BLOCK, offset)
            del kept[offset]
        return kept


@pytest.fixture
def served(serve: Serve) -> Iterator[NbdkitProcess]:
    """A server whose compactor has work to do all the time; afterwards it must be whole."""
    server = serve(disksize=SIZE + PRIVATE, compaction_interval="0.05")
    with Churn(server):
        yield server
    assert server.request("GET", "/health")[1].startswith('{"status": "ok"')
    assert server.log.read_text() == ""


def run(*command: str, timeout: float = 120) -> str:
    """Run a command that must succeed and return what it said."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    ran = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout}"
    return ran.stdout


def front(served: NbdkitProcess, *filters: str, parameters: tuple[str, ...] = (), script: str) -> str:
    """Run a shell script with $uri a second nbdkit with filters, whose client side is the server."""
    window = ["--filter=offset", "nbd", f"uri={served.uri}", "offset=0", f"range={SIZE}"]
    return run("nbdkit", "-U", "-", *filters, *window, *parameters, "--run", script)


class TestNbdcopy:
    def test_pattern(self, served: NbdkitProcess) -> None:
        """Data that says where it belongs, checked at the first wrong byte."""
        into = f'nbdcopy "$uri" "{served.uri}"'
        run("nbdkit", "-U", "-", "pattern", str(SIZE), "--run", into)
        check = f'nbdcopy "$uri" -- [ nbdkit --exit-with-parent --filter=checkwrite pattern {SIZE} ]'
        front(served, script=check)

    @pytest.mark.parametrize("percent", [5, 50])
    def test_sparse_random(self, served: NbdkitProcess, percent: int) -> None:
        """Holes stay holes both ways; the plugin fails the copy when what comes back is not what it gave."""
        plugin = f"sparse-random {SIZE} seed={SEED} percent={percent} runlength=20000"
        # The window again, so that the copy does not run over the private region.
        back = f'nbdcopy "$uri" -- [ nbdkit --exit-with-parent {plugin} ]'
        run("nbdkit", "-U", "-", *plugin.split(), "--run", f'nbdcopy "$uri" "{served.uri}"')
        stored = int(served.stats()["orig_data_size"])
        assert stored < SIZE * percent / 100 * 1.5 + PRIVATE
        front(served, script=back)

    def test_options(self, served: NbdkitProcess, tmp_path: Path) -> None:
        """One connection, synchronous, odd request size; then everything at once."""
        original, copy = tmp_path / "original", tmp_path / "copy"
        dice = random.Random(SEED)
        original.write_bytes(b"".join(dice.randbytes(700) * 9 for _ in range(3000)))
        copy.write_bytes(bytes(SIZE))
        run("nbdcopy", "--synchronous", "--flush", str(original), served.uri)
        front(served, script=f'nbdcopy --connections=8 --requests=64 "$uri" {copy}')
        assert copy.read_bytes()[: original.stat().st_size] == original.read_bytes()


class TestFio:
    def fio(self, served: NbdkitProcess, *options: str) -> str:
        common = ["--name=job", "--ioengine=nbd", f"--uri={served.uri}", f"--randseed={SEED}"]
        verify = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--buffer_compress_percentage=50"]
        # Else it leaves files in the present folder.
        verify.append("--verify_state_save=0")
        text = run("fio", *common, *verify, *options)
        assert "err= 0" in text
        assert "verify" not in text.lower().replace("--verify", ""), text
        return text

    def test_aligned(self, served: NbdkitProcess) -> None:
        self.fio(served, "--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={SIZE}")

    def test_immediate_read_back(self, served: NbdkitProcess) -> None:
        self.fio(served, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=16M", "--verify_backlog=256")

    def test_odd_sizes(self, served: NbdkitProcess) -> None:
        self.fio(served, "--rw=randwrite", "--bsrange=512-64k", "--iodepth=16", f"--size={SIZE}")

    def test_unaligned(self, served: NbdkitProcess) -> None:
        # One byte more than 512: no request starts or ends at a block's boundary but by chance.
        self.fio(served, "--rw=randwrite", "--bs=513", "--iodepth=16", "--size=4M", "--offset=1234567")

    def test_connections(self, served: NbdkitProcess) -> None:
        jobs = ["--numjobs=4", "--size=16M", "--offset_increment=16M", "--group_reporting=1"]
        self.fio(served, "--rw=randwrite", "--bsrange=1k-32k", "--iodepth=8", *jobs)

    def test_trims_in_between(self, served: NbdkitProcess) -> None:
        """Each block is trimmed, then written, then verified."""
        # Else a trim is in flight together with the write that it belongs before, in no order.
        overlap = ("--iodepth=16", "--serialize_overlap=1", "--size=32M")
        self.fio(served, "--rw=randtrimwrite", "--bs=4k", *overlap)
        assert served.stats()["trims"] > 4096

    def test_random_trims(self, served: NbdkitProcess) -> None:
        """Trims at random beside verified writes of another region."""
        stop = threading.Event()
        trims = 0

        def trim() -> None:
            nonlocal trims
            while not stop.is_set():
                where = ["--offset=32M", "--size=32M", "--bs=8k", "--iodepth=8", f"--uri={served.uri}"]
                run("fio", "--name=trim", "--ioengine=nbd", "--rw=randtrim", *where)
                trims += 1

        thread = threading.Thread(target=trim)
        thread.start()
        try:
            self.fio(served, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=32M")
        finally:
            stop.set()
            thread.join(60)
        assert trims > 0
        assert served.stats()["trims"] > 4096


class TestQemu:
    def window(self, served: NbdkitProcess) -> str:
        """The recipe's region, as qemu names it."""
        return (
            f'json:{{"driver":"raw","offset":0,"size":{SIZE},"discard":"unmap",'
            f'"file":{{"driver":"nbd","server":{{"type":"unix","path":"{served.socket}"}},'
            f'"export":"{served.name}","discard":"unmap"}}}}'
        )

    def test_io(self, served: NbdkitProcess) -> None:
        script = """
            write -P 0xaa 0 64k
            write -z 4k 4k
            read -P 0 4k 4k
            read -P 0xaa 8k 4k
            read -P 0xaa 0 4k
            discard 0 64k
            read -P 0 0 64k
            write -P 0x55 1 4095
            read -P 0 0 1
            read -P 0x55 1 4095
            write -f -P 0x77 12345 54321
            read -P 0x77 12345 54321
            write -z -u 20000 10000
            read -P 0 20000 10000
            read -P 0x77 30000 36666
            aio_write -P 0x11 1M 1M
            aio_write -P 0x22 3M 1M
            aio_write -P 0x33 5M 64k
            aio_flush
            aio_read -P 0x11 1M 1M
            aio_read -P 0x22 3M 1M
            aio_read -P 0x33 5M 64k
            aio_flush
            writev -P 0x44 8M 512 1k 3k
            readv -P 0x44 8M 3k 1k 512
            flush
            discard 1M 5M
            read -P 0 1M 5M
        """
        commands = [word for line in script.strip().splitlines() for word in ("-c", line.strip())]
        text = run("qemu-io", "-f", "raw", "-d", "unmap", *commands, served.uri)
        # qemu-io ends with 0 even when a pattern does not match.
        assert "failed" not in text.lower(), text
        assert "error" not in text.lower(), text

    def test_bench_and_compare(self, served: NbdkitProcess, tmp_path: Path) -> None:
        uri = self.window(served)
        run("qemu-img", "bench", "-w", "-c", "20000", "-d", "16", "-s", "4k", "--pattern=99", uri)
        run("qemu-img", "bench", "-c", "5000", "-d", "16", "-s", "4097", "-S", "8191", uri)
        image = tmp_path / "image"
        dice = random.Random(SEED)
        with image.open("wb") as file:
            file.truncate(SIZE)
            for offset in range(0, SIZE, MIB):
                file.seek(offset + dice.randrange(MIB // 2))
                file.write(dice.randbytes(3000) * dice.randrange(1, 100))
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", str(image), uri)
        assert "identical" in run("qemu-img", "compare", "-f", "raw", str(image), uri)
        with image.open("r+b") as file:
            file.seek(SIZE // 2 + 1)
            file.write(b"one other byte")
        with pytest.raises(AssertionError, match="Content mismatch"):
            run("qemu-img", "compare", "-f", "raw", str(image), uri)

    def test_map(self, served: NbdkitProcess, tmp_path: Path) -> None:
        """What qemu takes from the block status: it copies only what is data."""
        handle = served.connect()
        handle.pwrite(os.urandom(MIB), 10 * MIB)
        uri = self.window(served)
        entries = json.loads(run("qemu-img", "map", "--output=json", uri))
        assert [(entry["start"], entry["length"]) for entry in entries if entry["data"]] == [(10 * MIB, MIB)]
        image = tmp_path / "image"
        run("qemu-img", "convert", "-O", "raw", uri, str(image))
        assert image.stat().st_blocks * 512 < 2 * MIB
        assert image.read_bytes()[10 * MIB : 11 * MIB] == handle.pread(MIB, 10 * MIB)


class TestNbdinfo:
    """Block status of what was never written: there the packaged compressed server dies."""

    def totals(self, served: NbdkitProcess) -> dict[int, int]:
        text = front(served, script='nbdinfo --map --totals --json "$uri"')
        return {entry["type"]: entry["size"] for entry in json.loads(text)}

    def test_never_written(self, served: NbdkitProcess) -> None:
        assert self.totals(served) == {HOLE: SIZE}

    def test_large_and_empty(self, serve: Serve) -> None:
        served = serve(disksize=MAX_DISKSIZE)
        (entry,) = json.loads(run("nbdinfo", "--map", "--totals", "--json", served.uri))
        assert (entry["size"], entry["type"]) == (MAX_DISKSIZE, HOLE)

    def test_written_and_trimmed(self, served: NbdkitProcess) -> None:
        handle = served.connect()
        handle.pwrite(os.urandom(16 * MIB), 5 * MIB)
        assert self.totals(served) == {HOLE: SIZE - 16 * MIB, DATA: 16 * MIB}
        handle.trim(4 * MIB, 8 * MIB)
        handle.zero(MIB, 20 * MIB, nbd.CMD_FLAG_NO_HOLE)
        assert self.totals(served) == {HOLE: SIZE - 12 * MIB, DATA: 11 * MIB, ZERO: MIB}
        handle.trim(SIZE, 0)
        assert self.totals(served) == {HOLE: SIZE}

    def test_features(self, served: NbdkitProcess) -> None:
        for feature in ("multi-conn", "flush", "fua", "trim", "zero", "fast-zero", "df", "write"):
            run("nbdinfo", "--can", feature, served.uri)
        assert run("nbdinfo", "--list", served.uri).count("export=") == 1


def block_status(handle: Any, count: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    """Pairs of length and type, as the server gives them."""
    found: list[tuple[int, int]] = []

    def note(context: str, start: int, entries: list[int], error: Any) -> None:
        found.extend(zip(entries[::2], entries[1::2], strict=True))

    handle.block_status(count, offset, note, flags)
    return found


class TestLibnbd:
    def test_what_one_writes_another_reads(self, served: NbdkitProcess) -> None:
        """Multi-conn's promise, with no flush in between."""
        handles = [served.connect() for _ in range(4)]
        assert all(handle.can_multi_conn() for handle in handles)
        dice = random.Random(SEED)
        for turn in range(400):
            writer, reader = dice.sample(handles, 2)
            offset, length = dice.randrange(SIZE - 70000), dice.randrange(1, 70000)
            action = turn % 4
            if action == 0:
                writer.zero(length, offset)
                expected = bytes(length)
            else:
                expected = dice.randbytes(length // 3 + 1) * 3
                expected = expected[:length]
                writer.pwrite(expected, offset, nbd.CMD_FLAG_FUA if action == 1 else 0)
            assert reader.pread(length, offset) == expected

    @pytest.mark.parametrize("fua", [0, nbd.CMD_FLAG_FUA])
    @pytest.mark.parametrize("fast", [0, nbd.CMD_FLAG_FAST_ZERO])
    @pytest.mark.parametrize("no_hole", [0, nbd.CMD_FLAG_NO_HOLE])
    def test_zero_with_each_flag(self, served: NbdkitProcess, fua: int, fast: int, no_hole: int) -> None:
        handle = served.connect()
        noise = os.urandom(MIB)
        flags = fua | fast | no_hole
        for offset, length in ((0, MIB), (4096, 8192), (100, 50), (4000, 200), (5000, 100000), (0, 1)):
            handle.pwrite(noise, 0)
            handle.zero(length, offset, flags)
            expected = noise[:offset] + bytes(length) + noise[offset + length :]
            assert handle.pread(MIB, 0) == expected
        handle.pwrite(noise, 0)
        handle.zero(64 << 10, 64 << 10, flags)
        assert block_status(handle, 64 << 10, 64 << 10)[0][1] == (ZERO if no_hole else HOLE)

    @pytest.mark.parametrize("fua", [0, nbd.CMD_FLAG_FUA])
    def test_trim_and_flush(self, served: NbdkitProcess, fua: int) -> None:
        handle = served.connect()
        noise = os.urandom(MIB)
        handle.pwrite(noise, 0, fua)
        handle.trim(8192, 4096, fua)
        handle.flush()
        assert handle.pread(MIB, 0) == noise[:4096] + bytes(8192) + noise[12288:]

    def test_trim_of_parts_of_blocks(self, served: NbdkitProcess) -> None:
        """Whole blocks inside go; of the others every byte is the old one or zero."""
        handle = served.connect()
        noise = bytes(random.Random(SEED).randrange(1, 256) for _ in range(32768))
        handle.pwrite(noise, 0)
        handle.trim(20000, 1000)
        now = handle.pread(32768, 0)
        assert now[:1000] == noise[:1000]
        assert now[4096:20480] == bytes(16384)
        assert now[21000:] == noise[21000:]
        assert all(new in (0, old) for new, old in zip(now, noise, strict=True))

    def test_block_status(self, served: NbdkitProcess) -> None:
        handle = served.connect()
        for block in range(0, 200, 2):
            handle.pwrite(os.urandom(4096), block * 4096)
        expected = [(4096, HOLE if block % 2 else DATA) for block in range(199)]
        found: list[tuple[int, int]] = []
        while (place := sum(length for length, _ in found)) < 199 * 4096:
            found += block_status(handle, 199 * 4096 - place, place)  # a server may tell of fewer than asked
        assert found == expected
        # A request that starts within a block gets the rest of it.
        assert block_status(handle, 8192, 1000)[0] == (3096, DATA)
        length, kind = block_status(handle, 8192, 1000, nbd.CMD_FLAG_REQ_ONE)[0]
        assert (length, kind) == (3096, DATA)
        assert len(block_status(handle, MIB, 0, nbd.CMD_FLAG_REQ_ONE)) == 1
        assert block_status(handle, 1, SIZE - 1)[0][1] == HOLE

    def test_reads_in_one_piece(self, served: NbdkitProcess) -> None:
        handle = served.connect()
        assert handle.get_structured_replies_negotiated()
        noise = os.urandom(3 * MIB)
        handle.pwrite(noise, 777)
        for flags in (0, nbd.CMD_FLAG_DF):
            chunks: list[tuple[int, bytes, int]] = []

            def note(data: bytes, offset: int, status: int, error: Any, into: list[Any] = chunks) -> None:
                into.append((offset, bytes(data), status))

            handle.pread_structured(2 * MIB, 1234, note, flags)
            data = b"".join(data for _, data, _ in sorted(chunks))
            assert data == noise[1234 - 777 :][: 2 * MIB]
            assert not flags or len(chunks) == 1

    def test_largest_requests(self, served: NbdkitProcess) -> None:
        """32 MiB is what the protocol promises, 64 MiB what nbdkit and libnbd take."""
        handle = served.connect()
        dice = random.Random(SEED)
        for size, offset in ((32 * MIB, 0), (32 * MIB, 12345), (64 * MIB, 0)):
            data = dice.randbytes(size // 64) * 64
            handle.pwrite(data, offset)
            assert handle.pread(size, offset) == data
        handle.zero(SIZE, 0)
        assert handle.pread(SIZE, 0) == bytes(SIZE)

    def test_any_offset_and_length(self, served: NbdkitProcess) -> None:
        """Around a block's boundary: every kind of start and end."""
        handle = served.connect()
        model = bytearray(os.urandom(5 * 4096))
        handle.pwrite(model, 0)
        edges = [0, 1, 7, 4095, 4096, 4097, 8191, 8192, 8193, 12288, 20479, 20480]
        for turn, (start, end) in enumerate((s, e) for s in edges for e in edges if s < e):
            if turn % 3 == 2:
                handle.zero(end - start, start)
                model[start:end] = bytes(end - start)
            else:
                data = os.urandom(1 + (end - start) // (1 + turn % 3)) * 3
                handle.pwrite(data[: end - start], start)
                model[start:end] = data[: end - start]
            assert handle.pread(end - start, start) == model[start:end]
            assert handle.pread(len(model), 0) == model


class TestFilters:
    """nbdkit as the client, with its filters in between."""

    def check(self, served: NbdkitProcess, *filters: str, parameters: tuple[str, ...] = ()) -> None:
        """The pattern through the filters, there and back."""
        words = [f"--filter={name}" for name in filters]
        into = f"nbdkit -U - pattern {SIZE} --run \"nbdcopy \\$uri '$uri'\""
        back = f'nbdcopy "$uri" -- [ nbdkit --exit-with-parent --filter=checkwrite pattern {SIZE} ]'
        front(served, *words, parameters=parameters, script=f"{into} && {back}")

    def test_split(self, served: NbdkitProcess) -> None:
        self.check(served, "blocksize", parameters=("minblock=4k", "maxdata=24k", "maxlen=8M"))

    def test_errors_that_are_retried(self, served: NbdkitProcess) -> None:
        """The client above the filters sees none of them."""
        again = ("retry-request-retries=20", "retry-request-delay=1")
        self.check(served, "retry-request", "error", parameters=("error-rate=1%", *again))

    def test_delays(self, served: NbdkitProcess) -> None:
        self.check(served, "delay", parameters=("delay-read=3ms", "delay-write=3ms"))

    def test_server_refuses_parts_of_blocks(self, serve: Serve) -> None:
        """The advertised sizes as policy, in the server itself: a filter sees them."""
        policy = ("blocksize-error-policy=error", "blocksize-minimum=4k")
        served = serve("--filter=blocksize-policy", **dict(word.split("=") for word in policy))
        handle = served.connect()
        assert handle.get_block_size(nbd.SIZE_MINIMUM) == 4096
        handle.set_strict_mode(0)
        with pytest.raises(nbd.Error) as caught:
            handle.pwrite(b"x" * 100, 0)
        assert caught.value.errno == "EINVAL"
        handle.pwrite(b"x" * 4096, 4096)
        assert handle.pread(8192, 0) == bytes(4096) + b"x" * 4096


class Racer:
    """One connection, many requests in flight in a region of its own, and a copy of what must be there."""

    DEPTH = 32
    LARGEST = 16 << 10

    def __init__(self, handle: Any, seed: int, start: int, end: int) -> None:
        self.handle = handle
        self.dice = random.Random(seed)
        self.start, self.end = start, end
        self.model = bytearray(end - start)
        self.flying: dict[int, tuple[int, int]] = {}
        self.turns = 0
        self.errors: list[str] = []

    def run(self, until: float) -> None:
        """Work until `until`, then let everything land and compare the whole region."""
        while time.monotonic() < until and not self.errors:
            while len(self.flying) < self.DEPTH and self.start_one():
                pass
            self.handle.poll(-1)
        while self.flying:
            self.handle.poll(-1)
        for offset in range(self.start, self.end, MIB):
            length = min(MIB, self.end - offset)
            at = offset - self.start
            if self.handle.pread(length, offset) != self.model[at : at + length]:
                self.errors.append(f"the region at {offset} has changed")

    def start_one(self) -> bool:
        """Send one random request that overlaps none in flight; return whether there was room for it."""
        dice = self.dice
        length = dice.choice((dice.randrange(1, 600), 4096, dice.randrange(1, self.LARGEST)))
        offset = dice.randrange(self.start, self.end - length)
        if any(offset < end and begin < offset + length for begin, end in self.flying.values()):
            return False
        at = offset - self.start
        self.turns += 1
        ticket = self.turns
        self.flying[ticket] = (offset, offset + length)
        kind = dice.randrange(10)
        if kind < 4:
            buffer = nbd.Buffer(length)
            expected = bytes(self.model[at : at + length])

            def compare(error: Any) -> int:
                if bytes(buffer.to_bytearray()) != expected:
                    self.errors.append(f"{length} bytes at {offset} are not what was written")
                return self.landed(ticket, error)

            self.handle.aio_pread(buffer, offset, compare)
        elif kind < 9:
            random_part = dice.randbytes(dice.randrange(1, length + 1))
            data = bytearray((random_part * (length // len(random_part) + 1))[:length])
            self.model[at : at + length] = data
            self.handle.aio_pwrite(nbd.Buffer.from_bytearray(data), offset, lambda e: self.landed(ticket, e))
        else:
            self.model[at : at + length] = bytes(length)
            flags = dice.choice((0, nbd.CMD_FLAG_NO_HOLE))
            self.handle.aio_zero(length, offset, lambda e: self.landed(ticket, e), flags)
        return True

    def landed(self, ticket: int, error: Any) -> int:
        """A request has ended."""
        if getattr(error, "value", error):
            self.errors.append(f"request {ticket}: errno {getattr(error, 'value', error)}")
        del self.flying[ticket]
        return 1  # libnbd forgets the request


@pytest.mark.parametrize("region", [SIZE // 8, 65536 + 1001], ids=["large", "dense"])
def test_races(serve: Serve, region: int) -> None:
    """As libnbd's aio-parallel: 8 connections, hundreds of requests in flight, every read compared.

    The dense regions share the blocks at their borders, so two connections change parts of one block at once.
    """
    # Several threads for each client, also with an nbdkit where that is not the default.
    served = serve(disksize=SIZE + PRIVATE, compaction_interval="0.05", thread_model="parallel")
    with Churn(served):
        race(served, region)
    assert served.log.read_text() == ""


def race(served: NbdkitProcess, region: int) -> None:
    racers = [Racer(served.connect(), SEED + i, i * region, (i + 1) * region) for i in range(8)]
    until = time.monotonic() + 5
    threads = [threading.Thread(target=racer.run, args=(until,)) for racer in racers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [racer.errors for racer in racers] == [[]] * 8
    print(f"{sum(racer.turns for racer in racers)} requests")
    assert all(racer.turns > 100 for racer in racers)
