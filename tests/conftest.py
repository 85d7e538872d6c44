"""Fixtures for all tests: a clean environment, and a real nbdkit that serves the plugin."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zramd

PACKAGE_PARENT = Path(zramd.__file__).parent.parent
PLUGIN = PACKAGE_PARENT / "nbdkit_plugin.py"


def pytest_report_header() -> str:
    try:
        import nbd  # noqa: F401

        libnbd = "yes"
    except ImportError:
        libnbd = "no"
    tools = {name: "yes" if shutil.which(name) else "no" for name in ("nbdkit", "fio", "qemu-io", "nbdcopy")}
    tools |= {"libnbd": libnbd, "root": "yes" if os.geteuid() == 0 else "no"}
    return f"zramd: {PACKAGE_PARENT}; " + ", ".join(f"{name} {there}" for name, there in tools.items())


@pytest.fixture(autouse=True)
def clean_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("ZRAMD_", "LISTEN_")):
            monkeypatch.delenv(name)


def wait_until(predicate: Callable[[], object], timeout: float = 10.0) -> None:
    """Poll until `predicate` is true; fails the test after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > end:
            pytest.fail(f"not within {timeout} s: {predicate}")
        time.sleep(0.01)


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

    def connect(self) -> Any:
        """A libnbd handle; skips the test where libnbd's Python module is missing."""
        nbd = pytest.importorskip("nbd")
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_uri(self.uri)
        return handle

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
