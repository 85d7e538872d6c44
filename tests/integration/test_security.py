"""What docs/security.md claims and no other test shows: who can reach a device, and what is left of it."""

import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.content import noise
from support.run import wait_until
from support.server import NbdkitProcess

NOBODY = 65534
Serve = Callable[..., NbdkitProcess]


def as_nobody(code: str) -> str:
    """Run Python code as another user, return what it prints."""
    words = [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "/usr/bin/python3",
        "-c",
        code,
    ]
    return subprocess.run(words, capture_output=True, text=True, cwd="/").stdout.strip()


def test_what_is_made_only_its_owner_may_read(serve: Serve, memory_folder: Path) -> None:
    """Whatever the umask."""
    umask = os.umask(0)
    try:
        served = serve(state=memory_folder / "state")
    finally:
        os.umask(umask)
    wait_until(lambda: (served.rundir / "metrics.prom").exists())
    assert stat.S_IMODE(served.rundir.stat().st_mode) == 0o700
    for path in [*served.rundir.iterdir(), memory_folder / "state"]:
        if not stat.S_ISSOCK(path.stat().st_mode):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("open_folder", [False, True])
def test_another_user_reaches_nothing(serve: Serve, open_folder: bool) -> None:
    folder = Path(tempfile.mkdtemp(prefix="zramd-open-"))
    try:
        folder.chmod(0o755)  # all but the run folder is open to him
        if open_folder:
            (folder / "run").mkdir()
            (folder / "run").chmod(0o755)
        served = serve(rundir=folder / "run")
        for name in ("nbd.sock", "control.sock"):
            code = f"import socket\ntry: socket.socket(socket.AF_UNIX).connect('{served.rundir}/{name}')\n"
            assert as_nobody(code + "except OSError as error: print(error.strerror)") == "Permission denied"
        pid = served.process.pid
        code = f"try: open('/proc/{pid}/mem').read(1)\nexcept OSError as error: print(error.strerror)"
        assert as_nobody(code) == "Permission denied"
        code = f"import os\ntry: os.kill({pid}, 9)\nexcept OSError as error: print(error.strerror)"
        assert as_nobody(code) == "Operation not permitted"
        served.end()
    finally:
        shutil.rmtree(folder)


def test_a_client_reads_only_what_was_written_to_the_device(serve: Serve) -> None:
    """Not what was stored in the same memory before."""
    served = serve(disksize="1M")
    client = NbdSocket(served)
    for block in range(256):
        assert client.ask(client.WRITE, block * 4096, 4096, noise(block)) == 0
    assert client.ask(client.TRIM, 0, 1 << 20) == 0
    assert client.read(0, 1 << 20) == bytes(1 << 20)
    assert client.ask(client.WRITE, 5000, 1, b"x") == 0
    assert client.read(4096, 4096) == bytes(904) + b"x" + bytes(3191)
    client.close()


@pytest.mark.skipif(shutil.which("nbdinfo") is None, reason="speaks TLS by nbdinfo")
def test_who_has_no_key_is_refused(serve: Serve, tmp_path: Path) -> None:
    keys, others = tmp_path / "keys.psk", tmp_path / "others.psk"
    keys.write_text(f"alice:{os.urandom(32).hex()}\n")
    others.write_text(f"alice:{os.urandom(32).hex()}\n")
    served = serve("--tls=require", f"--tls-psk={keys}", disksize="1M")

    def size(scheme: str, more: str) -> tuple[int, str]:
        where = (
            f"{scheme}+unix://{more.partition(' ')[0]}/zram0?socket={served.socket}{more.partition(' ')[2]}"
        )
        done = subprocess.run(["nbdinfo", "--size", where], capture_output=True, text=True, timeout=30)
        return done.returncode, done.stdout.strip()

    assert size("nbds", f"alice@ &tls-psk-file={keys}") == (0, "1048576")
    for scheme, more in (
        ("nbd", " "),
        ("nbds", f"alice@ &tls-psk-file={others}"),
        ("nbds", f"mallory@ &tls-psk-file={keys}"),
    ):
        status, said = size(scheme, more)
        assert status != 0
        assert said == ""


def test_clients_do_not_come_to_what_the_owner_may_do(serve: Serve) -> None:
    """The NBD socket takes no word of the control socket's, and that knows no path but its own."""
    served = serve()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(served.socket))
        client.sendall(b"POST /reset HTTP/1.1\r\n\r\n")
        answer = b""
        with suppress(ConnectionResetError):
            while data := client.recv(4096):
                answer += data
    assert answer.startswith(b"NBDMAGIC")
    assert b"HTTP" not in answer
    for path in ("/../../etc/passwd", "/etc/passwd", "//etc/passwd", "/stats/../../x"):
        assert served.request("GET", path)[0] == 404


def test_silent_clients_hold_nobody_up(serve: Serve) -> None:
    """Who connects and says nothing holds no lock: the others are served."""
    served = serve()
    silent = []
    for _ in range(50):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(served.socket))
        silent.append(sock)
    client = NbdSocket(served)
    assert client.ask(client.WRITE, 0, 4096, noise(1)) == 0
    assert client.read(0, 4096) == noise(1)
    client.close()
    for sock in silent:
        sock.close()
