"""Finding devices, and asking servers that answer wrong, late or not at all."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from zramd.contract import exchange, rundir
from zramd.control import peer, servers
from zramd.errors import DeviceError, UsageError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which devices are looked for."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "zramd"


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[bytes], servers.Served]]:
    """Make a device whose control socket gives the same answer to whatever is asked."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    asked: list[socket.socket] = []

    def make(answer: bytes | None) -> servers.Served:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()

        def answer_once() -> None:
            connection, _ = listener.accept()
            asked.append(connection)
            if answer is not None:
                connection.recv(4096)
                connection.sendall(answer)
                connection.close()

        threading.Thread(target=answer_once, daemon=True).start()
        return servers.Served("a", str(tmp_path), 1)

    yield make
    listener.close()
    for connection in asked:
        connection.close()


def test_every(place: Path) -> None:
    assert servers.every() == []
    live = rundir.Rundir(str(place / "b"))
    (place / "a").mkdir()
    (place / "a" / "pid").write_text("1\n")
    (place / "nothing").mkdir()
    (place / "file.attached").write_text("x")
    found = [(served.name, served.path, served.pid) for served in servers.every()]
    assert found == [("a", f"{place}/a", None), ("b", f"{place}/b", os.getpid())]
    assert servers.find("b").pid == os.getpid()
    with pytest.raises(DeviceError, match="the server of a has died, and its data with it: start it again"):
        servers.find("a")
    assert servers.look("a").pid is None
    assert servers.find(None, f"{place}/b").name == "b"
    live.remove()
    with pytest.raises(DeviceError, match="there is no device 'b': use one of a"):
        servers.find("b")


def test_many_may_look_while_a_server_starts(tmp_path: Path) -> None:
    """Who looks whether a server lives takes its lock for a moment: that must not keep one from starting."""
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            rundir.holder(str(tmp_path / "run"))

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            rundir.Rundir(str(tmp_path / "run")).remove()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "a/b", "/run"])
def test_no_name(place: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not a device's name"):
        servers.look(name)


def test_ask(answering: Callable[[bytes], servers.Served]) -> None:
    served = answering(b'HTTP/1.1 200 OK\r\nX: y\r\n\r\n{"a": 1}')
    assert served.ask_json("GET", "/x") == {"a": 1}


@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        (b"HTTP/1.1 400 Bad\r\n\r\nthat is wrong\n", UsageError, "a: that is wrong"),
        (b"HTTP/1.1 409 Conflict\r\n\r\nin use\nmore\n", DeviceError, "a: in use"),
        (b"HTTP/1.1 503 No\r\n\r\n", DeviceError, "a: status 503"),
        (
            b"HTTP/1.1 404 Not Found\r\n\r\nno such path",
            DeviceError,
            "another version of zramd, which .* '/x'",
        ),
        (b'HTTP/1.1 200 OK\r\n\r\n{"a": ', DeviceError, "a does not answer /x in whole: is it stopping?"),
        (b"HTTP/1.1 200 OK\r\n\r\n[1]", DeviceError, "a does not answer /x in whole"),
        (b"", DeviceError, "a does not answer: '.*/control.sock': what it sends is not an answer"),
        (b"HTTP/1.1 xx\r\n\r\n", DeviceError, "what it sends is not an answer"),
        (b"HTTP/1.1 \r\n\r\n", DeviceError, "what it sends is not an answer"),
        (b"\x00\xff\r\n\r\n", DeviceError, "what it sends is not an answer"),
    ],
)
def test_wrong_answers(
    answering: Callable[[bytes], servers.Served], answer: bytes, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        answering(answer).ask_json("GET", "/x")


def test_no_answer(answering: Callable[[bytes | None], servers.Served], tmp_path: Path) -> None:
    held = rundir.Rundir(str(tmp_path / "none"))
    served = servers.Served("a", held.path, os.getpid())
    with pytest.raises(DeviceError, match=r"there is no '.*/control.sock': it is starting, "):
        served.request("GET", "/x")
    held.remove()
    with pytest.raises(DeviceError, match=r"^a has stopped meanwhile$"):
        served.request("GET", "/x")
    with pytest.raises(DeviceError, match=r"a does not answer within 0.1 seconds: look at its process, 1$"):
        answering(None).request("GET", "/x", timeout=0.1)


@pytest.mark.parametrize("much", [False, True])
def test_an_answer_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, much: bool) -> None:
    """Whoever serves, nobody waits for ever, nor does it fill our memory."""
    if much:
        monkeypatch.setattr(exchange, "MAX_ANSWER", 100_000)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as connection, suppress(OSError):
                while True:
                    connection.sendall(b"x" * 10_000 if much else b"x")
                    time.sleep(0 if much else 0.01)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        served = servers.Served("a", str(tmp_path), 1)
        sentence = "what it sends has no end" if much else "does not answer within 0.5 seconds"
        with pytest.raises(DeviceError, match=sentence):
            served.request("GET", "/x", timeout=30 if much else 0.5)
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a link of another user's")
def test_a_link_in_the_folders_place(tmp_path: Path) -> None:
    """Made by its owner once we had looked: what is asked for would be done to another device."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    os.lchown(link, 65534, 65534)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()
        served = servers.Served("a", str(link), 1)
        with pytest.raises(DeviceError, match=r"not answer: .* its folder has become another user's link"):
            served.request("POST", "/reset", timeout=1)


def test_a_server_that_stops_while_one_looks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has not died, and nothing of it is left to be named."""
    look = servers._server

    def late(path: str) -> int | None:
        os.unlink(f"{path}/pid")
        return look(path)

    monkeypatch.setattr(servers, "_server", late)
    for found in (servers.every, lambda: servers.find("a")):
        (place / "a").mkdir(parents=True, exist_ok=True)
        (place / "a" / "pid").write_text("1\n")
        if found is servers.every:
            assert found() == []
        else:
            with pytest.raises(DeviceError, match=r"^a has stopped meanwhile$"):
                found()


def test_a_server_that_ends_before_it_is_sent_a_signal(place: Path) -> None:
    """No process is found then, and not because it were in a container."""
    held = rundir.Rundir(str(place / "a"))
    served = servers.find("a")
    held.remove()
    with pytest.raises(DeviceError, match=r"^a has stopped meanwhile$"):
        served.process()


def test_a_pipe_in_the_place_of_the_states(place: Path) -> None:
    """The folder's owner may wait for who opens it."""
    (place / "a").mkdir(parents=True)
    (place / "a" / "pid").write_text("1\n")
    os.mkfifo(place / "a" / "state_path")
    said: list[str] = []
    looking = threading.Thread(target=lambda: said.append(str(servers.look("a").died())), daemon=True)
    looking.start()
    looking.join(10)
    assert len(said) == 1
    assert said[0].startswith("the server of a has died, and its data with it: ")


def test_a_long_place_of_the_state(place: Path) -> None:
    state = place / "/".join(["x" * 200] * 4)
    state.parent.mkdir(parents=True)
    state.write_text("")
    (place / "a").mkdir(parents=True)
    (place / "a" / "pid").write_text("1\n")
    (place / "a" / "state_path").write_text(f"{state}\n")
    assert str(servers.look("a").died()).endswith(f"start it again with state={state}")


def test_unreadable(place: Path, tmp_path: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    place.write_text("a file")
    with pytest.raises(DeviceError, match="cannot be read: not a directory"):
        servers.every()


def test_a_want_of_descriptors_does_not_pass_for_a_want_of_a_state(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told that the data is lost removes it."""
    (place / "a").mkdir(parents=True)
    (place / "a" / "state_path").write_text("/kept\n")

    def short(*arguments: object, **rest: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    served = servers.Served("a", str(place / "a"), None)
    assert served._state() == "/kept"
    with monkeypatch.context() as few:
        few.setattr(os, "open", short)
        with pytest.raises(DeviceError, match="it is not known whether it has a state: too many open files"):
            served._state()


def test_a_want_of_memory_does_not_pass_for_another_namespace(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = rundir.Rundir(str(place / "b"))

    def short(path: str) -> str:
        raise OSError(errno.ENOMEM, "Cannot allocate memory", path)

    with monkeypatch.context() as few:
        few.setattr(os, "readlink", short)
        with pytest.raises(DeviceError, match=r"which process serves '.*': .*cannot allocate memory"):
            peer.find("b", str(place / "b"))
    live.remove()
