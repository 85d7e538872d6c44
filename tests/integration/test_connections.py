"""What a connection is given: its threads, and send buffers for large requests and answers at both ends."""

import fcntl
import re
import socket
import struct
import termios
from collections.abc import Callable

import pytest
from support.client import NbdSocket
from support.run import wait_until
from support.server import NbdkitProcess

from zramd.kernel import netlink
from zramd.process import buffers

Serve = Callable[..., NbdkitProcess]
REQUEST = 128 << 10
READ = 0


def default() -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        return buffers.size(sock)


def widened() -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        buffers.widen(sock)
        return buffers.size(sock)


def unread(sock: socket.socket) -> int:
    (count,) = struct.unpack("=i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
    return int(count)


def test_more_answers_wait_for_the_client_than_would_fit(serve: Serve) -> None:
    """The server's own end is not ours to look at, but all that it has sent is there to be read."""
    served = serve()
    first = NbdSocket(served)
    queue_answers(first)
    queue_answers(NbdSocket(served))  # whoever comes later has one, too


def queue_answers(client: NbdSocket) -> None:
    """Ask for more than fits into any buffer, and see how much is there."""
    assert widened() > default(), "this system allows for no larger buffer: raise net.core.wmem_max"
    answers = 2 * widened() // REQUEST
    for _ in range(answers):
        client.send(READ, 0, REQUEST)
    # What fits is the buffer and a little more.
    wait_until(lambda: unread(client.sock) > (default() + widened()) // 2)
    for _ in range(answers):
        assert client.reply()[0] == 0
        assert client.receive(REQUEST) == bytes(REQUEST)


def test_the_connection_that_the_kernel_gets_has_one(serve: Serve) -> None:
    with netlink.dial(str(serve().socket)) as sock:
        assert buffers.size(sock) == widened()


@pytest.mark.parametrize(
    ("setting", "model"),
    [("auto", "serialize_requests"), ("serialize_requests", "serialize_requests"), ("parallel", "parallel")],
)
def test_the_thread_model_is_the_one_asked_for_and_one_thread_by_itself(
    serve: Serve, setting: str, model: str
) -> None:
    served = serve("-v", thread_model=setting)
    assert re.findall("using thread model: (.*)", served.log.read_text()) == [model]


def test_with_one_thread_each_client_is_served_beside_the_others(serve: Serve) -> None:
    """A client that does not take its answers holds its own thread only."""
    served = serve()
    stuck, other = NbdSocket(served), NbdSocket(served)
    for _ in range(64):
        stuck.send(READ, 0, 1 << 20)
    assert other.ask(other.WRITE, 0, 4096, b"x" * 4096) == 0
    assert other.read(0, 4096) == b"x" * 4096
