"""Clients that vanish, come in crowds, talk nonsense or will not leave: the others go on unharmed."""

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.client import NbdSocket, bystander
from support.run import SEED, wait_until
from support.server import NbdkitProcess

Serve = Callable[..., NbdkitProcess]
MIB = 1 << 20
BLOCK = 4096
STOP_SECONDS = 10.0  # it is one, on a machine that does nothing else; for ever, if it waits for a client
READ, WRITE = NbdSocket.READ, NbdSocket.WRITE


class TestVanishingClients:
    def test_half_a_write(self, serve: Serve) -> None:
        """Cut off anywhere, in the header or in the data: nothing of it is written."""
        served = serve()
        dice = random.Random(SEED)
        noise = os.urandom(256 << 10)
        with bystander(served):
            before = served.descriptors()
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
            wait_until(lambda: served.clients() == 1)
            wait_until(lambda: served.descriptors() <= before)
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
            wait_until(lambda: served.clients() == 1)
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
        threads_before, files_before = served.settled()
        memory = []
        for turn in range(4):
            crowd = [NbdSocket(served) for _ in range(200)]
            assert served.clients() == 201
            # Blocks shared by two clients each: the pieces meet in the middle of blocks.
            blocks = {(16 * MIB + number * 5000): os.urandom(5000) for number in range(200)}
            for client, (offset, block) in zip(crowd, blocks.items(), strict=True):
                client.send(WRITE, offset, len(block), block)
            assert [client.reply()[0] for client in crowd] == [0] * 200
            for client, (offset, block) in zip(reversed(crowd), blocks.items(), strict=True):
                assert client.read(offset, len(block)) == block
            most = f"{served.resident() / MIB:.1f} MiB with {served.threads()} threads"
            for client in crowd:
                if turn % 2:
                    client.close()
                else:
                    client.sock.close()
            wait_until(lambda: served.clients() == 1)
            wait_until(lambda: served.threads() == threads_before)
            wait_until(lambda: served.descriptors() == files_before)
            memory.append(served.resident())
            print(f"resident {most}, then {memory[-1] / MIB:.1f} MiB")
            assert steady.read(0, BLOCK) == noise
        # The Python state of a thread, left behind, would be 5 KB: 3 MiB and more for all that came, and with
        # several threads for each client 48 MiB. (So many leave the heap now 1 MiB larger, now smaller.)
        assert memory[-1] - memory[0] < (MIB if model == "auto" else 4 * MIB)
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
            before = served.settled()
            for _ in range(self.COUNT):
                provoke(served.socket, nonsense(dice), dice.random() < 0.5)
            wait_until(lambda: (served.threads(), served.descriptors()) == before)
            assert served.clients() == 1
        self.quiet(served)

    def test_requests(self, serve: Serve) -> None:
        """After a good handshake: noise, and requests whose fields are noise."""
        served = serve()
        dice = random.Random(SEED)
        with bystander(served):
            before = served.settled()
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
            wait_until(lambda: (served.threads(), served.descriptors()) == before)
            assert served.clients() == 1
        self.quiet(served, lines_each=6)

    def test_control_socket(self, serve: Serve) -> None:
        served = serve()
        dice = random.Random(SEED)
        path = served.rundir / "control.sock"
        good = b"GET /stats HTTP/1.1\r\nHost: zramd\r\nContent-Length: 3\r\n\r\nabc"
        statuses: dict[bytes, int] = {}
        with bystander(served):
            before = served.settled()
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
            wait_until(lambda: (served.threads(), served.descriptors()) == before)
            print(statuses)
            assert b"500" not in statuses
            assert statuses[b"400"] > self.COUNT / 4
            assert served.stats()["disksize"] == 64 * MIB
        assert served.log.read_text() == ""

    def quiet(self, served: NbdkitProcess, lines_each: int = 2) -> None:
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


def test_one_who_leaves_while_extents_are_told(serve: Serve) -> None:
    """nbdkit 1.32 sends each extent by itself; it must not go on once that fails."""
    served = serve()
    writer = NbdSocket(served)
    for block in range(0, 8000, 16):
        assert writer.ask(writer.WRITE, block * 4096, 4096, bytes([1 + block % 255]) * 4096) == 0
    with bystander(served, length=1 << 20):
        for _ in range(3):
            _ask_for_extents(served)
    assert writer.read(6400 * 4096, 4096) == bytes([1 + 6400 % 255]) * 4096
    assert served.process.poll() is None


def _whole(sock: socket.socket, size: int) -> bytes:
    """Return so many bytes: with a time limit, MSG_WAITALL does not wait for all of them."""
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, data
        data += more
    return data


def _ask_for_extents(served: NbdkitProcess) -> None:
    """Ask for more extents than a socket holds, take none, and leave."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(str(served.socket))
    _whole(sock, 18)
    context = b"base:allocation"
    query = struct.pack(">III", 0, 1, len(context)) + context
    structured_reply, set_meta_context, go = 8, 10, 7
    sock.sendall(struct.pack(">I", 3))
    for option, data in ((structured_reply, b""), (set_meta_context, query), (go, struct.pack(">IH", 0, 0))):
        sock.sendall(struct.pack(">8sII", b"IHAVEOPT", option, len(data)) + data)
        acknowledged = False
        while not acknowledged:
            _, _, kind, length = struct.unpack(">QIII", _whole(sock, 20))
            _whole(sock, length)
            acknowledged = kind == 1
    # Until the server stands still in the midst of an answer, and takes no more.
    sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        for cookie in range(10000):
            sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, NbdSocket.BLOCK_STATUS, cookie, 0, 32 << 20))
    sock.close()
