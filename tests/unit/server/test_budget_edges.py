"""A budget whose file cannot be made, or is not what it should be: one sentence each."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.run import PATIENCE, SEED, run_in_fake_kernel

import zramd
from zramd.contract import budget as file
from zramd.core.memory.budget import Budget
from zramd.errors import BudgetError
from zramd.server import budget
from zramd.server.budget import Member
from zramd.settings import config
from zramd.settings.config import Config


def settings(folder: Path, name: str, **words: str) -> Config:
    given = {"disksize": "64M", "budget": "8M", "name": name, "rundir": f"{folder}/{name}"}
    return config.parse((given | words).items())


def refused(folder: Path) -> str:
    """What is said to a server that is to have a part in the budget of this folder."""
    with pytest.raises(BudgetError) as raised:
        Member(settings(folder, "one"))
    return str(raised.value)


def path(folder: Path) -> Path:
    return folder / file.NAME


@pytest.fixture
def made(memory_folder: Path) -> Path:
    """A folder with a budget's file, which nobody uses."""
    os.close(Member(settings(memory_folder, "one"))._fd)
    return memory_folder


# Runs where only it sees what it mounts.
MOUNTED = """
import os, subprocess, sys
from zramd.errors import BudgetError
from zramd.server.budget import Member
from zramd.settings import config
folder, options = sys.argv[1:3]
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", options, "zramd-test", folder], check=True)
def join(name):
    words = {"disksize": "64M", "budget": "8M", "name": name, "rundir": f"{folder}/{name}"}
    try:
        return Member(config.parse(words.items()))
    except BudgetError as error:
        print(str(error).replace(folder, "FOLDER"))
for change in sys.argv[3:]:
    subprocess.run(["mount", "-o", f"remount,{change}", folder], check=True)
    one = join("one")
    if one:
        print("joined", one.core.budget)
        os.close(one._fd)
        del one  # what is mapped would keep the file system writable
"""


def in_tmpfs(folder: Path, options: str, *changes: str) -> list[str]:
    """What a server says in a tmpfs with these options, after each change of them."""
    alone = (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    )
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    done = subprocess.run(
        [*alone, sys.executable, "-P", "-c", MOUNTED, str(folder), options, *changes],
        env={**os.environ, "PYTHONPATH": str(Path(zramd.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_full_file_system(memory_folder: Path) -> None:
    """However far it comes: nothing of it is in the way once there is room."""
    page = os.sysconf("SC_PAGE_SIZE")
    table = -(-file.TABLE_BYTES // page)
    sizes = [f"size={page * pages}" for pages in (1, table, table + 1, table + 2)]
    full = (
        "budget 'FOLDER/.budget' cannot be made: no space left on device: make room there, or use no budget"
    )
    said = in_tmpfs(memory_folder, sizes[0], *sizes)
    assert [line.lower() for line in said] == [*[full.lower()] * 3, "joined 8388608"]


def test_a_read_only_file_system(memory_folder: Path) -> None:
    """Where there is no file yet, and where there is one."""
    said = in_tmpfs(memory_folder, "size=1m", "ro", "rw", "ro")
    sentence = (
        "budget 'FOLDER/.budget' cannot be opened: read-only file system: let the service write there "
        "(ReadWritePaths=)"
    )
    assert [line.lower() for line in said] == [sentence.lower(), "joined 8388608", sentence.lower()]


@pytest.mark.parametrize(
    ("at", "data", "why"),
    [
        (0, b"#!/bin/sh\nexit 0\n", "'{}' is damaged, or no budget of zramd"),
        (16, b"\7\0\0\0\0\0\0\0", "budget '{}' has version 7, this zramd knows 1"),
        (24, b"\1\0\0\0\0\0\0\0", "budget '{}' is damaged (its size is not that of 1024 slots)"),
    ],
)
def test_a_file_that_is_something_else(made: Path, at: int, data: bytes, why: str) -> None:
    """It stays as it is."""
    with path(made).open("r+b") as target:
        target.seek(at)
        target.write(data)
    before = path(made).read_bytes()
    remedy = "once no device has a part in it, remove the file"
    assert refused(made) == f"{why.format(path(made))}: {remedy}"
    assert path(made).read_bytes() == before


@pytest.mark.parametrize("size", [10, 4096, file.TABLE_AT + 100, file.BYTES - 1])
def test_a_file_that_is_cut_off(made: Path, size: int) -> None:
    """Before any of it is mapped: what is not there would end the process."""
    os.truncate(path(made), size)
    said = refused(made)
    assert said.startswith((f"'{path(made)}' is damaged", f"budget '{path(made)}' is damaged"))
    assert said.endswith(": once no device has a part in it, remove the file")
    assert path(made).stat().st_size == size


def test_whatever_stands_in_its_words(made: Path) -> None:
    """What cannot be is said to be damaged; slots of nobody are freed, and the next server has all of it."""
    rnd = random.Random(SEED)
    sound = path(made).read_bytes()
    joined = 0
    for damaged in (1, 2, 200) * 8:
        data = bytearray(sound)
        for slot in rnd.sample(range(file.SLOTS), damaged):
            owner = file._OWNERS_AT + slot * file._OWNER_BYTES
            data[file.lock_of(slot) : file.lock_of(slot) + 16] = rnd.randbytes(16)
            data[owner : owner + file._OWNER_BYTES] = rnd.randbytes(file._OWNER_BYTES)
        path(made).write_bytes(data)
        shown = file.look(str(path(made)))
        assert shown is None or shown.devices == 0
        try:
            member = Member(settings(made, "one"))
        except BudgetError as error:
            said = str(error)
        else:
            joined += 1
            said = f"joined {member.core.budget} {file.slots(member._fd)}"
            os.close(member._fd)
            del member
        why = (
            "is damaged (a slot has more than any machine): once no device has a part in it, remove the file"
        )
        assert said in (f"budget '{path(made)}' {why}", "joined 8388608 []")
    assert joined


@pytest.mark.parametrize("target", ["other", "none"])
def test_a_link(memory_folder: Path, target: str) -> None:
    (memory_folder / "other").write_bytes(b"precious")
    path(memory_folder).symlink_to(memory_folder / target)
    link = f"budget '{path(memory_folder)}' is a link: remove it, or use no budget"
    assert refused(memory_folder) == link
    assert (memory_folder / "other").read_bytes() == b"precious"
    assert not (memory_folder / "none").exists()
    assert file.look(str(path(memory_folder))) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user(made: Path) -> None:
    os.chown(path(made), 12345, 12345)
    said = refused(made)
    assert said.startswith(f"budget '{path(made)}' is not used: ")
    assert "12345" in said
    assert said.endswith(f"; chmod 600 '{path(made)}'\", or use no budget")


def test_a_file_with_two_names(made: Path) -> None:
    os.link(path(made), made / "other")
    assert refused(made).endswith(": remove it, or use no budget")


def test_a_pipe_in_its_place(memory_folder: Path) -> None:
    """Nobody waits for its other end."""
    os.mkfifo(path(memory_folder), 0o600)
    assert refused(memory_folder).endswith(": remove it, or use no budget")
    assert file.look(str(path(memory_folder))) is None


def test_who_only_looks_takes_no_slot(made: Path) -> None:
    """As a server on standby does before its turn comes."""
    before = path(made).read_bytes()
    budget.look(settings(made, "two", budget_floor="4M"))
    assert path(made).read_bytes() == before
    assert file.look(str(path(made))) is None
    with pytest.raises(BudgetError, match="less than all floors together"):
        core = Budget(os.open(path(made), os.O_RDWR), 7)
        core.begin(6 << 20, 0)
        budget.look(settings(made, "two", budget_floor="4M"))


def test_two_budgets_one_after_the_other(memory_folder: Path) -> None:
    """The last one counts for all; who has more already keeps it, and gets no more."""
    one = Member(settings(memory_folder, "one", budget="8M"))
    assert one.core.claim(6 << 20)
    two = Member(settings(memory_folder, "two", budget="4M"))
    assert (one.core.budget, two.core.budget) == (4 << 20, 4 << 20)
    assert not two.core.claim(4096)
    assert not one.core.claim(7 << 20)
    assert one.core.mine == 6 << 20
    three = Member(settings(memory_folder, "three", budget="16M"))
    assert two.core.claim(4 << 20)
    assert three.core.taken == 10 << 20
    for member in one, two, three:
        os.close(member._fd)


def test_a_device_of_ublk(memory_folder: Path, ublk_shim: Path) -> None:
    """Its kernel is told that there is no room, as at mem_limit, and what was written stays."""
    assert run_in_fake_kernel(ublk_shim, "ublkbudget.py", memory_folder, timeout=60) == ""
