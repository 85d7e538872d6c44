"""A server that is short of something: of descriptors, threads, memory, room, or of who reads what it says.

What needed it fails with a sentence; all else goes on, a signal ends the server, and when the shortage ends
so does the trouble.
"""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.client import NbdSocket, bystander
from support.run import SANITIZED, preloaded, wait_until
from support.server import PACKAGE_PARENT, PLUGIN, NbdkitProcess

from zramd.core.device.device import Device
from zramd.server import log, sockets
from zramd.settings import codecs

Serve = Callable[..., NbdkitProcess]
MIB = 1 << 20
WRITE = NbdSocket.WRITE


def causes(served: NbdkitProcess) -> list[str]:
    """What the server says goes wrong."""
    health = json.loads(served.request("GET", "/health")[1])
    assert health["status"] == ("degraded" if health["causes"] else "ok")
    told: list[str] = health["causes"]
    return told


@pytest.fixture
def crowd() -> Iterator[Callable[[NbdkitProcess, int], list[socket.socket]]]:
    """Connect many times, and say nothing."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    connected: list[socket.socket] = []

    def connect(served: NbdkitProcess, count: int) -> list[socket.socket]:
        for _ in range(count):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            connected.append(sock)
            sock.connect(str(served.socket))
        return connected

    yield connect
    for sock in connected:
        sock.close()


class TestConnections:
    def test_more_than_the_limit(
        self, serve: Serve, crowd: Callable[[NbdkitProcess, int], list[socket.socket]]
    ) -> None:
        served = serve(client_limit="20")
        with bystander(served):
            idle = crowd(served, 200)
            text = "there are 20 connections already, the most that client_limit allows"
            wait_until(lambda: f"clients are turned away: {text}" in causes(served))
            assert served.descriptors() < 100
            for sock in idle:
                sock.close()
            wait_until(lambda: causes(served) == [])
            client = NbdSocket(served)
            client.read(0, 4096)
            client.close()
        assert f"preconnect: error: a client was turned away: {text}" in served.log.read_text()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
    @pytest.mark.parametrize("room", [0, 4, 40])
    def test_more_than_the_descriptors(
        self, serve: Serve, crowd: Callable[[NbdkitProcess, int], list[socket.socket]], room: int, number: int
    ) -> None:
        served = serve()
        with bystander(served):
            in_use = served.descriptors()
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (in_use + room, hard))
            idle = crowd(served, 300)
            wait_until(lambda: any("descriptors" in cause for cause in causes(served)))
            assert served.request("PUT", "/compaction", "off")[0] == 200
            for sock in idle:
                sock.close()
            resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (in_use + 100, hard))
            wait_until(lambda: causes(served) == [])
            client = NbdSocket(served)
            client.read(0, 4096)
            client.close()
            resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (in_use + room, hard))
            crowd(served, 300)
            wait_until(lambda: any("descriptors" in cause for cause in causes(served)))
        served.stop(number)
        assert served.process.returncode == 0
        assert not served.rundir.exists()
        assert len(served.log.read_text().splitlines()) < 100

    def test_gone_without_a_word(self) -> None:
        """Connections over TCP are asked now and then whether there still is somebody."""
        with socket.socket() as listener, socket.socket() as client:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            sockets.keep_alive([listener.fileno()])
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                found = [
                    accepted.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (
                        socket.TCP_KEEPIDLE,
                        socket.TCP_KEEPINTVL,
                        socket.TCP_KEEPCNT,
                        socket.TCP_USER_TIMEOUT,
                    )
                ]
                assert found == [20, 10, 3, 50_000]

    def test_clients_over_tcp_are_asked(self, tmp_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "python", str(PLUGIN), "disksize=1M"]
        process = subprocess.Popen(
            [*command, f"rundir={tmp_path}/run"],
            env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
            stdin=subprocess.DEVNULL,
        )
        try:
            wait_until((tmp_path / "run" / "control.sock").exists)
            with socket.create_connection(("127.0.0.1", port)) as client:
                assert client.recv(8) == b"NBDMAGIC"
                lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
                (timer,) = [
                    words[5] for words in lines if words[1].endswith(f":{port:04X}") and words[3] == "01"
                ]
                assert timer.startswith("02:"), "the timer for who is silent runs"
        finally:
            process.terminate()
            assert process.wait(30) == 0


class TestStandardError:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_nobody_reads(self, tmp_path: Path, number: int) -> None:
        rundir = tmp_path / "run"
        reader, writer = os.pipe()
        words = [sys.executable, "-P", "-m", "zramd", "serve", "--name", "x", "--size", "64M"]
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
        process = subprocess.Popen(
            [*words, f"rundir={rundir}", "mem_limit=1M"],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=env,
        )
        os.close(writer)
        try:
            served = NbdkitProcess.__new__(NbdkitProcess)
            served.process, served.rundir, served.socket, served.name = (
                process,
                rundir,
                rundir / "nbd.sock",
                "x",
            )
            wait_until(served.is_ready)
            client = NbdSocket(served)
            noise = os.urandom(4096)
            start = time.monotonic()
            refused = sum(client.ask(WRITE, 4096 * turn, 4096, noise) != 0 for turn in range(5000))
            periods = 2 + int((time.monotonic() - start) / log.Log.PERIOD)  # those it may have touched
            assert refused > 4000
            assert served.request("GET", "/health")[0] == 200
            process.send_signal(number)
            assert process.wait(30) == 0
            with os.fdopen(reader) as text:
                lines = text.read().splitlines()
            assert sum("pool is full" in line for line in lines) <= periods * log.Log.BURST
            assert any("lines more like these were held back" in line for line in lines)
        finally:
            process.kill()
            process.wait()


class TestManager:
    def test_busy_when_we_are_ready(
        self, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = str(tmp_path / "notify")
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
        ):
            manager.bind(path)
            manager.settimeout(30)
            other.setblocking(False)
            other.connect(path)
            with pytest.raises(BlockingIOError):
                while True:
                    other.send(b"STATUS=somebody else")
            monkeypatch.setenv("NOTIFY_SOCKET", path)
            served = serve()
            text = "the service manager does not take 'READY=1': its queue is full"
            wait_until(
                lambda: f"the service manager does not know that zramd serves: {text}" in causes(served)
            )
            while manager.recv(4096) != b"READY=1":
                pass
            wait_until(lambda: causes(served) == [])


class TestAddressSpace:
    @pytest.mark.parametrize("limit", [400 * MIB, 1200 * MIB, 4096 * MIB])
    def test_limited(self, tmp_path: Path, limit: int) -> None:
        command = ["nbdkit", "-f", "-U", f"{tmp_path}/sock", "python", str(PLUGIN), "disksize=1G"]
        ran = subprocess.run(
            ["prlimit", f"--as={limit}", *command, f"rundir={tmp_path}/run"],
            env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 1
        (line,) = ran.stderr.splitlines()
        assert f"the address space is limited to {limit} bytes: use 'ulimit -v unlimited'" in line
        assert not (tmp_path / "run").exists()


# Runs where only it sees what it mounts. Prints what came of a run folder without room.
FULL = """
import errno, json, os, subprocess, sys, time
from pathlib import Path
from support.client import NbdSocket
from support.run import wait_until, zramd_command as zramd
from support.server import NbdkitProcess
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "zramd-test", folder], check=True)
run = folder / "run"
served = NbdkitProcess.__new__(NbdkitProcess)
served.rundir, served.socket, served.name = run, run / "nbd.sock", "full"

def health():
    return json.loads(served.request("GET", "/health")[1])

def fill():
    fd = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(fd, bytes(4096))
    except OSError as error:
        assert error.errno == errno.ENOSPC
    os.close(fd)

done = zramd("start", "full", "--size", "64M", f"rundir={run}", f"state={sys.argv[2]}")
assert done.returncode == 0, done.stderr
client = NbdSocket(served)
assert client.ask(client.WRITE, 0, 4096, b"data" * 1024) == 0
client.close()
wait_until(lambda: not served.clients())
before = (run / "data_id").read_text()
fill()
print("reset", served.request("POST", "/reset")[0])
name = run / "data_id"
print("the old name", name.exists() and name.read_text() == before)
fill()
client = NbdSocket(served)
assert client.read(0, 4096) == bytes(4096)
assert client.ask(client.WRITE, 0, 4096, b"more" * 1024) == 0
client.close()
wait_until(lambda: "stats files are not written" in str(health()["causes"]))  # as numbers have changed
os.unlink(folder / "filler")
wait_until(lambda: health()["status"] == "ok")
after = (run / "data_id").read_text()
print("another name", len(after) == len(before) and after != before)
fill()
done = zramd("restart", "--rundir", run)
print("restart", done.returncode, done.stderr)
client = NbdSocket(served)
assert client.read(0, 4096) == b"more" * 1024
client.close()
os.unlink(folder / "filler")
wait_until(lambda: health()["status"] == "ok")
print("the same name", (run / "data_id").read_text() == after)
fill()
done = zramd("stop", "--rundir", run)
print("stop", done.returncode, done.stderr, run.exists())
"""


@pytest.mark.parametrize("most", [30, 64, 100])
@pytest.mark.parametrize("words", ["start a --size 16M", "serve --name a --size 16M"])
def test_a_start_with_few_descriptors(tmp_path: Path, words: str, most: int) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    command = f"ulimit -n {most}; exec {sys.executable} -P -m zramd {words} rundir={tmp_path}/run"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    sentence = "too many open files: raise ulimit -n, or LimitNOFILE= of the service"
    assert re.fullmatch(f"zramd: ('[^']*' cannot be used: )?{sentence}\n", done.stderr), done.stderr
    assert os.listdir(tmp_path / "run") == []


def test_run_folder_without_room(tmp_path: Path, memory_folder: Path) -> None:
    command = (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    )
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    path = os.pathsep.join((str(PACKAGE_PARENT), str(Path(__file__).parent.parent)))
    done = subprocess.run(
        [*command, sys.executable, "-c", FULL, str(tmp_path), str(memory_folder / "state")],
        env={**os.environ, "PYTHONPATH": path, "ZRAMD_SEED": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "reset 200",
        "the old name False",
        "another name True",
        "restart 0 ",
        "the same name True",
        "stop 0  False",
    ]


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
@pytest.mark.parametrize("algorithm", ["lz4", "lz4hc", "zstd(level=12)"])
def test_no_memory_for_a_codec_keeps_the_server_from_starting(
    algorithm: str, tmp_path: Path, malloc_shim: Path
) -> None:
    """That of the first request is made when the server starts."""

    def metadata(name: str, level: int = 0) -> int:
        return Device(1 << 20, codec=name, level=level).counters()["metadata_bytes"]

    name, level = codecs.parse(algorithm)
    size = metadata(name, level) - metadata("none") + (12 << 10)
    if name == "zstd":
        size -= (min(8, 2 * len(os.sched_getaffinity(0))) - 2) * (96 << 10)  # decoders
    done = subprocess.run(
        [
            *(sys.executable, "-m", "zramd", "serve", "--size", "1M"),
            *(f"comp_algorithm={algorithm}", f"rundir={tmp_path}/run"),
        ],
        env={
            **os.environ,
            **preloaded(malloc_shim),
            "PYTHONPATH": str(PACKAGE_PARENT),
            "SHIM_REFUSED": str(size),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    assert f"no memory to compress by {name}: {size} bytes" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()
