"""Requests that cannot be done: each gets the right error, and the connection and the data go on unharmed."""

import errno
import os
import random
from collections.abc import Callable
from functools import partial

import pytest
from support.client import NbdSocket, bystander
from support.run import SEED, run_threads, wait_until
from support.server import NbdkitProcess

Serve = Callable[..., NbdkitProcess]
MIB = 1 << 20
BLOCK = 4096
READ, WRITE, FLUSH, TRIM, CACHE = (
    NbdSocket.READ,
    NbdSocket.WRITE,
    NbdSocket.FLUSH,
    NbdSocket.TRIM,
    NbdSocket.CACHE,
)
WRITE_ZEROES, BLOCK_STATUS = NbdSocket.WRITE_ZEROES, NbdSocket.BLOCK_STATUS


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
            pytest.param(CACHE, PAST, 200, 0, errno.EINVAL, id="cache over the end"),
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
        wait_until(lambda: len(served.log.read_text().splitlines()) == 3)  # a thread passes them on

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
            (lambda: handle.cache(200, size - 100), "EINVAL"),
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
        counts = {0: 0, errno.ENOSPC: 0}

        def work(number: int) -> None:
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

        run_threads(partial(work, number) for number in range(4))
        print(counts)
        assert min(counts.values()) > 100
        assert served.stats()["mem_used_max"] <= 2 * MIB
