"""How servers are begun: what nbdkit is run with, what the user is told, and what is refused."""

import errno
import io
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.run import wait_until

from zramd.commands import main, verb_parser
from zramd.contract import rundir
from zramd.control import life
from zramd.errors import ConfigError, DeviceError, RundirError, ZramdError
from zramd.launch import lifecycle, nbdkit, spawn, watcher
from zramd.settings import config


@pytest.fixture
def settings() -> config.Config:
    return config.parse([("size", "1G"), ("name", "zram0"), ("rundir", "/run/z")])


def test_greeting_names_a_command_that_is_there(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout zramd is beside its Python, where no shell looks."""
    (tmp_path / "zramd").touch(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert f"{tmp_path}/zramd attach" in watcher.greeting(settings, nbdkit.read_options([]), 4711)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"{tmp_path}/zramd" not in watcher.greeting(settings, nbdkit.read_options([]), 4711)


def test_greeting_of_a_folder_that_was_moved(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script beside Python begins with the path that Python had when it was installed."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "there is one").touch()
    for head, runs in (
        (f"#!{tmp_path}/gone/python", False),
        (f"#!/bin/sh\n'''exec' {tmp_path}/gone/python \"$0\"", False),
        (f"#!/bin/sh\n'''exec' \"{tmp_path}/none is\" \"$0\"", False),
        (f"#!/bin/sh\n'''exec' \"{tmp_path}/there is one\" \"$0\"", True),
        ("#!/bin/sh -e", True),
    ):
        (tmp_path / "zramd").write_text(f"{head}\n")
        (tmp_path / "zramd").chmod(0o755)
        for path in ("/nowhere", str(tmp_path)):
            monkeypatch.setenv("PATH", path)
            text = watcher.greeting(settings, nbdkit.read_options([]), 4711)
            assert (f"attach        {tmp_path}/python -P -m zramd attach" in text) == (not runs), head


def test_greeting(settings: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "base", lambda: rundir.ROOTS)
    text = watcher.greeting(settings, nbdkit.read_options([]), 4711)
    assert "nbd+unix:///zram0?socket=/run/z/nbd.sock" in text
    assert "stats folder  /run/z\n" in text
    assert "zramd attach --rundir /run/z\n" in text
    assert "zramd top --rundir /run/z\n" in text
    assert "kill 4711" in text
    usual = config.parse([("size", "1G"), ("name", "zram0"), ("rundir", "/run/zramd/zram0")])
    assert "zramd attach zram0\n" in watcher.greeting(usual, nbdkit.read_options(["-t", "4"]), 4711)
    assert "zramd top zram0\n" in watcher.greeting(usual, nbdkit.read_options([]), 4711)
    silent = config.parse([("size", "1G"), ("rundir", "/run/z"), ("endpoint", "off")])
    assert "cat /run/z/mm_stat" in watcher.greeting(silent, nbdkit.read_options([]), 4711)
    tls = watcher.greeting(settings, nbdkit.read_options(["--tls=require"]), 4711)  # the kernel has none
    assert "attach        nbdinfo 'nbds+unix:///zram0?socket=/run/z/nbd.sock'\n" in tls
    assert "attach        nbdinfo nbd://localhost:1/zram0\n" in watcher.greeting(
        settings, nbdkit.read_options(["-p", "1"]), 4711
    )


def test_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    answers = iter([False, False, True])
    watcher.watch(os.getpid(), lambda: next(answers), "hello")
    assert out.getvalue() == "hello"


def test_watch_ends_with_nbdkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    watcher.watch(child, lambda: False, "hello")
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("answer", "ready"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\n{"status": "ok", "pid": %d, "clients": 0}' % os.getpid(), True),
        (b'HTTP/1.1 200 OK\r\n\r\n{"status": "ok", "pid": 1%d}' % os.getpid(), False),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\nno", False),
        (b"", False),
    ],
    ids=["it answers", "another one", "no health", "nothing"],
)
def test_is_ready(tmp_path: Path, answer: bytes, ready: bool) -> None:
    """Only the server that was started counts, and it is that one which holds the folder."""
    folder = tmp_path / "run"
    settings = config.parse([("size", "1G"), ("rundir", str(folder))])
    assert not spawn.is_ready(settings, os.getpid())
    held = rundir.Rundir(str(folder))
    assert not spawn.is_ready(settings, os.getpid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / "control.sock"))
        listener.listen()

        def answer_once() -> None:
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=answer_once)
        thread.start()
        assert not spawn.is_ready(settings, os.getpid() + 1)
        assert spawn.is_ready(settings, os.getpid()) is ready
        thread.join()
    held.remove()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["serve", "word"], 2),
        (["serve", "--bad"], 2),
        (["--version"], 0),
        (["serve", "--help"], 0),
    ],
)
def test_usage(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["size=1X"], "disksize: '1X' is not a size"),
        (["--size", "1X"], "disksize: '1X' is not a size"),
        (["--size", "1G", "size=2G"], "size='2G' is a second value: disksize is already '1G'"),
        (["--name", "a/b"], "name: 'a/b' is not a name"),
        (["nam=x"], "unknown setting 'nam': did you mean 'name'?"),
    ],
)
def test_bad_settings(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *words]) == 2
    assert capsys.readouterr().err.startswith(f"zramd: {sentence}")


@pytest.fixture
def no_exec(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Keep `serve` from becoming nbdkit; returns the command lines it would have run."""
    ran: list[list[str]] = []
    monkeypatch.setattr("os.execvp", lambda file, argv: ran.append(argv))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/sbin/{name}")
    monkeypatch.setattr(watcher, "start", lambda settings, text: None)
    return ran


def run_serve(*words: str) -> int:
    """Run the verb, so that its errors reach the test."""
    arguments = verb_parser("serve").parse_args(words)
    status: int = arguments.run(arguments)
    return status


def test_serve(no_exec: list[list[str]], tmp_path: Path) -> None:
    run_serve("--name", "a", f"rundir={tmp_path}", "mem_limit=1M", "--", "-t", "2")
    plugin = ["python", nbdkit.plugin_path(), "name=a", f"rundir={tmp_path}", "mem_limit=1M", "disksize=1G"]
    assert no_exec == [["nbdkit", "-f", "-U", f"{tmp_path}/nbd.sock", "-t", "2", *plugin]]


def test_serve_where_a_server_lives(no_exec: list[list[str]], tmp_path: Path) -> None:
    held = rundir.Rundir(str(tmp_path / "run"))
    with pytest.raises(RundirError, match=f"in use by a running server \\(pid {os.getpid()}\\)"):
        run_serve(f"rundir={tmp_path}/run")
    held.remove()
    assert no_exec == []


def test_serve_without_nbdkit(
    no_exec: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"/nowhere:{tmp_path}")
    (tmp_path / "nbdkit").mkdir()
    with pytest.raises(ZramdError, match=r"nbdkit is not installed: run 'apt-get install .*nbdkit"):
        run_serve(f"rundir={tmp_path}")


def test_a_want_of_memory_does_not_pass_for_a_want_of_nbdkit(
    no_exec: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_stat = os.stat

    def stat(path: Any, **rest: Any) -> os.stat_result:
        if str(path).endswith("/nbdkit"):
            raise OSError(errno.ENOMEM, "Cannot allocate memory", path)
        return really_stat(path, **rest)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        run_serve(f"rundir={tmp_path}")


def test_no_place_for_the_rundir(no_exec: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"):
        run_serve()


def test_a_process_that_cannot_be_made_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number 0 would stand for our own process group, which was then killed with all that is in it."""
    parent = os.getpid()
    fork = os.fork

    def fork_once() -> int:
        if os.getpid() != parent:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", fork_once)
    with pytest.raises(DeviceError, match=r"no process can be started for it: .*temporarily unavailable"):
        spawn.spawn(["true"])


def test_a_server_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else it would serve although the start has failed."""
    numbers: list[int] = []

    def open_number(pid: int) -> int:
        numbers.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(spawn.pidfd, "open_number", open_number)
    settings = config.parse([("disksize", "1M"), ("rundir", str(tmp_path))])
    turn = life.Turn(str(tmp_path), os.open(tmp_path, os.O_RDONLY), False)
    with pytest.raises(OSError, match="Too many open files"):
        lifecycle._begin(settings, ["sleep", "60"], turn, "/")
    wait_until(lambda: not os.path.exists(f"/proc/{numbers[0]}"))
    os.close(turn.fd)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", "it gave no reason"),
        ("zramd: took over 5 blocks from state '/s' in 1 ms\n", "it gave no reason"),
        ("nbdkit: error: bind: permission denied\nnbdkit: debug\n", "debug"),
        (
            "Traceback:\n  x\nMemoryError\nnbdkit: error: /p.py: error running this script\n",
            "not enough memory",
        ),
        ("Exception in thread:\nMemoryError: \n", "not enough memory"),
        ("nbdkit: error: /p.py: error running this script\n", "/p.py: error running this script"),
    ],
)
def test_the_reason_of_a_server_that_does_not_start(said: str, reason: str) -> None:
    assert spawn.reason(said) == reason
