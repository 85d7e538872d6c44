"""Messages to a service manager that is busy, or not there."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from zramd.errors import StateError, ZramdError
from zramd.launch import fdstore
from zramd.process import notify


class BusyManager:
    """A service manager that reads only when told to, and to whom others have sent all that it takes."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(30)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            other.connect(self.path)
            try:
                while True:
                    other.send(b"STATUS=somebody else")
            except BlockingIOError:
                pass

    def read(self) -> tuple[str, list[int]]:
        """The next message that is not somebody else's, with its descriptors."""
        while True:
            text, fds, _, _ = socket.recv_fds(self.socket, 4096, 4)
            if text != b"STATUS=somebody else":
                return text.decode(), list(fds)


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BusyManager]:
    made = BusyManager(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", made.path)
    yield made
    made.socket.close()


def test_what_must_arrive_waits(busy: BusyManager) -> None:
    manager = notify.Manager()
    sender = threading.Thread(target=manager.insist, args=("READY=1",), daemon=True)
    sender.start()
    sender.join(0.1)
    assert sender.is_alive()
    assert busy.read() == ("READY=1", [])
    sender.join(30)
    assert not sender.is_alive()


def test_news_do_not(busy: BusyManager) -> None:
    notify.Manager().tell("STATUS=x")


def test_in_vain(busy: BusyManager) -> None:
    with pytest.raises(ZramdError) as caught:
        notify.Manager().insist("READY=1", patience=0.05)
    assert str(caught.value) == "the service manager does not take 'READY=1': its queue is full"


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nowhere"))
    manager = notify.Manager()
    manager.tell("STATUS=x")
    with pytest.raises(ZramdError) as caught:
        manager.insist("READY=1")
    assert str(caught.value) == "the service manager does not take 'READY=1': no such file or directory"


def test_no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.Manager().insist("READY=1")


def test_abstract_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(f"\0zramd-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@zramd-test-{os.getpid()}")
        notify.Manager().insist("READY=1")
        assert there.recv(100) == b"READY=1"


def test_memory_file_is_kept_or_nothing_is_served(busy: BusyManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "PATIENCE", 0.05)
    with pytest.raises(StateError) as caught:
        fdstore.prepare(-1)
    assert str(caught.value) == (
        "state=systemd: the service manager does not take 'FDSTORE=1': its queue is full, "
        "so it would not keep the data: start the service again"
    )
    monkeypatch.setattr(notify, "PATIENCE", 30)
    sender = threading.Thread(target=fdstore.prepare, args=(-1,), daemon=True)
    sender.start()
    text, fds = busy.read()
    sender.join(30)
    assert text == "FDSTORE=1\nFDNAME=zramd-state\nFDPOLL=0"
    assert len(fds) == 1
    os.close(fds[0])
