"""Messages to the kernel, byte for byte; handshakes with a real nbdkit, and with servers that lie."""

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zramd.errors import AttachError
from zramd.kernel import netlink

little_endian = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are written for x86")


@little_endian
def test_message_bytes() -> None:
    """A request as the kernel takes it: header, generic header, attributes padded to 4 bytes."""
    content = [netlink.u32(1, 3), netlink.u64(2, 1 << 32), netlink.text(10, "zramd/a")]
    found = netlink.message(0x1B, 1, 9, *content)
    assert found.hex(" ", -4) == (
        "34000000 1b000500 09000000 00000000 01010000"
        " 08000100 03000000 0c000200 00000000 01000000 0c000a00 7a72616d 642f6100"
    )


@little_endian
def test_socket_list_bytes() -> None:
    assert netlink.sockets([5, 6]).hex(" ", -4) == (
        "1c000780 0c000180 08000100 05000000 0c000180 08000100 06000000"
    )


def test_attributes_are_padded_and_read_back() -> None:
    packed = netlink.attribute(1, b"a") + netlink.nested(2, netlink.u32(7, 8)) + netlink.attribute(3, b"")
    assert len(packed) % 4 == 0
    kinds = list(netlink.attributes(packed))
    assert kinds == [(1, b"a"), (2, netlink.u32(7, 8)), (3, b"")]


@pytest.mark.parametrize("torn", [b"\x01", b"\x03\0\1\0", b"\xff\xff\1\0abcd", b"\0\0\0\0"])
def test_torn_attributes_end_it(torn: bytes) -> None:
    assert list(netlink.attributes(netlink.u32(1, 2) + torn)) == [(1, struct.pack("=I", 2))]


def test_messages_are_told_apart() -> None:
    data = netlink.message(20, 4, 1, netlink.u32(1, 0)) + netlink.message(21, 4, 2, netlink.u32(1, 9))
    assert [(kind, sequence) for kind, sequence, _ in netlink.messages(data)] == [(20, 1), (21, 2)]
    assert [kind for kind, _, _ in netlink.messages(data[:-1])] == [20]


def test_dead_links_of_this_family_only() -> None:
    """The group may tell of other things; only a dead link has an index for us."""
    links = netlink.DeadLinks.__new__(netlink.DeadLinks)
    links._family = 27
    dead = netlink.message(27, 4, 0, netlink.u32(1, 5))
    status = netlink.message(27, 5, 0, netlink.u32(1, 6))
    other = netlink.message(28, 4, 0, netlink.u32(1, 7))
    assert list(links.parse(dead + status + other + dead)) == [5, 5]


def test_kernel_families_are_found() -> None:
    """The kernel that runs this test answers: its control family is there, one of this name is not."""
    kernel = netlink.Kernel.__new__(netlink.Kernel)
    kernel._socket, kernel._sequence = netlink._netlink(), 0
    family, groups = kernel._find_family("nlctrl")
    assert family == 16
    assert "notify" in groups
    with pytest.raises(netlink.NoFamilyError, match="no netlink family 'zramd-none'"):
        kernel._find_family("zramd-none")
    kernel.close()


# ---- Handshakes ------------------------------------------------------------------------------------------


@pytest.fixture
def nbdkit(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start nbdkit with the words given; the path of its socket."""
    running = []

    def start(*words: str) -> str:
        path = tmp_path / "nbd.sock"
        running.append(subprocess.Popen(["nbdkit", "-f", "-U", str(path), *words], stderr=subprocess.DEVNULL))
        end = time.monotonic() + 10
        with socket.socket(socket.AF_UNIX) as probe:
            while probe.connect_ex(str(path)):  # a socket is there before one can connect to it
                assert time.monotonic() < end
                assert running[-1].poll() is None
                time.sleep(0.01)
        return str(path)

    yield start
    for process in running:
        process.kill()
        process.wait()


def shake(address: netlink.Address, name: str) -> netlink.Export:
    with netlink.dial(address) as sock:
        return netlink.handshake(sock, name)


def test_handshake(nbdkit: Callable[..., str]) -> None:
    path = nbdkit("--filter=blocksize-policy", "memory", "8M", "blocksize-minimum=512")
    with netlink.dial(path) as sock:
        export = netlink.handshake(sock, "any")
        assert (export.size, export.minimum_block) == (8 << 20, 512)
        assert export.flags & netlink.MULTI_CONN
        assert sock.gettimeout() is None
        # Requests are answered: where requests may be sent, the kernel would go on.
        sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 77, 4096, 512))
        assert netlink._receive(sock, 16 + 512) == struct.pack(">IIQ", 0x67446698, 0, 77) + bytes(512)


def test_handshake_over_tcp() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "null", "1M"])
    try:
        end = time.monotonic() + 10
        while True:
            try:
                assert shake(("127.0.0.1", port), "").size == 1 << 20
                break
            except ConnectionRefusedError:
                assert time.monotonic() < end
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--filter=exportname", "null", "1M", "exportname=yes", "exportname-strict=true"),
            r"^the server has no export 'zram0'",
        ),
        (
            ("--filter=blocksize-policy", "null", "1M", "blocksize-minimum=8192", "blocksize-preferred=8192"),
            r"^export 'zram0' has 1048576 bytes in blocks of 8192 or more: the kernel needs blocks of 4096$",
        ),
        (("null", "4095"), r"^export 'zram0' has 4095 bytes in blocks of 1 or more: "),
        (("--oldstyle", "null", "1M"), r"^the server does not speak the fixed newstyle protocol of NBD$"),
        (("--mask-handshake=0", "null", "1M"), r"^the server does not speak the fixed newstyle protocol"),
    ],
)
def test_refused(nbdkit: Callable[..., str], words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(AttachError, match=sentence):
        shake(nbdkit(*words), "zram0")


def liar(tmp_path: Path, answer: bytes) -> str:
    """A server that greets well, takes the option, sends `answer` and leaves."""
    path = str(tmp_path / "liar.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        client, _ = listener.accept()
        with client, listener:
            client.sendall(b"NBDMAGICIHAVEOPT\0\3")
            client.recv(4096)
            client.sendall(answer)
            client.shutdown(socket.SHUT_WR)
            client.recv(4096)

    threading.Thread(target=serve, daemon=True).start()
    return path


def reply(kind: int, data: bytes = b"", *, length: int | None = None, magic: int = 0x3E889045565A9) -> bytes:
    return struct.pack(">QIII", magic, 7, kind, len(data) if length is None else length) + data


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (reply(1), "does not report the size of export 'zram0'"),
        (reply(3, b"\0\0" + bytes(3)) + reply(1), "does not report the size"),
        (reply(1, magic=7), "the server's answer is not NBD"),
        (reply(3, length=1 << 30), "the server's answer is not NBD"),
        (reply(1 << 31 | 1), "refuses export 'zram0': it does not know the option GO"),
        (reply(1 << 31 | 5), "refuses export 'zram0': it demands TLS, which the kernel's client cannot do"),
        (reply(1 << 31 | 6, b"no\nsuch \xff"), "has no export 'zram0': no such \ufffd"),
        (reply(1 << 31 | 99), "refuses export 'zram0': error 99"),
    ],
)
def test_lies(tmp_path: Path, answer: bytes, sentence: str) -> None:
    with pytest.raises(AttachError, match=sentence):
        shake(liar(tmp_path, answer), "zram0")


def test_end_of_connection(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError, match="the server has closed the connection"):
        shake(liar(tmp_path, reply(3, length=12)), "zram0")


def test_server_that_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "mute.sock"))
        listener.listen()
        with netlink.dial(str(tmp_path / "mute.sock"), timeout=0.05) as sock, pytest.raises(TimeoutError):
            netlink.handshake(sock, "zram0")
