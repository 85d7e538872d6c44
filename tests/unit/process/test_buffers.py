"""Send buffers of unix sockets: as large as the system lets us make them, never smaller than they were."""

import errno
import socket
from collections.abc import Iterator

import pytest

from zramd.process import buffers
from zramd.process.buffers import SEND_BUFFER, size, widen


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def reach() -> int:
    """What anybody may have: net.core.wmem_max, twice."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        return size(sock)


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be without CAP_NET_ADMIN: the option that needs it is one that nobody has."""
    real = socket.socket

    class Unprivileged(real):  # type: ignore[valid-type, misc]
        def setsockopt(self, level: int, option: int, value: int) -> None:
            if option == buffers._SO_SNDBUFFORCE:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            super().setsockopt(level, option, value)

    monkeypatch.setattr(socket, "socket", Unprivileged)


def test_it_is_as_large_as_we_may(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    before = size(other)
    widen(one)
    assert size(one) >= max(before, reach())
    assert size(other) == before
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, buffers._SO_SNDBUFFORCE, SEND_BUFFER)
        except PermissionError:
            return
    assert size(one) == max(before, 2 * SEND_BUFFER)


def test_without_the_right_it_is_what_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    with socket.socket(socket.AF_UNIX) as sock:
        before = size(sock)
        widen(sock)
        assert size(sock) == max(before, reach())


def test_none_gets_smaller(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    """The system's default may be above what it lets anybody ask for."""
    widen(pair[0])
    before = size(pair[0])
    monkeypatch.setattr(buffers, "SEND_BUFFER", 1 << 14)
    widen(pair[0])
    assert size(pair[0]) == before
    refuse(monkeypatch)
    ours = socket.socket(fileno=socket.dup(pair[0].fileno()))
    with ours:
        real_size = buffers.size
        # The buffer counts as full size, the most that may be asked for is less.
        monkeypatch.setattr(buffers, "SEND_BUFFER", before)
        monkeypatch.setattr(buffers, "size", lambda sock: 1 << 14 if sock is not ours else real_size(sock))
        widen(ours)
        assert real_size(ours) == before


def test_tcp_is_left_alone() -> None:
    with socket.socket(socket.AF_INET) as sock:
        before = size(sock)
        widen(sock)
        assert size(sock) == before


def test_a_socket_that_takes_no_option_is_used_as_it_is(pair: tuple[socket.socket, socket.socket]) -> None:
    class Stubborn(socket.socket):
        def setsockopt(self, *words: object) -> None:
            raise OSError(errno.ENOBUFS, "no")

    with Stubborn(fileno=socket.dup(pair[0].fileno())) as sock:
        widen(sock)
        sock.send(b"x")
    assert pair[1].recv(1) == b"x"
