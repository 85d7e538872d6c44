"""Shortages as a machine has them: a full tmpfs, limits of a process and of a cgroup.

Whatever is short: what was answered reads back, a client that is served stays so, and when the shortage ends
so does the trouble: /health, stats files, restart, stop, and a new server for the state.

overcommit_memory=2 is not set here, as it is the whole machine's: RLIMIT_AS refuses the same calls.
"""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from phases import _save
from world import BLOCK, World, ensure, eventually

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, limits and cgroups want root")
FULL = (errno.ENOSPC, errno.ENOMEM, errno.EIO)
MAX_BLOCKS = 3900  # of those that these tests fill; what checks itself writes above


@pytest.fixture
def tmpfs() -> Iterator[Callable[[str], Path]]:
    """Make a tmpfs of a size, with a path that leaves room for a socket's."""
    mounted: list[str] = []

    def make(size: str) -> Path:
        folder = tempfile.mkdtemp(prefix="zramd-")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", folder], check=True)
        mounted.append(folder)
        return Path(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)
        os.rmdir(folder)


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    """Make worlds, and remove them."""
    made: list[World] = []

    def make(with_state: bool, *settings: str, inside: Path = Path("/dev/shm"), start: bool = True) -> World:
        made.append(World(with_state, *settings, inside=inside))
        if start:
            ended = made[-1].start()
            assert ended.status == 0, ended
            made[-1].note_process()
        return made[-1]

    yield make
    for one in made:
        one.close()


def fill(world: World, first: int = 0, count: int = MAX_BLOCKS) -> int:
    """Write until the server refuses; return how many writes it took."""
    client = world.stand()
    taken = 0
    for block in range(first, first + count):
        error = world.write(client, block)
        if error:
            assert error in FULL, error
            break
        taken += 1
    return taken


def leave(folder: Path, pages: int) -> Path:
    """Fill a file system but for some pages; return the file that does it."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        while True:
            free = os.statvfs(folder).f_bavail - pages
            try:
                if free > 0:
                    os.posix_fallocate(file.fileno(), 0, free * os.statvfs(folder).f_bsize)
                return ballast
            except OSError as error:  # the server has taken some meanwhile
                if error.errno != errno.ENOSPC:
                    raise


def sound(world: World) -> None:
    """All is as before: the process, its threads, its clients, restart, stop, the state."""
    world.check_serving(world.pid, True)
    if world.state:
        world.check_restart()
        world.check_serving(world.pid, True)
    world.check_stop()


def refused(world: World, *words: str) -> str:
    """A start that fails: one sentence, nothing left; return the sentence."""
    ended = world.start()
    assert ended.status == 1, ended
    assert ended.err.startswith("zramd: "), ended
    assert ended.err.count("\n") == 1, ended
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err.lower(), ended.err
    eventually(lambda: not world.alive(), "a server is left")
    assert not world.rundir.exists() or not list(world.rundir.iterdir()), list(world.rundir.iterdir())
    return ended.err


@pytest.mark.parametrize("pages", [0, 1, 7, 40])
def test_a_full_tmpfs_for_the_state(
    tmpfs: Callable[[str], Path], world: Callable[..., World], pages: int
) -> None:
    folder = tmpfs("96M")
    it = world(True, inside=folder)
    fill(it, 0, 600)
    client = it.stand()
    for block in range(0, 600, 3):
        assert it.discard(client, client.TRIM, block) == 0
    ballast = leave(folder, pages)
    fill(it, 600)
    for block in range(0, 600, 5):
        assert it.write(client, block) in (0, *FULL)
    for block in range(1, 600, 7):
        assert it.discard(client, client.WRITE_ZEROES, block) in (0, *FULL)
    it.ask("POST", "/compact", patience=30)
    ensure(fill(it, 700) < MAX_BLOCKS, "a full file system is never full")
    it.verify(client.read)
    # The run folder is on it, too: that is said, and nothing else is wrong.
    status, text = it.ask("GET", "/health")
    assert status == 200
    assert '"ok"' in text or "no space left on device" in text, text
    ballast.unlink()
    assert fill(it, 600, 200) == 200
    sound(it)


def test_a_load_into_a_full_tmpfs(tmpfs: Callable[[str], Path], world: Callable[..., World]) -> None:
    source = world(False)
    fill(source, 0, 2000)
    stream = _save(source)
    folder = tmpfs("96M")
    it = world(True, inside=folder)
    ballast = leave(folder, 20)
    head = f"PUT /load HTTP/1.1\r\nContent-Length: {len(stream)}\r\n\r\n".encode()
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(20)
        control.connect(str(it.rundir / "control.sock"))
        with suppress(OSError):
            control.sendall(head + stream)
        answer = control.recv(1000).decode()
    assert " 200 " not in answer
    assert "full" in answer or "no space" in answer.lower(), answer
    ballast.unlink()
    assert it.ask("POST", "/reset")[0] == 200
    fill(it, 0, 100)
    sound(it)


def test_a_state_on_a_full_tmpfs_does_not_start(
    tmpfs: Callable[[str], Path], world: Callable[..., World]
) -> None:
    folder = tmpfs("16M")
    it = world(True, start=False)
    assert it.state
    it.settings = [word.replace(str(it.state), str(folder / "state")) for word in it.settings]
    it.state = folder / "state"
    ballast = leave(folder, 0)
    sentence = refused(it)
    assert "no space" in sentence.lower() or "full" in sentence, sentence
    ballast.unlink()
    assert it.start().status == 0
    fill(it, 0, 100)
    sound(it)


@pytest.mark.parametrize("with_state", [True, False])
def test_a_full_tmpfs_for_the_run_folder(
    tmpfs: Callable[[str], Path], world: Callable[..., World], with_state: bool
) -> None:
    folder = tmpfs("4M")
    it = world(with_state, start=False)
    it.settings = [word.replace(str(it.rundir), str(folder / "run")) for word in it.settings]
    it.rundir, it.socket = folder / "run", folder / "run" / "nbd.sock"
    ballast = leave(folder, 0)
    refused(it, "no space left on device")
    ballast.unlink()
    assert it.start().status == 0
    fill(it, 0, 100)
    ballast = leave(folder, 0)
    fill(it, 100, 100)
    it.drop()
    status, _ = it.ask("POST", "/reset")
    if status == 200:
        it.known = {block: bytes(BLOCK) for block in it.known}
    client = it.stand()
    it.verify(client.read)
    assert it.write(client, 5) == 0
    assert it.ask("GET", "/health")[0] == 200
    it.ask("POST", "/compact")
    ballast.unlink()
    sound(it)


def limit(world: World, which: int, soft: int) -> tuple[int, int]:
    """Lower a limit of the running server; return what it was."""
    before = resource.prlimit(world.pid, which)
    resource.prlimit(world.pid, which, (soft, before[1]))
    return before


@pytest.mark.parametrize("with_state", [True, False])
def test_no_descriptors(world: Callable[..., World], with_state: bool) -> None:
    it = world(with_state)
    fill(it, 0, 200)
    used = len(os.listdir(f"/proc/{it.pid}/fd"))
    before = limit(it, resource.RLIMIT_NOFILE, used + 12)
    idle = []
    for _ in range(60):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(1)
        with suppress(OSError):
            sock.connect(str(it.socket))
        idle.append(sock)
    client = it.stand()
    for block in range(200, 300):
        assert it.write(client, block) == 0
    for sock in idle:
        sock.close()
    resource.prlimit(it.pid, resource.RLIMIT_NOFILE, before)
    sound(it)


@pytest.mark.parametrize("room", [0, 1 << 14, 1 << 20])
@pytest.mark.parametrize("with_state", [True, False])
def test_no_address_space(world: Callable[..., World], with_state: bool, room: int) -> None:
    it = world(with_state)
    fill(it, 0, 200)
    size = int(Path(f"/proc/{it.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    before = limit(it, resource.RLIMIT_AS, size + room)
    for _ in range(3):
        with suppress(OSError):
            fill(it, 200, 300)
        with suppress(OSError, AssertionError):
            it.connect(1).close()
        it.ask("GET", "/stats", patience=2)
        it.ask("POST", "/compact", patience=2)
    resource.prlimit(it.pid, resource.RLIMIT_AS, before)
    it.drop()
    sound(it)


def test_a_start_without_address_space_says_so(world: Callable[..., World]) -> None:
    it = world(False, start=False)
    survived = 0
    for mebibytes in (300, 400, 600, 1200):  # nbdkit by itself takes more than 200
        it.prefix = ["prlimit", f"--as={mebibytes << 20}"]
        ended = it.start()
        if ended.status == 0:
            it.check_stop()
            survived += 1
            continue
        it.kill()
        refused(it, "ulimit -v")
    it.prefix = []
    assert it.start().status == 0
    sound(it)


def test_what_starts_in_an_address_space_can_be_taken_over_in_it(world: Callable[..., World]) -> None:
    it = world(True, start=False)
    for mebibytes in range(1400, 24000, 400):
        it.prefix = ["prlimit", f"--as={mebibytes << 20}"]
        if it.start().status == 0:
            break
    fill(it, 0, 2000)
    it.drop()
    it.kill()
    ended = it.start()
    assert ended.status == 0, ended
    it.verify(it.stand().read)
    it.prefix = []
    sound(it)


@pytest.mark.parametrize("with_state", [True, False])
def test_no_file_may_grow(world: Callable[..., World], with_state: bool) -> None:
    it = world(with_state)
    fill(it, 0, 100)
    before = limit(it, resource.RLIMIT_FSIZE, 0)
    fill(it, 100, 300)
    it.verify(it.stand().read)
    # The log cannot grow either.
    eventually(
        lambda: '"ok"' not in it.ask("GET", "/health")[1] and "file too large" in it.ask("GET", "/health")[1],
        "nothing tells why there are no stats files",
    )
    resource.prlimit(it.pid, resource.RLIMIT_FSIZE, before)
    sound(it)


def test_a_start_where_no_file_may_grow(world: Callable[..., World]) -> None:
    it = world(True, start=False)
    it.prefix = ["prlimit", "--fsize=0"]
    refused(it, "file too large")


def test_no_locked_memory(world: Callable[..., World]) -> None:
    it = world(False, "swap=local", start=False)
    ended = it.start()
    if ended.status:
        pytest.skip(f"swap=local cannot be had here: {ended.err}")
    it.check_stop()
    it.prefix = ["setpriv", "--bounding-set=-ipc_lock", "prlimit", "--memlock=65536"]
    refused(it, "cannot lock memory", "limitmemlock")


@contextmanager
def cgroup(controller: str, **limits: int) -> Iterator[Path]:
    """Make a cgroup with limits; skips the test where that cannot be."""
    second = Path("/sys/fs/cgroup/cgroup.controllers")
    if second.exists():
        if controller not in second.read_text().split():
            pytest.skip(f"this machine's cgroups have no {controller} controller")
        base, names = Path("/sys/fs/cgroup"), {"memory": "memory.max", "pids": "pids.max"}
        with suppress(OSError):
            (base / "cgroup.subtree_control").write_text(f"+{controller}")
    else:
        base = Path("/sys/fs/cgroup") / controller
        names = {"memory": "memory.limit_in_bytes", "pids": "pids.max"}
    folder = base / f"zramd-faults-{os.getpid()}"
    try:
        folder.mkdir()
        for name, value in limits.items():
            (folder / names[name]).write_text(str(value))
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no cgroup with a limit of {controller} can be made here: {error}")
    try:
        yield folder
    finally:
        eventually(lambda: folder.rmdir() is None, "the cgroup stays", 20)


def join(folder: Path, pid: int) -> None:
    """Put a process into a cgroup."""
    (folder / "cgroup.procs").write_text(str(pid))


def test_a_cgroup_without_processes(world: Callable[..., World]) -> None:
    it = world(True)
    fill(it, 0, 100)
    with cgroup("pids", pids=len(it.threads())) as folder:
        join(folder, it.pid)
        for _ in range(20):
            with suppress(OSError, AssertionError):
                it.connect(0.3).close()
        assert '"ok"' in it.ask("GET", "/health")[1]
        assert fill(it, 100, 200) == 200
        (folder / "pids.max").write_text("max")
        it.check_serving(it.pid, True)
        join(folder.parent, it.pid)
    sound(it)


def test_a_cgroup_with_little_memory(world: Callable[..., World]) -> None:
    """A server with a mem_limit below the cgroup's is refused nothing but writes."""
    it = world(True, "mem_limit=6M")
    with cgroup("memory", memory=64 << 20) as folder:
        join(folder, it.pid)
        assert fill(it) < MAX_BLOCKS
        it.verify(it.stand().read)
        assert '"ok"' in it.ask("GET", "/health")[1]
        join(folder.parent, it.pid)
    client = it.stand()
    for block in range(0, 500):
        assert it.discard(client, client.TRIM, block) == 0
    sound(it)


def test_a_cgroup_s_oom_kill_loses_no_answered_write(world: Callable[..., World]) -> None:
    it = world(True)
    before = it.pid
    with cgroup("memory", memory=9 << 20) as folder:
        join(folder, before)
        with suppress(OSError):
            fill(it)
        if it.pid == before:
            os.kill(before, signal.SIGKILL)  # it was swapped out instead
        eventually(lambda: not it.alive(), "the killed server stays")
        it.drop()
        ended = it.start()
        assert ended.status == 0, ended
        it.verify(it.stand().read)
        sound(it)
        it.known.clear()
        assert it.state
        it.state.unlink()


def test_no_processes_for_another_user(world: Callable[..., World]) -> None:
    """RLIMIT_NPROC does not hold for root: so the server is another user's."""
    user = 64321
    it = world(True, start=False)
    shutil.chown(it.folder, user, user)
    it.prefix = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    probe = subprocess.run(
        [*it.prefix, "python3", "-c", f"open({str(Path(__file__))!r})"], capture_output=True
    )
    if probe.returncode:
        pytest.skip("this checkout lies where another user cannot read it")
    ended = it.start()
    assert ended.status == 0, ended
    fill(it, 0, 100)
    before = limit(it, resource.RLIMIT_NPROC, 1)
    for _ in range(20):
        with suppress(OSError, AssertionError):
            it.connect(0.3).close()
    assert '"ok"' in it.ask("GET", "/health")[1]
    assert fill(it, 100, 200) == 200
    resource.prlimit(it.pid, resource.RLIMIT_NPROC, before)
    it.check_serving(it.pid, True)
    it.check_stop()
