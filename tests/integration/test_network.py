"""A device for other machines: TLS with keys and with certificates, strangers, idle clients, and new keys."""

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.run import PATIENCE, talk, wait_until, zramd_command
from support.server import PLUGIN

from zramd.contract import rundir
from zramd.server import admission

NAME = "net0"
BLOCK = 4096


def psktool(file: Path, name: str) -> None:
    if shutil.which("psktool") is None:
        pytest.skip("psktool is not installed: gnutls-bin")
    subprocess.run(["psktool", "-u", name, "-p", str(file)], check=True, capture_output=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Served:
    """A server begun by `zramd start` that listens on loopback."""

    def __init__(self, folder: Path, state: Path, *words: str) -> None:
        self.rundir = folder / "run"
        self.port = free_port()
        self.words = (f"rundir={self.rundir}", f"state={state}", f"listen=127.0.0.1:{self.port}", *words)
        self.start()

    def start(self) -> None:
        done = zramd_command("start", NAME, "--size", "16M", *self.words)
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("NBD URI ")]
        self.uri = line.removeprefix("NBD URI").strip()
        assert "socket  " not in done.stdout

    @property
    def pid(self) -> int:
        return rundir.holder(str(self.rundir)) or 0

    def restart(self, *words: str) -> None:
        done = zramd_command("restart", "--rundir", self.rundir, *words)
        assert done.returncode == 0, done.stderr

    def health(self) -> dict[str, object]:
        answer = talk(self.rundir / "control.sock", b"GET /health HTTP/1.1\r\n\r\n")
        found: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])
        return found

    def set(self, name: str, value: str) -> None:
        done = zramd_command("set", "--rundir", self.rundir, f"{name}={value}")
        assert done.returncode == 0, done.stderr

    def log(self) -> str:
        return (self.rundir / "log").read_text()

    def connect(self) -> socket.socket:
        """A stranger's connection, which says nothing."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60 * PATIENCE)

    def end(self) -> None:
        if pid := self.pid:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not self.pid)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path, memory_folder: Path) -> Iterator[Serve]:
    """Start a server with these settings."""
    started: list[Served] = []

    def run(*words: str) -> Served:
        served = Served(tmp_path, memory_folder / "state", *words)
        started.append(served)
        return served

    yield run
    for served in started:
        served.end()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Keys of guest1 and guest2."""
    umask = os.umask(0o077)
    try:
        for name in ("guest1", "guest2"):
            psktool(tmp_path / "keys.psk", name)
    finally:
        os.umask(umask)
    return tmp_path / "keys.psk"


def nbdinfo(uri: str) -> str:
    """What a client with this URI is told of the size, or of why it gets nothing."""
    done = subprocess.run(
        ["nbdinfo", "--size", uri], capture_output=True, text=True, errors="replace", timeout=60 * PATIENCE
    )
    return (done.stdout or done.stderr).strip()


SIZE = str(16 << 20)
TLS_REQUIRED = 0x80000005  # NBD_REP_ERR_TLS_REQD


def answer_without_tls(served: Served) -> int:
    """The type of what the server answers to a client that wants the device and begins no TLS."""
    name = NAME.encode()
    with served.connect() as client, client.makefile("rb") as said:
        assert said.read(18)[:16] == b"NBDMAGICIHAVEOPT"
        wish = struct.pack(f">I{len(name)}sH", len(name), name, 0)
        client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, len(wish)) + wish)  # NBD_OPT_GO
        answer = struct.Struct(">QIII")
        _, option, kind, _ = answer.unpack(said.read(answer.size))
        assert option == 7
        return int(kind)


class TestKeys:
    def test_who_has_one_comes_in(self, serve: Serve, keys: Path) -> None:
        served = serve(f"tls=psk:{keys}")
        assert served.uri == f"nbds://guest1@127.0.0.1:{served.port}/{NAME}?tls-psk-file={keys}"
        assert nbdinfo(served.uri) == SIZE
        assert nbdinfo(served.uri.replace("guest1", "guest2")) == SIZE
        others = keys.with_name("others.psk")
        others.write_text("guest3:" + "00" * 32 + "\n")
        stranger = served.uri.replace("guest1", "guest3").replace(str(keys), str(others))
        assert "gnutls_handshake" in nbdinfo(stranger)
        assert answer_without_tls(served) == TLS_REQUIRED
        assert (served.health()["listen"], served.health()["tls"]) == (f"127.0.0.1:{served.port}", "psk")
        assert not (served.rundir / "nbd.sock").exists()

    def test_only_those_who_are_named(self, serve: Serve, keys: Path) -> None:
        served = serve(f"tls=psk:{keys}", "clients=guest2")
        assert served.uri == f"nbds://guest2@127.0.0.1:{served.port}/{NAME}?tls-psk-file={keys}"
        assert nbdinfo(served.uri) == SIZE
        assert "gnutls_handshake" in nbdinfo(served.uri.replace("guest2", "guest1"))
        mine = [served.rundir / name for name in rundir.KEYS]
        assert [path.exists() for path in mine] == [True, False, False]
        assert mine[0].stat().st_mode & 0o777 == 0o600
        served.restart("clients=guest1")
        assert nbdinfo(served.uri.replace("guest2", "guest1")) == SIZE
        assert "gnutls_handshake" in nbdinfo(served.uri)
        assert [path.exists() for path in mine] == [False, True, False]
        done = zramd_command("restart", "--rundir", served.rundir, "clients=guest3")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"zramd: clients: 'guest3' has no key in '{keys}': ")
        assert nbdinfo(served.uri.replace("guest2", "guest1")) == SIZE
        done = zramd_command("stop", "--rundir", served.rundir)
        assert done.returncode == 0, done.stderr
        assert not served.rundir.exists()

    def test_a_kernel_cannot_come(self, serve: Serve, keys: Path) -> None:
        served = serve(f"tls=psk:{keys}")
        done = zramd_command("attach", "--rundir", served.rundir)
        assert done.returncode == 1
        assert done.stderr in (
            f"zramd: {NAME} serves on listen=127.0.0.1:{served.port}, with TLS, which the kernel does not "
            "speak: to attach it here, start it without listen\n",
            f"zramd: only root may attach: run 'sudo zramd attach --rundir {served.rundir}'\n",
        )

    def test_the_address_stays(self, serve: Serve, keys: Path) -> None:
        served = serve(f"tls=psk:{keys}")
        done = zramd_command("restart", "--rundir", served.rundir, "listen=127.0.0.1:1")
        assert (done.returncode, done.stderr) == (
            1,
            f"zramd: {NAME} is reached by listen=127.0.0.1:{served.port}, where its clients come again: for "
            "listen=127.0.0.1:1 stop it, and start it with that\n",
        )
        done = zramd_command("set", "--rundir", served.rundir, "listen=:1")
        assert "listen cannot be changed while the device is served" in done.stderr


def certificates(folder: Path, names: tuple[str, ...]) -> Path:
    """A CA, this machine's certificate, and clients' in folders of their own, as docs/network.md has it."""
    if shutil.which("certtool") is None:
        pytest.skip("certtool is not installed: gnutls-bin")
    here = folder / "pki"
    here.mkdir(0o700)

    def certtool(*words: str) -> None:
        subprocess.run(["certtool", *words], cwd=here, capture_output=True, check=True)

    def sign(name: str, info: str) -> None:
        (here / f"{name}.info").write_text(f"{info}\nexpiration_days = 2\nsigning_key\n")
        certtool("--generate-privkey", "--key-type=ecdsa", f"--outfile={name}-key.pem")
        certtool(
            *("--generate-certificate", f"--load-privkey={name}-key.pem"),
            *("--load-ca-certificate=ca-cert.pem", "--load-ca-privkey=ca-key.pem"),
            *(f"--template={name}.info", f"--outfile={name}-cert.pem"),
        )

    umask = os.umask(0o077)
    try:
        (here / "ca.info").write_text("cn = zramd\nca\ncert_signing_key\nexpiration_days = 2\n")
        certtool("--generate-privkey", "--key-type=ecdsa", "--outfile=ca-key.pem")
        certtool(
            "--generate-self-signed",
            "--load-privkey=ca-key.pem",
            "--template=ca.info",
            "--outfile=ca-cert.pem",
        )
        sign("server", "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server")
        for name in names:
            sign(name, f"cn = {name}\ntls_www_client")
            (here / name).mkdir()
            shutil.copy(here / "ca-cert.pem", here / name)
            for kind in ("key", "cert"):
                os.replace(here / f"{name}-{kind}.pem", here / name / f"client-{kind}.pem")
    finally:
        os.umask(umask)
    return here


class TestCertificates:
    def test_who_has_one_comes_in(self, serve: Serve, tmp_path: Path) -> None:
        pki = certificates(tmp_path, ("guest1",))
        served = serve(f"tls=x509:{pki}")
        plain = f"nbds://127.0.0.1:{served.port}/{NAME}"
        assert served.uri == plain  # the folder has no client's certificate
        assert nbdinfo(f"{plain}?tls-certificates={pki}/guest1") == SIZE
        (pki / "none").mkdir()
        shutil.copy(pki / "ca-cert.pem", pki / "none")
        assert nbdinfo(f"{plain}?tls-certificates={pki}/none") != SIZE
        assert answer_without_tls(served) == TLS_REQUIRED

    def test_names_where_nbdkit_knows_them(self, serve: Serve, tmp_path: Path) -> None:
        pki = certificates(tmp_path, ("guest1", "guest2"))
        version = subprocess.run(["nbdkit", "--version"], capture_output=True, text=True, check=True).stdout
        numbers = re.search(r"(\d+)\.(\d+)", version)
        assert numbers is not None
        if (int(numbers[1]), int(numbers[2])) < (1, 40):
            words = (f"rundir={tmp_path}/run", "listen=127.0.0.1", f"tls=x509:{pki}", "clients=guest1")
            done = zramd_command("start", NAME, "--size", "16M", *words)
            assert (done.returncode, done.stderr) == (
                1,
                f"zramd: {NAME} does not start: clients=guest1: this nbdkit does not say whose certificate a "
                "client has: use nbdkit 1.40 or later, tls=psk:FILE, or a CA for this device alone\n",
            )
            return
        served = serve(f"tls=x509:{pki}", "clients=guest1")
        assert nbdinfo(f"{served.uri}?tls-certificates={pki}/guest1") == SIZE
        assert nbdinfo(f"{served.uri}?tls-certificates={pki}/guest2") != SIZE
        refused = "client 'guest2' is none of clients=guest1: add its name, if it may come"
        wait_until(lambda: refused in served.log())
        assert served.health()["clients"] == 0
        served.restart("clients=guest2")
        assert nbdinfo(f"{served.uri}?tls-certificates={pki}/guest1") != SIZE
        assert nbdinfo(f"{served.uri}?tls-certificates={pki}/guest2") == SIZE


class Qemu:
    """qemu-nbd's client as a guest has it: it reconnects, and no request of it fails meanwhile."""

    def __init__(self, options: str, *objects: str) -> None:
        words = [word for given in objects for word in ("--object", given)]
        self._process = subprocess.Popen(
            ["qemu-io", *words, "--image-opts", f"driver=nbd,reconnect-delay=60,{options}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        said = ""
        while not re.search(r"ops; |failed|error|ould not|rror:", said):
            line = self._process.stdout.readline()
            assert line, said
            said += line
        return said

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write("quit\n")
            self._process.stdin.close()
        assert self._process.wait(60 * PATIENCE) == 0


@pytest.mark.parametrize("way", ["psk", "x509"])
def test_new_keys_while_clients_write(serve: Serve, keys: Path, tmp_path: Path, way: str) -> None:
    """The server is restarted for them, and its address refuses nobody meanwhile."""
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed: qemu-utils")
    if way == "psk":
        served = serve(f"tls=psk:{keys}", "clients=guest1")
        (tmp_path / "mine").mkdir(0o700)
        shutil.copy(keys, tmp_path / "mine/keys.psk")
        creds = f"tls-creds-psk,id=tls0,endpoint=client,dir={tmp_path}/mine,username=guest1"
    else:
        pki = certificates(tmp_path, ("guest1",))
        served = serve(f"tls=x509:{pki}")
        creds = f"tls-creds-x509,id=tls0,endpoint=client,dir={pki}/guest1"
    client = Qemu(
        f"server.type=inet,server.host=127.0.0.1,server.port={served.port},export={NAME},tls-creds=tls0",
        creds,
    )
    stop = threading.Event()
    refused: list[OSError] = []

    def knock() -> None:
        while not stop.is_set():
            try:
                served.connect().close()
            except OSError as error:
                refused.append(error)
            time.sleep(0.05)

    knocking = threading.Thread(target=knock)
    knocking.start()
    try:
        for turn in range(4):
            said = client.run(f"write -P {turn + 1} {turn * 65536} 64k")
            assert "wrote 65536/65536" in said, said
            if way == "psk":
                lines = keys.read_text().splitlines()
                # guest2 gets another key; guest1, who is connected, keeps its own.
                fresh = [
                    line if line.startswith("guest1:") else f"guest2:{os.urandom(32).hex()}" for line in lines
                ]
                keys.write_text("\n".join(fresh) + "\n")
            else:
                shutil.copy(pki / "server-cert.pem", pki / "before.pem")
                words = ["certtool", "--generate-certificate", "--load-privkey=server-key.pem"]
                words += ["--load-ca-certificate=ca-cert.pem", "--load-ca-privkey=ca-key.pem"]
                words += ["--template=server.info", "--outfile=server-cert.pem"]
                subprocess.run(words, cwd=pki, check=True, capture_output=True)
                assert (pki / "before.pem").read_text() != (pki / "server-cert.pem").read_text()
            served.restart()
        for turn in range(4):
            said = client.run(f"read -P {turn + 1} {turn * 65536} 64k")
            assert "read 65536/65536" in said
            assert "Pattern verification failed" not in said
    finally:
        stop.set()
        knocking.join()
        client.close()
    assert refused == []
    if way == "psk":
        assert nbdinfo(served.uri) == SIZE
        served.restart("clients=guest1,guest2")
        assert nbdinfo(served.uri.replace("guest1", "guest2")) == SIZE


class TestStrangers:
    def test_a_few_at_a_time(self, serve: Serve, keys: Path) -> None:
        """Those who say nothing make room for who has a key; what they cost is bounded."""
        served = serve(f"tls=psk:{keys}", "handshake_limit=4")
        with ExitStack() as stack:
            crowd = [stack.enter_context(served.connect()) for _ in range(200)]
            wait_until(lambda: served.health()["handshakes"] == 4)
            greeted = 0
            for stranger in crowd:
                # In the end each is cut off: greeted in its turn, or turned away before.
                with suppress(ConnectionResetError):
                    greeted += stranger.recv(1) != b""
            assert 4 <= greeted < 200
            wait_until(lambda: "clients are turned away" not in str(served.health()["causes"]))
        assert nbdinfo(served.uri) == SIZE
        wait_until(lambda: served.health()["handshakes"] == 0)
        assert len((served.rundir / "log").read_text().splitlines()) < 50

    def test_one_too_many_is_told_nothing(self, serve: Serve, keys: Path) -> None:
        served = serve(f"tls=psk:{keys}", "handshake_limit=1")
        # One that goes on to speak is not cut off in a hurry: it sends an option again and again.
        with served.connect() as first, served.connect() as second:
            assert first.recv(18)[:8] == b"NBDMAGIC"
            second.settimeout(60 * PATIENCE)
            began = time.monotonic()
            with suppress(ConnectionResetError):
                said = second.recv(1)
                # It had its turn when the first was cut off, or was turned away.
                assert said in (b"", b"N")
            assert time.monotonic() - began < admission.TURN + 10 * PATIENCE

    def test_slow_handshakes_end(self, serve: Serve, keys: Path) -> None:
        served = serve(f"tls=psk:{keys}", "handshake_limit=1")
        with served.connect() as slow, served.connect() as waits:
            assert slow.recv(18)[:8] == b"NBDMAGIC"
            end = time.monotonic() + 60 * PATIENCE
            with suppress(BrokenPipeError, ConnectionResetError):
                while time.monotonic() < end:
                    slow.send(b"\0")  # one byte of the flags, and so on
                    time.sleep(0.3)
                pytest.fail("a client that speaks slowly holds its place for ever")
            assert waits.recv(1) == b"N"

    def test_idle_clients_leave(self, serve: Serve, keys: Path) -> None:
        served = serve(f"tls=psk:{keys}", "client_idle=10")
        code = (
            "import nbd, sys, time\n"
            "h = nbd.NBD(); h.set_uri_allow_local_file(True); h.connect_uri(sys.argv[1])\n"
            "print(h.get_size(), flush=True)\n"
            "busy = nbd.NBD(); busy.set_uri_allow_local_file(True); busy.connect_uri(sys.argv[1])\n"
            "end = time.monotonic() + 100\n"
            "gone = lambda: h.aio_is_dead() or h.aio_is_closed()\n"
            "while time.monotonic() < end and not gone():\n"
            "    busy.pread(512, 0)\n"
            "    try: h.poll(100)\n"
            "    except nbd.Error: pass\n"
            "print(gone(), busy.aio_is_ready(), flush=True)\n"
        )
        done = subprocess.run(
            ["/usr/bin/python3", "-c", code, served.uri],
            capture_output=True,
            text=True,
            timeout=150 * PATIENCE,
        )
        if "No module named 'nbd'" in done.stderr:
            pytest.skip("libnbd's Python module is not installed: python3-libnbd")
        assert done.stdout.splitlines() == [SIZE, "True True"], done.stderr
        wait_until(lambda: "zramd: 1 idle client was cut off, as client_idle has it" in served.log())
        served.set("client_idle", "0")


class TestRefusals:
    def refused(self, tmp_path: Path, *words: str, after: tuple[str, ...] = ()) -> str:
        rest = ["--", *after] if after else []
        done = zramd_command("start", NAME, "--size", "16M", f"rundir={tmp_path}/run", *words, *rest)
        assert done.returncode in (1, 2)
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return done.stderr.removeprefix("zramd: ").rstrip()

    def test_a_port_in_use(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            for listen in (f"127.0.0.1:{port}", f"*:{port}"):
                assert self.refused(tmp_path, f"listen={listen}", "tls=off") == (
                    f"listen={listen}: port {port} is in use by another program: "
                    "use another port, or stop that"
                )

    def test_an_address_of_another_machine(self, tmp_path: Path) -> None:
        assert self.refused(tmp_path, "listen=192.0.2.1:10809", "tls=off") == (
            "listen=192.0.2.1:10809: '192.0.2.1' is not an address of this machine: use one that "
            "'ip address' shows, or :PORT for all"
        )

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "[fe80::1%nowhere]"])
    def test_a_host_that_nobody_knows(self, tmp_path: Path, host: str) -> None:
        said = self.refused(tmp_path, f"listen={host}:10809", "tls=off")
        assert said.startswith(
            f"listen={host}:10809: '{host.strip('[]')}' is no host that this machine knows ("
        )

    @pytest.mark.parametrize("option", ["-p", "--port", "-U", "-i"])
    def test_another_transport(self, tmp_path: Path, option: str) -> None:
        said = self.refused(tmp_path, "listen=127.0.0.1:10809", after=(option, "1"))
        assert said == (
            f"nbdkit's option {option} and listen=127.0.0.1:10809 both say how clients come: leave one out"
        )

    def test_tls_twice(self, tmp_path: Path) -> None:
        said = self.refused(tmp_path, "listen=127.0.0.1:10809", after=("--tls=require",))
        assert said == (
            "nbdkit's option --tls and listen=127.0.0.1:10809 both say how clients come: leave one out"
        )

    def test_sockets_were_passed(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as passed:
            code = (
                f"import os; os.dup2({passed.fileno()}, 3); os.environ.update(LISTEN_FDS='1',"
                "LISTEN_PID=str(os.getpid()));"
                f"os.execv({sys.executable!r}, [{sys.executable!r}, '-P', '-m', 'zramd', 'serve', "
                f"'rundir={tmp_path}/run', 'listen=127.0.0.1:10809'])"
            )
            done = subprocess.run(
                [sys.executable, "-c", code],
                pass_fds=[passed.fileno()],
                capture_output=True,
                text=True,
                timeout=60 * PATIENCE,
            )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "zramd: listen=127.0.0.1:10809, but sockets were passed on which to listen (LISTEN_FDS): "
            "leave one out\n"
        )

    def test_nbdkit_by_hand(self, tmp_path: Path) -> None:
        """It would serve otherwise than the settings say."""
        words = ["nbdkit", "-f", "-U", f"{tmp_path}/s", "python", str(PLUGIN), "disksize=1M"]
        words += [f"rundir={tmp_path}/run", "listen=127.0.0.1:10809"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60 * PATIENCE)
        assert done.returncode == 1
        said = "listen=127.0.0.1:10809 is for 'zramd serve' and 'zramd start', which give nbdkit the options"
        assert said in done.stderr
