"""zramd restart while the device is saved or loaded: it is refused, and the save or load goes on whole."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.content import block_content
from support.run import wait_until
from support.run import zramd_command as zramd
from support.server import NbdkitProcess, Started

BLOCK = 4096
BLOCKS = 4000
COMMAND = [sys.executable, "-P", "-m", "zramd"]


@pytest.fixture
def started(tmp_path: Path, memory_folder: Path) -> Iterator[Started]:
    server = Started(tmp_path, memory_folder / "state")
    yield server
    assert zramd("stop", "--rundir", server.rundir).returncode == 0


def fill(served: NbdkitProcess | Started) -> None:
    client = NbdSocket(served)
    for block in range(BLOCKS):
        assert client.ask(client.WRITE, block * BLOCK, BLOCK, block_content(block, 1)) == 0
    client.close()


def is_whole(served: Started) -> bool:
    client = NbdSocket(served)
    data = client.read(0, BLOCKS * BLOCK)
    client.close()
    return data == b"".join(block_content(block, 1) for block in range(BLOCKS))


def refused(served: Started, what: str) -> None:
    """See that a restart is refused, and that the same process serves on."""
    pid = served.pid
    done = served.restart()
    sentence = f"again goes on as before: a {what} is under way: restart when it is done"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"zramd: {sentence}\n")
    assert served.pid == pid


def test_while_it_is_loaded(serve: Callable[..., NbdkitProcess], started: Started, tmp_path: Path) -> None:
    source = serve()
    fill(source)
    file = tmp_path / "saved"
    assert zramd("save", "--rundir", source.rundir, file).returncode == 0
    data = file.read_bytes()
    load = subprocess.Popen(
        [*COMMAND, "load", "--rundir", str(started.rundir), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert load.stdin is not None
    load.stdin.write(data[: len(data) // 2])
    load.stdin.flush()
    wait_until(lambda: started.ask("/stats")["pages_stored"])
    refused(started, "load")
    said, errors = load.communicate(data[len(data) // 2 :], timeout=60)
    assert (load.returncode, errors) == (0, b"")
    assert said.startswith(f"{BLOCKS} blocks, ".encode())
    assert is_whole(started)
    assert started.restart().returncode == 0
    assert is_whole(started)


def test_while_it_is_saved(started: Started, tmp_path: Path) -> None:
    fill(started)
    file = tmp_path / "saved"
    reader, writer = os.pipe()
    save = subprocess.Popen(
        [*COMMAND, "save", "--rundir", str(started.rundir), "-"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    begun = os.read(reader, 8)  # and no more: the pipe is full then
    assert begun == b"\x89ZRAMD\r\n"
    refused(started, "save")
    with open(reader, "rb") as pipe:
        file.write_bytes(begun + pipe.read())
    _, errors = save.communicate(timeout=60)
    assert (save.returncode, errors.count(b"\n")) == (0, 1)
    assert zramd("load", "--check", file).stdout.count(f"blocks    {BLOCKS} of") == 1
    assert started.restart().returncode == 0
    assert is_whole(started)
