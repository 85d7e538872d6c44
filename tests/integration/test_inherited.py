"""What a command was started with: closed standard descriptors, others' descriptors, variables for others."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.manager import ServiceManager
from support.run import talk, wait_until
from support.server import PACKAGE_PARENT

WORDS = [sys.executable, "-P", "-m", "zramd"]


@pytest.fixture
def rundir(tmp_path: Path) -> Iterator[Path]:
    """A run folder for one server; who serves there at the end is ended."""
    folder = tmp_path / "run"
    yield folder
    if (folder / "pid").exists():
        pid = int((folder / "pid").read_text())
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not (folder / "pid").exists())


def environment(**more: str) -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "PYTHONUNBUFFERED")
    }
    return {**kept, "PYTHONPATH": str(PACKAGE_PARENT), **more}


def shell(script: str, *words: str | Path, **more: str) -> tuple[int, str]:
    """Run a command as bash has it; return its status and what it said to standard error."""
    done = subprocess.run(
        ["bash", "-c", script, "bash", *WORDS, *words],
        env=environment(**more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done.returncode, done.stderr


def serves(rundir: Path) -> bool:
    try:
        return b'"status"' in talk(rundir / "control.sock", b"GET /health HTTP/1.1\r\n\r\n")
    except OSError:
        return False


def files_of(pid: int) -> list[str]:
    """What the descriptors of a process are, but for those that it closes meanwhile."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return found


def listens_on_the_network(pid: int) -> bool:
    """Whether a process has a socket that is no unix socket."""
    before = files_of(pid)
    unix = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    links = set(before) & set(files_of(pid))  # a client's may come or go meanwhile
    sockets = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    assert sockets
    return not sockets <= unix


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_start_with_closed_descriptors(rundir: Path, closed: str) -> None:
    status, said = shell(f'exec "$@" {closed}', "start", "c", f"rundir={rundir}", "--size", "64M")
    assert (status, said) == (0, "")
    assert serves(rundir)
    pid = (rundir / "pid").read_text().strip()
    # All three are there, in the direction that they are used in.
    flags = [int(Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split()[3], 8) & 3 for fd in range(3)]
    assert os.O_RDONLY in (flags[0], flags[0] ^ os.O_RDWR)
    assert all(flag != os.O_RDONLY for flag in flags[1:])


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["list", "config check", "doctor --help", "start nothing.at/all"])
def test_commands_with_closed_descriptors(words: str, closed: str) -> None:
    """The status is as it is else, and what is wrong is said in one sentence."""
    script = 'exec "$@" '
    there = shell(script + ">/dev/null", *words.split())
    assert shell(script + closed, *words.split()) == (there if "2>" not in closed else (there[0], ""))


@pytest.mark.parametrize("closed", ["", "<&- >&- 2>&-"])
def test_serve_with_closed_descriptors(rundir: Path, closed: str) -> None:
    words = ["serve", "--name", "c", f"rundir={rundir}", "--size", "64M"]
    script = f'exec "$@" {closed}'
    with subprocess.Popen(
        ["bash", "-c", script, "bash", *WORDS, *words], env=environment(), stdout=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(lambda: serves(rundir))
            for fd in range(3):
                assert os.path.exists(f"/proc/{process.pid}/fd/{fd}")
        finally:
            process.terminate()


def test_a_path_that_is_not_ascii_in_a_locale_that_is(rundir: Path) -> None:
    """As services have it, and what cron starts."""
    folder = rundir / "ä"
    rundir.mkdir()
    words = ["start", "c", f"rundir={folder}", f"state=/dev/shm/{os.getpid()}-ä", "--size", "64M"]
    try:
        assert shell('exec "$@"', *words, LC_ALL="C") == (0, "")
        assert serves(folder)
        assert shell('exec "$@"', "restart", "--rundir", folder, LC_ALL="C") == (0, "")
        assert shell('exec "$@"', "stop", "--rundir", folder, LC_ALL="C") == (0, "")
    finally:
        Path(words[3].removeprefix("state=")).unlink(missing_ok=True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_cannot_be_printed_is_said(rundir: Path, unbuffered: str) -> None:
    """The server is started all the same."""
    words = ["start", "c", f"rundir={rundir}", "--size", "64M"]
    status, said = shell('exec "$@" >/dev/full', *words, PYTHONUNBUFFERED=unbuffered)
    assert (status, said) == (
        1,
        "zramd: it is done, but cannot be printed to standard output: no space left on device\n",
    )
    assert serves(rundir)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "--version", "start --help", "doctor", "completion bash"])
def test_what_was_asked_for_cannot_be_printed(words: str, unbuffered: str) -> None:
    status, said = shell('exec "$@" >/dev/full', *words.split(), PYTHONUNBUFFERED=unbuffered)
    assert status == 1
    assert said.endswith("cannot be printed to standard output: no space left on device\n")
    assert said.count("\n") == 1
    script = 'exec 3> >(:); wait $!; exec "$@" >&3'  # who reads it has seen enough
    assert shell(script, *words.split(), PYTHONUNBUFFERED=unbuffered) == (1, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("script", ['exec "$@" 2>/dev/full', 'exec 3> >(:); wait $!; exec "$@" 2>&3'])
@pytest.mark.parametrize(("words", "status"), [("list", 0), ("nope", 2), ("list --nope", 2), ("stats a", 1)])
def test_what_cannot_be_said_changes_nothing(
    words: str, status: int, script: str, unbuffered: str, tmp_path: Path
) -> None:
    more = {"PYTHONUNBUFFERED": unbuffered, "XDG_RUNTIME_DIR": str(tmp_path)}
    assert shell(script, *words.split(), **more) == (status, "")


def test_a_save_is_done_though_its_summary_cannot_be_said(rundir: Path, tmp_path: Path) -> None:
    assert shell('exec "$@"', "start", "c", f"rundir={rundir}", "--size", "64M")[0] == 0
    assert shell('exec "$@" 2>/dev/full', "save", "--rundir", rundir, tmp_path / "saved") == (0, "")
    assert shell('exec "$@"', "load", "--check", tmp_path / "saved") == (0, "")


def test_a_save_to_what_is_closed(rundir: Path) -> None:
    assert shell('exec "$@"', "start", "c", f"rundir={rundir}", "--size", "64M")[0] == 0
    status, said = shell('exec "$@" >&-', "save", "--rundir", rundir, "-")
    assert (status, said) == (2, "zramd: standard output is closed: a device cannot be saved to it\n")
    sentence = "zramd: standard input is closed: give a FILE, or something to read\n"
    assert shell('exec "$@" <&-', "load", "--check", "-") == (2, sentence)
    assert shell('exec "$@" <&-', "load", "--rundir", rundir, "-") == (2, sentence)


@pytest.mark.parametrize(
    "words", ["stats --rundir x", "list --rundir x", "start c rundir=x", "start c state=x", "serve rundir=x"]
)
def test_in_a_folder_that_is_gone(words: str, tmp_path: Path) -> None:
    """What is relative to it has no place."""
    status, said = shell(
        f'mkdir {tmp_path}/x; cd {tmp_path}/x; rmdir {tmp_path}/x; exec "$@"', *words.split()
    )
    assert status == 1
    assert said.endswith("zramd: the folder in which this runs is gone: change to another one\n")


@pytest.mark.parametrize("verb", ["start", "serve"])
def test_a_server_keeps_no_descriptor_of_others(rundir: Path, tmp_path: Path, verb: str) -> None:
    """A script's lock is free when the script has ended, and what a pipe leads to sees its end."""
    lock = tmp_path / "lock"
    name = ["c"] if verb == "start" else ["--name", "c"]
    script = f'exec 9>{lock} 77<&9; flock 9; "$@" & pid=$!; [ {verb} = serve ] || wait $pid'
    words = [*WORDS, verb, *name, f"rundir={rundir}", "--size", "64M"]
    subprocess.run(["bash", "-c", script, "bash", *words], env=environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: serves(rundir))
    with lock.open() as file:
        # The small process that prints the greeting ends as soon as the server answers.
        wait_until(lambda: _is_free(file.fileno()))
    assert not [link for link in files_of(int((rundir / "pid").read_text())) if "lock" in link]


def _is_free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def test_a_descriptor_that_nbdkit_is_told_of_stays(rundir: Path, tmp_path: Path) -> None:
    """As the shell's <(…) has it: here a filter's parameter."""
    script = f'exec "$@" rundir={rundir} --size 64M -- --filter=log logfile=/dev/fd/8 8>x'
    words = ["serve", "--name", "c"]
    with subprocess.Popen(
        ["bash", "-c", script, "bash", *WORDS, *words],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: serves(rundir))
            assert os.readlink(f"/proc/{process.pid}/fd/8") == str(tmp_path / "x")
        finally:
            process.terminate()


def test_a_server_in_the_background_keeps_no_folder_busy(rundir: Path, tmp_path: Path) -> None:
    words = ["start", "c", "rundir=run", "--size", "64M"]
    assert shell(f'cd {tmp_path}; exec "$@"', *words)[0] == 0
    pid = (rundir / "pid").read_text().strip()
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


def test_paths_of_nbdkits_are_relative_to_where_the_user_is(rundir: Path, tmp_path: Path) -> None:
    words = ["start", "c", "rundir=run", "--size", "64M", "--", "--filter=log", "logfile=requests"]
    assert shell(f'cd {tmp_path}; exec "$@"', *words)[0] == 0
    assert (tmp_path / "requests").exists()
    pid = (rundir / "pid").read_text().strip()
    assert os.readlink(f"/proc/{pid}/cwd") == str(tmp_path)


@pytest.mark.parametrize("verb", ["start", "serve"])
@pytest.mark.parametrize(
    "left",
    [
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "0", "LISTEN_PID": "self"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "zramd-state"},
        {"ZRAMD_TAKES_OVER": "0", "ZRAMD_RUNDIR_MADE": "no", "ZRAMD_STATE_FD": "0", "ZRAMD_BACKGROUND": "no"},
        {"PYTHONHOME": "/nowhere", "PYTHONWARNINGS": "error", "PYTHONTRACEMALLOC": "5", "PYTHONINSPECT": "1"},
    ],
)
def test_variables_that_were_meant_for_others(rundir: Path, verb: str, left: dict[str, str]) -> None:
    """It listens where it always does, and nowhere else."""
    name = ["c"] if verb == "start" else ["--name", "c"]
    words = [*WORDS, verb, *name, f"rundir={rundir}", "--size", "64M"]
    env = environment(**left)
    if "PYTHONHOME" in left:  # for nbdkit's Python: ours would not start
        env = environment()
        code = f"import os, sys; os.environ.update({left}); from zramd.commands import main; sys.exit(main())"
        words = [sys.executable, "-c", code, *words[len(WORDS) :]]
    elif left.get("LISTEN_PID") == "self":
        words = ["bash", "-c", 'export LISTEN_PID=$$; exec "$@"', "bash", *words]
    with subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: serves(rundir))
            pid = int((rundir / "pid").read_text())
            assert pid == process.pid or verb == "start"
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(rundir / "nbd.sock"))
                assert client.recv(8) == b"NBDMAGIC"
            assert not listens_on_the_network(pid)
            known = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            assert not {f"{name}={value}" for name, value in left.items()} & set(known)
        finally:
            if verb == "serve":
                process.terminate()


@pytest.mark.parametrize("count", ["x", "-1", "99999999999", "\u00b2", " 1"])
def test_a_number_of_sockets_that_is_none(rundir: Path, count: str) -> None:
    script = 'export LISTEN_PID=$$; exec "$@"'
    status, said = shell(script, "serve", f"rundir={rundir}", LISTEN_FDS=count)
    sentence = f"LISTEN_FDS='{count}' is not a number of sockets: unset LISTEN_FDS and LISTEN_PID"
    assert (status, said) == (2, f"zramd: {sentence}\n")


@pytest.mark.parametrize("what", ["closed", "file", "connected", "datagram"])
def test_what_was_passed_but_does_not_listen(rundir: Path, tmp_path: Path, what: str) -> None:
    """nbdkit would believe it, and end, or listen on a TCP port."""
    made: list[int] = []
    if what == "file":
        made.append(os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT))
    elif what != "closed":
        kind = socket.SOCK_STREAM if what == "connected" else socket.SOCK_DGRAM
        made += [sock.detach() for sock in socket.socketpair(socket.AF_UNIX, kind)]
    redirect = f"3<&{made[0]}" if made else "3<&-"
    script = f'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" {redirect}'
    words = [
        "bash",
        "-c",
        script,
        "bash",
        *WORDS,
        "serve",
        "--name",
        "c",
        f"rundir={rundir}",
        "--size",
        "64M",
    ]
    done = subprocess.run(words, env=environment(), pass_fds=made, capture_output=True, text=True, timeout=20)
    for fd in made:
        os.close(fd)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "zramd: LISTEN_FDS=1 says that descriptor 3 is a socket on which to listen, but it is not: "
        "unset LISTEN_FDS and LISTEN_PID, or pass it\n"
    )


def test_a_socket_that_was_passed(rundir: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "passed.sock"))
        listening.listen(4)
        script = f'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&{listening.fileno()}'
        words = ["serve", "--name", "c", f"rundir={rundir}", "--size", "64M"]
        with subprocess.Popen(
            ["bash", "-c", script, "bash", *WORDS, *words],
            env=environment(),
            pass_fds=[listening.fileno()],
            stdout=subprocess.DEVNULL,
        ) as process:
            try:
                wait_until(lambda: serves(rundir))
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(tmp_path / "passed.sock"))
                    assert client.recv(8) == b"NBDMAGIC"
                assert not (rundir / "nbd.sock").exists()
                assert not listens_on_the_network(process.pid)
            finally:
                process.terminate()


def test_a_server_in_the_background_tells_no_manager(rundir: Path, tmp_path: Path) -> None:
    """It would say that a service is ready which has only called `zramd start`."""
    manager = ServiceManager(tmp_path)
    words = ["start", "c", f"rundir={rundir}", "--size", "64M"]
    assert shell('exec "$@"', *words, NOTIFY_SOCKET=str(manager.path))[0] == 0
    manager.take()
    assert manager.said == []
    manager.close()
