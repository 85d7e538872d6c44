"""A server of front=ublk: its life as a user sees it, without nbdkit. Its device takes a kernel: tests/vm."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.run import PATIENCE, wait_until
from support.steps import Steps

from zramd import Device as Core
from zramd.contract import exchange, rundir
from zramd.control import servers
from zramd.core.device.saving import load, save
from zramd.core.ublk import control
from zramd.errors import DeviceError
from zramd.launch import standby, ublkway
from zramd.launch.wishes import Wanted

NO_RINGS = control.available(os.devnull)
pytestmark = pytest.mark.skipif(bool(NO_RINGS), reason=NO_RINGS)


class Device:
    """A device in a folder, and the commands that are given for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.state = Path(f"/dev/shm/zramd-test-{os.getpid()}-{folder.name}.state")
        # No nbdkit is found there.
        self.environment = {**os.environ, "PATH": str(folder)}
        self.environment.pop("NOTIFY_SOCKET", None)
        self.begun: list[subprocess.Popen[str]] = []  # which end with the test, whatever becomes of it

    def run(self, *words: object, status: int = 0) -> str:
        """The output of a command of zramd, standard error behind it."""
        command = [sys.executable, "-P", "-m", "zramd", *map(str, words)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60 * PATIENCE
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *words: object) -> int:
        """Start it in the background; its process."""
        self.run("start", "u0", "--size", "8M", "--ublk", f"rundir={self.folder}", *words)
        return self.pid

    @property
    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def ask(self, method: str, path: str, body: str = "", fd: int = -1) -> tuple[int, str]:
        """What the server answers; a descriptor goes along if there is one. OSError: it is just leaving."""
        status, text = exchange.ask(str(self.folder), method, path, body, 20 * PATIENCE, fd=fd)
        return status, text.strip()

    def health(self) -> dict[str, Any]:
        status, text = self.ask("GET", "/health")
        assert status == 200
        found: dict[str, Any] = json.loads(text)
        return found

    def save(self) -> bytes:
        """What the device holds."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20 * PATIENCE)
            sock.connect(str(self.folder / "control.sock"))
            sock.sendall(b"GET /save HTTP/1.1\r\n\r\n")
            stream = b"".join(iter(lambda: sock.recv(65536), b"")).partition(b"\r\n\r\n")[2]
        copy = Core(8 << 20)
        with (self.folder.parent / "copy").open("w+b") as file:
            file.write(stream)
            file.seek(0)
            load(copy, file.fileno(), begun=b"", length=-1, patience=20)
        data = bytearray(8 << 20)
        copy.read(data, 0)
        return bytes(data)

    def fill(self) -> bytes:
        """Load data by `zramd load`, and return what the device holds then."""
        filled = Core(8 << 20)
        filled.write(b"".join(b"%-4096d" % number for number in range(500)), 4096)
        with (self.folder.parent / "saved").open("wb") as file:
            save(filled, file.fileno(), live=False, patience=20)
        self.run("load", "--rundir", self.folder, file.name)
        assert json.loads(self.ask("GET", "/stats")[1])["pages_stored"] == 500
        return self.save()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path)
    yield made
    for process in made.begun:
        process.kill()
        process.communicate()
    for pid in (rundir.standby(str(made.folder)), rundir.holder(str(made.folder))):
        if pid:
            os.kill(pid, signal.SIGKILL)
    made.state.unlink(missing_ok=True)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


BODY = json.dumps({"number": 3, "queues": 2, "depth": 128, "max_io_bytes": 65536, "recovers": False})


def test_its_life_without_nbdkit(device: Device) -> None:
    said = device.run("start", "u0", "--size", "8M", "--ublk", f"rundir={device.folder}")
    assert "front         ublk: this machine's kernel, once it is attached\n" in said
    # Where the kernel has no ublk it is said that there is nothing to attach it with.
    assert ("not on this machine: " if ublkway.never() else "attach --rundir") in said
    assert "NBD URI" not in said
    health = device.health()
    assert (health["front"], health["clients"], health["standby"]) == ("ublk", 0, False)
    assert health["ublk"]["number"] is None
    assert not health["ublk"]["serving"]
    assert "u0" in device.run("list", "--rundir", device.folder)
    assert "ublk_requests" in device.run("stats", "--rundir", device.folder)
    pid = device.pid
    mapped = {Path(line.split()[-1]).name for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
    assert not [name for name in mapped if "nbdkit" in name]
    device.run("stop", "--rundir", device.folder)
    assert gone(pid)
    assert not device.folder.exists()


def test_what_is_no_device_of_ublks_is_refused(device: Device) -> None:
    device.start()
    with open(os.devnull) as null:
        status, text = device.ask("PUT", "/ublk", BODY, null.fileno())
    assert (status, text.partition(":")[0]) == (409, "/dev/ublkb3 is not served")
    before = len(os.listdir(f"/proc/{device.pid}/fd"))
    assert device.ask("PUT", "/ublk", BODY) == (
        400,
        "one descriptor, of /dev/ublkcN, is to come with this, not 0",
    )
    with open(os.devnull) as null:
        for body in ("", "[]", "{}", BODY.replace("128", "0"), BODY.replace("false", "0")):
            assert device.ask("PUT", "/ublk", body, null.fileno())[0] == 400, body
        recovers = device.ask("PUT", "/ublk", BODY.replace("false", "true"), null.fileno())
        assert recovers[0] == 409
        assert device.ask("GET", "/health", "", null.fileno())[0] == 200
    assert device.ask("DELETE", "/ublk", '{"number": 3}')[0] == 200
    assert device.ask("DELETE", "/ublk", "{}")[0] == 400
    assert device.health()["clients"] == 0
    wait_until(lambda: len(os.listdir(f"/proc/{device.pid}/fd")) <= before)  # none is kept


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("client_limit=64",), "client_limit=64 is for front=nbd: leave it out with front=ublk"),
        (("endpoint=off",), "endpoint=off leaves no way to attach a device of front=ublk"),
        (("--", "-p", "10809"), "'-p' is for nbdkit: a device of front=ublk has no clients but"),
        (("front=nbd",), "front='ublk' is a second value"),
    ],
)
def test_what_is_nbdkits_is_refused(device: Device, words: tuple[str, ...], sentence: str) -> None:
    said = device.run("start", "u0", "--ublk", f"rundir={device.folder}", *words, status=2)
    assert said.startswith(f"zramd: {sentence}")
    assert said.count("\n") == 1


def test_a_start_that_fails_says_why(device: Device) -> None:
    """One sentence, by the server itself in the foreground, too."""
    device.state.write_bytes(b"no state" * 1000)
    words = ("u0", "--size", "8M", "--ublk", f"rundir={device.folder}", f"state={device.state}")
    said = device.run("start", *words, status=1)
    assert said.startswith(f"zramd: u0 does not start: '{device.state}' is not a state of zramd: ")
    assert said.count("\n") == 1
    said = device.run("serve", "--name", *words, status=1)
    assert said.startswith(f"zramd: '{device.state}' is not a state of zramd: ")
    assert said.count("\n") == 1
    assert not device.folder.exists()


def test_in_the_foreground_ctrl_c_ends_it(device: Device, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "zramd",
        "serve",
        "--size",
        "8M",
        "--ublk",
        f"rundir={device.folder}",
    ]
    with (tmp_path / "out").open("w+") as out:
        served = subprocess.Popen(command, env=device.environment, stdout=out, stderr=subprocess.STDOUT)
        wait_until(lambda: "try next:" in (tmp_path / "out").read_text())
        assert device.pid == served.pid
        served.send_signal(signal.SIGINT)
        assert served.wait(20 * PATIENCE) == 0
        text = (tmp_path / "out").read_text()
    assert "  front         ublk: this machine's kernel, once it is attached\n" in text
    assert "Traceback" not in text
    assert not device.folder.exists()


def test_hangup_opens_its_log_again(device: Device) -> None:
    pid = device.start()
    (device.folder / "log").rename(device.folder.parent / "old")
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: (device.folder / "log").exists())
    assert device.health()["pid"] == pid


def test_auto_is_nbd_where_nbdkit_is_asked_for(device: Device) -> None:
    words = ("u0", f"rundir={device.folder}", "front=auto", "client_limit=5")
    said = device.run("start", *words, status=1)  # without nbdkit, as it happens
    assert said.startswith("zramd: front=auto: nbd, because client_limit=5 is for it\n")
    assert "nbdkit is not installed" in said


def test_nbdkit_does_not_serve_it(device: Device) -> None:
    words = ["nbdkit", "-f", "-U", "-", "python", rundir.__file__.replace("zramd/contract/rundir.py", "")]
    words[-1] += "nbdkit_plugin.py"
    done = subprocess.run([*words, "size=1M", f"rundir={device.folder}", "front=ublk"], capture_output=True)
    assert done.returncode
    assert b"front=ublk is served without nbdkit: use 'zramd serve --ublk'" in done.stderr


def test_restart_changes_settings_and_keeps_data(device: Device) -> None:
    first = device.start(f"state={device.state}")
    data = device.fill()
    device.run("restart", "--rundir", device.folder, "mem_limit=6M")
    assert gone(first)
    assert device.save() == data
    assert json.loads(device.ask("GET", "/settings")[1])["mem_limit"] == 6 << 20
    assert device.health()["pid"] == device.pid


def test_a_restart_that_cannot_be_leaves_the_old_one(device: Device) -> None:
    first = device.start(f"state={device.state}")
    data = device.fill()
    said = device.run("restart", "--rundir", device.folder, "metrics_file=/nowhere/at/all.prom", status=1)
    assert "goes on as before" in said
    assert device.health()["pid"] == first
    assert device.save() == data


def test_another_front_may_have_its_data(device: Device) -> None:
    device.environment = dict(os.environ)  # with nbdkit
    device.start(f"state={device.state}")
    data = device.fill()
    device.run("restart", "--rundir", device.folder, "front=nbd")
    assert device.health()["front"] == "nbd"
    assert device.save() == data
    assert (device.folder / "nbd.sock").exists()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(device.folder / "nbd.sock"))
        assert client.recv(8) == b"NBDMAGIC"
    with open(os.devnull) as null:
        answer = device.ask("PUT", "/ublk", BODY, null.fileno())
    assert answer == (409, "it is served by front=nbd: a device is given to front=ublk only")
    device.run("restart", "--rundir", device.folder, "front=ublk")
    assert device.health()["front"] == "ublk"
    assert device.save() == data
    assert not (device.folder / "nbd.sock").exists()


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        ([], "has no state: nobody could take over after a crash"),
        (["state"], "runs in the foreground: whoever runs it starts the next one after a crash"),
    ],
)
def test_who_can_have_no_standby(device: Device, pairs: list[str], why: str) -> None:
    """With swap alone there is none then; whoever asks for one learns why."""
    words = ["serve", "--name", "u0", "--size", "8M", "--ublk", f"rundir={device.folder}"]
    served = subprocess.Popen(
        [sys.executable, "-P", "-m", "zramd", *words, *(f"{key}={device.state}" for key in pairs)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until((device.folder / "control.sock").exists)
        found = servers.look(None, str(device.folder))
        with pytest.raises(DeviceError, match=why):
            standby.wanted(found, Wanted(standby=True))
        assert not standby.wanted(found, Wanted(swap=True))
        with pytest.raises(DeviceError, match=why):
            standby.start(None, str(device.folder))
    finally:
        served.kill()
        served.wait()


def test_who_gets_a_standby(device: Device) -> None:
    device.start(f"state={device.state}")
    found = servers.look(None, str(device.folder))
    assert standby.wanted(found, Wanted(swap=True))
    assert standby.wanted(found, Wanted(standby=True))
    assert not standby.wanted(found, Wanted())
    assert not standby.wanted(found, Wanted(swap=True, standby=False))


class TestStandby:
    @pytest.fixture
    def served(self, device: Device) -> tuple[int, bytes, int]:
        """The server's process, its data, and who is on standby for it."""
        pid = device.start(f"state={device.state}")
        return pid, device.fill(), standby.start(None, str(device.folder))

    def test_it_takes_over_from_one_that_is_killed(
        self, device: Device, served: tuple[int, bytes, int]
    ) -> None:
        pid, data, waiting = served
        assert (device.folder / "standby").read_text() == f"{waiting}\n"
        assert rundir.standby(str(device.folder)) == waiting
        assert not device.health()["standby"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: rundir.holder(str(device.folder)) == waiting)
        wait_until((device.folder / "control.sock").exists)
        wait_until(lambda: self.answers(device))
        health = device.health()
        assert (health["pid"], health["standby"], health["status"]) == (waiting, True, "ok")
        assert device.save() == data
        assert not (device.folder / "standby").exists()
        assert rundir.standby(str(device.folder)) is None

    def answers(self, device: Device) -> bool:
        try:
            return bool(device.health())
        except OSError:
            return False

    def test_it_ends_with_one_that_is_stopped(self, device: Device, served: tuple[int, bytes, int]) -> None:
        device.run("stop", "--rundir", device.folder)
        wait_until(lambda: gone(served[2]))
        assert not device.folder.exists()

    def test_there_is_one(self, device: Device, served: tuple[int, bytes, int]) -> None:
        words = f"from zramd.launch import standby; standby.start(None, {str(device.folder)!r})"
        done = subprocess.run([sys.executable, "-P", "-c", words], capture_output=True, text=True)
        assert f"has a server on standby already: {served[2]}" in done.stderr

    def test_it_is_for_a_device_that_is_attached(
        self, device: Device, served: tuple[int, bytes, int]
    ) -> None:
        """Where somebody has detached it meanwhile, none is left; the server itself goes on."""
        standby.start_for("u0", str(device.folder))
        wait_until(lambda: gone(served[2]))
        assert rundir.standby(str(device.folder)) is None
        assert device.health()["pid"] == served[0]
        standby.start_for("u0", str(device.folder))
        assert rundir.standby(str(device.folder)) is None

    def test_a_restart_puts_a_new_one_there(self, device: Device, served: tuple[int, bytes, int]) -> None:
        pid, data, waiting = served
        device.run("restart", "--rundir", device.folder, "mem_limit=7M")
        after = rundir.standby(str(device.folder))
        assert after not in (None, waiting)
        assert gone(waiting)
        assert device.pid not in (pid, after)
        os.kill(device.pid, signal.SIGKILL)
        wait_until(lambda: self.answers(device) and device.health()["pid"] == after)
        assert json.loads(device.ask("GET", "/settings")[1])["mem_limit"] == 7 << 20
        assert device.save() == data

    def promoted(self, device: Device, served: tuple[int, bytes, int]) -> int:
        """The process of the server that was on standby, and serves."""
        pid, _, waiting = served
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.answers(device) and device.health()["standby"])
        return waiting

    def serves(self, device: Device, pid: int) -> None:
        """Return once this process answers; it may take over from one that is just leaving."""

        def it_does() -> bool:
            try:
                return bool(device.health()["pid"] == pid)
            except OSError:
                return False

        wait_until(it_does, 60)  # Python starts twice

    def serve(self, device: Device, *words: str, **more: str) -> subprocess.Popen[str]:
        """`zramd serve`, as a service manager starts it again."""
        settings = ("--name", "u0", "--size", "8M", f"rundir={device.folder}", *words)
        begun = subprocess.Popen(
            [sys.executable, "-P", "-m", "zramd", "serve", *settings],
            env={**device.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        device.begun.append(begun)
        return begun

    @pytest.mark.parametrize("front", ["ublk", "auto"])
    def test_a_server_that_is_started_again_takes_over(
        self, device: Device, served: tuple[int, bytes, int], front: str
    ) -> None:
        waiting = self.promoted(device, served)
        again = self.serve(device, f"front={front}", f"state={device.state}", "mem_limit=7M")
        self.serves(device, again.pid)
        assert gone(waiting)
        assert not device.health()["standby"]
        assert device.save() == served[1]
        assert json.loads(device.ask("GET", "/settings")[1])["mem_limit"] == 7 << 20
        device.run("stop", "--rundir", device.folder)  # others have their turn with it
        assert again.wait(20 * PATIENCE) == 0
        assert not device.folder.exists()

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("front=ublk",), "is in use by a running server"),
            (("front=ublk", "state={state}", "--size", "9M"), "is of a device of 8388608 bytes, not 9437184"),
            (("front=ublk", "state={state}", "metrics_file=/nowhere/x.prom"), "/nowhere"),
        ],
    )
    def test_one_that_cannot_leaves_it_alone(
        self, device: Device, served: tuple[int, bytes, int], words: tuple[str, ...], sentence: str
    ) -> None:
        waiting = self.promoted(device, served)
        again = self.serve(device, *(word.format(state=device.state) for word in words))
        said = again.communicate(timeout=20 * PATIENCE)[1]
        assert again.returncode
        assert sentence in said
        assert said.count("\n") == 1
        assert device.health()["pid"] == waiting
        assert device.save() == served[1]
        device.run("restart", "--rundir", device.folder)  # it is as it was

    @pytest.mark.parametrize("at", ["inplace.exec", "successor.told", "server.device", "server.serves"])
    def test_one_that_is_killed_on_its_way(
        self, device: Device, served: tuple[int, bytes, int], at: str, steps: Steps
    ) -> None:
        """Before it has told the other to leave, that goes on; later the next one has all."""
        waiting = self.promoted(device, served)
        words = ("front=ublk", f"state={device.state}")
        steps.held.add(at)
        again = self.serve(device, *words, **steps.env)
        assert steps.wait(at, 60) == again.pid
        again.kill()
        again.communicate()
        steps.release()
        if at == "inplace.exec":
            assert device.health()["pid"] == waiting
        else:
            wait_until(lambda: gone(waiting))
            again = self.serve(device, *words)
            self.serves(device, again.pid)
        assert device.save() == served[1]
