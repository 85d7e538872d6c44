"""Real servers: nbdkit with the plugin, as a test starts it, or as `zramd start` does."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import zramd
from support.client import NbdSocket
from support.run import talk, zramd_command
from zramd.contract import rundir

PACKAGE_PARENT = Path(zramd.__file__).parent.parent
PLUGIN = PACKAGE_PARENT / "nbdkit_plugin.py"


class NbdkitProcess:
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


class Started:
    """A server with a state, begun by `zramd start`."""

    def __init__(self, folder: Path, state: Path, *words: str) -> None:
        self.name = "again"
        self.rundir = folder / "run"
        self.socket = self.rundir / "nbd.sock"
        self.state = state
        done = zramd_command(
            "start", self.name, "--size", "64M", f"rundir={self.rundir}", f"state={state}", *words
        )
        assert (done.returncode, done.stderr) == (0, "")

    @property
    def pid(self) -> int:
        """The process that serves; 0 if none does."""
        return rundir.holder(str(self.rundir)) or 0

    def restart(self, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run `zramd restart` for it."""
        return zramd_command("restart", "--rundir", self.rundir, *words, env=env)

    def refused(self, *words: str, status: int = 1) -> str:
        """Try, see that the same process serves on, and return the sentence."""
        pid = self.pid
        done = self.restart(*words)
        assert (done.returncode, done.stdout) == (status, ""), done
        assert done.stderr.startswith("zramd: ")
        assert done.stderr.count("\n") == 1
        assert self.pid == pid
        NbdSocket(self).close()
        return done.stderr.removeprefix("zramd: ").rstrip()

    def ask(self, path: str) -> dict[str, object]:
        """What the endpoint answers, as JSON."""
        answer = talk(self.rundir / "control.sock", f"GET {path} HTTP/1.1\r\n\r\n".encode())
        values: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])
        return values
