"""Looking for nbdkit's sockets among all descriptors, while something is short."""

import errno
import os
import socket

import pytest

from zramd.server import sockets


def test_clients_are_found_without_a_descriptor_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()

    def no_dup(fd: int) -> int:
        raise OSError(errno.EMFILE, "no")

    with ours, theirs:
        others = sockets.inherited() - {os.fstat(ours.fileno()).st_ino}
        with monkeypatch.context() as short:
            short.setattr(os, "dup", no_dup)
            found = sockets.shut_clients(frozenset(others), socket.SHUT_RDWR)
        assert found >= 1
        assert theirs.recv(1) == b""
        assert ours.fileno() >= 0
        os.fstat(ours.fileno())


def test_a_socket_that_does_not_tell_what_it_is_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()

    class Silent:
        def __init__(self, fileno: int) -> None:
            raise OSError(errno.ENOBUFS, "no")

    with ours, theirs:
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as short:
            short.setattr(sockets.socket, "socket", Silent)
            for look in (sockets.listening, sockets.inherited, lambda: sockets.count_clients(frozenset())):
                with pytest.raises(OSError, match="no"):
                    look()
        assert len(os.listdir("/proc/self/fd")) == before
