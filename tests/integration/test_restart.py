"""zramd restart: clients that write meanwhile lose nothing, are never refused; what cannot be restarted."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import pytest
from support.client import NbdSocket
from support.run import wait_until
from support.run import zramd_command as zramd
from support.server import PACKAGE_PARENT, PLUGIN, NbdkitProcess, Started

from zramd.contract import rundir
from zramd.launch.takeover import LEAVE_TIMEOUT

Serve = Callable[..., NbdkitProcess]
BLOCK = 4096
BLOCKS = 2000
RESTARTS = 20


def content(block: int, version: int) -> bytes:
    dice = random.Random(block << 32 | version)
    return (b"%08d %08d " % (block, version) + dice.randbytes(dice.randrange(50, 3600))).ljust(BLOCK, b"\0")


class Client(threading.Thread):
    """Writes and reads, one request at a time; connects again at once when the server leaves."""

    def __init__(self, served: "Started | Qemu", first: int) -> None:
        super().__init__(daemon=True)
        self.served = served
        self.first = first
        self.known: dict[int, int] = {}
        self.slowest = 0.0
        self.connections = 0
        self.failure: BaseException | None = None
        self.stopping = False

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.failure = error

    def work(self) -> None:
        dice, nbd, version = random.Random(self.first), None, 0
        while not self.stopping:
            block = self.first + dice.randrange(BLOCKS)
            version += 1
            since = time.monotonic()
            while True:
                if nbd is None:
                    nbd = self.connect()
                try:
                    assert nbd.ask(nbd.WRITE, block * BLOCK, BLOCK, content(block, version)) == 0
                    self.known[block] = version
                    other = dice.choice((block, *list(self.known)[:1]))
                    assert nbd.read(other * BLOCK, BLOCK) == content(other, self.known[other])
                    break
                except (ConnectionError, EOFError):
                    nbd = None
            self.slowest = max(self.slowest, time.monotonic() - since)

    def connect(self) -> NbdSocket:
        """Refused, no socket, or cut off before it is connected: qemu would sleep for a second then."""
        try:
            nbd = NbdSocket(self.served)
        except OSError as error:
            raise AssertionError(f"attempt {self.connections + 1} to connect failed: {error}") from None
        self.connections += 1
        return nbd


def test_clients_that_write_meanwhile(started: Callable[..., Started]) -> None:
    served = started()
    clients = [Client(served, number * BLOCKS) for number in range(3)]
    for client in clients:
        client.start()
    pids = {served.pid}
    for number in range(RESTARTS):
        all_connect(clients, number + 1)
        done = served.restart()
        assert (done.returncode, done.stderr) == (0, "")
        pids.add(served.pid)
        assert f"pid           {served.pid}\n" in done.stdout
    all_connect(clients, RESTARTS + 1)
    for client in clients:
        client.stopping = True
        client.join()
        assert client.failure is None, client.failure
        assert client.connections > RESTARTS
        assert client.slowest < LEAVE_TIMEOUT, "it waited until somebody gave up"
    assert len(pids) == RESTARTS + 1
    nbd = NbdSocket(served)
    for client in clients:
        assert len(client.known) > 50
        for block, version in client.known.items():
            assert nbd.read(block * BLOCK, BLOCK) == content(block, version)
    nbd.close()
    print(f"the slowest of all requests took {max(client.slowest for client in clients) * 1000:.0f} ms")


def all_connect(clients: list[Client], times: int) -> None:
    """Wait until each client has connected so many times, and fail at once if one has failed."""
    wait_until(lambda: all(client.connections >= times or client.failure for client in clients), 60)
    assert [client.failure for client in clients if client.failure] == []


class Qemu:
    """qemu-nbd: connects again by itself, serves what it has, and looks like support.server.NbdkitProcess."""

    def __init__(self, folder: Path, name: str, server: Path) -> None:
        self.name = name
        self.socket = folder / "qemu.sock"
        options = f"driver=nbd,export={name},reconnect-delay=60,server.type=unix,server.path={server}"
        words = ["-t", "-e", "20", "-k", self.socket, "-x", name, "--image-opts", options]
        self.process = subprocess.Popen(["qemu-nbd", *words])
        wait_until(self.socket.exists)

    def __enter__(self) -> "Qemu":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


class Kept:
    """A server on a state whose listening socket somebody keeps, as systemd does for a .socket unit."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.name = "kept"
        self.rundir = folder / "run"
        self.socket = folder / "kept.sock"
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listening.bind(str(self.socket))
        self.listening.listen(16)
        self.settings = [f"name={self.name}", "disksize=64M", f"rundir={self.rundir}", f"state={state}"]
        self.start()

    def start(self) -> None:
        # (Debian's sh knows no descriptor beyond 9.)
        script = 'exec 3<&$0; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
        fd = self.listening.fileno()
        self.process = subprocess.Popen(
            ["bash", "-c", script, str(fd), "nbdkit", "-f", "python", str(PLUGIN), *self.settings],
            env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
            pass_fds=[fd],
        )

    def kill(self) -> None:
        """Kill it and start another one, which is there when this returns."""
        self.process.kill()
        self.process.wait()
        self.start()
        wait_until(lambda: rundir.holder(str(self.rundir)) == self.process.pid)

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.listening.close()


def measure(qemu: Qemu, what: str, end: Callable[[], object]) -> None:
    """End a server 20 times while eight clients use it through qemu; print how long the slowest waited."""
    clients = [Client(qemu, number * BLOCKS) for number in range(8)]
    for client in clients:
        client.start()
    pauses = []
    for _ in range(RESTARTS):
        time.sleep(0.2)
        for client in clients:
            client.slowest = 0.0
        end()
        time.sleep(0.2)
        pauses.append(max(client.slowest for client in clients))
    for client in clients:
        client.stopping = True
        client.join()
        assert client.failure is None, client.failure
        assert client.connections == 1
        assert len(client.known) > 50
    nbd = NbdSocket(qemu)
    for client in clients:
        for block, version in client.known.items():
            assert nbd.read(block * BLOCK, BLOCK) == content(block, version)
    nbd.close()
    times = f"{median(pauses) * 1000:.0f} ms in the median, {max(pauses) * 1000:.0f} ms at most"
    print(f"{what}: the slowest request took {times} ({RESTARTS} times, 8 requests under way)")


def test_pause_of_a_restart(started: Callable[..., Started], tmp_path: Path) -> None:
    served = started()
    with Qemu(tmp_path, served.name, served.socket) as qemu:
        measure(qemu, "zramd restart, qemu", lambda: served.restart().check_returncode())


def test_pause_of_a_kill(tmp_path: Path, memory_folder: Path) -> None:
    with Kept(tmp_path, memory_folder / "state") as served, Qemu(tmp_path, "kept", served.socket) as qemu:
        measure(qemu, "kill -9 and a new start, the socket kept, qemu", served.kill)


class Caller(Client):
    """Connects, reads a block and leaves, again and again."""

    def work(self) -> None:
        while not self.stopping:
            nbd = self.connect()
            with suppress(ConnectionError):
                nbd.read(0, BLOCK)
                nbd.close()


def test_no_attempt_to_connect_fails(started: Callable[..., Started]) -> None:
    served = started()
    callers = [Caller(served, 0) for _ in range(3)]
    for caller in callers:
        caller.start()
    for _ in range(RESTARTS):
        assert served.restart().returncode == 0
    for caller in callers:
        caller.stopping = True
        caller.join()
        assert caller.failure is None, caller.failure
        assert caller.connections > RESTARTS


def test_descriptors_do_not_add_up(started: Callable[..., Started]) -> None:
    """One listening socket under two numbers has nbdkit accept twice for each client, and hang in it.

    The server itself keeps each under another number, which nbdkit does not know.
    """

    def sockets() -> list[str]:
        folder = f"/proc/{served.pid}/fd"
        links = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
        return [link for link in links if link.startswith("socket:")]

    served = started()
    before = sockets()
    for _ in range(3):
        assert served.restart().returncode == 0
        assert len(sockets()) == len(before)
        assert len(set(sockets())) == len(set(before))


def test_a_client_that_stands_still(started: Callable[..., Started]) -> None:
    """Who connects and says no word, or takes no answers, holds nobody up for long."""
    served = started()
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    silent.connect(str(served.socket))
    deaf = NbdSocket(served)
    for number in range(8):
        deaf.send(deaf.READ, number << 20, 1 << 20)
    client = Client(served, 0)
    client.start()
    all_connect([client], 1)
    assert served.restart().returncode == 0
    all_connect([client], 2)
    client.stopping = True
    client.join()
    assert client.failure is None, client.failure
    assert client.connections == 2
    silent.close()


def test_many_requests_in_flight_meet_no_error(started: Callable[..., Started]) -> None:
    """nbdkit fails what it reads while it shuts down; so it must not read then."""
    served = started()
    for _ in range(5):
        nbd = NbdSocket(served)
        for number in range(100):
            nbd.send(nbd.WRITE, number * BLOCK, BLOCK, content(number, 1))
        assert served.restart().returncode == 0
        answers = 0
        try:
            while True:
                error, _ = nbd.reply()
                assert error == 0
                answers += 1
        except ConnectionError:
            pass
        assert answers > 0
        again = NbdSocket(served)
        for number in range(answers):
            assert again.read(number * BLOCK, BLOCK) == content(number, 1)
        again.close()


def test_settings_stay_or_change(started: Callable[..., Started]) -> None:
    served = started("mem_limit=32M", "compaction_step=128K", "--", "-t", "3")
    before = served.ask("/settings")
    assert served.restart().returncode == 0
    assert served.ask("/settings") == before
    assert served.restart("mem_limit=16M", "compaction=off").returncode == 0
    assert served.ask("/settings") == {**before, "mem_limit": 16 << 20, "compaction": False}
    assert served.ask("/stats")["mem_limit"] == 16 << 20
    words = Path(f"/proc/{served.pid}/cmdline").read_bytes().split(b"\0")
    assert words[words.index(b"-t") + 1] == b"3"
    assert words.count(b"-f") == 1


def test_a_restart_with_another_codec_keeps_what_the_others_stored(started: Callable[..., Started]) -> None:
    """Payloads name their codec: each server reads what those before it wrote."""
    served = started("comp_algorithm=none", "verify=on")
    kinds = {"lz4": "lz4", "lz4hc(level=4)": "lz4", "zstd": "zstd", "zstd(level=1)": "zstd", "none": "raw"}
    wrote = {"none": 0}
    for number, algorithm in enumerate(
        ("none", "lz4hc(level=4)", "zstd", "lz4", "zstd(level=1)", "none", "lz4")
    ):
        if number:
            assert served.restart(f"comp_algorithm={algorithm}").returncode == 0
        assert served.ask("/settings")["comp_algorithm"] == algorithm
        assert served.ask("/stats")["comp_algorithm"] == algorithm
        nbd = NbdSocket(served)
        for block in range(number * 50, number * 50 + 50):
            assert nbd.ask(nbd.WRITE, block * BLOCK, BLOCK, content(block, 1)) == 0
        for block in range(number * 50 + 50):
            assert nbd.read(block * BLOCK, BLOCK) == content(block, 1)
        nbd.close()
        wrote[algorithm] = number * 50
    for algorithm, block in wrote.items():
        done = zramd("debug", "block", "--rundir", served.rundir, block)
        assert (done.returncode, f"kind          {kinds[algorithm]}: " in done.stdout) == (0, True), done
    assert zramd("check", "--rundir", served.rundir).returncode == 0


def test_a_restart_refuses_a_recompression_that_gains_nothing(started: Callable[..., Started]) -> None:
    served = started("recompression=zstd(level=9)")
    assert (
        "recompression='zstd(level=9)' makes nothing smaller than comp_algorithm='zstd(level=9)' did: use"
        in served.refused("comp_algorithm=zstd(level=9)", status=2)
    )
    assert served.restart("comp_algorithm=zstd(level=9)", "recompression=off").returncode == 0
    assert "use a higher level, or off" in served.refused("recompression=zstd", status=2)
    done = zramd("set", "--rundir", served.rundir, "recompression=zstd(level=9)")
    assert (done.returncode, done.stderr) == (
        2,
        "zramd: run: recompression='zstd(level=9)' makes nothing smaller than "
        "comp_algorithm='zstd(level=9)' did: use a higher level, or off\n",
    )
    assert zramd("set", "--rundir", served.rundir, "recompression=zstd(level=10)").returncode == 0


def test_stop_after_a_restart_leaves_only_the_state(started: Callable[..., Started]) -> None:
    served = started()
    assert served.restart().returncode == 0
    assert served.restart().returncode == 0
    assert zramd("stop", "--rundir", served.rundir).returncode == 0
    assert not served.rundir.exists()
    assert served.state.exists()


def test_over_tcp(started: Callable[..., Started]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = started("--", "-i", "127.0.0.1", "-p", str(port))
    assert served.restart().returncode == 0
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        assert client.recv(8) == b"NBDMAGIC"
    assert served.restart().returncode == 0


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["disksize=32M"], 1, "is of a device of 67108864 bytes, not 33554432"),
        (["verify=on"], 1, "was made with verify=off: use verify=off"),
        (["state=/dev/shm/other"], 2, "would make it another device"),
        (["name=other"], 2, "would make it another device"),
        (["mem_limit=lots"], 2, "'lots' is not a size"),
        (["memlimit=1G"], 2, "did you mean 'mem_limit'"),
        (["metrics_file=/nowhere/x.prom"], 1, "metrics_file '/nowhere/x.prom' cannot be written"),
    ],
)
def test_settings_that_do_not_fit(
    started: Callable[..., Started], words: list[str], status: int, sentence: str
) -> None:
    told = started().refused(*words, status=status)
    assert sentence in told
    if status == 1:
        assert told.startswith("again goes on as before: the new server does not start: ")


def test_a_new_server_that_cannot_be_imported(started: Callable[..., Started], tmp_path: Path) -> None:
    """As after an upgrade that went wrong: that is known before the old server is asked to leave."""
    served = started()
    pid = served.pid
    (tmp_path / "nbdkit").write_text("#!/bin/sh\necho 'nbdkit: error: it is broken' >&2\nexit 1\n")
    (tmp_path / "nbdkit").chmod(0o755)
    done = served.restart(env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert done.stderr == "zramd: again goes on as before: the new server does not start: it is broken\n"
    assert served.pid == pid


def test_a_new_server_that_fails_after_the_old_one_left(
    started: Callable[..., Started], tmp_path: Path
) -> None:
    """Then one with the old settings comes in its place."""
    served = started()
    nbd = NbdSocket(served)
    assert nbd.ask(nbd.WRITE, 0, BLOCK, content(0, 7)) == 0
    pid = served.pid
    # The first one says that it is ready, and ends once the old one was told; the next one is real.
    (tmp_path / "nbdkit").write_text(
        "#!/usr/bin/python3\n"
        "import os, signal, sys\n"
        f"if os.path.exists('{tmp_path}/tried'):\n"
        "    os.environ['PATH'] = os.environ['PATH'].partition(':')[2]\n"
        "    os.execvp('nbdkit', sys.argv)\n"
        f"open('{tmp_path}/tried', 'w').close()\n"
        "link, old, _ = map(int, os.environ['ZRAMD_TAKES_OVER'].split())\n"
        "os.write(link, b'r')\n"
        "os.read(link, 1)\n"
        "os.write(link, b't')\n"
        "signal.pidfd_send_signal(old, signal.SIGUSR1)\n"
        "sys.exit('nbdkit: error: it fell over')\n"
    )
    (tmp_path / "nbdkit").chmod(0o755)
    done = served.restart(env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert served.pid not in (0, pid)
    told = f"zramd: again is served as before, by a new process {served.pid}: it fell over\n"
    assert done.stderr == told
    again = NbdSocket(served)
    assert again.read(0, BLOCK) == content(0, 7)


def test_without_a_state(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert zramd("start", "bare", "--size", "64M", f"rundir={folder}").returncode == 0
    pid = rundir.holder(str(folder))
    assert pid
    try:
        done = zramd("restart", "--rundir", folder)
        assert done.returncode == 1
        assert (
            "zramd: bare has no state, and its data would be lost: stop it and start it with state="
            in done.stderr
        )
        assert rundir.holder(str(folder)) == pid
        os.kill(pid, signal.SIGUSR1)  # there is nothing to hand over: it is a plain stop
        wait_until(lambda: rundir.holder(str(folder)) is None)
        assert not folder.exists()
    finally:
        if rundir.holder(str(folder)) == pid:
            os.kill(pid, signal.SIGKILL)


def test_dead_server(started: Callable[..., Started]) -> None:
    served = started()
    os.kill(served.pid, signal.SIGKILL)
    wait_until(lambda: not served.pid)
    done = served.restart()
    assert done.returncode == 1
    assert "has died" in done.stderr


def test_in_the_foreground(serve: Serve, memory_folder: Path) -> None:
    served = serve(state=memory_folder / "state")
    done = zramd("restart", "--rundir", served.rundir)
    assert done.returncode == 1
    assert (
        f"runs in the foreground, not by 'zramd start': end it with 'kill -USR1 {served.process.pid}'"
        in done.stderr
    )
    nbd = NbdSocket(served)
    assert nbd.ask(nbd.WRITE, 0, BLOCK, content(0, 1)) == 0
    served.stop(signal.SIGUSR1)
    assert served.process.returncode == 0


def test_two_at_once(started: Callable[..., Started]) -> None:
    """One of them succeeds, the others fail if they come meanwhile; a server is there, and has the data."""
    served = started()
    nbd = NbdSocket(served)
    assert nbd.ask(nbd.WRITE, 0, BLOCK, content(0, 7)) == 0
    with_results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: with_results.append(served.restart())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(done.returncode == 0 for done in with_results), with_results
    assert len(with_results) == 3, "one of them hangs"
    assert "Traceback" not in "".join(done.stderr for done in with_results)
    again = NbdSocket(served)
    assert again.read(0, BLOCK) == content(0, 7)


# All servers at once, as a package does it once it is upgraded.

ALL = """
import sys
from zramd.commands import main
from zramd.control import servers
from zramd.launch import processes
servers.every = lambda: [servers.Served("", folder, servers._server(folder)) for folder in {folders!r}]
if {unit!r}:
    processes.unit_of = lambda served, process: {unit!r}
sys.exit(main(["restart", "--all"]))
"""


def restart_all(
    *folders: Path, unit: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As if there were no devices but these: others on this machine are not this test's."""
    script = ALL.format(folders=[str(folder) for folder in folders], unit=unit)
    return subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_all_with_a_state_are_restarted(
    started: Callable[..., Started], serve: Serve, tmp_path: Path
) -> None:
    served, plain = started(), serve(disksize="64M")
    client = NbdSocket(served)
    assert client.ask(client.WRITE, 0, BLOCK, content(0, 1)) == 0
    before, plain_before = served.pid, rundir.holder(str(plain.rundir))
    done = restart_all(served.rundir, plain.rundir)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"again         restarted, away for [0-9]+ ms", first)
    assert second == f"{plain.name:<13} goes on as it is: it has no state, and its data would be lost"
    assert served.pid not in (0, before)
    assert rundir.holder(str(plain.rundir)) == plain_before
    again = NbdSocket(served)
    assert again.read(0, BLOCK) == content(0, 1)
    again.close()


def test_one_that_cannot_be_restarted_does_not_keep_the_others_from_it(
    started: Callable[..., Started], serve: Serve
) -> None:
    dead = serve(disksize="64M")
    dead.process.kill()
    dead.process.wait()
    served = started()
    before = served.pid
    done = restart_all(dead.rundir, served.rundir)
    assert done.returncode == 1
    assert done.stderr.startswith("zramd: the server of ")
    assert done.stderr.count("\n") == 1
    assert done.stdout.startswith("again         restarted, away for ")
    assert served.pid not in (0, before)


@pytest.mark.parametrize(
    ("attach", "said", "calls"),
    [
        ("no", "restarted by 'systemctl restart zramd@again.service'", ["restart zramd@again.service"]),
        (
            "swap",
            "goes on as it is: this machine uses it, and 'systemctl restart zramd@again.service' would",
            [],
        ),
    ],
)
def test_a_service_is_restarted_unless_its_device_is_used_here(
    started: Callable[..., Started], tmp_path: Path, attach: str, said: str, calls: list[str]
) -> None:
    served = started()
    before = served.pid
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/zramd.conf").write_text(f"[again]\ndisksize = 64M\nattach = {attach}\n")
    systemctl = tmp_path / "bin/systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n')
    systemctl.chmod(0o755)
    env = {"ZRAMD_ROOT": str(tmp_path), "PATH": f"{systemctl.parent}:{os.environ['PATH']}"}
    done = restart_all(served.rundir, unit="zramd@again.service", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"again         {said}")
    log = tmp_path / "calls"
    assert (log.read_text().splitlines() if log.exists() else []) == calls
    assert served.pid == before


@pytest.mark.parametrize("words", [("zram0",), ("--rundir", "/run/zramd/zram0"), ("mem_limit=1M",)])
def test_all_takes_nothing_else(words: tuple[str, ...]) -> None:
    done = zramd("restart", "--all", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "zramd: --all means every device, as it is: leave out NAME, --rundir and key=value\n"
    )
