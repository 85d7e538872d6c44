"""`zramd guest-tool`: what it writes runs where there is no zramd."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.run import zramd_command

from zramd.launch import guesttool

ROOT = Path(__file__).resolve().parents[3]
FILES = ["zramd-guest", *guesttool.UNITS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the command has written."""
    made = tmp_path / "guest"
    done = zramd_command("guest-tool", made)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{made}/{name}" for name in FILES]
    return made


def run(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run it with no environment, in a folder where nothing is."""
    return subprocess.run(words, cwd="/", env={}, capture_output=True, text=True, timeout=60, check=False)


def test_it_runs_outside_of_any_zramd(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "elsewhere"
    shutil.copy(folder / "zramd-guest", program)
    for words in ([sys.executable, "-I", program], ["/usr/bin/python3", "-I", program], [program]):
        helped = run(*words, "--help")
        assert (helped.returncode, helped.stderr) == (0, "")
        assert helped.stdout.startswith("usage: zramd-guest ")
        wrong = run(*words, "setup", "--disk", "/dev/none")
        assert wrong.returncode == 1
        assert wrong.stderr.startswith("zramd-guest: ")
        assert run(*words, "nothing").returncode == 2
    traced = run(sys.executable, "-I", "-X", "importtime", program, "--help").stderr
    imported = {line.rpartition("|")[2].strip() for line in traced.splitlines()}
    assert "zramd_guest.policy" in imported
    assert {name for name in imported if name.split(".")[0] == "zramd"} == set()


def test_it_holds_nothing_but_the_rooms_modules(folder: Path) -> None:
    with zipfile.ZipFile(folder / "zramd-guest") as packed:
        assert packed.testzip() is None
        names = packed.namelist()
    sources = [f"zramd_guest/{path.name}" for path in sorted((ROOT / "zramd/guest").glob("*.py"))]
    assert names == ["__main__.py", *sources]


def test_the_same_source_makes_the_same_file(folder: Path) -> None:
    for path in (ROOT / "zramd/guest").glob("*.py"):
        os.utime(path)
    assert guesttool.archive() == (folder / "zramd-guest").read_bytes()


def test_units_call_it_where_it_is_put(folder: Path) -> None:
    for name in guesttool.UNITS:
        assert (folder / name).read_text() == (ROOT / "systemd" / name).read_text()
    text = "".join((folder / name).read_text() for name in guesttool.UNITS)
    assert text.count("=/usr/local/sbin/zramd-guest ") == 3


@pytest.mark.parametrize("there", ["", "guest"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / "guest").mkdir()
    done = zramd_command("guest-tool", tmp_path / there)
    assert done.returncode == 2
    assert "is there already: give a folder that is to be made" in done.stderr
    assert list((tmp_path / "guest").iterdir()) == []


@pytest.mark.parametrize("bad", ["", "/proc/nobody/guest"])
def test_a_folder_that_cannot_be_made(bad: str) -> None:
    done = zramd_command("guest-tool", bad)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_python_as_old_as_guests_have_can_read_it() -> None:
    """Debian 11 has 3.9."""
    import ast

    for path in (ROOT / "zramd/guest").glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 9))
