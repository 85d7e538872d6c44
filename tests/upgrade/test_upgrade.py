"""A server of an older version is taken over by `zramd restart` of this one, with its clients and its data.

    scripts/test tests/upgrade                          the version before the package was put in rooms
    ZRAMD_OLDER=COMMIT scripts/test tests/upgrade       any other that knows `zramd restart`

Not run with all tests: it builds that version, into build/older (kept, and used again), and needs its commit.
"""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.content import block_content
from support.run import run_threads, talk, wait_until, zramd_command
from support.server import PACKAGE_PARENT

from zramd import Device
from zramd.contract import rundir
from zramd.core.device import saving
from zramd.server import statefile

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 4096
BLOCKS = 3000  # of each client
CLIENTS = 3
OLDER = os.environ.get("ZRAMD_OLDER", "")  # read here: tests run without such variables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", ROOT, "-c", f"safe.directory={ROOT}", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, f"git {' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


def older_commit() -> str:
    """The commit to come from: ZRAMD_OLDER, or the one before the first that had a module in a room."""
    if OLDER:
        return git("rev-parse", "--verify", f"{OLDER}^{{commit}}")
    moves = git(
        "log", "--no-renames", "--diff-filter=A", "--format=%H", "--", "zramd/contract/rundir.py"
    ).split()
    assert moves, "the history does not go back to the move into rooms: fetch all of it, or set ZRAMD_OLDER"
    return git("rev-parse", f"{moves[-1]}^")


@pytest.fixture(scope="module")
def older() -> Path:
    """The folder of a release build of the older version."""
    commit = older_commit()
    folder = ROOT / "build" / "older" / commit[:12]
    built = folder / "build" / "release"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["git", "-C", ROOT, "-c", f"safe.directory={ROOT}", "archive", commit],
            check=True,
            capture_output=True,
        )
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        backend = tomllib.loads((folder / "pyproject.toml").read_text())["build-system"]["backend-path"]
        done = subprocess.run(
            [sys.executable, "-c", "from setuptools import setup; setup()", "build"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": ":".join(backend), "ZRAMD_BUILD": "release"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "done").touch()
    return built


class Server:
    """A server on a state, by `zramd start`; it looks like support.server.NbdkitProcess to NbdSocket."""

    def __init__(self, package: Path, folder: Path, state: Path, *words: str) -> None:
        self.name = "kept"
        self.package = package
        self.rundir = folder / "run"
        self.socket = self.rundir / "nbd.sock"
        settings = ("--size", "64M", f"rundir={self.rundir}", f"state={state}", *words)
        done = zramd_command("start", self.name, *settings, env={"PYTHONPATH": str(package)})
        assert (done.returncode, done.stderr) == (0, "")

    @property
    def pid(self) -> int:
        return rundir.holder(str(self.rundir)) or 0

    def ask(self, path: str) -> dict[str, object]:
        answer = talk(self.rundir / "control.sock", f"GET {path} HTTP/1.1\r\n\r\n".encode())
        values: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])
        return values

    def is_of(self, package: Path) -> bool:
        """Whether the compiled core that the server has mapped is of this build."""
        lines = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        cores = {line.split(maxsplit=5)[5] for line in lines if "/zramd/core/" in line}
        assert cores, "no core is mapped: whose server is that?"
        return all(core.startswith(f"{package}/zramd/core/") for core in cores)


class Client:
    """Writes and reads one block after the other, and connects again when the server leaves."""

    def __init__(self, served: Server, first: int) -> None:
        self.served, self.first = served, first
        self.known: dict[int, int] = {}
        self.connections = 0
        self.stopping = False

    def work(self) -> None:
        nbd: NbdSocket | None = None
        while not self.stopping:
            number = sum(self.known.values())
            block = self.first + number % BLOCKS
            version = self.known.get(block, 0) + 1
            while True:
                try:
                    if nbd is None:
                        nbd = NbdSocket(self.served)  # type: ignore[arg-type]
                        self.connections += 1
                    assert nbd.ask(nbd.WRITE, block * BLOCK, BLOCK, block_content(block, version)) == 0
                    break
                except (ConnectionResetError, BrokenPipeError, ConnectionError):
                    nbd = None
            self.known[block] = version
        assert nbd is not None
        nbd.close()


@pytest.fixture
def start(older: Path, tmp_path: Path, memory_folder: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server of the older version."""
    made: list[Server] = []

    def begin(*words: str) -> Server:
        made.append(Server(older, tmp_path, memory_folder / "state", *words))
        return made[-1]

    yield begin
    for served in made:
        if served.pid:
            os.kill(served.pid, signal.SIGKILL)


def verify(served: Server, known: dict[int, int]) -> None:
    nbd = NbdSocket(served)  # type: ignore[arg-type]
    for block, version in known.items():
        assert nbd.read(block * BLOCK, BLOCK) == block_content(block, version)
    nbd.close()


@pytest.mark.parametrize("words", [(), ("verify=on", "mem_limit=48M", "compaction=off")])
def test_restart_with_clients(start: Callable[..., Server], older: Path, words: tuple[str, ...]) -> None:
    served = start(*words)
    assert served.is_of(older)
    before = served.pid
    settings = served.ask("/settings")
    clients = [Client(served, number * BLOCKS) for number in range(CLIENTS)]

    def restart() -> None:
        try:
            wait_until(lambda: all(len(client.known) > 200 for client in clients), 60)
            done = zramd_command("restart", "--rundir", served.rundir)
            assert (done.returncode, done.stderr) == (0, "")
            written = [sum(client.known.values()) for client in clients]
            wait_until(
                lambda: all(
                    sum(client.known.values()) > number + 200
                    for client, number in zip(clients, written, strict=True)
                ),
                60,
            )
        finally:
            for client in clients:
                client.stopping = True

    run_threads([restart, *(client.work for client in clients)])
    assert served.pid != before
    assert served.is_of(PACKAGE_PARENT)
    assert all(client.connections == 2 for client in clients)
    now = served.ask("/settings")
    assert {name: now[name] for name in settings} == settings, "what it had is as it was, whatever is new"
    for client in clients:
        verify(served, client.known)
    done = zramd_command("check", "--rundir", served.rundir)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_killed_servers_state(start: Callable[..., Server], tmp_path: Path, memory_folder: Path) -> None:
    served = start()
    known = dict.fromkeys(range(500), 1)
    nbd = NbdSocket(served)  # type: ignore[arg-type]
    for block in known:
        assert nbd.ask(nbd.WRITE, block * BLOCK, BLOCK, block_content(block, 1)) == 0
    pid = served.pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not served.pid)
    again = Server(PACKAGE_PARENT, tmp_path, memory_folder / "state")
    assert again.is_of(PACKAGE_PARENT)
    verify(again, known)
    assert zramd_command("stop", "--rundir", again.rundir).returncode == 0


def cold_state(path: Path) -> dict[int, int]:
    """Leave a state with cold blocks, as a killed server does; the versions of its blocks."""
    fd = statefile.open_state(str(path), 64 << 20, False)
    device = Device(64 << 20, state=fd, cold_level=3, mark_cold=statefile.mark_cold)
    os.close(fd)
    known = dict.fromkeys(range(500), 1)
    for block in known:
        device.write(block_content(block, 1), block * BLOCK)
    assert device.cool(0, 500)[0] > 100
    return known


def test_a_state_with_cold_blocks_is_refused_by_it(older: Path, tmp_path: Path, memory_folder: Path) -> None:
    """In its own words; and nothing in the file is changed."""
    path = memory_folder / "state"
    known = cold_state(path)
    before = path.stat()
    words = ("start", "kept", "--size", "64M", f"rundir={tmp_path / 'run'}", f"state={path}")
    done = zramd_command(*words, env={"PYTHONPATH": str(older)})
    assert done.returncode == 1
    assert f"state '{path}' has format 2, this zramd has 1: use the zramd that made it" in done.stderr
    after = path.stat()
    assert (after.st_mtime_ns, after.st_blocks, after.st_size) == (
        before.st_mtime_ns,
        before.st_blocks,
        before.st_size,
    )
    verify_state(path, known)


def verify_state(path: Path, known: dict[int, int]) -> None:
    fd = statefile.open_state(str(path), 64 << 20, False)
    device = Device(64 << 20, state=fd)
    os.close(fd)
    device.check()
    for block, version in known.items():
        found = bytearray(BLOCK)
        device.read(found, block * BLOCK)
        assert found == block_content(block, version)


def test_a_server_with_cold_blocks_is_not_replaced_by_it(
    older: Path, tmp_path: Path, memory_folder: Path
) -> None:
    """A restart by the older version fails before the server that is there has left."""
    path = memory_folder / "state"
    known = cold_state(path)
    served = Server(PACKAGE_PARENT, tmp_path, path)
    try:
        pid = served.pid
        done = zramd_command("restart", "--rundir", served.rundir, env={"PYTHONPATH": str(older)})
        # What it does not know and finds first, a setting or the state, depends on how old it is.
        assert done.returncode in (1, 2)
        assert "has format 2, this zramd has 1" in done.stderr or "unknown setting 'rec" in done.stderr
        assert served.pid == pid
        assert served.is_of(PACKAGE_PARENT)
        verify(served, known)
    finally:
        os.kill(served.pid, signal.SIGKILL)


def test_its_saves_and_ours(start: Callable[..., Server], tmp_path: Path) -> None:
    """Without a cold block it loads what this version saves; with one it refuses, in its own words."""
    served = start()
    at = ("--rundir", served.rundir)
    known = dict.fromkeys(range(200), 1)
    for cold in (False, True):
        device = Device(64 << 20, cold_level=3)
        for block in known:
            device.write(block_content(block, 1), block * BLOCK)
        if cold:
            assert device.cool(0, 200)[0] > 50
        file = tmp_path / f"saved-{cold}"
        with file.open("wb") as target:
            saving.save(device, target.fileno())
        done = zramd_command("load", *at, "--force", str(file), env={"PYTHONPATH": str(served.package)})
        if cold:
            assert done.returncode == 1
            assert "it has another format than this zramd reads: format 2, not 1" in done.stderr
        else:
            assert (done.returncode, done.stderr) == (0, "")
            verify(served, known)


def test_its_commands(start: Callable[..., Server], tmp_path: Path) -> None:
    """This version's commands know an older server: they show it, save what it has, and stop it."""
    served = start()
    nbd = NbdSocket(served)  # type: ignore[arg-type]
    for block in range(100):
        assert nbd.ask(nbd.WRITE, block * BLOCK, BLOCK, block_content(block, 1)) == 0
    nbd.close()
    wait_until(lambda: served.ask("/health")["clients"] == 0)
    at = ("--rundir", served.rundir)
    for verb in ("stats", "compact", "check"):
        done = zramd_command(verb, *at)
        assert (done.returncode, done.stderr) == (0, ""), verb
    stream = tmp_path / "stream"
    done = zramd_command("save", *at, str(stream))
    assert done.returncode == 0, done.stderr
    done = zramd_command("stop", *at)
    assert done.returncode == 0, done.stderr
    assert not served.pid
