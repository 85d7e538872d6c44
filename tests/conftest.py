"""Fixtures for all tests: a clean environment, and a real nbdkit that serves the plugin."""

import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import zramd

PACKAGE_PARENT = Path(zramd.__file__).parent.parent
PLUGIN = PACKAGE_PARENT / "nbdkit_plugin.py"
SCALE = float(os.environ.get("ZRAMD_STRESS", "1"))  # how much longer tests with threads and kills are to last
SEED = int(os.environ.get("ZRAMD_SEED", str(random.SystemRandom().randrange(1 << 32))))  # of random choices
SANITIZED = "san" in os.environ.get("ZRAMD_BUILD", "")


# What the tests start is to be interrupted, also where nohup or a script's & has signals ignored: children
# inherit that.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_report_header() -> str:
    try:
        import nbd  # noqa: F401

        libnbd = "yes"
    except ImportError:
        libnbd = "no"
    tools = {name: "yes" if shutil.which(name) else "no" for name in ("nbdkit", "fio", "qemu-io", "nbdcopy")}
    tools |= {"libnbd": libnbd, "root": "yes" if os.geteuid() == 0 else "no"}
    found = ", ".join(f"{name} {there}" for name, there in tools.items())
    return f"zramd: {PACKAGE_PARENT}; {found}; ZRAMD_SEED={SEED}"


@pytest.fixture(autouse=True)
def clean_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("ZRAMD_", "LISTEN_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What a command that runs in this process has signals do, they do only in that test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """A test that makes random choices tells the seed when it fails."""
    if hasattr(request.module, "SEED"):
        print(f"ZRAMD_SEED={SEED}")


def zramd_command(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "zramd", *map(str, words)],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def block_content(block: int, version: int) -> bytes:
    """What only this version of this block holds, of every kind; version 0: a hole."""
    if version == 0:
        return bytes(4096)
    rnd = random.Random(block << 32 | version)
    kind = rnd.randrange(8)
    if kind == 0:
        return (block << 32 | version).to_bytes(8, "little") * 512
    head = b"%08d %08d " % (block, version)
    size = 4000 if kind == 1 else rnd.randrange(50, 3600)
    return (head + rnd.randbytes(size) + bytes(4096))[: 4096 - 18] + head


def compressible(seed: int, size: int = 700) -> bytes:
    """A block that is stored as a little more than `size` bytes."""
    return random.Random(seed).randbytes(size) + bytes(4096 - size)


def noise(seed: int) -> bytes:
    """A block that is stored raw."""
    return random.Random(seed).randbytes(4096)


def run_threads(works: Iterable[Callable[[], None]]) -> None:
    """Run each in a thread of its own, all to their end; raise the first exception of one."""
    errors: list[BaseException] = []

    def guard(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def wait_until(predicate: Callable[[], object], timeout: float = 10.0) -> None:
    """Poll until `predicate` is true; fails the test after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > end:
            pytest.fail(f"not within {timeout} s: {predicate}")
        time.sleep(0.01)


def preloaded(library: Path) -> dict[str, str]:
    """What has a program use a library before all others, but for a sanitizer's, which must be the first."""
    before = os.environ.get("LD_PRELOAD")
    return {"LD_PRELOAD": f"{before}:{library}" if before else str(library)}


def talk(path: Path, data: bytes, timeout: float = 10.0) -> bytes:
    """Send `data` to a unix socket and return all that comes back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(str(path))
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(65536), b""))


class Served:
    """A running nbdkit with the plugin; `process.pid` is the process that serves."""

    def __init__(self, folder: Path, options: tuple[str, ...], settings: dict[str, object]) -> None:
        self.rundir = Path(str(settings.pop("rundir", folder / "run")))
        self.name = str(settings.get("name", "zram0"))
        self.socket = self.rundir / "nbd.sock"
        self.uri = f"nbd+unix:///{self.name}?socket={self.socket}"
        self.log = folder / "nbdkit.log"
        settings.setdefault("disksize", "64M")
        pairs = [f"{key}={value}" for key, value in settings.items()]
        command = ["nbdkit", "-f", "-U", str(self.socket), *options]
        command += ["python", str(PLUGIN), f"rundir={self.rundir}", *pairs]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def is_ready(self) -> bool:
        """Whether it answers; fails the test if it has ended."""
        if self.process.poll() is not None:
            pytest.fail(f"nbdkit ended with {self.process.returncode}: {self.log.read_text()}")
        try:
            return b'"status"' in talk(self.rundir / "control.sock", b"GET /health HTTP/1.1\r\n\r\n")
        except OSError:
            return False

    def request(self, method: str, path: str, body: str = "") -> tuple[int, str]:
        """Send one HTTP request to the endpoint and return status and body."""
        text = f"{method} {path} HTTP/1.1\r\nHost: zramd\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        answer = talk(self.rundir / "control.sock", text.encode(), timeout=60).decode()
        header, _, content = answer.partition("\r\n\r\n")
        return int(header.split()[1]), content

    def stats(self) -> dict[str, Any]:
        """The counters now."""
        status, body = self.request("GET", "/stats")
        assert status == 200, body
        values: dict[str, Any] = json.loads(body)
        return values

    def clients(self) -> int:
        """How many clients are connected."""
        count: int = json.loads(self.request("GET", "/health")[1])["clients"]
        return count

    def threads(self) -> int:
        """How many threads the process has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def descriptors(self) -> int:
        """How many files the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def settled(self) -> tuple[int, int]:
        """Threads and files while nobody comes or goes."""
        # nbdkit starts a client's threads one by one: the first may answer before the last is there.
        time.sleep(0.2)
        return self.threads(), self.descriptors()

    def connect(self) -> Any:
        """A libnbd handle; skips the test where libnbd's Python module is missing."""
        nbd = pytest.importorskip("nbd")
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_uri(self.uri)
        return handle

    def resident(self) -> int:
        """Bytes of memory that the process has resident."""
        # VmRSS in /proc/PID/status is off by up to 32 pages for each CPU since Linux 6.2; this walks them.
        words = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().split()
        return int(words[words.index("Rss:") + 1]) * 1024

    def stop(self, number: int = 15) -> float:
        """Send a signal and return the seconds until the process has ended."""
        started = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(30)
        return time.monotonic() - started

    def end(self) -> None:
        """End it whatever its state."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class NbdSocket:
    """An NBD client of a few lines: it says what libnbd would refuse to say, and costs little."""

    READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)

    def __init__(self, served: Served, timeout: float = 30.0) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout)
        self.sock.connect(str(served.socket))
        magic, option_magic, _ = struct.unpack(">8s8sH", self.receive(18))
        assert (magic, option_magic) == (b"NBDMAGIC", b"IHAVEOPT")
        name = served.name.encode()
        export_name = 1  # the option that enters transmission without a further reply
        self.sock.sendall(struct.pack(">I8sII", 3, option_magic, export_name, len(name)) + name)
        self.size, self.flags = struct.unpack(">QH", self.receive(10))
        self._cookie = 0

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes; ConnectionError at the end of the connection."""
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(min(length - len(data), 1 << 20))
            if not part:
                raise ConnectionError("the server has closed the connection")
            data += part
        return bytes(data)

    def send(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> int:
        """Send a request and return its cookie."""
        self._cookie += 1
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, self._cookie, offset, length)
        self.sock.sendall(header + payload)
        return self._cookie

    def reply(self) -> tuple[int, int]:
        """Error and cookie of the next reply; what was read follows it."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return error, cookie

    def ask(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> int:
        """Send a request, wait for its reply and return its error, 0 for none."""
        cookie = self.send(command, offset, length, payload, flags)
        error, answered = self.reply()
        assert answered == cookie
        return error

    def read(self, offset: int, length: int) -> bytes:
        """What is at `offset`."""
        assert self.ask(self.READ, offset, length) == 0
        return self.receive(length)

    def close(self) -> None:
        """Leave as a client should."""
        self.send(self.DISCONNECT, 0, 0)
        self.sock.close()


@contextmanager
def bystander(served: Served, length: int = 8 << 20) -> Iterator[None]:
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
                assert client.ask(client.WRITE, offset, size, data) == 0
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


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start nbdkit: `serve(*nbdkit_options, **settings)`; the test's end ends it."""
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed")
    running: list[Served] = []

    def start(*options: str, wait: bool = True, **settings: object) -> Served:
        folder = tmp_path / f"server{len(running)}"
        folder.mkdir(mode=0o700)
        served = Served(folder, options, settings)
        running.append(served)
        if wait:
            wait_until(served.is_ready)
        return served

    yield start
    for served in running:
        served.end()


class Steps:
    """Holds processes at their named steps: see zramd.steps."""

    def __init__(self, path: Path) -> None:
        self.env = {"ZRAMD_STEPS": str(path)}
        self.held: set[str] = set()  # at which steps processes are to wait
        self.seen: list[tuple[int, str]] = []  # process and step, as they came
        self._links: list[tuple[str, socket.socket]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            pid, name = link.makefile().readline().split()
            self.seen.append((int(pid), name))
            if name in self.held:
                self._links.append((name, link))
            else:
                link.close()

    def wait(self, name: str, timeout: float = 20.0) -> int:
        """Wait until a process is held at a step, and return its number."""
        wait_until(lambda: any(step == name for step, _ in self._links), timeout)
        return next(pid for pid, step in reversed(self.seen) if step == name)

    def release(self) -> None:
        """Let all go on, and hold nobody any more."""
        self.held.clear()
        for _, link in self._links:
            link.close()
        self._links.clear()

    def close(self) -> None:
        """End it."""
        self.release()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    """Who has `steps.env` in its environment can be held at its steps."""
    made = Steps(tmp_path / "steps.sock")
    yield made
    made.close()


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """An empty folder on a tmpfs, for state files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="zramd-test-") as name:
        yield Path(name)
