"""Fixtures for all tests: a clean environment, and a real nbdkit that serves the plugin."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.backings import has_direct_io
from support.run import SEED, wait_until
from support.server import PACKAGE_PARENT, NbdkitProcess
from support.steps import Steps

# What the tests start is to be interrupted, also where nohup or a script's & has signals ignored: children
# inherit that.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_report_header() -> str:
    try:
        import nbd  # noqa: F401

        libnbd = "yes"
    except ImportError:
        libnbd = "no"
    tools = {name: "yes" if shutil.which(name) else "no" for name in ("nbdkit", "fio", "qemu-io", "nbdcopy")}
    tools |= {"libnbd": libnbd, "root": "yes" if os.geteuid() == 0 else "no"}
    found = ", ".join(f"{name} {there}" for name, there in tools.items())
    return f"zramd: {PACKAGE_PARENT}; {found}; ZRAMD_SEED={SEED}"


@pytest.fixture(autouse=True)
def clean_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("ZRAMD_", "LISTEN_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What a command that runs in this process has signals do, they do only in that test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """A test that makes random choices tells the seed when it fails."""
    if hasattr(request.module, "SEED"):
        print(f"ZRAMD_SEED={SEED}")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., NbdkitProcess]]:
    """Start nbdkit: `serve(*nbdkit_options, **settings)`; the test's end ends it."""
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed")
    running: list[NbdkitProcess] = []

    def start(*options: str, wait: bool = True, **settings: object) -> NbdkitProcess:
        folder = tmp_path / f"server{len(running)}"
        folder.mkdir(mode=0o700)
        served = NbdkitProcess(folder, options, settings)
        running.append(served)
        if wait:
            wait_until(served.is_ready)
        return served

    yield start
    for served in running:
        served.end()


@pytest.fixture(scope="session")
def malloc_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload: see support/shim_malloc.c."""
    made = tmp_path_factory.mktemp("shim") / "malloc.so"
    source = Path(__file__).parent / "support" / "shim_malloc.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", made, source], check=True)
    return made


@pytest.fixture(scope="session")
def ublk_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload: see support/shim_ublk.c."""
    made = tmp_path_factory.mktemp("shim") / "ublk.so"
    source = Path(__file__).parent / "support" / "shim_ublk.c"
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", made, source], check=True)
    return made


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    """Who has `steps.env` in its environment can be held at its steps."""
    made = Steps(tmp_path / "steps.sock")
    yield made
    made.close()


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """An empty folder on a tmpfs, for state files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="zramd-test-") as name:
        yield Path(name)


@pytest.fixture
def disk_folder() -> Iterator[Path]:
    """An empty folder of ours on a file system with direct I/O, for backings."""
    for place in (None, "/var/tmp"):
        with tempfile.TemporaryDirectory(dir=place, prefix="zramd-test-") as name:
            if has_direct_io(Path(name)):
                yield Path(name)
                return
    pytest.skip("neither the folder for temporary files nor /var/tmp has direct I/O")


@pytest.fixture
def loop_device(disk_folder: Path) -> Iterator[str]:
    """A blank block device of 16 MiB: a file as /dev/loopN."""
    if os.geteuid():
        pytest.skip("only root can make a loop device")
    file = disk_folder / "loop"
    subprocess.run(["fallocate", "--length", "16M", file], check=True)
    done = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"there are no loop devices: {done.stderr.strip()}")
    yield done.stdout.strip()
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)
