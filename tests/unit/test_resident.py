"""What must not wait for swap is held in memory: files in /run whose pages the kernel could swap out."""

import subprocess
import sys
from pathlib import Path

import pytest

from zramd import resident

# A process that has locked its memory, as a server with swap=local and a keeper do. It prints the files of
# which it has pages locked: what is only mapped, or in nobody's memory, the kernel may swap out.
LOCKED = """
import os, sys
from zramd.core.system import process
def locked():
    held, name = set(), ""
    for line in open("/proc/self/smaps"):
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            name = words[5].strip() if len(words) == 6 else ""
        elif words[0] == "Locked:" and int(words[1]) and name.startswith(folder):
            held.add(name.removeprefix(folder + "/"))
    return " ".join(sorted(held))
folder = sys.argv[1]
try:
    process.lock_memory()
except OSError:
    sys.exit(99)
"""


def locked(folder: Path, code: str) -> list[str]:
    """Run code in such a process; the files of the folder that it says are locked."""
    done = subprocess.run(
        [sys.executable, "-c", LOCKED + code, folder], capture_output=True, text=True, timeout=60
    )
    if done.returncode == 99:
        pytest.skip("may not lock memory")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def folder(memory_folder: Path) -> Path:
    """A folder in a tmpfs, as /run is one."""
    return memory_folder


def test_hold(folder: Path) -> None:
    (folder / "one").write_text("x")
    (folder / "two").write_text("x" * 5000)
    (folder / "none").write_text("")
    (folder / "link").symlink_to("one")
    (folder / "free").write_text("x")
    code = """
from zramd import resident
free = resident.hold_file(folder + "/free")
held = [resident.hold_file(f"{folder}/{name}") for name in ("one", "two", "none", "link", "missing")]
assert [one and len(one) for one in held] == [1, 5000, None, None, None]
del free
print(locked())
"""
    assert locked(folder, code) == ["one", "two"]


def test_held_before_memory_is_locked(folder: Path) -> None:
    (folder / "one").write_text("x")
    code = """
import ctypes
ctypes.CDLL(None).munlockall()
from zramd import resident
held = resident.hold_file(folder + "/one")
assert locked() == ""
process.lock_memory()
print(locked())
"""
    assert locked(folder, code) == ["one"]


def test_no_lock_is_kept(folder: Path) -> None:
    """Whoever closes the file gives its lock up, whatever is held."""
    from zramd import lockfile

    path = folder / "one"
    with path.open("w") as file:
        file.write("x")
        file.flush()
        assert lockfile.take(file.fileno())
        held = resident.hold(file.fileno())
    assert held is not None
    with path.open() as file:
        assert not lockfile.is_taken(file.fileno())


def test_what_a_server_and_its_standby_will_need(folder: Path) -> None:
    code = """
from zramd.contract import rundir
server = rundir.Rundir(folder + "/run")
server.publish(rundir.STATE, "/dev/shm/x\\n")
server.publish(rundir.DATA_ID, "1\\n")
server.publish(rundir.DATA_ID, "2\\n")
server.publish("mm_stat", "0\\n")
print(locked())
"""
    assert locked(folder, code) == ["run/data_id", "run/pid", "run/state_path"]
    (folder / "run/pid").write_text("1\n")
    code = """
from zramd.contract import rundir
place = rundir.Standby(folder + "/run")
print(locked())
"""
    assert locked(folder, code) == ["run/pid"]


def test_what_a_keeper_will_need(folder: Path) -> None:
    code = """
from zramd.kernel import attached
attached.FOLDER = folder
attached._path = lambda name: f"{folder}/{name}.attached"
record = attached.Record("one")
record.write("/dev/nbd0", "1", keeper=1)
first = locked()
record.write("/dev/nbd0", "1" * 5000, keeper=1)
print(first, locked())
"""
    assert locked(folder, code) == ["one.attached"] * 2


def test_what_one_on_standby_will_need_of_the_budget(folder: Path) -> None:
    """The table of the slots, and who has those in use; not the megabyte that 1,024 of them would take."""
    code = """
from pathlib import Path
from zramd.contract import budget as file, handover
from zramd.server import budget
from zramd.settings import config as settings
pairs = {"disksize": "1M", "budget": "1G", "rundir": folder + "/run/one"}
config = settings.parse(pairs.items())
Path(config.rundir).mkdir(parents=True)
members = [budget.Member(config) for _ in range(8)]
at = Path(file.path(config.rundir))
budget.look(config)
assert not budget._held
os.environ[handover.TAKES_OVER] = handover.order(-1, -1, True, standby=True)
budget.look(config)
(held,) = budget._held
assert len(held) == file.needed(file.slots(members[0]._fd)) < file.BYTES // 4
del members
print(locked())
"""
    assert locked(folder, code) == ["run/.budget"]
