"""What somebody meets who tries zramd for the first time, and what they are told to do next."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.run import wait_until, zramd_command
from support.server import PACKAGE_PARENT, NbdkitProcess

from zramd.contract import rundir

NOBODY = 65534
Serve = Callable[..., NbdkitProcess]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder that stands for /, with three devices configured: one elsewhere, one wrong, one not here."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\n")
    (tmp_path / "etc/zramd.conf").write_text(
        f"[g0]\ndisksize = 16M\nattach = no\nrundir = {tmp_path}/elsewhere/g\n"
        f"[wrong]\nsiez = 1\nrundir = {tmp_path}/elsewhere/w\n[other]\nzram-size = 0\n"
    )
    return tmp_path


@pytest.fixture
def zramd(machine: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    return lambda *words: zramd_command(*words, env={"ZRAMD_ROOT": str(machine)})


@pytest.fixture
def started(machine: Path, zramd: Callable[..., "subprocess.CompletedProcess[str]"]) -> Iterator[Path]:
    """The run folder of g0, which runs as configured."""
    done = zramd("start", "g0")
    assert (done.returncode, done.stderr) == (0, "")
    folder = machine / "elsewhere/g"
    yield folder
    if (folder / "pid").exists():
        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)


def test_names_find_what_is_configured(zramd, started, machine):
    for words in (
        ["stats", "g0"],
        ["list", "g0"],
        ["list", "/dev/g0"],
        ["check", "g0"],
        ["top", "--once", "g0"],
    ):
        done = zramd(*words)
        assert (done.returncode, done.stderr) == (0, ""), words
        assert "g0" in done.stdout
    assert [device["name"] for device in json.loads(zramd("list", "-J").stdout)["devices"]].count("g0") == 1
    assert zramd("save", "g0", machine / "saved").returncode == 0
    assert f"rundir '{started}' is in use by a running server" in zramd("start", "g0").stderr
    # An error that was made since does not hide it.
    conf = machine / "etc/zramd.conf"
    conf.write_text(conf.read_text().replace("attach", "atach"))
    assert zramd("stop", "g0").returncode == 0
    assert not started.exists()
    assert "there is no device 'g0': 'zramd start g0' starts it\n" in zramd("stop", "g0").stderr


@pytest.mark.parametrize("words", [["start", "nope"], ["start", "nope", "mem_limit=1M"], ["start"]])
def test_start_of_what_is_not_configured(zramd, machine, words):
    done = zramd(*words)
    name = "nope" if "nope" in words else "zram0"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.replace(str(machine), "") == (
        f"zramd: there is no device '{name}' in /etc/zramd.conf: add a section [{name}] "
        "(there: g0; with errors: wrong; not on this machine: other); "
        "--size starts one that is not configured\n"
    )


def test_serve_of_what_is_not_configured(zramd):
    done = zramd("serve", "--config", "nope")
    assert done.returncode == 2
    assert done.stderr.endswith("(there: g0; with errors: wrong; not on this machine: other)\n")


@pytest.mark.parametrize("words", [["--size", "1M"], ["size=1M"], ["disksize=1M"]])
def test_start_of_one_that_is_described_in_full(zramd, tmp_path, words):
    folder = tmp_path / "run"
    done = zramd("start", "nope", *words, f"rundir={folder}")
    assert (done.returncode, done.stderr) == (0, "")
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)


def test_without_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what to do; the table, which scripts read, stays empty."""
    from zramd.commands import main

    monkeypatch.setattr(rundir, "base", lambda: str(tmp_path))
    for words, said in (([], True), (["list"], True), (["list", "--raw"], False), (["list", "-n"], False)):
        assert main(words) == 0
        found = capsys.readouterr()
        assert found.out == ""
        assert ("'zramd start zram0 --size 1G' starts one" in found.err) == said
        assert found.err.count("\n") == said


@root_only
def test_the_advice_to_another_user_is_right(tmp_path: Path) -> None:
    """Root looks in another place than the user whose device it is."""
    shutil.copytree(PACKAGE_PARENT / "zramd", tmp_path / "lib/zramd")
    shutil.copy(PACKAGE_PARENT / "nbdkit_plugin.py", tmp_path / "lib")
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    for folder in (home, *home.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "XDG_RUNTIME_DIR": str(home)}

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["/usr/bin/python3", "-P", "-m", "zramd", *words],
            env=environment,
            preexec_fn=lambda: os.setuid(NOBODY),
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = run("start", "a0", "--size", "1M")
    assert done.returncode == 0, done.stderr
    folder = home / "zramd/a0"
    try:
        for words, rest in (
            (["attach", "a0"], f"attach a0 --rundir {folder}"),
            (["attach", "--swap", "a0"], f"attach a0 --rundir {folder} --swap"),
            (["attach", "--rundir", "zramd/a0"], f"attach --rundir {folder}"),
            (["attach", "b0"], "attach b0"),
            (["detach", "--swapoff", "a0"], "detach a0 --swapoff"),
        ):
            done = run(*words)
            assert done.returncode == 1
            match = re.fullmatch(
                r"zramd: only root may (?:at|de)tach kernel devices: run 'sudo (.*)'\n", done.stderr
            )
            assert match, done.stderr
            assert match[1].endswith(f" {rest}")
            assert match[1].startswith(("zramd ", "/usr/bin/python3 -P -m zramd "))
    finally:
        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)


def test_a_limit_below_what_is_in_use(serve: Serve) -> None:
    served = serve()
    client = NbdSocket(served)
    assert client.ask(client.WRITE, 0, 1 << 20, os.urandom(1 << 20)) == 0
    client.close()
    at = ("--rundir", str(served.rundir))
    done = zramd_command("set", *at, "mem_limit=64K")
    assert (done.returncode, done.stdout) == (0, "mem_limit=65536\n")
    assert re.fullmatch(r"zramd: [0-9]+ bytes are in use already: .*\n", done.stderr)
    for word in ("mem_limit=0", "mem_limit=1G"):
        assert zramd_command("set", *at, word).stderr == ""


def test_a_save_of_a_device_in_use_says_so(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    at = ("--rundir", str(served.rundir))
    assert "client" not in zramd_command("save", *at, tmp_path / "f").stderr
    client = NbdSocket(served)
    done = zramd_command("save", *at, tmp_path / "f")
    client.close()
    assert done.returncode == 0
    assert "has 1 client: what was not written to it yet is not in the file" in done.stderr


def test_a_run_folder_with_an_equals_sign(serve: Serve, tmp_path: Path) -> None:
    served = serve(rundir=tmp_path / "a=b")
    for option in (["--rundir", "a=b"], ["--rundir=a=b"], ["--rund", "a=b"]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "zramd", "set", *option, "compaction=off"],
            env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "compaction=off\n", "")
    assert json.loads(served.request("GET", "/settings")[1])["compaction"] is False


def test_the_core_in_a_checkout(tmp_path: Path) -> None:
    """There Python finds the source first, which has no core."""
    shutil.copytree(
        PACKAGE_PARENT / "zramd", tmp_path / "zramd", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = "from zramd import Zsmalloc, Device, ZramdError; print(Zsmalloc, Device(1).disksize)"

    def run(*places: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {['', *places]!r}; {code}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    done = run(str(PACKAGE_PARENT))
    assert (done.stdout, done.stderr) == ("<class 'zramd.core.pool.zsmalloc.Zsmalloc'> 4096\n", "")


def test_a_command_where_an_interrupt_is_ignored(serve: Serve) -> None:
    """A script's & has SIGINT ignored: what zramd leaves running ends by it all the same, as nbdkit does."""
    served = serve()
    folder = served.rundir.parent / "other"
    script = f"trap '' INT; '{sys.executable}' -P -m zramd start other --size 1M rundir='{folder}'"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}, capture_output=True
    )
    assert done.returncode == 0
    pid = int((folder / "pid").read_text())
    os.kill(pid, signal.SIGINT)
    wait_until(lambda: not folder.exists())


def test_what_the_tests_start_can_be_interrupted() -> None:
    """Also where the tests themselves were started by nohup, or in the background of a script."""
    conftest = Path(__file__).parents[1] / "conftest.py"
    code = (
        "import signal, subprocess, sys, runpy\n"
        f"sys.path.append({str(conftest.parent)!r})\n"
        f"runpy.run_path({str(conftest)!r})\n"
        "work = 'print(1, flush=True); import time; time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', work],"
        " stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
        "child.stdout.readline(); child.send_signal(signal.SIGINT); print(child.wait(30))\n"
    )
    done = subprocess.run(
        ["bash", "-c", 'trap "" INT HUP; exec "$@"', "bash", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("-2\n", 0), done.stderr
