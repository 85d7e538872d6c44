"""Bad input and bad clients: a clear error or a clean refusal, and the others and the data go on unharmed."""

import contextlib
import errno
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PACKAGE_PARENT, PLUGIN, NbdSocket, Served, wait_until

Serve = Callable[..., Served]
MIB = 1 << 20
BLOCK = 4096
NOBODY = 65534
STOP_SECONDS = 1.0
SEED = int(os.environ.get("ZRAMD_SEED", str(random.SystemRandom().randrange(1 << 32))))
READ, WRITE, FLUSH, TRIM, CACHE = (
    NbdSocket.READ,
    NbdSocket.WRITE,
    NbdSocket.FLUSH,
    NbdSocket.TRIM,
    NbdSocket.CACHE,
)
WRITE_ZEROES, BLOCK_STATUS = NbdSocket.WRITE_ZEROES, NbdSocket.BLOCK_STATUS


@pytest.fixture(autouse=True)
def seed() -> None:
    print(f"ZRAMD_SEED={SEED}")


def clients(served: Served) -> int:
    """How many clients are connected."""
    count: int = json.loads(served.request("GET", "/health")[1])["clients"]
    return count


def threads(served: Served) -> int:
    """How many threads the process has."""
    return len(os.listdir(f"/proc/{served.process.pid}/task"))


def descriptors(served: Served) -> int:
    """How many files the process has open."""
    return len(os.listdir(f"/proc/{served.process.pid}/fd"))


def settled(served: Served) -> tuple[int, int]:
    """Threads and files while nobody comes or goes."""
    # nbdkit starts a client's threads one by one: the first may answer before the last is there.
    time.sleep(0.2)
    return threads(served), descriptors(served)


@contextlib.contextmanager
def bystander(served: Served, length: int = 8 * MIB) -> Iterator[None]:
    """Another client, which works on the first bytes of the device meanwhile and finds all as it left it."""
    stopping = threading.Event()
    failures: list[BaseException] = []
    turns = 0

    def work() -> None:
        nonlocal turns
        try:
            client = NbdSocket(served)
            dice = random.Random(SEED)
            model = bytearray(client.read(0, length))
            while not stopping.is_set():
                size = dice.randrange(1, 16384)
                offset = dice.randrange(length - size)
                data = (dice.randbytes(1 + size // 3) * 3)[:size]
                assert client.ask(WRITE, offset, size, data) == 0
                model[offset : offset + size] = data
                offset = dice.randrange(length - size)
                assert client.read(offset, size) == model[offset : offset + size]
                turns += 1
            assert client.read(0, length) == model
            client.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        wait_until(lambda: turns or failures)
        yield
    finally:
        stopping.set()
        thread.join(60)
    assert not failures, f"{failures[0]!r} after {turns} turns; log: {served.log.read_text()[-500:]}"


class TestBadRequests:
    """Each gets the right error, and the same connection goes on."""

    PAST = 64 * MIB - 100

    @pytest.mark.parametrize(
        ("command", "offset", "length", "flags", "expected"),
        [
            pytest.param(READ, PAST, 200, 0, errno.EINVAL, id="read over the end"),
            pytest.param(READ, 64 * MIB, 1, 0, errno.EINVAL, id="read at the end"),
            pytest.param(READ, 1 << 63, BLOCK, 0, errno.EINVAL, id="read far out"),
            pytest.param(READ, (1 << 64) - 1, BLOCK, 0, errno.EINVAL, id="read round the end of numbers"),
            pytest.param(READ, 0, 65 * MIB, 0, errno.EINVAL, id="read too much"),
            pytest.param(READ, 0, 0, 0, errno.EINVAL, id="read nothing"),
            pytest.param(WRITE, PAST, 200, 0, errno.ENOSPC, id="write over the end"),
            pytest.param(WRITE, 64 * MIB, 1, 0, errno.ENOSPC, id="write at the end"),
            pytest.param(WRITE, (1 << 64) - 1, BLOCK, 0, errno.ENOSPC, id="write round the end of numbers"),
            pytest.param(WRITE, 0, 64 * MIB + 1, 0, errno.ENOSPC, id="write too much"),
            pytest.param(TRIM, PAST, 200, 0, errno.EINVAL, id="trim over the end"),
            pytest.param(TRIM, 0, 0xFFFFFFFF, 0, errno.EINVAL, id="trim too much"),
            pytest.param(WRITE_ZEROES, PAST, 200, 0, errno.ENOSPC, id="zero over the end"),
            pytest.param(WRITE_ZEROES, 0, 0xFFFFFFFF, 0, errno.ENOSPC, id="zero too much"),
            pytest.param(FLUSH, 4096, 4096, 0, errno.EINVAL, id="flush of a range"),
            pytest.param(
                BLOCK_STATUS, 0, BLOCK, 0, errno.EINVAL, id="block status without structured replies"
            ),
            pytest.param(CACHE, 0, BLOCK, 0, errno.EINVAL, id="what is not offered"),
            pytest.param(99, 0, BLOCK, 0, errno.EINVAL, id="unknown command"),
            pytest.param(READ, 0, BLOCK, 1 << 15, errno.EINVAL, id="unknown flag"),
            pytest.param(WRITE, 0, BLOCK, 1 << 4, errno.EINVAL, id="fast-zero flag on a write"),
            pytest.param(
                READ, 0, BLOCK, 1 << 2, errno.EINVAL, id="do-not-fragment without structured replies"
            ),
        ],
    )
    def test_error(
        self, serve: Serve, command: int, offset: int, length: int, flags: int, expected: int
    ) -> None:
        served = serve()
        client = NbdSocket(served)
        assert client.size == 64 * MIB
        noise = os.urandom(MIB)
        assert client.ask(WRITE, 63 * MIB, MIB, noise) == 0
        for _ in range(3):
            payload = bytes(length) if command == WRITE else b""
            assert client.ask(command, offset, length, payload, flags) == expected
            assert client.read(63 * MIB, MIB) == noise
        assert client.read(0, BLOCK) == bytes(BLOCK)
        assert len(served.log.read_text().splitlines()) == 3

    def test_through_libnbd(self, serve: Serve) -> None:
        """The same seen by a client library with its own checks off, structured replies and all."""
        nbd = pytest.importorskip("nbd")
        served = serve()
        handle = served.connect()
        handle.set_strict_mode(0)
        size = handle.get_size()
        handle.pwrite(b"x" * BLOCK, size - BLOCK)
        for what, expected in (
            (lambda: handle.pread(200, size - 100), "EINVAL"),
            (lambda: handle.pread(1, size), "EINVAL"),
            (lambda: handle.pread(1, 1 << 62), "EINVAL"),
            (lambda: handle.pwrite(b"y" * 200, size - 100), "ENOSPC"),
            (lambda: handle.trim(200, size - 100), "EINVAL"),
            (lambda: handle.zero(200, size - 100), "ENOSPC"),
            (lambda: handle.cache(200, 0), "EINVAL"),
            (lambda: handle.block_status(200, size - 100, lambda *_: 0), "EINVAL"),
        ):
            with pytest.raises(nbd.Error) as caught:
                what()
            assert caught.value.errno == expected
        assert handle.pread(BLOCK, size - BLOCK) == b"x" * BLOCK

    def test_payload_that_is_too_large_to_skip(self, serve: Serve) -> None:
        """Only this costs the connection: there is no telling where the next request starts."""
        served = serve()
        with bystander(served):
            client = NbdSocket(served)
            client.send(WRITE, 0, 1 << 31, bytes(100))
            with pytest.raises(ConnectionError):
                client.reply()
        assert served.process.poll() is None


class TestBadSettings:
    """One sentence that names the value, an exit status, and nothing left behind."""

    CASES = (
        ("colour", "red"),
        ("mem_limits", "1G"),
        ("disksize", "64X"),
        ("disksize", "0"),
        ("disksize", "-1"),
        ("disksize", "1.5G"),
        ("disksize", ""),
        ("disksize", "1 G"),
        ("disksize", "0x"),
        ("disksize", "9E"),
        ("disksize", "18446744073709551616"),
        ("size", "2M"),
        ("name", "a/b"),
        ("name", ".."),
        ("name", ""),
        ("name", "x" * 65),
        ("mem_limit", "half"),
        ("comp_algorithm", "zstd"),
        ("comp_algorithm", "lz4(level=0)"),
        ("compaction", "maybe"),
        ("compaction_threshold", "0"),
        ("compaction_threshold", "101"),
        ("compaction_near_limit", "nan"),
        ("compaction_interval", "-1"),
        ("compaction_interval", "inf"),
        ("compaction_step", "1"),
        ("pool_full", "maybe"),
        ("stats_interval", "often"),
        ("endpoint", "2"),
        ("rundir", ""),
        ("rundir", "/" + "x" * 200),
        ("rundir", "/proc/none"),
        ("rundir", "/dev/null"),
        ("rundir", "/dev/null/run"),
        ("rundir", "/tmp"),
    )

    def refused(self, folder: Path, command: list[str], user: int | None = None) -> str:
        """Run what must fail in `folder`; return its one line of errors."""
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "PYTHONDONTWRITEBYTECODE": "1"}
        env["XDG_RUNTIME_DIR"] = str(folder)
        before = sorted(folder.rglob("*"))
        ran = subprocess.run(
            command,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            user=user,
            check=False,
        )
        assert ran.returncode in (1, 2), ran
        assert ran.stdout == ""
        assert len(ran.stderr.splitlines()) == 1, ran.stderr
        assert sorted(folder.rglob("*")) == before
        return ran.stderr

    @pytest.mark.parametrize(("key", "value"), CASES)
    def test_plugin(self, tmp_path: Path, key: str, value: str) -> None:
        words = [] if key == "disksize" else ["disksize=1M"]
        if key != "rundir":
            words.append(f"rundir={tmp_path}/run")
        command = ["nbdkit", "-f", "-U", f"{tmp_path}/sock", "python", str(PLUGIN), *words, f"{key}={value}"]
        said = self.refused(tmp_path, command)
        assert key in said
        assert f"'{key if key in ('colour', 'mem_limits') else value}'" in said

    @pytest.mark.parametrize(("key", "value"), CASES)
    def test_launcher(self, tmp_path: Path, key: str, value: str) -> None:
        words = [] if key == "disksize" else ["disksize=1M"]
        if key != "rundir":
            words.append(f"rundir={tmp_path}/run")
        said = self.refused(
            tmp_path, [sys.executable, "-P", "-m", "zramd", "serve", *words, f"{key}={value}"]
        )
        assert said.startswith(("zramd: ", "nbdkit: "))  # what it cannot know before, the plugin tells
        assert f"'{key if key in ('colour', 'mem_limits') else value}'" in said

    def test_rundir_that_is_not_ours_to_write(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            user = NOBODY if os.geteuid() == 0 else None
            readable = subprocess.run(["test", "-r", str(PLUGIN)], user=user, check=False).returncode == 0
            if not readable:
                pytest.skip("needs a checkout that other users can read")
            folder.chmod(0o555)
            words = ["disksize=1M", f"rundir={folder}/run"]
            said = self.refused(folder, ["nbdkit", "-f", "-U", "-", "python", str(PLUGIN), *words], user)
            assert f"rundir '{folder}/run' cannot be used: permission denied" in said
            folder.chmod(0o755)

    def test_rundir_in_use(self, serve: Serve, tmp_path: Path) -> None:
        served = serve()
        with bystander(served):
            before = sorted(served.rundir.iterdir())
            command = ["nbdkit", "-f", "-U", f"{tmp_path}/sock", "python", str(PLUGIN), "disksize=1M"]
            said = self.refused(tmp_path, [*command, f"rundir={served.rundir}"])
            assert f"'{served.rundir}' is in use by a running server (pid {served.process.pid})" in said
            launcher = [sys.executable, "-P", "-m", "zramd", "serve", f"rundir={served.rundir}"]
            assert f"(pid {served.process.pid})" in self.refused(tmp_path, launcher)
            assert sorted(served.rundir.iterdir()) == before


class TestFullPool:
    def fill(self, client: NbdSocket, dice: random.Random, start: int) -> dict[int, bytes]:
        """Write blocks from `start` on until one is refused; return what was taken."""
        taken = {}
        for offset in range(start, client.size, BLOCK):
            block = dice.randbytes(dice.randrange(500, 4000)).ljust(BLOCK, b"\0")
            error = client.ask(WRITE, offset, BLOCK, block)
            if error:
                assert error == errno.ENOSPC
                break
            taken[offset] = block
        return taken

    def test_refused_and_nothing_lost(self, serve: Serve) -> None:
        served = serve(mem_limit="4M", compaction_interval="0.05")
        client, other = NbdSocket(served), NbdSocket(served)
        dice = random.Random(SEED)
        kept = self.fill(client, dice, 0)
        assert len(kept) * BLOCK > 5 * MIB
        refused = 0
        for offset in dice.sample(sorted(kept), 500):
            block = dice.randbytes(BLOCK)
            error = client.ask(WRITE, offset, BLOCK, block)
            assert error in (0, errno.ENOSPC)
            if error:
                refused += 1
            else:
                kept[offset] = block
            assert other.read(offset, BLOCK) == kept[offset]
        assert refused > 300
        stats = served.stats()
        assert stats["mem_used_max"] <= stats["mem_limit"] == 4 * MIB
        assert stats["failed_writes"] >= refused
        # Always possible: to read, to free, and to write what takes no memory.
        for offset, block in kept.items():
            assert other.read(offset, BLOCK) == block
        freed = sorted(kept)[: len(kept) // 2]
        for offset in freed[::2]:
            assert other.ask(TRIM, offset, BLOCK) == 0
        for offset in freed[1::2]:
            assert other.ask(WRITE, offset, BLOCK, b"7" * BLOCK) == 0
            kept[offset] = b"7" * BLOCK
        for offset in freed[::2]:
            kept[offset] = bytes(BLOCK)
        # What was freed is scattered: there is room only because compaction makes it.
        assert len(self.fill(client, dice, 32 * MIB)) > len(freed) // 2
        for offset, block in kept.items():
            assert client.read(offset, BLOCK) == block
        assert served.stats()["mem_used_max"] <= 4 * MIB
        # One line a refusal, without a traceback.
        log = served.log.read_text()
        assert "Traceback" not in log
        assert len(log.splitlines()) <= served.stats()["failed_writes"]

    def test_a_larger_limit_helps(self, serve: Serve) -> None:
        served = serve(mem_limit="1M")
        client = NbdSocket(served)
        kept = self.fill(client, random.Random(SEED), 0)
        noise = os.urandom(MIB)
        assert client.ask(WRITE, 32 * MIB, MIB, noise) == errno.ENOSPC
        assert served.request("PUT", "/mem_limit", "8M")[0] == 200
        assert client.ask(WRITE, 32 * MIB, MIB, noise) == 0
        assert served.request("PUT", "/mem_limit", "1M")[0] == 200
        assert client.ask(WRITE, 40 * MIB, MIB, noise) == errno.ENOSPC
        assert client.read(32 * MIB, MIB) == noise
        assert all(client.read(offset, BLOCK) == block for offset, block in kept.items())

    def test_the_part_of_a_request_that_fitted(self, serve: Serve) -> None:
        """A large write that is refused leaves each block whole: old or new."""
        served = serve(mem_limit="4M")
        client = NbdSocket(served)
        old, new = os.urandom(3 * MIB), os.urandom(3 * MIB)
        assert client.ask(WRITE, 0, 3 * MIB, old) == 0
        assert client.ask(WRITE, 3 * MIB, 3 * MIB, new) == errno.ENOSPC
        assert client.ask(WRITE, 100, 3 * MIB - 100, new[100:]) in (0, errno.ENOSPC)
        now = client.read(0, 6 * MIB)
        for at in range(0, 3 * MIB, BLOCK):
            fresh = old[:100] + new[100:BLOCK] if at == 0 else new[at : at + BLOCK]
            assert now[at : at + BLOCK] in (old[at : at + BLOCK], fresh)
            assert now[3 * MIB + at :][:BLOCK] in (bytes(BLOCK), new[at : at + BLOCK])

    def test_as_io_error(self, serve: Serve) -> None:
        served = serve(mem_limit="1M", pool_full="eio")
        client = NbdSocket(served)
        noise = os.urandom(2 * MIB)
        assert client.ask(WRITE, 0, len(noise), noise) == errno.EIO
        # Only a full pool is told so: what is past the end stays what it was.
        assert client.ask(WRITE, client.size, BLOCK, bytes(BLOCK)) == errno.ENOSPC

    def test_many_at_the_limit(self, serve: Serve) -> None:
        """Four clients overwrite near the limit while it compacts: each block is what its owner knows."""
        served = serve(mem_limit="2M", compaction_interval="0.02")
        failures: list[BaseException] = []
        counts = {0: 0, errno.ENOSPC: 0}

        def work(number: int) -> None:
            try:
                client, dice = NbdSocket(served), random.Random(SEED + number)
                kept: dict[int, bytes] = {}
                start = number * 16 * MIB
                for _ in range(3000):
                    offset = start + dice.randrange(500) * BLOCK
                    if dice.random() < 0.1:
                        assert client.ask(TRIM, offset, BLOCK) == 0
                        kept[offset] = bytes(BLOCK)
                        continue
                    block = dice.randbytes(dice.choice((0, 50, 1500, 3000, BLOCK))).ljust(BLOCK, b"\1")
                    error = client.ask(WRITE, offset, BLOCK, block)
                    counts[error] += 1
                    if not error:
                        kept[offset] = block
                    assert client.read(offset, BLOCK) == kept.get(offset, bytes(BLOCK))
                for offset, block in kept.items():
                    assert client.read(offset, BLOCK) == block
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert failures == []
        print(counts)
        assert min(counts.values()) > 100
        assert served.stats()["mem_used_max"] <= 2 * MIB


class TestVanishingClients:
    def test_half_a_write(self, serve: Serve) -> None:
        """Cut off anywhere, in the header or in the data: nothing of it is written."""
        served = serve()
        dice = random.Random(SEED)
        noise = os.urandom(256 << 10)
        with bystander(served):
            before = descriptors(served)
            first = NbdSocket(served)
            assert first.ask(WRITE, 16 * MIB, len(noise), noise) == 0
            for _ in range(100):
                client = NbdSocket(served)
                request = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 16 * MIB, len(noise)) + bytes(
                    len(noise)
                )
                client.sock.sendall(request[: dice.choice((1, 27, 28, 29, dice.randrange(1, len(request))))])
                client.sock.close()
            assert first.read(16 * MIB, len(noise)) == noise
            first.close()
            wait_until(lambda: clients(served) == 1)
            wait_until(lambda: descriptors(served) <= before)
        log = served.log.read_text()
        assert len(log.splitlines()) <= 100
        assert "Traceback" not in log

    SCRIPT = """
import sys, nbd
handle = nbd.NBD()
handle.connect_uri(sys.argv[1])
what, size, turn = sys.argv[2], int(sys.argv[3]), 0
buffers = [nbd.Buffer.from_bytearray(bytearray([n]) * size) for n in range(16)]
while True:
    while handle.aio_in_flight() < 16:
        turn += 1
        offset = (16 << 20) + turn * size % (32 << 20)
        getattr(handle, "aio_p" + what)(buffers[turn % 16], offset, lambda e: 1)
        if turn == 100:
            print("under way", flush=True)
    handle.poll(-1)
"""

    @pytest.mark.parametrize("size", [BLOCK, 256 << 10])
    @pytest.mark.parametrize("what", ["read", "write"])
    def test_killed_at_depth_16(self, serve: Serve, what: str, size: int) -> None:
        pytest.importorskip("nbd")
        served = serve()
        dice = random.Random(SEED)
        with bystander(served):
            for _ in range(8):
                command = [sys.executable, "-c", self.SCRIPT, served.uri, what, str(size)]
                with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                    assert process.stdout is not None
                    assert process.stdout.readline() == b"under way\n"
                    time.sleep(dice.random() * 0.02)
                    process.kill()
                assert served.process.poll() is None, served.log.read_text()
            wait_until(lambda: clients(served) == 1)
            # Each block that was written is that of one request.
            reader = NbdSocket(served)
            data = reader.read(16 * MIB, 32 * MIB)
            for at in range(0, len(data), BLOCK):
                assert data[at : at + BLOCK] == data[at : at + 1] * BLOCK
        assert len(served.log.read_text().splitlines()) <= 8 * 16


class TestManyClients:
    @pytest.mark.parametrize("model", ["auto", "parallel"])
    def test_200_at_once(self, serve: Serve, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """All are served at the same time, and afterwards the server is what it was."""
        # glibc gives threads heaps of their own, each of which grows to its size over the first ten thousand
        # threads. With one heap for all it shows after a few hundred whether anything is kept.
        monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
        served = serve(thread_model=model)
        # Small requests only: nbdkit keeps for each of a client's threads a buffer as large as the largest.
        steady, noise = NbdSocket(served), os.urandom(BLOCK)
        assert steady.ask(WRITE, 0, BLOCK, noise) == 0
        threads_before, files_before = settled(served)
        memory = []
        for turn in range(4):
            crowd = [NbdSocket(served) for _ in range(200)]
            assert clients(served) == 201
            # Blocks shared by two clients each: the pieces meet in the middle of blocks.
            blocks = {(16 * MIB + number * 5000): os.urandom(5000) for number in range(200)}
            for client, (offset, block) in zip(crowd, blocks.items(), strict=True):
                client.send(WRITE, offset, len(block), block)
            assert [client.reply()[0] for client in crowd] == [0] * 200
            for client, (offset, block) in zip(reversed(crowd), blocks.items(), strict=True):
                assert client.read(offset, len(block)) == block
            most = f"{served.resident() / MIB:.1f} MiB with {threads(served)} threads"
            for client in crowd:
                if turn % 2:
                    client.close()
                else:
                    client.sock.close()
            wait_until(lambda: clients(served) == 1)
            wait_until(lambda: threads(served) == threads_before)
            wait_until(lambda: descriptors(served) == files_before)
            memory.append(served.resident())
            print(f"resident {most}, then {memory[-1] / MIB:.1f} MiB")
            assert steady.read(0, BLOCK) == noise
        # The Python state of a thread, left behind, would be 5 KB: 3 MiB and more for all that came.
        assert memory[-1] - memory[0] < MIB
        assert served.log.read_text() == ""

    def test_names_of_no_text(self, serve: Serve) -> None:
        """An export name that is not UTF-8 is one that does not exist."""
        served = serve()
        steady = NbdSocket(served)
        name = b"\xff\xfe\xfd"
        for option, data in (
            (1, name),  # export name
            (6, struct.pack(">I", len(name)) + name + bytes(2)),  # info
            (7, struct.pack(">I", len(name)) + name + bytes(2)),  # go
        ):
            header = struct.pack(">I8sII", 3, b"IHAVEOPT", option, len(data))
            provoke(served.socket, header + data, wait=True)
        assert steady.read(0, BLOCK) == bytes(BLOCK)
        log = served.log.read_text()
        assert "Traceback" not in log
        assert len(log.splitlines()) <= 6


def nonsense(dice: random.Random) -> bytes:
    """Random bytes, more often than not such as begin like what the server expects."""
    noise = dice.randbytes(dice.randrange(1, 300))
    kind = dice.randrange(5)
    if kind == 0:
        return noise
    if kind == 1:  # random client flags
        return dice.randbytes(4) + b"IHAVEOPT" + noise
    flags = struct.pack(">I", dice.randrange(4))
    if kind == 2:  # options of any number, with a length that is right or random
        length = dice.choice((len(noise), dice.getrandbits(32), dice.randrange(70000)))
        return flags + b"IHAVEOPT" + struct.pack(">II", dice.randrange(16), length) + noise
    if kind == 3:  # a known option with random content, several times
        option = b"IHAVEOPT" + struct.pack(">II", dice.choice((3, 5, 6, 7, 8, 9, 10)), len(noise)) + noise
        return flags + option * dice.randrange(1, 10)
    # lengths inside the option's data that lie
    data = struct.pack(">I", dice.getrandbits(dice.choice((8, 16, 32)))) + noise
    return flags + b"IHAVEOPT" + struct.pack(">II", dice.choice((6, 7, 9, 10)), len(data)) + data


def provoke(path: Path, data: bytes, wait: bool) -> bytes:
    """Send bytes to a unix socket and close it, after the answer or without waiting for it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        answer = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            if wait:
                sock.shutdown(socket.SHUT_WR)
                while part := sock.recv(65536):
                    answer += part
        return answer


class TestRandomBytes:
    COUNT = 400

    def test_handshake(self, serve: Serve) -> None:
        served = serve()
        dice = random.Random(SEED)
        with bystander(served):
            before = settled(served)
            for _ in range(self.COUNT):
                provoke(served.socket, nonsense(dice), dice.random() < 0.5)
            wait_until(lambda: (threads(served), descriptors(served)) == before)
            assert clients(served) == 1
        self.quiet(served)

    def test_requests(self, serve: Serve) -> None:
        """After a good handshake: noise, and requests whose fields are noise."""
        served = serve()
        dice = random.Random(SEED)
        with bystander(served):
            before = settled(served)
            for turn in range(self.COUNT):
                client = NbdSocket(served)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    if turn % 2:
                        client.sock.sendall(dice.randbytes(dice.randrange(1, 300)))
                    else:
                        for _ in range(5):
                            command, flags = (
                                dice.choice((*range(9), dice.getrandbits(16))),
                                dice.getrandbits(16),
                            )
                            # Not where the bystander works: a request may happen to be good.
                            offset = dice.choice((16 * MIB, 64 * MIB)) + dice.getrandbits(
                                dice.choice((10, 40, 63))
                            )
                            payload = dice.randbytes(dice.randrange(100)) if command == WRITE else b""
                            length = dice.choice((len(payload), dice.getrandbits(32)))
                            client.send(command, offset, length, payload, flags if dice.random() < 0.3 else 0)
                client.sock.close()
            wait_until(lambda: (threads(served), descriptors(served)) == before)
            assert clients(served) == 1
        self.quiet(served, lines_each=6)

    def test_control_socket(self, serve: Serve) -> None:
        served = serve()
        dice = random.Random(SEED)
        path = served.rundir / "control.sock"
        good = b"GET /stats HTTP/1.1\r\nHost: zramd\r\nContent-Length: 3\r\n\r\nabc"
        statuses: dict[bytes, int] = {}
        with bystander(served):
            before = settled(served)
            for turn in range(self.COUNT):
                kind = turn % 4
                if kind == 0:
                    data = dice.randbytes(dice.randrange(1, 500))
                elif kind == 1:  # some bytes changed
                    mutable = bytearray(good)
                    for _ in range(dice.randrange(1, 5)):
                        mutable[dice.randrange(len(mutable))] = dice.getrandbits(8)
                    data = bytes(mutable)
                elif kind == 2:
                    data = good[: dice.randrange(len(good))]
                else:  # too long in one way or another
                    name = dice.choice((b"x" * 9000, b"Content-Length: 999999999999", b"A: b\r\n" * 3000))
                    data = b"GET /stats HTTP/1.1\r\n" + name + b"\r\n\r\n"
                answer = provoke(path, data, wait=dice.random() < 0.8)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
                statuses[answer[9:12]] = statuses.get(answer[9:12], 0) + 1
            wait_until(lambda: (threads(served), descriptors(served)) == before)
            print(statuses)
            assert b"500" not in statuses
            assert statuses[b"400"] > self.COUNT / 4
            assert served.stats()["disksize"] == 64 * MIB
        assert served.log.read_text() == ""

    def quiet(self, served: Served, lines_each: int = 2) -> None:
        """The log tells of each bad client in a few lines, and nothing surprised the server itself."""
        log = served.log.read_text()
        print(f"{len(log.splitlines())} lines, {len(log)} bytes in the log for {self.COUNT} connections")
        assert len(log.splitlines()) <= lines_each * self.COUNT
        assert len(log) < 150 * lines_each * self.COUNT
        assert "Traceback" not in log


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_with_clients_of_all_kinds(self, serve: Serve, number: int) -> None:
        """Idle, writing, stuck in a request, stuck in the handshake, and stuck on the control socket."""
        served = serve()
        idle = [NbdSocket(served) for _ in range(20)]
        half = NbdSocket(served)
        half.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, MIB) + bytes(1000))
        deaf = NbdSocket(served)
        for _ in range(4):
            deaf.send(READ, 0, 8 * MIB)
        stuck = []
        for name in ("nbd.sock", "control.sock"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(served.rundir / name))
            sock.sendall(b"G")
            stuck.append(sock)
        turns = [0] * 4

        def write(number: int) -> None:
            client, noise = NbdSocket(served), os.urandom(MIB)
            with contextlib.suppress(OSError):
                while not client.ask(WRITE, number * 4 * MIB, MIB, noise):
                    turns[number] += 1

        writers = [threading.Thread(target=write, args=(index,)) for index in range(4)]
        for writer in writers:
            writer.start()
        wait_until(lambda: min(turns) > 2)
        seconds = served.stop(number)
        for writer in writers:
            writer.join(10)
        print(f"ended after {seconds:.2f} s, {len(served.log.read_text().splitlines())} lines in the log")
        assert seconds < STOP_SECONDS
        assert served.process.returncode == 0, served.log.read_text()
        assert not served.rundir.exists()
        assert len(served.log.read_text().splitlines()) <= 40
        for sock in (*stuck, *(client.sock for client in (*idle, half, deaf))):
            sock.close()
