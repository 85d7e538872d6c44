"""The life of a server that `zramd start` began: who may begin and end it, and what is left of it."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.run import wait_until
from support.run import zramd_command as zramd
from support.steps import Steps

from zramd.contract import rundir

BLOCK = 4096


class Device:
    """One in a run folder of its own; it looks like support.server.NbdkitProcess to NbdSocket."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.name = "alive"
        self.rundir = folder / "run"
        self.socket = self.rundir / "nbd.sock"
        self.state = state

    def command(self, verb: str, *words: object) -> list[str]:
        if verb == "start":
            return [verb, self.name, "--size", "64M", f"rundir={self.rundir}", *map(str, words)]
        return [verb, "--rundir", str(self.rundir), *map(str, words)]

    def done(self, verb: str, *words: object) -> str:
        result = zramd(*self.command(verb, *words))
        assert (result.returncode, result.stderr) == (0, ""), result
        return result.stdout

    def refused(self, verb: str, *words: object) -> str:
        result = zramd(*self.command(verb, *words))
        assert (result.returncode, result.stdout) == (1, ""), result
        assert result.stderr.startswith("zramd: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("zramd: ").rstrip()

    @property
    def with_state(self) -> str:
        return f"state={self.state}"

    @property
    def pid(self) -> int:
        return rundir.holder(str(self.rundir)) or 0

    def kill(self) -> None:
        pid = self.pid
        if pid:  # 0 would be our own process group
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.pid)

    def connect(self) -> NbdSocket:
        return NbdSocket(self)  # type: ignore[arg-type]


@pytest.fixture
def device(tmp_path: Path, memory_folder: Path) -> Iterator[Device]:
    made = Device(tmp_path, memory_folder / "state")
    yield made
    made.kill()


# Beginning.


def test_a_start_without_either_socket_in_the_run_folder(device: Device, tmp_path: Path) -> None:
    """Without the endpoint nobody can be asked whether it serves, and nbdkit's socket is elsewhere."""
    assert "NBD URI" in device.done("start", "endpoint=off", "--", "-U", tmp_path / "elsewhere.sock")
    assert sorted(path.name for path in device.rundir.iterdir() if path.is_socket()) == []
    device.done("stop")
    assert not device.rundir.exists()


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_paths_with_other_letters(
    tmp_path: Path, memory_folder: Path, monkeypatch: pytest.MonkeyPatch, locale: str
) -> None:
    """Also where there is no locale, as in a service."""
    monkeypatch.setenv("LC_ALL", locale)
    (tmp_path / "zwölf").mkdir()
    device = Device(tmp_path / "zwölf", memory_folder / "größe")
    device.done("start", device.with_state, f"metrics_file={tmp_path}/ö.prom")
    try:
        device.done("restart")
        client = device.connect()
        assert client.ask(client.WRITE, 0, BLOCK, b"x" * BLOCK) == 0
        client.close()
        device.done("restart")
        client = device.connect()
        assert client.read(0, BLOCK) == b"x" * BLOCK
        client.close()
        wait_until((tmp_path / "ö.prom").exists)
        device.done("stop")
        assert not device.rundir.exists()
    finally:
        device.kill()


def test_many_starts_at_once(device: Device) -> None:
    """One of them has started it; the others say who serves, and none takes another's server for its own."""
    words = [sys.executable, "-P", "-m", "zramd"]
    starts = [
        subprocess.Popen(
            [*words, *device.command("start", f"mem_limit={number + 1}M")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(6)
    ]
    ends = [(*start.communicate(timeout=60), start.returncode) for start in starts]
    assert sorted(status for _, _, status in ends) == [0, 1, 1, 1, 1, 1]
    for out, said, status in ends:
        if status:
            assert f"is in use by a running server (pid {device.pid})" in said
        else:
            assert f"pid           {device.pid}\n" in out


def test_a_start_and_a_serve_at_once(device: Device, steps: Steps) -> None:
    """`serve` waits for nobody who is only about to make the folder; the folder's lock decides."""
    steps.held.add("start.turn")
    words = [sys.executable, "-P", "-m", "zramd"]
    start = subprocess.Popen(
        [*words, *device.command("start")], env={**os.environ, **steps.env}, stderr=subprocess.PIPE, text=True
    )
    steps.wait("start.turn")
    done = zramd(*device.command("restart"))
    assert done.returncode == 1
    steps.release()
    _, said = start.communicate(timeout=60)
    assert (start.returncode, said) == (0, "")


# Ending.


def test_stop_without_a_state(device: Device) -> None:
    device.done("start")
    nbd = device.connect()
    assert nbd.ask(nbd.WRITE, 0, BLOCK, b"x" * BLOCK) == 0
    said = device.refused("stop")
    assert said == (
        "run has no state, and its clients would lose its data (1 connected): "
        "disconnect them first, or use --force"
    )
    assert nbd.read(0, BLOCK) == b"x" * BLOCK
    device.done("stop", "--force")
    assert not device.rundir.exists()
    device.done("start")
    device.connect().close()
    wait_until(lambda: '"clients": 0' in health(device))
    device.done("stop")


def health(device: Device) -> str:
    from zramd.contract import exchange

    return exchange.ask(str(device.rundir), "GET", "/health")[1]


def test_stop_with_a_state(device: Device) -> None:
    device.done("start", device.with_state)
    nbd = device.connect()
    assert nbd.ask(nbd.WRITE, 0, BLOCK, b"x" * BLOCK) == 0
    device.done("stop")
    device.done("start", device.with_state)
    assert device.connect().read(0, BLOCK) == b"x" * BLOCK


FILTERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "delay": ("--", "--filter=delay", "wdelay=300ms"),
    "short-delay": ("--", "--filter=delay", "wdelay=5ms"),
    "rate": ("--", "--filter=rate", "rate=8M"),
}


@pytest.mark.parametrize("how", ["restart", "stop", "USR1"])
@pytest.mark.parametrize("filters", FILTERS)
def test_no_request_is_answered_by_a_shutdown(device: Device, how: str, filters: str) -> None:
    """It is carried out, or its client is cut off and sends it again: also one that sleeps in a filter."""
    device.done("start", device.with_state, *FILTERS[filters])
    writes = (
        4 if filters == "delay" else 10
    )  # of each client: an nbdkit that is old lets one after the other sleep
    for _ in range(3):
        clients = [device.connect() for _ in range(3)]
        for number, nbd in enumerate(clients):
            for turn in range(writes):
                nbd.send(nbd.WRITE, (number * 10 + turn) << 16, 1 << 16, bytes([turn + 1]) * (1 << 16))
        pid = device.pid
        if how == "USR1":
            os.kill(pid, signal.SIGUSR1)
            wait_until(lambda: not device.pid)
        else:
            device.done(how)
        answered = []
        for number, nbd in enumerate(clients):
            try:
                for _ in range(writes):
                    error, cookie = nbd.reply()
                    assert error == 0
                    answered.append((number, cookie - 1))
            except OSError:
                pass
        if how != "restart":
            device.done("start", device.with_state, *FILTERS[filters])
        again = device.connect()
        for number, turn in answered:
            assert again.read((number * 10 + turn) << 16, 1 << 16) == bytes([turn + 1]) * (1 << 16)
        again.close()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--filter=cow",), "cow"),
        (("--filter", "cow"), "cow"),
        (("--filter=log", "--filt=cow", "logfile=/dev/null"), "cow"),
        (("--filter=cache",), "cache"),
        (("--filter=cache", "cache=unsafe"), "cache"),
        (("--filter=cache", "cache=writethrough"), ""),
        (("--filter=log", "--filter=noextents", "logfile=/dev/null"), ""),
    ],
)
def test_filters_that_keep_what_is_written(device: Device, words: tuple[str, ...], name: str) -> None:
    device.done("start", device.with_state, "--", *words)
    pid = device.pid
    if name:
        assert f"alive has nbdkit's filter '{name}'" in device.refused("restart")
        assert device.pid == pid
    else:
        device.done("restart")
        assert device.pid != pid


def test_restart_in_the_folder_of_the_start(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbdkit's options may have relative paths."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)
    device.done("start", device.with_state, "--", "--filter=log", "logfile=said", "-P", "number")
    old = device.pid
    assert (first / "number").read_text().strip() == str(old)
    monkeypatch.chdir(second)
    device.done("restart")
    assert (first / "number").read_text().strip() == str(device.pid) != str(old)
    assert os.listdir(second) == []
    device.connect().close()
    assert "Connect" in (first / "said").read_text()


# A socket of the user's own.


def test_another_unix_socket(device: Device, tmp_path: Path) -> None:
    device.socket = tmp_path / "own.sock"
    words = (device.with_state, "--", "-U", str(device.socket))
    device.done("start", *words)
    device.connect().close()
    device.done("stop")
    assert not device.socket.exists()
    device.done("start", *words)
    device.kill()
    assert device.socket.exists()
    device.done("start", *words)  # in place of one that nobody listens on
    device.done("restart")
    device.connect().close()
    assert device.socket.exists()
    device.done("stop")
    assert not device.socket.exists()


def test_a_socket_that_is_in_use_stays(device: Device, tmp_path: Path) -> None:
    device.done("start")
    taken = device.socket
    other = Device(tmp_path / "other", device.state)
    assert "Address already in use" in other.refused("start", "--", "-U", taken)
    device.connect().close()
    (tmp_path / "file").write_text("mine")
    assert "Address already in use" in other.refused("start", "--", "-U", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert not other.rundir.exists()


# What a server leaves that did not stop in its normal way.


@pytest.mark.parametrize("there", [False, True])
def test_a_server_in_the_foreground_that_cannot_listen(device: Device, there: bool) -> None:
    """nbdkit ends then without a word to it: that must not look like a server that died."""
    if there:
        device.rundir.mkdir(0o700)
    result = zramd("serve", *device.command("start")[2:], "--", "-p", "1", "-i", "192.0.2.1")
    assert (result.returncode, result.stderr) == (1, "bind: Cannot assign requested address\n")
    wait_until(lambda: not device.rundir.exists() or (there and not os.listdir(device.rundir)))


def test_killed_with_a_state(device: Device) -> None:
    device.done("start", device.with_state)
    device.kill()
    for verb in ("stop", "stats", "restart"):
        assert device.refused(verb) == (
            f"the server of run has died, its data is in its state: start it again with {device.with_state}"
        )
    listed = zramd("list", "--rundir", device.rundir)
    assert listed.returncode == 1
    assert "its data is in its state" in listed.stderr
    device.state.unlink()
    assert f"has died, and its state '{device.state}' is gone: start it again" in device.refused("stop")
    device.done("start")
    device.kill()
    assert "has died, and its data with it" in device.refused("stop")


def test_log_of_a_server_that_died(device: Device) -> None:
    device.done("start", device.with_state)
    with (device.rundir / "log").open("a") as log:
        log.write("its last words\n")
    device.kill()
    device.done("start", device.with_state)
    assert "its last words" in (device.rundir / "log.1").read_text()
    assert "its last words" not in (device.rundir / "log").read_text()
    device.done("restart")
    device.done("stop")
    assert os.listdir(device.rundir) == []


def test_hangup_has_the_log_opened_again(device: Device) -> None:
    device.done("start")
    pid = device.pid
    log = device.rundir / "log"
    wait_until(log.exists)
    log.rename(device.rundir / "log.old")
    os.kill(pid, signal.SIGHUP)
    wait_until(log.exists)
    nbd = device.connect()
    nbd.close()
    assert device.pid == pid
    (device.rundir / "log.old").unlink()
    device.done("stop", "--force")
    assert not device.rundir.exists()


def test_folder_is_removed_under_a_server(device: Device) -> None:
    """Another server may take its name: the first one does nothing to that one's folder, and says so."""
    device.done("start")
    first = device.pid
    nbd = device.connect()
    log = os.open(device.rundir / "log", os.O_RDONLY)
    shutil.rmtree(device.rundir)
    device.done("start")
    second = device.pid
    assert second != first
    number = (device.rundir / "stats.json").stat().st_ino
    assert nbd.ask(nbd.WRITE, 0, BLOCK, b"x" * BLOCK) == 0

    def said() -> bool:
        return b"was removed, or another one is in its place: nothing finds this server" in os.pread(
            log, 65536, 0
        )

    wait_until(said)
    with (device.rundir / "log").open("a") as others:
        others.write("of the second\n")
    os.kill(first, signal.SIGHUP)
    wait_until(lambda: b"the log cannot be opened again: rundir" in os.pread(log, 65536, 0))
    os.close(log)
    assert (device.rundir / "log").read_text() == "of the second\n"
    assert (device.rundir / "stats.json").stat().st_ino == number or f'"pid": {second}' in (
        device.rundir / "stats.json"
    ).read_text()
    os.kill(first, signal.SIGTERM)
    wait_until(lambda: not os.path.exists(f"/proc/{first}"))
    device.connect().close()
    assert device.pid == second
    assert {"nbd.sock", "control.sock", "pid", "stats.json"} <= set(os.listdir(device.rundir))


def test_a_hold_up_of_the_folder_is_told(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from zramd.control import life
    from zramd.errors import DeviceError

    device.done("start")
    folder = os.open(device.rundir, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    monkeypatch.setattr(life, "PATIENCE", 0.1)
    try:
        with (
            pytest.raises(
                DeviceError, match="alive is being started, stopped, restarted or attached by anoth"
            ),
            life.turn(str(device.rundir), device.name),
        ):
            pass
        # A service waits for longer.
        timer = threading.Timer(0.5, fcntl.flock, (folder, fcntl.LOCK_UN))
        timer.start()
        with life.turn(str(device.rundir), device.name, patience=life.LONG_PATIENCE):
            timer.join()
    finally:
        os.close(folder)
