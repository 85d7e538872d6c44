"""state=systemd: what the service manager gets, and what the next server has."""

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
from support.manager import ServiceManager
from support.run import talk, wait_until
from support.server import PACKAGE_PARENT
from support.steps import Steps

BLOCK = 4096


class Service:
    """A server, as its manager starts it again and again."""

    def __init__(self, folder: Path) -> None:
        self.manager = ServiceManager(folder)
        self.name = "kept"
        self.rundir = folder / "run"
        self.socket = self.rundir / "nbd.sock"
        self.log = folder / "log"
        self.process: subprocess.Popen[str] | None = None

    def start(
        self, *extra: tuple[str, int], state: str = "systemd", listen: str = "", **environment: str
    ) -> None:
        """Run `zramd serve` with the descriptors that are kept, after those given."""
        words = [sys.executable, "-P", "-m", "zramd", "serve", "--name", self.name, "--size", "64M"]
        words += [f"rundir={self.rundir}", f"state={state}", *([f"listen={listen}"] if listen else [])]
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), **environment}
        with self.log.open("wb") as log:
            self.process = self.manager.start(words, env, *extra, output=log, errors=log)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def comes(self) -> None:
        """Return once it serves, and its manager has what it gives."""
        wait_until(self.serves)
        self.manager.take()

    def serves(self) -> bool:
        try:
            return b'"status"' in talk(self.rundir / "control.sock", b"GET /health HTTP/1.1\r\n\r\n")
        except OSError:
            return False

    def end(self, number: int) -> int:
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        assert self.process is not None
        status = self.process.wait()
        self.process = None
        return status

    def cpu_ticks(self) -> int:
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(words[11]) + int(words[12])

    def kept(self) -> list[str]:
        """The names of what its manager keeps."""
        return [name for name, _ in self.manager.kept]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    yield made
    if made.process:
        made.end(signal.SIGKILL)
    made.manager.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_the_next_server_has_the_data(service: Service, number: int) -> None:
    data = os.urandom(2000).ljust(BLOCK, b"\0")
    for turn in range(3):
        service.start()
        service.comes()
        assert service.kept() == ["zramd-state"]  # given once
        nbd = NbdSocket(service)
        for block in range(turn):
            assert nbd.read(block * BLOCK, BLOCK) == data
        assert nbd.read(turn * BLOCK, BLOCK) == bytes(BLOCK)
        assert nbd.ask(nbd.WRITE, turn * BLOCK, BLOCK, data) == 0
        assert service.end(number) == (-9 if number == signal.SIGKILL else 0)
    assert os.fstat(service.manager.kept[0][1]).st_blocks > 0


def test_sockets_of_the_manager_stay_sockets(service: Service) -> None:
    """nbdkit takes each descriptor that is passed for a socket, and would spin on a file."""
    service.start()
    service.comes()
    service.end(signal.SIGKILL)
    with socket.socket() as first, socket.socket() as second:
        for listener in (first, second):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        first_two = service.manager.kept[0]
        service.manager.kept = []
        service.start(("a", first.fileno()), first_two, ("b", second.fileno()))
        wait_until(service.serves)
        for listener in (first, second):
            with socket.create_connection(listener.getsockname(), 5) as client:
                assert client.recv(8) == b"NBDMAGIC"
        assert not service.socket.exists()
        before = service.cpu_ticks()
        wait_until(service.serves)
        assert service.cpu_ticks() - before < 20
        assert "accept" not in service.log.read_text()
        service.manager.take()
        assert service.manager.kept == []
    health = json.loads(
        talk(service.rundir / "control.sock", b"GET /settings HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")[2]
    )
    assert health["state"] == "systemd"


def test_clients_queue_while_a_service_is_restarted(service: Service) -> None:
    """The sockets of `listen` stay open, until another address is configured."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        first, second = one.getsockname(), other.getsockname()
    service.start(listen=f"127.0.0.1:{first[1]}")
    service.comes()
    names = {"zramd-state", f"zramd-listen 127.0.0.1 {first[1]}"}
    assert set(service.kept()) == names
    for number in (signal.SIGUSR1, signal.SIGKILL):
        service.end(number)
        with socket.create_connection(first, 60) as client:  # nobody serves, and nobody is refused
            service.start(listen=f"127.0.0.1:{first[1]}")
            assert client.recv(8) == b"NBDMAGIC"
            service.comes()
    service.end(signal.SIGUSR1)
    service.start(listen=f"127.0.0.1:{second[1]}")
    service.comes()
    assert f"zramd-listen 127.0.0.1 {second[1]}" in service.kept()
    assert f"zramd-listen 127.0.0.1 {first[1]}" not in service.kept()
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


def test_a_file_that_is_no_state(service: Service) -> None:
    file = os.memfd_create("other")
    os.write(file, b"x" * 8192)
    service.manager.kept = [("zramd-state", file)]
    service.start()
    assert service.wait() == 1
    assert "'systemd' is not a state of zramd" in service.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("at", ["serve.exec", "server.device", "server.published", "server.serves"])
def test_a_server_that_is_ended_while_it_starts(
    service: Service, steps: Steps, at: str, number: signal.Signals
) -> None:
    """The manager has one file, which is the next server's, and nothing else is left."""
    data = os.urandom(2000).ljust(BLOCK, b"\0")
    service.start()
    service.comes()
    nbd = NbdSocket(service)
    assert nbd.ask(nbd.WRITE, 0, BLOCK, data) == 0
    nbd.close()
    service.end(signal.SIGUSR1)
    steps.held.add(at)
    service.start(**steps.env)
    assert steps.wait(at) == service.pid
    os.kill(service.pid, number)
    steps.release()
    service.wait()
    service.manager.take()
    assert service.kept() == ["zramd-state"]
    service.start()
    service.comes()
    assert service.kept() == ["zramd-state"]
    nbd = NbdSocket(service)
    assert nbd.read(0, BLOCK) == data
    nbd.close()
    service.end(signal.SIGTERM)
    assert os.listdir(service.rundir) == []  # the folder itself the first one had left to the next
