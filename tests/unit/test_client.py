"""Finding devices, and asking servers that answer wrong, late or not at all."""

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zramd import client, peer, rundir
from zramd.errors import DeviceError, UsageError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which devices are looked for."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "zramd"


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[bytes], client.Served]]:
    """Make a device whose control socket gives the same answer to whatever is asked."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    asked: list[socket.socket] = []

    def make(answer: bytes | None) -> client.Served:
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
        return client.Served("a", str(tmp_path), 1)

    yield make
    listener.close()
    for connection in asked:
        connection.close()


def test_every(place: Path) -> None:
    assert client.every() == []
    live = rundir.Rundir(str(place / "b"))
    (place / "a").mkdir()
    (place / "a" / "pid").write_text("1\n")
    (place / "nothing").mkdir()
    (place / "file.attached").write_text("x")
    found = [(served.name, served.path, served.pid) for served in client.every()]
    assert found == [("a", f"{place}/a", None), ("b", f"{place}/b", os.getpid())]
    assert client.find("b").pid == os.getpid()
    with pytest.raises(DeviceError, match="the server of a has died, and its data with it: start it again"):
        client.find("a")
    assert client.look("a").pid is None
    assert client.find(None, f"{place}/b").name == "b"
    live.remove()
    with pytest.raises(DeviceError, match="there is no device 'b': use one of a"):
        client.find("b")


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
        client.look(name)


def test_ask(answering: Callable[[bytes], client.Served]) -> None:
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
        (b"", DeviceError, "a does not answer: '.*/control.sock': what it sends is not an answer"),
        (b"HTTP/1.1 xx\r\n\r\n", DeviceError, "what it sends is not an answer"),
        (b"HTTP/1.1 \r\n\r\n", DeviceError, "what it sends is not an answer"),
        (b"\x00\xff\r\n\r\n", DeviceError, "what it sends is not an answer"),
    ],
)
def test_wrong_answers(
    answering: Callable[[bytes], client.Served], answer: bytes, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        answering(answer).ask_json("GET", "/x")


def test_no_answer(answering: Callable[[bytes | None], client.Served], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"there is no '.*/control.sock': it is starting, "):
        client.Served("a", str(tmp_path / "none"), 1).request("GET", "/x")
    with pytest.raises(DeviceError, match=r"a does not answer within 0.1 seconds: look at its process, 1$"):
        answering(None).request("GET", "/x", timeout=0.1)


def test_unreadable(place: Path, tmp_path: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    place.write_text("a file")
    with pytest.raises(DeviceError, match="cannot be read: not a directory"):
        client.every()


def test_a_want_of_descriptors_does_not_pass_for_a_want_of_a_state(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told that the data is lost removes it."""
    (place / "a").mkdir(parents=True)
    (place / "a" / "state").write_text("/kept\n")

    def short(*arguments: object, **rest: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    served = client.Served("a", str(place / "a"), None)
    with monkeypatch.context() as few:
        few.setattr("builtins.open", short)
        with pytest.raises(DeviceError, match="whether it has a state cannot be told: too many open files"):
            served._state()


def test_a_want_of_memory_does_not_pass_for_another_namespace(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = rundir.Rundir(str(place / "b"))

    def short(path: str) -> str:
        raise OSError(errno.ENOMEM, "Cannot allocate memory", path)

    with monkeypatch.context() as few:
        few.setattr(os, "readlink", short)
        with pytest.raises(DeviceError, match=r"who serves '.*' cannot be told: .*cannot allocate memory"):
            peer.find("b", str(place / "b"))
    live.remove()
