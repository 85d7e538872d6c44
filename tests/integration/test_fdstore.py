"""state=systemd: what the service manager gets, and what the next server has. The manager is this test."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.run import talk, wait_until
from support.server import PACKAGE_PARENT
from support.steps import Steps

BLOCK = 4096


class Manager:
    """Keeps what it is given, and starts a service with it as systemd does."""

    def __init__(self, folder: Path) -> None:
        self.name = "kept"
        self.rundir = folder / "run"
        self.socket = self.rundir / "nbd.sock"
        self.log = folder / "log"
        self.kept: list[tuple[str, int]] = []
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path = str(folder / "notify")
        self._notify.bind(self._path)
        self._notify.setblocking(False)
        self.pid = 0

    def start(
        self, *extra: tuple[str, int], state: str = "systemd", listen: str = "", **environment: str
    ) -> None:
        """Run `zramd serve` with the descriptors that are kept, after those given."""
        passed = [*extra, *self.kept]
        words = [sys.executable, "-P", "-m", "zramd", "serve", "--name", self.name, "--size", "64M"]
        words += [f"rundir={self.rundir}", f"state={state}", *([f"listen={listen}"] if listen else [])]
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "NOTIFY_SOCKET": self._path, **environment}
        child = os.fork()
        if child == 0:
            try:
                high = [os.dup2(fd, 200 + place) for place, (_, fd) in enumerate(passed)]
                for place, fd in enumerate(high, 3):
                    os.dup2(fd, place)
                    os.close(fd)
                if passed:
                    names = ":".join(name for name, _ in passed)
                    env |= {
                        "LISTEN_FDS": str(len(passed)),
                        "LISTEN_PID": str(os.getpid()),
                        "LISTEN_FDNAMES": names,
                    }
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(log, 2)
                os.dup2(log, 1)
                os.execve(words[0], words, env)
            finally:
                os._exit(99)
        self.pid = child

    def serves(self) -> bool:
        try:
            return b'"status"' in talk(self.rundir / "control.sock", b"GET /health HTTP/1.1\r\n\r\n")
        except OSError:
            return False

    def take(self) -> None:
        """Keep what has been sent."""
        while True:
            try:
                text, fds, _, _ = socket.recv_fds(self._notify, 4096, 4)
            except BlockingIOError:
                return
            words = dict(line.split("=", 1) for line in text.decode().splitlines())
            if words.get("FDSTORE") == "1":
                assert words["FDPOLL"] == "0"
                for fd in fds:
                    if words["FDNAME"] in dict(self.kept):  # it keeps a file once, as systemd does
                        os.close(fd)
                    else:
                        self.kept.append((words["FDNAME"], fd))
            elif words.get("FDSTOREREMOVE") == "1":
                for name, fd in [kept for kept in self.kept if kept[0] == words["FDNAME"]]:
                    self.kept.remove((name, fd))
                    os.close(fd)

    def end(self, number: int) -> int:
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return status

    def cpu_ticks(self) -> int:
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(words[11]) + int(words[12])


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    if made.pid:
        made.end(signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_the_next_server_has_the_data(manager: Manager, number: int) -> None:
    data = os.urandom(2000).ljust(BLOCK, b"\0")
    for turn in range(3):
        manager.start()
        wait_until(manager.serves)
        manager.take()
        assert [name for name, _ in manager.kept] == ["zramd-state"]  # given once
        nbd = NbdSocket(manager)  # type: ignore[arg-type]
        for block in range(turn):
            assert nbd.read(block * BLOCK, BLOCK) == data
        assert nbd.read(turn * BLOCK, BLOCK) == bytes(BLOCK)
        assert nbd.ask(nbd.WRITE, turn * BLOCK, BLOCK, data) == 0
        assert manager.end(number) == (-9 if number == signal.SIGKILL else 0)
    assert os.fstat(manager.kept[0][1]).st_blocks > 0


def test_sockets_of_the_manager_stay_sockets(manager: Manager) -> None:
    """nbdkit takes each descriptor that is passed for a socket, and would spin on a file."""
    manager.start()
    wait_until(manager.serves)
    manager.take()
    manager.end(signal.SIGKILL)
    with socket.socket() as first, socket.socket() as second:
        for listener in (first, second):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        first_two = manager.kept[0]
        manager.kept = []
        manager.start(("a", first.fileno()), first_two, ("b", second.fileno()))
        wait_until(manager.serves)
        for listener in (first, second):
            with socket.create_connection(listener.getsockname(), 5) as client:
                assert client.recv(8) == b"NBDMAGIC"
        assert not manager.socket.exists()
        before = manager.cpu_ticks()
        wait_until(manager.serves)
        assert manager.cpu_ticks() - before < 20
        assert "accept" not in manager.log.read_text()
        manager.take()
        assert manager.kept == []
    health = json.loads(
        talk(manager.rundir / "control.sock", b"GET /settings HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")[2]
    )
    assert health["state"] == "systemd"


def test_clients_queue_while_a_service_is_restarted(manager: Manager) -> None:
    """The sockets of `listen` stay open, until another address is configured."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        first, second = one.getsockname(), other.getsockname()
    manager.start(listen=f"127.0.0.1:{first[1]}")
    wait_until(manager.serves)
    manager.take()
    names = {"zramd-state", f"zramd-listen 127.0.0.1 {first[1]}"}
    assert {name for name, _ in manager.kept} == names
    for number in (signal.SIGUSR1, signal.SIGKILL):
        manager.end(number)
        with socket.create_connection(first, 60) as client:  # nobody serves, and nobody is refused
            manager.start(listen=f"127.0.0.1:{first[1]}")
            assert client.recv(8) == b"NBDMAGIC"
            wait_until(manager.serves)
            manager.take()
    manager.end(signal.SIGUSR1)
    manager.start(listen=f"127.0.0.1:{second[1]}")
    wait_until(manager.serves)
    manager.take()
    assert f"zramd-listen 127.0.0.1 {second[1]}" in dict(manager.kept)
    assert f"zramd-listen 127.0.0.1 {first[1]}" not in dict(manager.kept)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(first, 60)
    with socket.create_connection(second, 60) as client:
        assert client.recv(8) == b"NBDMAGIC"


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["serve"], 1, "state=systemd needs systemd to keep the data: use it in a service with Type=notify"),
        (["start", "x"], 2, "state=systemd is for 'zramd serve' as a service"),
    ],
)
def test_without_a_manager(tmp_path: Path, words: list[str], status: int, told: str) -> None:
    env = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "zramd",
            *words,
            "--size",
            "64M",
            f"rundir={tmp_path}/run",
            "state=systemd",
        ],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"zramd: {told}")
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_no_state(manager: Manager) -> None:
    file = os.memfd_create("other")
    os.write(file, b"x" * 8192)
    manager.kept = [("zramd-state", file)]
    manager.start()
    assert manager.wait() == 1
    assert "'systemd' is not a state of zramd" in manager.log.read_text()
    os.close(file)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("at", ["serve.exec", "server.device", "server.published", "server.serves"])
def test_a_server_that_is_ended_while_it_starts(
    manager: Manager, steps: Steps, at: str, number: signal.Signals
) -> None:
    """The manager has one file, which is the next server's, and nothing else is left."""
    data = os.urandom(2000).ljust(BLOCK, b"\0")
    manager.start()
    wait_until(manager.serves)
    manager.take()
    nbd = NbdSocket(manager)  # type: ignore[arg-type]
    assert nbd.ask(nbd.WRITE, 0, BLOCK, data) == 0
    nbd.close()
    manager.end(signal.SIGUSR1)
    steps.held.add(at)
    manager.start(**steps.env)
    assert steps.wait(at) == manager.pid
    os.kill(manager.pid, number)
    steps.release()
    manager.wait()
    manager.take()
    assert [name for name, _ in manager.kept] == ["zramd-state"]
    manager.start()
    wait_until(manager.serves)
    manager.take()
    assert [name for name, _ in manager.kept] == ["zramd-state"]
    nbd = NbdSocket(manager)  # type: ignore[arg-type]
    assert nbd.read(0, BLOCK) == data
    nbd.close()
    manager.end(signal.SIGTERM)
    assert os.listdir(manager.rundir) == []  # the folder itself the first one had left to the next
