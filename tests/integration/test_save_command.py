"""`zramd save` and `zramd load` through the real command against real servers."""

import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.run import wait_until
from support.server import NbdkitProcess
from support.steps import Steps

from zramd.contract.rundir import DATA_ID

Serve = Callable[..., NbdkitProcess]
BLOCK = 4096
SIZE = 64 << 20
COMMAND = [sys.executable, "-P", "-m", "zramd"]
ENV = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def zramd(*words: object, **more: object) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        env=ENV,
        stdin=more.pop("stdin", subprocess.DEVNULL),
        capture_output=True,
        timeout=60,
        **more,  # type: ignore[call-overload]
    )


def done(*words: object, **more: object) -> str:
    result = zramd(*words, **more)
    assert result.returncode == 0, result
    return (result.stdout + result.stderr).decode()


def refused(*words: object, status: int = 1, **more: object) -> str:
    result = zramd(*words, **more)
    said = result.stderr.decode()
    assert (result.returncode, said.count("\n"), said[:7]) == (status, 1, "zramd: "), result
    return said[7:-1]


def at(served: NbdkitProcess) -> tuple[str, str]:
    return "--rundir", str(served.rundir)


def fill(served: NbdkitProcess, size: int = SIZE) -> None:
    """Write noise, what compresses, words, zeros and holes."""
    dice = random.Random(1)
    client = NbdSocket(served)
    for start in range(0, size, 1 << 20):
        kind = dice.randrange(5)
        if kind == 0:
            continue
        data = b"".join(
            {1: dice.randbytes(8) * 512, 2: bytes(BLOCK)}.get(
                kind, dice.randbytes(dice.choice((300, 2000, BLOCK))).ljust(BLOCK, b"\7")
            )
            for _ in range(256)
        )
        assert client.ask(client.WRITE, start, len(data), data) == 0
    leave(served, client)


def leave(served: NbdkitProcess, client: NbdSocket) -> None:
    client.close()
    wait_until(lambda: served.clients() == 0)


def content(served: NbdkitProcess, size: int = SIZE) -> bytes:
    client = NbdSocket(served)
    data = b"".join(client.read(start, 1 << 20) for start in range(0, size, 1 << 20))
    leave(served, client)
    return data


def held(tmp_path: Path, served: NbdkitProcess) -> "tuple[subprocess.Popen[bytes], int]":
    """A save into a pipe that nobody reads further, and the pipe."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [*COMMAND, "save", *at(served), "-"], env=ENV, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert os.read(reader, 8) == b"\x89ZRAMD\r\n"
    return process, reader


def test_save_and_load(serve: Serve, tmp_path: Path) -> None:
    first, second = serve(), serve(disksize=SIZE + (1 << 20), verify="on")
    fill(first)
    file = tmp_path / "saved"
    said = done("save", *at(first), file)
    numbers = first.stats()
    assert said.startswith(f"{numbers['pages_stored']} blocks, {file.stat().st_size} bytes, ")
    assert file.stat().st_mode & 0o777 == 0o600
    assert [name for name in os.listdir(tmp_path) if name.startswith("saved")] == ["saved"]
    before = (second.rundir / DATA_ID).read_text()
    done("load", *at(second), file)
    assert content(second) == content(first)
    after = second.stats()
    for name in ("pages_stored", "compr_data_size", "same_pages", "huge_pages"):
        assert after[name] == numbers[name] > 0, name
    assert json.loads(second.request("POST", "/check")[1]) == {"sound": True}
    assert (second.rundir / DATA_ID).read_text() != before
    shown = done("load", "--check", file)
    assert f"disksize  {SIZE} bytes\n" in shown
    assert f"blocks    {numbers['pages_stored']} of {SIZE // BLOCK}\n" in shown
    assert f"payload   {numbers['compr_data_size']} bytes\n" in shown
    # The device has data now.
    assert "is not loaded" in (text := refused("load", *at(second), file))
    assert "the device is not empty: --force drops what it holds" in text
    done("load", "--force", *at(second), file)
    assert content(second) == content(first)


def test_pipe(serve: Serve) -> None:
    first, second = serve(), serve()
    fill(first)
    source = subprocess.Popen(
        [*COMMAND, "save", *at(first), "-"], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    done("load", *at(second), "-", stdin=source.stdout)
    assert source.wait(10) == 0
    assert content(second) == content(first)


def test_save_under_load(serve: Serve, tmp_path: Path) -> None:
    """Clients go on; without --live there is no file, with it each block is whole."""
    served, other = serve(), serve()
    fill(served)
    stop = threading.Event()

    def write() -> None:
        client = NbdSocket(served)
        dice = random.Random(2)
        while not stop.is_set():
            data = bytes([dice.randrange(256)]) * 16 + b"block" + bytes(BLOCK - 21)
            assert client.ask(client.WRITE, dice.randrange(64) * BLOCK + SIZE - 64 * BLOCK, BLOCK, data) == 0
        client.close()

    thread = threading.Thread(target=write)
    before = served.stats()["writes"]
    thread.start()
    file = tmp_path / "saved"
    try:
        wait_until(lambda: served.stats()["writes"] > before + 50)
        text = refused("save", *at(served), file)
        assert "a client changed the device while it was saved: stop what writes to it, or use --live" in text
        assert not [name for name in os.listdir(tmp_path) if name.startswith("saved")]
        said = done("save", "--live", *at(served), file)
    finally:
        stop.set()
        thread.join()
    assert "requests changed the device while it was saved: its blocks are of different moments" in said
    done("load", *at(other), file)
    found = content(other)
    assert found[: SIZE - 64 * BLOCK] == content(served)[: SIZE - 64 * BLOCK]
    for block in range(SIZE - 64 * BLOCK, SIZE, BLOCK):
        data = found[block : block + BLOCK]
        assert data[16:21] in (b"block", data[:5], found[block + 16 : block + 21])
        assert data[16:21] != b"block" or data == data[:1] * 16 + b"block" + bytes(BLOCK - 21)


@pytest.mark.parametrize(
    "end", ["command INT", "command TERM", "command HUP", "command KILL", "server KILL", "server USR1"]
)
def test_interrupted(serve: Serve, steps: Steps, tmp_path: Path, memory_folder: Path, end: str) -> None:
    """The old file is untouched; no half of a new one is left, or is taken for a whole one."""
    served = serve(state=memory_folder / "state")
    fill(served)
    file = tmp_path / "saved"
    done("save", *at(served), file)
    old = file.read_bytes()
    before = sorted(os.listdir(tmp_path))
    steps.held.add("save.opened")
    process = subprocess.Popen(
        [*COMMAND, "save", *at(served), str(file)], env={**ENV, **steps.env}, stderr=subprocess.PIPE
    )
    steps.wait("save.opened")
    who, name = end.split()
    if who == "server":
        assert served.stop(getattr(signal, f"SIG{name}")) < 5  # a hand-over does not wait for the save
    else:
        process.send_signal(getattr(signal, f"SIG{name}"))
    steps.release()
    assert process.stderr is not None
    said = process.stderr.read().decode()
    status = process.wait(20)
    assert file.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == before
    if who == "server":
        assert status == 1
        assert said == "zramd: zram0 was not saved: its server ended, or gave up, meanwhile\n".replace(
            "zram0", served.rundir.name
        )
    elif name == "KILL":
        assert (status, said) == (-9, "")
    else:
        assert status == 128 + getattr(signal, f"SIG{name}")
        assert said == f"zramd: interrupted: '{file}' is as it was\n"
    if end == "command KILL":
        done("save", *at(served), file)  # the server has not been held up
        assert file.read_bytes() != old[:100]


def test_two_saves_to_one_file(serve: Serve, steps: Steps, tmp_path: Path) -> None:
    """Each writes a file of its own: what one does to its own is nothing to the other."""
    served = serve()
    fill(served)
    file = tmp_path / "saved"
    words = [*COMMAND, "save", *at(served), str(file)]
    steps.held.add("save.opened")
    first = subprocess.Popen(words, env={**ENV, **steps.env}, stderr=subprocess.PIPE)
    steps.wait("save.opened")
    done("save", *at(served), file)  # from its begin to its end while the first one is under way
    assert "blocks" in done("load", "--check", file)
    steps.release()
    _, said = first.communicate(timeout=20)
    assert first.returncode == 0, said
    assert "blocks" in done("load", "--check", file)
    third = subprocess.Popen(words, env={**ENV, **steps.env}, stderr=subprocess.PIPE)
    fourth = subprocess.Popen(words, env={**ENV, **steps.env}, stderr=subprocess.PIPE)
    third.communicate(timeout=20)
    fourth.communicate(timeout=20)
    assert (third.returncode, fourth.returncode) == (0, 0)
    assert "blocks" in done("load", "--check", file)
    assert [name for name in os.listdir(tmp_path) if name.startswith("saved")] == ["saved"]


def test_save_where_a_file_must_have_a_name(serve: Serve, tmp_path: Path) -> None:
    """Not every file system has files without one: what is made then goes when the save is interrupted."""
    served = serve()
    fill(served)
    file = tmp_path / "saved"
    code = (
        "import os, sys; from zramd.commands import main; opened = os.open\n"
        "def refuse(path, flags, *rest, **more):\n"
        "    if flags & os.O_TMPFILE == os.O_TMPFILE: raise OSError(95, 'not supported')\n"
        "    return opened(path, flags, *rest, **more)\n"
        "os.open = refuse; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-P", "-c", code, "save", *map(str, at(served)), str(file)]
    result = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result
    assert "blocks" in done("load", "--check", file)
    assert [name for name in os.listdir(tmp_path) if name.startswith("saved")] == ["saved"]


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "KILL"])
@pytest.mark.parametrize("step", ["load.reset", "load.begun", "load.sent"])
def test_load_interrupted(serve: Serve, steps: Steps, tmp_path: Path, step: str, name: str) -> None:
    """What was not sent whole is not loaded, and can be again; what was, is, and is said to be."""
    first, second = serve(), serve()
    fill(first)
    file = tmp_path / "saved"
    done("save", *at(first), file)
    done("load", *at(second), file)
    steps.held.add(step)
    process = subprocess.Popen(
        [*COMMAND, "load", "--force", *at(second), str(file)],
        env={**ENV, **steps.env},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    steps.wait(step)
    process.send_signal(getattr(signal, f"SIG{name}"))
    steps.release()
    out, said = process.communicate(timeout=20)
    sent = step == "load.sent"
    if name == "KILL":
        assert process.returncode == -signal.SIGKILL
    elif sent:
        assert (process.returncode, said) == (0, "")
        assert "blocks" in out
    else:
        assert process.returncode == 128 + getattr(signal, f"SIG{name}")
        assert said == f"zramd: interrupted: {second.rundir.name} is not loaded, but empty\n"
    wait_until(lambda: '"streams": []' in second.request("GET", "/health")[1])
    assert (content(second) == content(first)) is sent
    done("load", "--force", *at(second), file)
    assert content(second) == content(first)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize(
    "what", ["file", "link", "link to nothing", "open folder", "open folder of his", "second name"]
)
def test_what_another_user_has_planted(serve: Serve, tmp_path: Path, what: str) -> None:
    """It would be his to read, or root would write, or load, where he wants."""
    served = serve()
    fill(served)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    file, secret = shared / "a.save", tmp_path / "secret"
    done("save", *at(served), secret)
    before = secret.read_bytes()
    if what == "file":
        file.write_bytes(before)
        os.chown(file, 65534, 65534)
    elif what.startswith("link"):
        file.symlink_to(secret if what == "link" else tmp_path / "planted")
        os.chown(file, 65534, 65534, follow_symlinks=False)
    elif what == "second name":
        os.link(secret, file)
        os.chown(secret, 65534, 65534)
    else:
        (shared / "his").mkdir()
        (shared / "his").chmod(0o777)
        if what == "open folder of his":
            os.chown(shared / "his", 65534, 65534)
        file = shared / "his/a.save"
    text = refused("save", *at(served), file)
    assert text.startswith(f"'{file}' is not used: '") or text.startswith(
        f"'{file}' is not used: other users"
    )
    assert text.endswith(": save to a folder of your own, or to - and a pipe")
    text = refused("load", "--force", *at(served), file)
    assert f"to load it all the same: zramd load … - < {file}" in text
    assert secret.read_bytes() == before
    assert not (tmp_path / "planted").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("nameless", [True, False])
def test_a_folder_of_another_user(
    serve: Serve, tmp_path: Path, nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sudo zramd save NAME ~/FILE: the file is root's, and so is one that takes its place."""
    served = serve()
    fill(served)
    home = tmp_path / "home"
    (home / "deeper").mkdir(parents=True)
    for folder in (home, home / "deeper"):
        os.chown(folder, 65534, 65534)
    file = home / "deeper/disk.save"
    if not nameless:
        monkeypatch.setitem(ENV, "LD_PRELOAD", str(without_nameless_files(tmp_path)))
    for _ in range(2):
        done("save", *at(served), file)
        assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (0, 0o600)
        assert os.listdir(home / "deeper") == ["disk.save"]
    done("load", "--force", *at(served), file)
    os.chown(file, 65534, 65534)  # he may have put there what he wants to have loaded
    done("load", "--force", *at(served), file)
    done("save", *at(served), file)
    assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (0, 0o600)
    os.chown(file, 65533, 65533)
    for verb in ("save", "load"):
        assert "belongs to user 65533" in refused(verb, *at(served), file)


def without_nameless_files(folder: Path) -> Path:
    """Return a library to preload: as a file system (NFS, FAT) that has no files without a name."""
    source = folder / "without.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <errno.h>\n#include <fcntl.h>\n"
        "#include <stdarg.h>\n"
        "int openat64(int folder, const char *name, int flags, ...) {\n"
        "    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);\n"
        "    if ((flags & O_TMPFILE) == O_TMPFILE) { errno = EOPNOTSUPP; return -1; }\n"
        '    int (*real)(int, const char *, int, int) = dlsym(RTLD_NEXT, "openat64");\n'
        "    return real(folder, name, flags, mode);\n}\n"
    )
    words = ["gcc", "-shared", "-fPIC", "-o", str(folder / "without.so"), str(source), "-ldl"]
    subprocess.run(words, check=True)
    return folder / "without.so"


def test_our_own_links(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    fill(served)
    (tmp_path / "disk").mkdir()
    (tmp_path / "saves").symlink_to("disk")
    (tmp_path / "disk/latest").symlink_to("first")
    done("save", *at(served), tmp_path / "saves/latest")
    assert (tmp_path / "disk/first").stat().st_size
    done("load", "--force", *at(served), tmp_path / "saves/latest")


@pytest.mark.parametrize("length", [231, 255])
def test_a_name_as_long_as_one_can_be(serve: Serve, tmp_path: Path, length: int) -> None:
    """Also where a file must have a name before it is whole."""
    served = serve(disksize="16M")
    folder = tmp_path / "saves"
    folder.mkdir()
    file = folder / ("ä" + "x" * (length - 2))
    done("save", *at(served), file)
    done("save", *at(served), file)  # in its place
    done("load", "--check", file)
    assert list(folder.iterdir()) == [file]


def test_full_disk(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    fill(served)
    file = tmp_path / "saved"
    done("save", *at(served), file)
    old = file.read_bytes()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    text = refused("save", *at(served), file, preexec_fn=limit)
    assert text == f"'{file}' cannot be written: file too large"
    assert file.read_bytes() == old
    assert [name for name in os.listdir(tmp_path) if name.startswith("saved")] == ["saved"]
    assert "'/dev/full' is not a regular file" in refused("save", *at(served), "/dev/full", status=2)
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [*COMMAND, "save", *at(served), "-"], env=ENV, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert result.returncode == 1
    assert result.stderr == b"zramd: 'standard output' cannot be written: no space left on device\n"


def test_what_is_in_the_way(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    precious = tmp_path / "thesis.txt"
    precious.write_text("do not lose me")
    text = refused("save", *at(served), precious, status=2)
    assert text == f"'{precious}' is something else than a saved device: --force overwrites it"
    assert precious.read_text() == "do not lose me"
    assert "is not a regular file" in refused("save", *at(served), tmp_path, status=2)
    assert "no such file or directory" in refused("save", *at(served), tmp_path / "no" / "where")
    assert "which file?" in refused("save", "zram0", status=2)
    done("save", "--force", *at(served), precious)
    done("load", "--check", precious)
    link = tmp_path / "link"
    link.symlink_to(precious)
    done("save", *at(served), link)
    assert link.is_symlink()


def test_load_refusals(serve: Serve, tmp_path: Path) -> None:
    first, second, small, tight = serve(), serve(), serve(disksize="1M"), serve(mem_limit="1M")
    fill(first)
    file, bad = tmp_path / "saved", tmp_path / "bad"
    done("save", *at(first), file)
    data = file.read_bytes()

    def load(served: NbdkitProcess, path: Path, *more: str) -> str:
        text = refused("load", *more, *at(served), path)
        assert served.stats()["pages_stored"] == 0
        return text

    def check() -> str:
        return refused("load", "--check", bad)

    bad.write_bytes(data[: len(data) // 2])
    for text in (load(second, bad), check()):
        assert f"it was cut off (at byte {len(data) // 2})" in text
        assert f"'{bad}'" in text
    middle = len(data) // 2
    bad.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
    assert "a chunk is damaged (at byte" in load(second, bad)
    assert "a chunk is damaged (at byte" in check()
    bad.write_bytes(data + b"\n")
    assert f"something follows its end (at byte {len(data)})" in load(second, bad)
    bad.write_bytes(b"hello")
    assert load(second, bad).endswith("it is not a saved device")
    assert refused("load", "--check", bad) == f"'{bad}' cannot be used: it is not a saved device"
    assert load(small, file).endswith("it is larger than the device")
    assert "mem_limit or the budget leaves no room" in load(tight, file)
    assert "no such file" in refused("load", *at(second), tmp_path / "none")
    client = NbdSocket(second)
    assert "the device is in use: disconnect every client before a load" in refused("load", *at(second), file)
    assert "disconnect every client before a reset" in refused("load", "--force", *at(second), file)
    leave(second, client)
    # A file that cannot be loaded does not cost what is there.
    before = content(first)
    refused("load", "--force", *at(first), bad)
    assert content(first) == before
    done("load", *at(second), file)
    assert content(second) == before


def test_no_client_while_it_is_loaded(serve: Serve, tmp_path: Path) -> None:
    first, second = serve(), serve()
    fill(first)
    file = tmp_path / "saved"
    done("save", *at(first), file)
    data = file.read_bytes()
    process = subprocess.Popen(
        [*COMMAND, "load", *at(second), "-"],
        env=ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(data[: 4 << 20])
    process.stdin.flush()
    wait_until(lambda: second.stats()["pages_stored"] > 0)
    with pytest.raises((ConnectionError, OSError)):
        NbdSocket(second).read(0, BLOCK)
    wait_until(lambda: "zram0 is being loaded: connect when that is done" in second.log.read_text())
    assert second.request("POST", "/reset")[0] == 409
    assert "the device is being loaded already" in refused("load", *at(second), file)
    assert "the device is being loaded" in refused("save", *at(second), tmp_path / "other")
    process.stdin.close()  # it ends too early
    assert process.wait(20) == 1
    assert process.stderr is not None
    assert b"it was cut off (at byte 4194304)" in process.stderr.read()
    assert second.stats()["pages_stored"] == 0
    done("load", *at(second), file)
    assert content(second) == content(first)


def test_the_server_dies_in_a_load(serve: Serve, tmp_path: Path, memory_folder: Path) -> None:
    first = serve()
    fill(first)
    file = tmp_path / "saved"
    done("save", *at(first), file)
    configured = {"state": memory_folder / "state", "rundir": tmp_path / "run"}
    second = serve(**configured)
    process = subprocess.Popen(
        [*COMMAND, "load", *at(second), "-"], env=ENV, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(file.read_bytes()[: 4 << 20])
    process.stdin.flush()
    wait_until(lambda: second.stats()["pages_stored"] > 0)
    second.stop(9)
    process.stdin.close()
    assert process.stderr is not None
    assert b"has ended meanwhile" in process.stderr.read()
    assert process.wait(20) == 1
    third = serve(**configured)
    assert third.stats()["pages_stored"] == 0
    assert "was not completed: the part that had arrived was dropped" in third.log.read_text()
    done("load", *at(third), file)
    assert content(third) == content(first)


def test_curl(serve: Serve, tmp_path: Path) -> None:
    first, second = serve(), serve()
    fill(first)
    file = tmp_path / "saved"
    curl = ["curl", "-sS", "--fail", "--unix-socket"]
    subprocess.run(
        [*curl, f"{first.rundir}/control.sock", "http://zramd/save", "-o", file], check=True, timeout=60
    )
    subprocess.run(
        [*curl, f"{second.rundir}/control.sock", "-T", file, "http://zramd/load"], check=True, timeout=60
    )
    assert content(second) == content(first)
