"""The programs that a run starts: nbdkit's servers, and fio against them."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil  # type: ignore[import-untyped]

import zramd
from bench.results import NotMeasuredError, Row, ratio_at_most
from bench.setup import Setup

PACKAGE_PARENT = Path(zramd.__file__).parent.parent
PLUGIN = PACKAGE_PARENT / "nbdkit_plugin.py"
START_TIMEOUT = 20.0  # seconds
STOP_TIMEOUT = 5.0

# fio's data, the same for every server. Random bytes and zeros take turns, 16 bytes a turn: of what fio can
# make, this costs lz4 what memory pages cost it, both ways, and compresses about as well. (Longer turns are
# two or three times cheaper; with the default, a request of 128K is random up to its middle and then zeros.)
FIO_DATA = ["--buffer_compress_percentage=70", "--buffer_compress_chunk=16"]


Environment = Mapping[str, str]
NOTHING: Environment = {}


class Keys:
    """A file with a key that client and server share."""

    NAME = "bench"

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Have psktool make it. Raises OSError, CalledProcessError."""
        subprocess.run(["psktool", "-u", self.NAME, "-p", str(self.path)], check=True, capture_output=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Server:
    """A running nbdkit; use it in a `with`, whose end ends it."""

    def __init__(
        self,
        setup: Setup,
        name: str,
        *plugin: str,
        environment: Environment = NOTHING,
        keys: Keys | None = None,
    ) -> None:
        """Start nbdkit with the plugin and its parameters; raises NotMeasuredError if it does not serve.

        `environment` is added to this process's. With `keys` it serves on TCP, by TLS.
        """
        self.name = name
        self.folder = setup.folder / name.replace(" ", "-")
        self.folder.mkdir(mode=0o700)
        self._socket = self.folder / "bench.sock"
        self.uri = f"nbd+unix:///?socket={self._socket}"
        transport = ["-U", str(self._socket)]
        self._port = 0
        if keys is not None:
            self._port = _free_port()
            transport = ["-i", "127.0.0.1", "-p", str(self._port), "--tls=require", f"--tls-psk={keys.path}"]
            self.uri = f"nbds://{keys.NAME}@127.0.0.1:{self._port}/?tls-psk-file={keys.path}"
        self.device = ["--ioengine=nbd", f"--uri={self.uri}"]
        threads = [f"--threads={setup.threads}"] if setup.threads else []
        # If this process is killed, nothing is left behind.
        command = ["nbdkit", "-f", "--exit-with-parent", *transport, *threads, *plugin]
        self._log = self.folder / "log"
        started = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.pid = self._process.pid
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - started

    def _wait(self) -> None:
        end = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                words = " ".join(self._log.read_text().split())
                raise NotMeasuredError(f"nbdkit does not serve {self.name}: {words or 'no reason given'}")
            time.sleep(0.005)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_INET if self._port else socket.AF_UNIX) as client:
            client.settimeout(1)
            try:
                client.connect(("127.0.0.1", self._port) if self._port else str(self._socket))
                return client.recv(8) == b"NBDMAGIC"
            except OSError:
                return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its threads, also of those that have ended.

        This is utime + stime of /proc/PID/stat before they are cut to clock ticks: the process's CPU clock,
        whose number is made as clock_getcpuclockid(3) makes it.
        """
        return time.clock_gettime(~self.pid << 3 | 2)

    def minor_faults(self) -> int:
        """Return the page faults of all its threads that needed no input, also of those that have ended."""
        text = Path(f"/proc/{self.pid}/stat").read_text()
        return int(text.rpartition(")")[2].split()[7])

    def resident_bytes(self) -> int:
        """Return its resident memory."""
        resident: int = psutil.Process(self.pid).memory_info().rss
        return resident


class ZramdServer(Server):
    """nbdkit with zramd's plugin; `settings` are keys of the plugin."""

    def __init__(
        self,
        setup: Setup,
        name: str,
        disksize: int | str,
        *,
        environment: Environment = NOTHING,
        keys: Keys | None = None,
        **settings: str,
    ) -> None:
        self._control = setup.memory / name.replace(" ", "-") / "control.sock"
        pairs = [f"{key}={value}" for key, value in settings.items()]
        rundir = f"rundir={self._control.parent}"
        plugin = ["python", str(PLUGIN), f"disksize={disksize}", rundir, *pairs]
        super().__init__(setup, name, *plugin, environment=environment, keys=keys)

    def request(self, method: str, path: str, content: str = "") -> dict[str, Any]:
        """Send a request to the control socket and return its JSON answer; raises OSError or ValueError."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(self._control))
            client.sendall(
                f"{method} {path} HTTP/1.1\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode()
            )
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        body: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
        return body

    def stats(self) -> dict[str, Any]:
        """Return the device's counters."""
        return self.request("GET", "/stats")


def library(setup: Setup, source: Path) -> Path:
    """Compile a library to be loaded first, and return it. Raises NotMeasuredError."""
    return setup.compiled(source, f"{source.stem}.so", "-O1", "-shared", "-fPIC")


def plugin_offers(plugin: str, line: str = "") -> bool:
    """Say whether nbdkit has a plugin, and whether `--dump-plugin` prints `line` of it."""
    try:
        dump = subprocess.run(["nbdkit", plugin, "--dump-plugin"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return not line or line in dump.stdout.splitlines()


@dataclass(frozen=True)
class Measured:
    """One fio job's result: requests, bytes per second, and percentiles of latency in µs."""

    requests: int
    iops: float
    bytes_per_second: float
    p50: float
    p99: float
    p99_of: dict[str, float]  # of its reads and of its writes alone, where it has them


def p99_rows(what: str, measured: Sequence[Measured], without: Sequence[Measured], note: str) -> list[Row]:
    """Return what reads and writes wait for beside some work; `what` has {} for each of the two."""

    def row(kind: str) -> Row:
        mine, other = ([run.p99_of[kind] for run in runs] for runs in (measured, without))
        return Row(f"p99 of {what.format(kind)}", "µs", mine, ratio_at_most(1.5), "without", other, note)

    return [row("read"), row("write")]


def fio(
    setup: Setup, device: Iterable[str], *jobs: Iterable[str], environment: Environment = NOTHING
) -> Measured:
    """Run fio on a device, the jobs side by side, and return the result of the first.

    `device` and the jobs are fio's options, `environment` is added to this process's. Raises NotMeasuredError
    if fio fails or moves nothing.
    """
    output = setup.folder / "fio.json"
    with suppress(FileNotFoundError):
        output.unlink()
    command = ["fio", "--output-format=json", f"--output={output}", "--unified_rw_reporting=both", *FIO_DATA]
    command += device
    for index, job in enumerate(jobs):
        command += [f"--name=job{index}", *job]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=setup.folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise NotMeasuredError(f"fio cannot be run: {error}") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise NotMeasuredError(f"fio failed with status {done.returncode}: {words}")
    # fio may put warnings before its JSON.
    text = output.read_text()
    job = json.loads(text[text.index("{") :])["jobs"][0]
    mixed = job["mixed"]
    if not mixed["total_ios"]:
        raise NotMeasuredError(f"fio did nothing: {' '.join(command)}")

    def percentile(kind: str, percent: str) -> float:
        value: float = job[kind]["clat_ns"]["percentile"][percent]
        return value / 1e3

    return Measured(
        requests=mixed["total_ios"],
        iops=mixed["iops"],
        bytes_per_second=mixed["bw_bytes"],
        p50=percentile("mixed", "50.000000"),
        p99=percentile("mixed", "99.000000"),
        p99_of={kind: percentile(kind, "99.000000") for kind in ("read", "write") if job[kind]["total_ios"]},
    )


def whole(rw: str, size: int, *options: str) -> list[str]:
    """A fio job that goes once through `size` bytes in requests of 128K."""
    return [f"--rw={rw}", "--bs=128k", "--iodepth=8", f"--size={size}", *options]


def timed(setup: Setup, rw: str, bs: str, iodepth: int, size: int, *options: str) -> list[str]:
    """A fio job that runs for the time of one run."""
    runtime = f"--runtime={setup.seconds * 1000:.0f}ms"
    job = [f"--rw={rw}", f"--bs={bs}", f"--iodepth={iodepth}", f"--size={size}"]
    return [*job, "--time_based", runtime, *options]
