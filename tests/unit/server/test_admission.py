"""How many may come: who never says what he wants, too few descriptors, and a door that shuts for a while."""

import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
from support.run import wait_until

from zramd.errors import DeviceError
from zramd.server import admission
from zramd.server.admission import Arrivals, Descriptors, Door
from zramd.server.trouble import Troubles


class Connection:
    """A connection with the thread that serves it, which waits for what the client says."""

    def __init__(self, arrivals: Arrivals, become_client: bool = False) -> None:
        self.client, self.served = socket.socketpair()
        self.client.settimeout(30)
        begun = threading.Event()

        def work() -> None:
            arrivals.begin()
            if become_client:
                arrivals.end()
            begun.set()
            self.served.recv(1)
            self.served.close()

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        begun.wait(30)
        self.number = self.thread.native_id
        wait_until(lambda: self._waits())

    def _waits(self) -> bool:
        with open(f"/proc/self/task/{self.number}/syscall") as file:
            return file.read().split()[1:2] == [f"0x{self.served.fileno():x}"]  # or it runs

    def leave(self) -> None:
        self.client.close()
        self.thread.join(30)
        wait_until(lambda: not os.path.exists(f"/proc/self/task/{self.number}"))


def test_who_says_nothing_is_cut_off() -> None:
    arrivals = Arrivals()
    silent, client = Connection(arrivals), Connection(arrivals, become_client=True)
    assert len(arrivals) == 1
    assert arrivals.cut_off(patience=60) == 0
    assert arrivals.cut_off(patience=0) == 1
    assert silent.client.recv(1) == b""
    client.client.send(b"x")  # a client is left alone
    assert not select.select([client.client], [], [], 0)[0] or client.client.recv(1) == b""
    silent.leave()
    client.leave()
    arrivals.forget_gone()
    assert len(arrivals) == 0


def test_who_left_is_forgotten() -> None:
    arrivals = Arrivals()
    one, other = Connection(arrivals), Connection(arrivals)
    one.leave()
    assert len(arrivals) == 2
    arrivals.forget_gone()
    assert len(arrivals) == 1
    other.leave()


def test_a_number_that_is_another_threads_by_now() -> None:
    """It began later than the one that is late."""
    arrivals = Arrivals()
    client = Connection(arrivals, become_client=True)
    assert client.number is not None
    arrivals._since[client.number] = 0.0  # since the machine was started
    assert arrivals.cut_off(patience=1) == 0
    client.client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.client.recv(1)
    client.leave()


def lowest() -> int:
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd


class TestDescriptors:
    @pytest.fixture(autouse=True)
    def limit(self) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def test_limit_is_raised_for_the_clients(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest() + 60, hard))
        descriptors = Descriptors(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(1456, hard), hard)
        descriptors.give_back()

    def test_shortage(self) -> None:
        descriptors = Descriptors(1)
        assert descriptors.shortage() == ""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = lowest() + 4  # fewer than are left free, however few there are in all
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        text = f" of {most} descriptors are in use: raise ulimit -n, or LimitNOFILE= of the service"
        assert descriptors.shortage().endswith(text)
        assert not descriptors.are_out
        opened = []
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        assert descriptors.shortage() == f"{most}{text}"
        assert descriptors.are_out
        # Then what is kept is given back for use, until there are others.
        assert not descriptors.keep()
        opened += [os.open(os.devnull, os.O_RDONLY) for _ in range(admission.SPARE)]
        assert not descriptors.keep()
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert descriptors.keep()
        assert descriptors.shortage() == ""
        assert not descriptors.are_out
        descriptors.give_back()


def test_door() -> None:
    before = signal.signal(admission.LOOK_AGAIN, lambda number, frame: None)
    try:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
            listener.bind("")  # a name that the system chooses
            listener.listen()
            name = listener.getsockname()
            door = Door([listener.fileno()])
            door.shut()
            door.shut()
            assert door.is_shut
            client.connect(name)
            assert not select.select([listener.fileno()], [], [], 0)[0]
            door.open()
            door.open()
            assert not door.is_shut
            assert select.select([listener.fileno()], [], [], 30)[0]
            accepted, _ = listener.accept()
            accepted.close()
    finally:
        signal.signal(admission.LOOK_AGAIN, before)


def test_who_waits_for_a_turn_when_the_server_leaves() -> None:
    """A stranger would hold up nbdkit's end, and so every client that waits for the next server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = admission.Admission(Troubles(), lambda: 9, lambda: 0, None, lambda: 1)
        made.begin([listener.fileno()])
        said: list[str] = []

        def comes() -> None:
            try:
                with made.lock:
                    made.connects()
            except DeviceError as error:
                said.append(str(error))

        with made.lock:
            made.connects()  # whose handshake does not end
        stranger = threading.Thread(target=comes)
        stranger.start()
        wait_until(lambda: made.watch_interval() == made.WATCH_QUEUE)
        made.leave()
        stranger.join()
        assert said == ["a client was turned away: the server is leaving"]
