"""Blocks on a disk: real servers with a backing, one after the other, and what none of them accepts."""

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.client import NbdSocket
from support.content import noise
from support.run import wait_until, zramd_command
from support.server import NbdkitProcess, Started

from zramd.contract import rundir
from zramd.contract.superblock import Superblock, pack, unpack
from zramd.core.device.writeback import Writeback
from zramd.server import opening
from zramd.settings import config

Serve = Callable[..., NbdkitProcess]
BLOCK = 4096
BLOCKS = 300
SIZE = 8 << 20
CONTENTS = [noise(number)[:1000].ljust(BLOCK, b"\0") for number in range(BLOCKS)]


def allocate(path: Path) -> Path:
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, SIZE)
    os.close(fd)
    return path


@pytest.fixture
def backing(disk_folder: Path) -> Path:
    return allocate(disk_folder / "backing")


def superblock(path: Path) -> Superblock:
    found = unpack(path.read_bytes()[:4096], str(path))
    assert found is not None
    return found


def state_format(state: Path) -> int:
    with state.open("rb") as file:
        return file.read(17)[16]


def put_out(state: Path, backing: Path, count: int = BLOCKS) -> str:
    """Make a state all of whose blocks are out, as a server leaves it; return the data's name."""
    pairs = {"size": "64M", "rundir": "/run/none", "state": str(state), "backing": str(backing)}
    made = opening.make_device(config.parse(pairs.items()))
    for number in range(count):
        made.device.write(CONTENTS[number], number * BLOCK)
    hands, at = Writeback(made.device), 0
    while at < count:
        at, _, _ = hands.gather(at, count, 0)
        assert hands.flush()[4] == 0
    assert made.device.counters()["out_pages"] == count
    data_id: str = made.device.data_id
    assert made.backing is not None
    os.close(made.backing._opened.fd)
    return data_id


def kind(served: NbdkitProcess, block: int) -> Any:
    return json.loads(served.request("GET", f"/block/{block}")[1])["kind"]


def refused(serve: Serve, **settings: object) -> str:
    """Start a server in vain, and return its one sentence."""
    served = serve(wait=False, **settings)
    assert served.process.wait(30) == 1
    lines = [line for line in served.log.read_text().splitlines() if line.startswith("nbdkit: error: ")]
    assert "Traceback" not in served.log.read_text()
    return lines[0].partition("get_ready: error: ")[2]


@pytest.fixture
def ordinary_io() -> Iterator[None]:
    """What is started is not of ioprio's class idle, even if the tests are."""

    def ionice(*words: str) -> str:
        command = ["ionice", *words, "-p", str(threading.get_native_id())]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    was_idle = ionice().startswith("idle")
    ionice("-c", "best-effort", "-n", "4")
    yield
    ionice("-c", "idle" if was_idle else "none")


@pytest.mark.usefixtures("ordinary_io")
def test_only_who_writes_out_leaves_the_disk_to_others(serve: Serve, state: Path, backing: Path) -> None:
    """Somebody waits for each read of what is out: none of those threads is of the class idle."""
    put_out(state, backing)
    served = serve(state=state, backing=backing)
    client = NbdSocket(served)
    assert client.read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    threads = list(Path(f"/proc/{served.process.pid}/task").iterdir())
    names = [(thread / "comm").read_text().strip() for thread in threads]
    said = subprocess.check_output(["ionice", "-p", *(thread.name for thread in threads)], text=True)
    idle = {name for name, line in zip(names, said.splitlines(), strict=True) if line.startswith("idle")}
    assert idle == {"zramd-out"}


def test_what_is_out_outlives_servers(serve: Serve, state: Path, backing: Path) -> None:
    data_id = put_out(state, backing)
    settings = {"state": state, "backing": backing, "verify": "off"}
    served = serve(**settings)
    assert kind(served, 7) == "out"
    client = NbdSocket(served)
    assert client.read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    assert client.ask(client.WRITE, 0, BLOCK, CONTENTS[1]) == 0
    assert client.ask(client.WRITE, 5 * BLOCK + 10, 20, b"x" * 20) == 0
    served.stop(signal.SIGKILL)

    served = serve(**settings)
    client = NbdSocket(served)
    wanted = [CONTENTS[1], *CONTENTS[1:]]
    wanted[5] = wanted[5][:10] + b"x" * 20 + wanted[5][30:]
    assert client.read(0, BLOCKS * BLOCK) == b"".join(wanted)
    assert (kind(served, 0), kind(served, 7)) == ("lz4", "out")
    assert served.request("POST", "/check")[0] == 200
    assert superblock(backing).data_id == data_id
    client.close()
    served.stop()
    served = serve(**settings)
    assert NbdSocket(served).read(0, BLOCKS * BLOCK) == b"".join(wanted)


def test_a_restart(started: Callable[..., Started], state: Path, backing: Path) -> None:
    """The new server looks at the backing while the old one has it, and opens it once that has left."""
    put_out(state, backing)
    served = started(f"backing={backing}")
    pid = served.pid
    done = served.restart("writeback_limit=2G")
    assert (done.returncode, done.stderr) == (0, "")
    assert served.pid != pid
    assert served.ask("/settings")["backing"] == str(backing)
    assert served.ask("/settings")["writeback_limit"] == 2 << 30
    client = NbdSocket(served)
    assert client.read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    client.close()
    served.refused("writeback_limit=1", status=2)
    for none in ("set", "restart"):
        done = zramd_command(none, "--rundir", served.rundir, "writeback_limit=0")
        assert done.returncode == 2
        assert "writeback_limit: '0' cannot be set: use off for no limit, " in done.stderr
    assert served.ask("/settings")["writeback_limit"] == 2 << 30
    done = zramd_command("set", "--rundir", served.rundir, "writeback_limit=off")
    assert (done.returncode, done.stdout, done.stderr) == (0, "writeback_limit=off\n", "")
    assert served.restart("compaction=on").returncode == 0
    assert served.ask("/settings")["writeback_limit"] == 0
    assert served.ask("/stats")["writeback"]["limit_left"] is None
    with backing.open("r+b") as file:
        file.write(b"\1" * 64)  # somebody writes over it: found before the old server leaves
    why = served.refused("compaction=off")
    assert "goes on as before: the new server does not start: " in why
    assert f"backing '{backing}' holds something else" in why


@pytest.fixture
def other(backing: Path) -> Path:
    return allocate(backing.with_name("other"))


def test_a_restart_with_another_one(
    started: Callable[..., Started], state: Path, backing: Path, other: Path
) -> None:
    """What the state knows of its blocks is read while the old server has it: that serves on."""
    put_out(state, backing)
    served = started(f"backing={backing}")
    sentence = (
        f"backing '{other}' is not the one on which blocks of state '{state}' are: use that; "
        "'zramd backing show PATH' says whose blocks are on one"
    )
    kept = superblock(backing)
    for found in (None, kept._replace(id="5" * 32), kept._replace(id="")):
        if found:
            with other.open("r+b") as file:
                file.write(pack(found))
        before = other.read_bytes()
        why = served.refused(f"backing={other}")
        assert why == f"again goes on as before: the new server does not start: {sentence}"
        assert other.read_bytes() == before
    assert served.refused("backing=").endswith(
        f"state '{state}' has blocks on a backing: start it with backing=PATH; 'zramd backing show PATH' "
        "says whose blocks are on one"
    )
    assert "cannot be opened: no such file" in served.refused(f"backing={other}-none")
    assert served.ask("/settings")["backing"] == str(backing)
    assert NbdSocket(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)


def test_a_restart_while_nothing_is_out(started: Callable[..., Started], backing: Path, other: Path) -> None:
    """From one to the other, to none and back; but not to one that another state needs."""
    served = started(f"backing={backing}")
    for path in (other, "", backing):
        done = served.restart(f"backing={path}")
        assert (done.returncode, done.stderr) == (0, "")
        assert served.ask("/settings")["backing"] == str(path)
    found = superblock(backing)
    with other.open("r+b") as file:
        file.write(pack(found._replace(id="5" * 32, data_id="6" * 32)))
    why = served.refused(f"backing={other}")
    assert (
        f"goes on as before: the new server does not start: backing '{other}' may hold blocks of again" in why
    )
    with other.open("r+b") as file:
        file.write(pack(found._replace(id="5" * 32)))  # ours, of before: nothing there is needed
    assert served.restart(f"backing={other}").returncode == 0


def test_a_state_needs_its_backing(serve: Serve, state: Path, backing: Path) -> None:
    put_out(state, backing)
    assert refused(serve, state=state) == (
        f"state '{state}' has blocks on a backing: start it with backing=PATH; 'zramd backing show PATH' "
        "says whose blocks are on one"
    )
    other = allocate(backing.with_name("other"))
    for _ in range(2):
        assert refused(serve, state=state, backing=other).startswith(
            f"backing '{other}' is not the one on which blocks of state '{state}' are: use that; "
        )
        assert not any(other.read_bytes()[:4096])
    served = serve(state=state, backing=backing)
    assert NbdSocket(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)


def test_a_backing_that_another_state_needs(
    serve: Serve, memory_folder: Path, state: Path, backing: Path
) -> None:
    data_id = put_out(state, backing)
    before = backing.read_bytes()
    sentence = (
        f"backing '{backing}' may hold blocks of zram0 (data {data_id}): start it with the state that has "
        f"that data, or, if nobody needs it, run 'zramd backing format --force {backing}'"
    )
    assert refused(serve, backing=backing) == sentence
    assert refused(serve, backing=backing, state=memory_folder / "new") == sentence
    done = zramd_command("backing", "format", backing)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"zramd: backing '{backing}' may hold blocks of zram0, whose state would be of"
    )
    assert backing.read_bytes() == before
    assert zramd_command("backing", "format", "--force", backing).returncode == 0
    assert refused(serve, backing=backing, state=state).startswith(f"backing '{backing}' is not the one on")
    serve(backing=backing, state=memory_folder / "new")
    assert superblock(backing).has_state


def test_from_one_backing_to_another(serve: Serve, state: Path, backing: Path) -> None:
    """The data has the same name on both, but its blocks are on the second: the first is refused."""
    put_out(state, backing, 0)
    other = allocate(backing.with_name("other"))
    put_out(state, other)
    assert superblock(backing).data_id == superblock(other).data_id
    assert refused(serve, state=state, backing=backing).startswith(f"backing '{backing}' is not the one on")
    served = serve(state=state, backing=other)
    assert NbdSocket(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)


def test_a_backing_in_use(serve: Serve, backing: Path) -> None:
    served = serve(backing=backing, name="swap0")
    assert f"what goes to backing '{backing}' is lost when this server ends: it has no state" in (
        served.log.read_text()
    )
    assert refused(serve, backing=backing) == (
        f"backing '{backing}' is in use by another server: stop that first, or use another one"
    )
    done = zramd_command("backing", "format", "--force", backing)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"zramd: backing '{backing}' is in use by another server")
    done = zramd_command("backing", "show", backing)
    assert (done.returncode, done.stderr) == (0, "")
    shown = dict(re.split("  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert shown["used now"] == "yes, by another program"
    assert shown["size"] == "8 MiB, 128 extents of 64 KiB"
    assert shown["holds"].startswith("blocks of swap0, data ")
    assert shown["needed"] == "yes, now"
    found = superblock(backing)
    served.stop(signal.SIGKILL)
    assert "\nneeded    no: that data is gone\n" in zramd_command("backing", "show", backing).stdout
    answer = json.loads(zramd_command("backing", "show", "-J", backing).stdout)
    assert (answer["used"], answer["needed"], answer["superblock"]["name"]) == (False, False, "swap0")
    os.truncate(backing, SIZE // 2)
    shown = zramd_command("backing", "show", backing).stdout
    had = "it had 8 MiB when the superblock was written\n"
    assert f"4 MiB, 64 extents of 64 KiB; it has shrunk: {had}" in shown
    os.unlink(backing)
    with allocate(backing).open("r+b") as file:
        file.write(pack(found))
        os.posix_fallocate(file.fileno(), 0, 2 * SIZE)
    shown = zramd_command("backing", "show", backing).stdout
    assert f"16 MiB, 256 extents of 64 KiB; it has grown: {had}" in shown
    serve(backing=backing)


def test_a_backing_in_use_by_another_name(serve: Serve, loop_device: str, disk_folder: Path) -> None:
    """A file, and a loop device over it: two servers would write to the same bytes."""
    file = disk_folder / "loop"
    served = serve(backing=loop_device, name="swap0")
    assert refused(serve, backing=file) == (
        f"backing '{file}' is in use by {loop_device}: stop that first, or use another one"
    )
    shown = zramd_command("backing", "show", file).stdout
    assert shown.endswith(f"\nused now  yes, by {loop_device}\n")
    served.stop()
    serve(backing=loop_device)


def test_a_reset_and_a_kill(serve: Serve, state: Path, backing: Path) -> None:
    """The data has another name then; the backing is this device's still."""
    data_id = put_out(state, backing)
    served = serve(state=state, backing=backing)
    assert served.request("POST", "/reset")[0] == 200
    served.stop(signal.SIGKILL)
    served = serve(state=state, backing=backing)
    assert NbdSocket(served).read(0, BLOCKS * BLOCK) == bytes(BLOCKS * BLOCK)
    assert (served.rundir / rundir.DATA_ID).read_text().strip() != data_id
    assert served.request("GET", "/health")[0] == 200


@pytest.mark.parametrize("size", ["odd", "none", "folder", "holes"])
def test_what_cannot_be_one(serve: Serve, disk_folder: Path, size: str) -> None:
    path = disk_folder / size
    if size == "folder":
        path.mkdir()
    elif size != "none":
        with path.open("wb") as file:
            file.truncate(SIZE if size == "holes" else 5000)
    words = {"odd": "has 5000 bytes", "none": "cannot be opened: no such file", "folder": "is a folder"}
    assert refused(serve, backing=path).startswith(f"backing '{path}' {words.get(size, 'has holes')}")


def test_a_state_keeps_its_format_until_something_is_out(serve: Serve, state: Path, backing: Path) -> None:
    """A zramd from before it had backings goes on with a state that has used none."""
    served = serve(state=state, backing=backing)
    assert NbdSocket(served).ask(NbdSocket.WRITE, 0, BLOCK, CONTENTS[0]) == 0
    served.stop()
    assert state_format(state) < 3
    put_out(state, backing)
    assert state_format(state) == 3


def test_the_thread_model(serve: Serve, backing: Path) -> None:
    """A read that waits for a disk holds up no other; an nbdkit before 1.34 cannot do that safely."""
    served = serve("-v", backing=backing)
    version = subprocess.run(["nbdkit", "--version"], capture_output=True, text=True, check=True).stdout
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    model = "parallel" if numbers >= (1, 34) else "serialize_requests"
    assert re.findall("using thread model: (.*)", served.log.read_text()) == [model]


def test_a_block_device(serve: Serve, state: Path, loop_device: str) -> None:
    put_out(state, Path(loop_device))
    served = serve(state=state, backing=loop_device)
    assert NbdSocket(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    assert refused(serve, backing=loop_device) == (
        f"backing '{loop_device}' is in use: another program has it, perhaps another zramd: stop that first, "
        "or use another one"
    )
    assert zramd_command("backing", "format", "--force", loop_device).returncode == 1
    served.stop(signal.SIGKILL)
    wait_until(lambda: served.process.poll() is not None)
    served = serve(state=state, backing=loop_device)
    assert NbdSocket(served).read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)


def test_a_restart_on_a_block_device(started: Callable[..., Started], loop_device: str) -> None:
    """Two processes cannot have it at once, not for a moment."""
    served = started(f"writeback-device={loop_device}")
    for _ in range(3):
        pid = served.pid
        done = served.restart()
        assert (done.returncode, done.stderr) == (0, "")
        assert served.pid != pid
    assert served.ask("/settings")["backing"] == loop_device


def test_without_a_state_the_user_is_told(tmp_path: Path, backing: Path) -> None:
    """Of a server in the background, by the command that starts it."""
    folder = tmp_path / "run"
    done = zramd_command("start", "none0", "--size", "16M", f"rundir={folder}", f"backing={backing}")
    try:
        assert done.returncode == 0
        assert done.stderr == (
            f"zramd: what goes to backing '{backing}' is lost when this server ends: it has no state\n"
        )
    finally:
        assert zramd_command("stop", "--rundir", folder).returncode == 0
