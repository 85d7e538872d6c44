"""The scripts as a user runs them."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
BACKEND = SCRIPTS / "lib" / "backend"

pytestmark = pytest.mark.timeout(1000)  # the first may have to build, on a machine that has other work
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: runs as another user")


def run(*command, **kwargs):
    kwargs = {"capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL} | kwargs
    return subprocess.run([str(word) for word in command], **kwargs)


@pytest.fixture(scope="module", autouse=True)
def set_up():
    """The tests here are of what is already set up: setting up is what scripts/test has just done.

    Where the source has changed since, that takes minutes, and none of them is a test's.
    """
    if not (ROOT / ".venv/stamp.zramd").exists():
        pytest.skip("needs scripts/test or scripts/serve to have been run in this checkout")
    words = f"set -euo pipefail; source '{SCRIPTS}/lib/common.sh'; ensure_venv zramd"
    done = run("bash", "-c", words, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "script", ["serve", "test", "build", "sanitize", "check", "fresh", "geometry", "package", "pictures"]
)
def test_help(script):
    result = run(SCRIPTS / script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    assert f"scripts/{script}" in result.stdout
    assert not result.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["build"], "usage: "),
        (["build", "fast"], "unknown build profile 'fast'; valid are: release debug coverage asan tsan"),
        (["sanitize", "msan"], "unknown sanitizer 'msan'"),
        (["geometry", "--fast"], "'--fast' is no file that can be read"),
        (["geometry", "/tmp"], "'/tmp' is no file that can be read"),
        (["check", "everything"], "usage: "),
        (["fresh"], "which suite? bookworm, trixie, testing or sid"),
        (["fresh", "--suite", "sid"], "unknown option '--suite'"),
        (["fresh", "../sid"], "'../sid' is no suite: write bookworm, trixie, testing or sid"),
        (["package", "--fast"], "usage: "),
        (["pictures", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments(command, says):
    result = run(SCRIPTS / command[0], *command[1:])
    assert result.returncode == 2
    assert says in result.stderr
    assert not result.stdout


def test_geometry_computes_what_the_pool_does(tmp_path):
    """The row of the design that zramd has and the one measured in a real pool are alike to the page."""
    dice = random.Random(1)
    corpus = tmp_path / "pages"
    pages = [dice.randbytes(size := dice.randrange(4096)) + bytes(4096 - size) for _ in range(1000)]
    corpus.write_bytes(b"".join(pages))
    result = run(SCRIPTS / "geometry", corpus)
    assert result.returncode == 0
    designs, _, left = result.stdout.split("\n\n")
    rows = [row.replace("*", "").split(" | ")[-4:] for row in designs.splitlines()]
    ours = next(n for n, row in enumerate(designs.splitlines()) if "**" in row)
    assert len(rows) > 20
    assert rows[ours] == rows[-1]
    assert rows[ours] not in rows[:ours]
    kernel, never, *some = [
        [float(cell) for cell in row.replace("*", "").split("|")[2:-1]] for row in left.splitlines()[2:]
    ]
    # Of the trace of memory pages: less the more pages go back by themselves.
    assert [row[1] for row in (never, *some)] == sorted((row[1] for row in (never, *some)), reverse=True)
    assert some[2][1] < kernel[1] < never[1]


def test_profiles_are_those_of_the_backend():
    backend = run(
        ROOT / ".venv/bin/python",
        "-c",
        "import zramd_build; print(*zramd_build.PROFILES)",
        env=os.environ | {"PYTHONPATH": str(BACKEND)},
    )
    script = run(SCRIPTS / "build", "--help")
    assert backend.stdout.strip(), backend.stderr
    assert f"one of: {backend.stdout}" in script.stdout


def test_unknown_profile_in_the_environment():
    result = run(
        ROOT / ".venv/bin/python",
        "-c",
        "import zramd_build; zramd_build.current_profile()",
        env=os.environ | {"PYTHONPATH": str(BACKEND), "ZRAMD_BUILD": "fast"},
    )
    assert result.returncode == 1
    assert "unknown build profile 'fast'" in result.stderr
    assert "release, debug, coverage, asan, tsan" in result.stderr


class ServeScript:
    """A scripts/serve in the background; `output` is its standard output."""

    def __init__(self, folder: Path, *arguments: str, command=(SCRIPTS / "serve",), **kwargs):
        self.rundir = folder / "run"
        self.socket = self.rundir / "nbd.sock"
        self._log = folder / "output"
        self.started = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*map(str, command), f"rundir={self.rundir}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **kwargs,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self, timeout: float = 60) -> float:
        """Waits until the device answers; the seconds since the start."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output
            if self.socket.exists() and run("nbdinfo", "--size", self.uri).returncode == 0:
                return time.monotonic() - self.started
            time.sleep(0.02)
        raise AssertionError(f"no answer after {timeout} s: {self.output}")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def stop(self, number: int = signal.SIGTERM) -> float:
        start = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(10)
        return time.monotonic() - start


@pytest.fixture
def serve(tmp_path):
    running = []

    def start(*arguments, **kwargs):
        folder = tmp_path / str(len(running))
        folder.mkdir()
        running.append(ServeScript(folder, *arguments, **kwargs))
        return running[-1]

    yield start
    for served in running:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_starts_and_stops(serve, number):
    served = serve("--name", "scripted", "--size", "64M")
    served.wait()
    assert run("nbdinfo", "--size", served.uri).stdout.strip() == str(64 << 20)
    assert served.stop(number) < 2
    assert served.process.returncode == 0, served.output
    assert not served.socket.exists()


def test_serve_says_what_to_do_next(serve):
    served = serve("--name", "scripted")
    served.wait()
    deadline = time.monotonic() + 10
    while str(served.socket) not in served.output and time.monotonic() < deadline:
        time.sleep(0.05)
    assert str(served.socket) in served.output
    assert str(served.rundir) in served.output


def test_second_start_is_quick(serve):
    """Less than two seconds until a client is answered, on a machine that does nothing else."""
    first = serve("--name", "first")
    first.wait()
    assert serve("--name", "second").wait() < 2


def test_serve_in_a_misleading_environment(serve, tmp_path):
    """Another folder, a symbolic link, another python3 first in PATH, and Python's own variables set."""
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("python", "python3"):
        (shims / name).write_text("#!/bin/sh\nexit 1\n")
        (shims / name).chmod(0o755)
    link = tmp_path / "serve"
    link.symlink_to(SCRIPTS / "serve")
    served = serve(
        command=(link,),
        cwd="/",
        env=os.environ
        | {
            "PATH": f"{shims}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path),
            "PYTHONHOME": str(tmp_path),
        },
    )
    served.wait()


def test_serve_from_within_the_checkout(serve):
    """There, the source without its compiled core must not shadow the installed package."""
    serve(cwd=ROOT).wait()


def test_serve_refuses_a_bad_setting(serve):
    served = serve("--size", "1X")
    assert served.process.wait(30) == 2
    assert "'1X'" in served.output
    assert "Traceback" not in served.output


def test_options_after_two_dashes_go_to_nbdkit(serve):
    served = serve("--", "--exportname=x", "--dump-plugin")
    assert served.process.wait(30) == 0
    assert "name=python" in served.output


def test_build_says_nothing_when_there_is_nothing_to_do():
    run(SCRIPTS / "build", "release")
    result = run(SCRIPTS / "build", "release")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def as_nobody(*command):
    """The command as a user who owns nothing."""
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *command]


@pytest.fixture
def open_checkout(tmp_path_factory):
    """A copy of the scripts where any user may look: the checkout itself may lie in a closed folder."""
    folder = Path("/tmp") / tmp_path_factory.mktemp("checkout").name
    shutil.copytree(SCRIPTS, folder / "scripts")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@needs_root
def test_ordinary_user_is_told_what_to_install(open_checkout):
    bin_ = open_checkout / "bin"
    bin_.mkdir()
    (bin_ / "dpkg-query").write_text("#!/bin/sh\nprintf 'installed:gcc '\nexit 1\n")
    for path in (bin_, bin_ / "dpkg-query"):
        path.chmod(0o755)
    env = os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}"}
    result = run(*as_nobody(open_checkout / "scripts/serve"), env=env, cwd="/")
    assert result.returncode == 1
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith("sudo apt-get install --no-install-recommends nbdkit nbdkit-plugin-python ")
    assert " gcc" not in line


@needs_root
def test_ordinary_user_cannot_set_up_a_checkout_of_another(open_checkout):
    result = run(*as_nobody(open_checkout / "scripts/serve"), cwd="/")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"{open_checkout} is not set up" in line
    assert "cannot write there" in line
