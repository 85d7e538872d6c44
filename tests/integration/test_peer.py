"""Whom a command sends a signal, and whom it believes: who serves, by the kernel's word, not by a file's."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.run import wait_until, zramd_command
from support.server import PACKAGE_PARENT, NbdkitProcess

from zramd import trusted
from zramd.contract import exchange
from zramd.control import peer
from zramd.errors import DeviceError

NOBODY = 65534
HIM = trusted.user(NOBODY)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with zramd."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        assert process.poll() is None, "it was sent a signal"
        process.kill()


@pytest.fixture
def his() -> Iterator[Path]:
    """A folder of another user's, which root is asked to use."""
    folder = Path(tempfile.mkdtemp(prefix="zramd-his-"))
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def held(folder: Path, number: int) -> Iterator[None]:
    """A pid file with this number, locked as a server has it."""
    fd = os.open(folder / "pid", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, b"%d\n" % number)
    # By another process: one that has it open is this test itself.
    code = "import fcntl, time; fcntl.flock(0, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    locker = subprocess.Popen([sys.executable, "-c", code], stdin=fd, stdout=subprocess.PIPE)
    os.close(fd)
    assert locker.stdout is not None
    locker.stdout.readline()
    try:
        yield
    finally:
        locker.kill()
        locker.communicate()


def refused(*words: str | Path) -> str:
    done = zramd_command(*words)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("zramd: ")
    assert done.stderr.count("\n") == 1
    return done.stderr[len("zramd: ") : -1]


@pytest.mark.parametrize("verb", ["stop", "restart"])
def test_a_number_that_is_somebody_elses(his: Path, victim: subprocess.Popen[bytes], verb: str) -> None:
    with held(his, victim.pid):
        sentence = refused(verb, "--rundir", his)
    assert sentence.startswith(
        (f"{his.name}: no process of this PID namespace is found", f"{his.name} does not")
    )


@needs_root
@pytest.mark.parametrize("verb", ["stop", "restart"])
def test_a_socket_that_leads_to_another_server(
    his: Path, serve: Callable[..., NbdkitProcess], verb: str, memory_folder: Path
) -> None:
    """root's own server, or any daemon of root's: he asks root to stop it by a name of his."""
    served = serve(state=memory_folder / "state")
    (his / "control.sock").symlink_to(served.rundir / "control.sock")
    (his / "pid").symlink_to(served.rundir / "pid")
    assert refused(verb, "--rundir", his).startswith("no server has used")
    (his / "pid").unlink()
    with held(his, served.process.pid):
        sentence = refused(verb, "--rundir", his)
    assert "belongs to" in sentence
    assert served.process.poll() is None


@needs_root
def test_a_link_to_another_device(his: Path, serve: Callable[..., NbdkitProcess]) -> None:
    served = serve()
    (his / "mine").symlink_to(served.rundir)
    os.chown(his / "mine", NOBODY, NOBODY, follow_symlinks=False)
    assert refused("stop", "--rundir", his / "mine") == (
        f"'{his}/mine' is not used: '{his}/mine' is a link that {HIM} has made"
    )
    assert served.process.poll() is None
    (his / "ours").symlink_to(served.rundir)  # a link of root's own is as good as the name
    assert zramd_command("stop", "--rundir", his / "ours").returncode == 0


@needs_root
@pytest.mark.parametrize("kind", ["fifo", "socket", "folder"])
def test_something_else_in_place_of_the_pid_file(his: Path, kind: str) -> None:
    """It is not waited for."""
    if kind == "fifo":
        os.mkfifo(his / "pid")
    elif kind == "folder":
        (his / "pid").mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(his / "pid"))
    assert refused("stop", "--rundir", his)
    with pytest.raises(DeviceError):
        peer.find("x", str(his))


@contextmanager
def users_server(folder: Path, **environment: str) -> Iterator[Path]:
    """A server that another user runs; yields its run folder."""
    readable = Path(tempfile.mkdtemp(prefix="zramd-package-"))
    readable.chmod(0o755)
    shutil.copytree(PACKAGE_PARENT / "zramd", readable / "zramd")
    shutil.copy(PACKAGE_PARENT / "nbdkit_plugin.py", readable)
    state = f"/dev/shm/zramd-test-{os.getpid()}.state"
    run = folder / "run"
    words = ["nbdkit", "-f", "-U", run / "nbd.sock", "python", readable / "nbdkit_plugin.py", "disksize=64M"]
    with subprocess.Popen(
        [*AS_NOBODY, *words, f"rundir={run}", f"state={state}", "name=his"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(readable), "ZRAMD_BACKGROUND": "1", **environment},
    ) as process:
        try:
            wait_until(lambda: (run / "control.sock").exists())
            yield run
        finally:
            process.kill()
    shutil.rmtree(readable)
    Path(state).unlink(missing_ok=True)


@needs_root
def test_root_and_the_server_of_another_user(his: Path) -> None:
    """root sees and stops it; what that user has it run, root does not run, nor swap to."""
    with users_server(his) as run:
        assert zramd_command("list", "--rundir", run, "-n", "-o", "NAME").stdout == "his\n"
        process = peer.find("his", str(run))
        assert process.uid == NOBODY
        process.close()
        sentence = refused("restart", "--rundir", run)
        assert sentence == (
            f"the server of run belongs to {HIM}, who decides what it runs: do this as that user"
        )
        sentence = refused("attach", "his", "--rundir", run, "--swap")
        assert f"belongs to {HIM}, who could read and change what is swapped out" in sentence
        assert zramd_command("stop", "--rundir", run).returncode == 0
        assert not (run / "pid").exists()


def test_a_server_in_another_pid_namespace(tmp_path: Path, victim: subprocess.Popen[bytes]) -> None:
    """What it calls its own number is another process's here."""
    run = tmp_path / "run"
    script = (
        f"echo {victim.pid - 1} > /proc/sys/kernel/ns_last_pid; "
        f'"$@" serve --name ns --size 64M rundir={run} & wait'
    )
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", script, "bash"]
    with subprocess.Popen(
        [*words, sys.executable, "-P", "-m", "zramd"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as container:
        try:
            wait_until(lambda: (run / "control.sock").exists() or container.poll() is not None)
            if container.poll() is not None:
                pytest.skip("PID namespaces cannot be made here")
            assert (run / "pid").read_text() == f"{victim.pid}\n"
            for verb in ("stop", "restart"):
                sentence = refused(verb, "--rundir", run)
                assert "run is served in another PID namespace" in sentence or "has no state" in sentence
            assert exchange.ask(str(run), "GET", "/health")[0] == 200
        finally:
            container.kill()


@pytest.mark.parametrize("endpoint", ["on", "off"])
def test_who_serves(serve: Callable[..., NbdkitProcess], endpoint: str) -> None:
    served = serve(endpoint=endpoint, wait=False)
    wait_until(lambda: (served.rundir / ("control.sock" if endpoint == "on" else "mm_stat")).exists())
    process = peer.find("zram0", str(served.rundir))
    assert (process.pid, process.uid) == (served.process.pid, os.geteuid())
    assert not process.ended(0)
    process.signal(signal.SIGTERM)
    assert process.ended(10)
    process.signal(signal.SIGTERM)  # nobody gets it
    process.close()
    with pytest.raises(DeviceError):
        peer.find("zram0", str(served.rundir))


def test_a_server_that_hangs(serve: Callable[..., NbdkitProcess]) -> None:
    served = serve()
    served.process.send_signal(signal.SIGSTOP)
    try:
        process = peer.find("zram0", str(served.rundir))
        assert process.pid == served.process.pid
        process.close()
    finally:
        served.process.send_signal(signal.SIGCONT)


def test_on_an_older_kernel(serve: Callable[..., NbdkitProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SO_PEERPIDFD the number is taken if that process has the pid file open."""
    served = serve()
    monkeypatch.setattr(peer, "_SO_PEERPIDFD", 9999)
    process = peer.find("zram0", str(served.rundir))
    assert process.pid == served.process.pid
    process.close()
    # One that has ended since, and left its number to another: that has no such file.
    (served.rundir / "pid").rename(served.rundir / "away")
    (served.rundir / "pid").write_text(f"{served.process.pid}\n")
    with pytest.raises(DeviceError, match="no process of this PID namespace is found"):
        peer.find("zram0", str(served.rundir))
    (served.rundir / "away").rename(served.rundir / "pid")


def test_no_descriptor_is_left_open(serve: Callable[..., NbdkitProcess]) -> None:
    served = serve()
    before = os.listdir("/proc/self/fd")
    peer.find("zram0", str(served.rundir)).close()
    with pytest.raises(DeviceError):
        peer.find("x", "/nowhere")
    assert os.listdir("/proc/self/fd") == before
