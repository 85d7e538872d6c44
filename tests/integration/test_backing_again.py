"""A disk that vanishes or fails while a server uses it, and is there again; and what else is not it."""

import errno
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.client import NbdSocket
from support.content import noise
from support.run import wait_until
from support.run import zramd_command as zramd
from support.server import Started
from support.steps import Steps
from test_backing_server import BLOCK, BLOCKS, CONTENTS, Serve, allocate, put_out, superblock

PASS = f"page_indexes=0-{BLOCKS - 1}"
SWEEP = 30  # seconds in which the server has surely looked at what was read


class Loops:
    """Loop devices, as many as a test asks for."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def make(self, file: Path) -> str:
        done = subprocess.run(
            ["losetup", "--find", "--show", file], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"there are no loop devices: {done.stderr.strip()}")
        self.made.append(done.stdout.strip())
        return self.made[-1]

    def vanish(self, device: str, file: Path) -> Path:
        """Have a device answer nothing any more; what was on it is in another file."""
        copy = file.with_name(f"{file.name}-again")
        subprocess.run(["sync", device], check=True)
        shutil.copyfile(file, copy)
        os.truncate(file, 0)
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        return copy

    def remove(self) -> None:
        for device in self.made:
            subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def loops() -> Iterator[Loops]:
    if os.geteuid():
        pytest.skip("only root can make a loop device")
    made = Loops()
    yield made
    made.remove()


def give(served: Started, *words: object) -> subprocess.CompletedProcess[str]:
    return zramd("set", "--rundir", served.rundir, *(str(word) for word in words))


def refused(served: Started, word: object, status: int = 1) -> str:
    """Give it in vain; the settings stay."""
    before = served.ask("/settings")
    done = give(served, word)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.count("\n") == 1
    assert served.ask("/settings") == before
    return done.stderr.removeprefix("zramd: run: ").rstrip()


def section(served: Started) -> dict[str, Any]:
    found: Any = served.ask("/stats")
    return dict(found["writeback"])


def client_of(served: Started) -> NbdSocket:
    return NbdSocket(served)


def test_a_disk_that_comes_back_under_another_name(
    started: Callable[..., Started], state: Path, disk_folder: Path, loops: Loops
) -> None:
    file = allocate(disk_folder / "disk")
    old = loops.make(file)
    put_out(state, Path(old))
    blank = loops.make(allocate(disk_folder / "blank"))
    served = started(f"backing={old}")
    client = client_of(served)
    assert client.read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)

    copy = loops.vanish(old, file)
    assert client.ask(client.READ, 0, BLOCK) == errno.EIO
    wait_until(lambda: served.ask("/health")["status"] == "degraded", timeout=SWEEP)
    assert served.ask("/health")["causes"] == [f"backing '{old}' fails: blocks that are out cannot be read"]
    assert section(served)["bd_read_errors"] > 0
    assert refused(served, f"backing={old}").startswith(f"backing '{old}' has 0 bytes")
    assert refused(served, f"backing={blank}") == (
        f"backing '{blank}' is not the one that the device has: 'zramd backing show PATH' says whose blocks "
        "are on one"
    )

    new = loops.make(copy)
    done = give(served, f"backing={new}")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"backing={new}\n", "")
    assert client.read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    wait_until(lambda: served.ask("/health")["status"] == "ok")
    assert section(served)["backing"] == new
    wait_until(lambda: json.loads((served.rundir / "stats.json").read_text())["writeback"]["backing"] == new)
    assert new in zramd("tiers", "--rundir", served.rundir).stdout
    assert served.ask("/settings")["backing"] == new
    assert json.loads(zramd("backing", "show", "-J", new).stdout)["used"]
    # The one that had vanished is nobody's any more.
    os.close(os.open(old, os.O_RDONLY | os.O_EXCL))

    pid = served.pid
    done = served.restart()
    assert (done.returncode, done.stderr) == (0, "")
    assert served.pid != pid
    assert served.ask("/settings")["backing"] == new
    assert client_of(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)


@pytest.mark.parametrize("live", [(), ("--live",)])
def test_no_save_while_it_cannot_be_read(
    started: Callable[..., Started], state: Path, disk_folder: Path, tmp_path: Path, live: tuple[str, ...]
) -> None:
    """A good save is not replaced by one that lacks what the disk has: it may be mended."""
    file, saved = allocate(disk_folder / "disk"), tmp_path / "saved"
    put_out(state, file)
    served = started(f"backing={file}")
    words = "save", *live, "--rundir", served.rundir
    assert zramd(*words, saved).returncode == 0
    old, whole = saved.read_bytes(), file.read_bytes()
    os.truncate(file, 0)
    done = zramd(*words, saved)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"zramd: {served.rundir.name} was not saved: block 0 is out and cannot be read: see "
        "docs/backing.md, 'When the disk fails'\n"
    )
    assert saved.read_bytes() == old
    assert os.listdir(tmp_path).count("saved") == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    file.write_bytes(whole)
    assert zramd(*words, saved).returncode == 0


def test_while_blocks_go_out_and_are_read(
    started: Callable[..., Started], state: Path, disk_folder: Path, loops: Loops
) -> None:
    """Two names for one disk, one after the other: no request meets a descriptor that is closed."""
    file = allocate(disk_folder / "disk")
    names = [loops.make(file), loops.make(file)]
    put_out(state, Path(names[0]))
    subprocess.run(["sync", names[0]], check=True)
    served = started(f"backing={names[0]}", "writeback_limit=off")
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(first: int) -> None:
        """Reads all, and writes anew what then goes out again."""
        try:
            client, known = client_of(served), dict(enumerate(CONTENTS))
            for turn in range(1 << 30):
                for block in range(first, BLOCKS, 2):
                    if stop.is_set():
                        return
                    assert client.read(block * BLOCK, BLOCK) == known[block], block
                    if block % 3 == 0:
                        known[block] = noise(turn * BLOCKS + block)[:1000].ljust(BLOCK, b"\0")
                        assert client.ask(client.WRITE, block * BLOCK, BLOCK, known[block]) == 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        assert zramd("writeback", "--rundir", served.rundir, PASS).returncode == 0
        done = give(served, f"backing={names[turn % 2 - 1]}")
        assert (done.returncode, done.stderr) == (0, "")
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    found = section(served)
    assert found["written_out"] > 0
    assert (found["bd_read_errors"], found["bd_write_errors"], found["backing_bad"]) == (0, 0, 0)
    assert zramd("check", "--rundir", served.rundir).returncode == 0
    links = [os.readlink(f"/proc/{served.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{served.pid}/fd")]
    assert sum(link in names for link in links) == 2  # the server's own, and the core's


def test_the_same_path_again(started: Callable[..., Started], state: Path, disk_folder: Path) -> None:
    """Also by another name, one that is relative, and a link; it stays ours alone."""
    backing = allocate(disk_folder / "backing")
    put_out(state, backing)
    served = started(f"backing={backing}")
    link = disk_folder / "link"
    link.symlink_to(backing)
    relative = os.path.relpath(backing)
    for word, path in ((backing, backing), (link, link), (relative, backing)):
        done = give(served, f"backing={word}")
        assert (done.returncode, done.stderr) == (0, "")
        assert served.ask("/settings")["backing"] == str(path)
    assert served.restart(f"backing={relative}").returncode == 0
    assert served.ask("/settings")["backing"] == str(backing)
    assert zramd("backing", "format", "--force", backing).returncode == 1
    assert client_of(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)


@pytest.fixture
def frozen(disk_folder: Path, loops: Loops) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A backing on a file system that can be told to answer no writes, and how."""
    disk, place = disk_folder / "disk", disk_folder / "mounted"
    subprocess.run(["fallocate", "--length", "64M", disk], check=True)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    place.mkdir()
    device = loops.make(disk)
    if subprocess.run(["mount", device, place], check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    is_frozen = False

    def freeze(how: str) -> None:
        nonlocal is_frozen
        subprocess.run(["fsfreeze", how, place], check=True)
        is_frozen = how == "--freeze"

    try:
        yield allocate(place / "backing"), freeze
    finally:
        if is_frozen:
            freeze("--unfreeze")
        wait_until(lambda: not subprocess.run(["umount", place], check=False, capture_output=True).returncode)


def test_a_disk_that_hangs(
    started: Callable[..., Started], frozen: tuple[Path, Callable[[str], None]]
) -> None:
    """No process that writes to it can end: whoever wants a restart is told, and the server goes on."""
    backing, freeze = frozen
    served = started(f"backing={backing}", "writeback_limit=off")
    client = client_of(served)
    for block in range(BLOCKS):
        assert client.ask(client.WRITE, block * BLOCK, BLOCK, CONTENTS[block]) == 0
    freeze("--freeze")
    assert zramd("writeback", "--rundir", served.rundir, PASS).returncode == 0
    wait_until(lambda: served.ask("/health")["backing_silent"] == 2, timeout=20)
    why = served.refused()
    assert why.startswith("again goes on as before: its backing has not answered for ")
    assert client.read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    assert client.ask(client.WRITE, 0, BLOCK, CONTENTS[1]) == 0
    assert give(served, f"backing={backing}").returncode == 0  # it can be read
    freeze("--unfreeze")
    wait_until(lambda: served.ask("/health")["backing_silent"] == 0)
    assert served.restart().returncode == 0
    assert client_of(served).read(0, BLOCKS * BLOCK) == b"".join([CONTENTS[1], *CONTENTS[1:]])
    assert zramd("stop", "--rundir", served.rundir).returncode == 0


def test_none_of_all_is_set(started: Callable[..., Started], state: Path, disk_folder: Path) -> None:
    backing = allocate(disk_folder / "backing")
    served = started(f"backing={backing}")
    before = served.ask("/settings")
    done = give(served, "writeback_age=2h", f"backing={disk_folder}/none")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"zramd: run: backing '{disk_folder}/none' cannot be opened: no such file")
    assert served.ask("/settings") == before
    assert "backing can only be given anew" in refused(served, "backing=", status=2)
    assert superblock(backing).name == "again"


def test_a_server_without_one(started: Callable[..., Started], disk_folder: Path) -> None:
    served = started()
    backing = allocate(disk_folder / "backing")
    assert refused(served, f"backing={backing}", status=2) == (
        "backing can only be given anew while the device is served, after it had vanished: for another one, "
        "or none, restart the server"
    )
    assert not any(backing.read_bytes())


def test_a_reset_meanwhile(serve: Serve, state: Path, disk_folder: Path) -> None:
    """What a pass was for has gone; what comes after it is whole, and goes out when it is asked to."""
    backing = allocate(disk_folder / "backing")
    served = serve(state=state, backing=backing, writeback_limit="off")
    for turn in range(6):
        client = NbdSocket(served)
        for block in range(BLOCKS):
            content = noise(turn * BLOCKS + block)[:1000].ljust(BLOCK, b"\0")
            assert client.ask(client.WRITE, block * BLOCK, BLOCK, content) == 0
        client.close()
        for _ in range(3):
            assert served.request("POST", "/writeback", PASS)[0] == 200
        wait_until(lambda: served.request("POST", "/reset")[0] == 200)
        client = NbdSocket(served)
        assert client.read(0, BLOCKS * BLOCK) == bytes(BLOCKS * BLOCK)
        client.close()
        assert json.loads(served.request("POST", "/check")[1])["sound"]
        stats = json.loads(served.request("GET", "/stats")[1])
        assert (stats["out_pages"], stats["pages_stored"]) == (0, 0)


def test_blocks_that_go_out_at_the_last_moment(
    started: Callable[..., Started], tmp_path: Path, disk_folder: Path
) -> None:
    """After the new server has looked: it fails once the old one has left, and one as before serves."""
    backing, other = allocate(disk_folder / "backing"), allocate(disk_folder / "other")
    served = started(f"backing={backing}", "writeback_limit=off")
    client = client_of(served)
    for block in range(BLOCKS):
        assert client.ask(client.WRITE, block * BLOCK, BLOCK, CONTENTS[block]) == 0
    steps = Steps(tmp_path / "steps")
    steps.held = {"restart.ready"}
    done: list[subprocess.CompletedProcess[str]] = []
    restart = threading.Thread(
        target=lambda: done.append(served.restart(f"backing={other}", env=steps.env)), daemon=True
    )
    restart.start()
    steps.wait("restart.ready")
    assert zramd("writeback", "--rundir", served.rundir, PASS).returncode == 0
    wait_until(lambda: section(served)["out_pages"] == BLOCKS)
    steps.close()
    restart.join(60)
    assert done[0].returncode == 1
    assert re.search(
        r"again is served as before, by a new process \d+: .*"
        rf"backing '{other}' is not the one on which blocks of state '{served.state}' are: ",
        done[0].stderr,
    )
    assert served.ask("/settings")["backing"] == str(backing)
    assert client_of(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    assert not any(other.read_bytes()[:BLOCK])


def test_a_damaged_superblock(started: Callable[..., Started], state: Path, disk_folder: Path) -> None:
    """What docs/backing.md says can be done about it: a copy, or to bring all back while a server runs."""
    file = allocate(disk_folder / "disk")
    put_out(state, file)
    whole = file.read_bytes()[:BLOCK]

    def write(at: int, data: bytes) -> None:
        fd = os.open(file, os.O_WRONLY)
        os.pwrite(fd, data, at)
        os.close(fd)

    write(100, b"\1")
    words = "again", "--size", "64M", f"state={state}", f"backing={file}"
    done = zramd("start", *words)
    assert done.returncode == 1
    assert f"backing '{file}' has a damaged superblock" in done.stderr
    write(0, whole)
    served = started(f"backing={file}")
    assert client_of(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    write(100, b"\1")
    assert zramd("bring-back", "--rundir", served.rundir).returncode == 0
    wait_until(lambda: section(served)["out_pages"] == 0)
    assert served.restart("backing=").returncode == 0
    assert zramd("backing", "format", "--force", file).returncode == 0
    assert served.restart(f"backing={file}").returncode == 0
    assert client_of(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)


def test_a_backing_that_has_grown(started: Callable[..., Started], state: Path, disk_folder: Path) -> None:
    """A restart uses all of it, with what lies there."""
    backing = allocate(disk_folder / "backing")
    put_out(state, backing)
    served = started(f"backing={backing}")
    size = backing.stat().st_size
    subprocess.run(["fallocate", "--length", str(2 * size), backing], check=True)
    assert section(served)["backing_size"] == size
    assert served.restart().returncode == 0
    assert section(served)["backing_size"] == superblock(backing).size == 2 * size
    assert section(served)["out_pages"] == BLOCKS
    assert client_of(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    assert served.restart().returncode == 0
    assert client_of(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
