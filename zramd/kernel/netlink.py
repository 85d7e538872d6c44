"""The NBD handshake, and the kernel's NBD client by generic netlink: what it takes to attach a kernel device.

    sock = dial(address)
    export = handshake(sock, "zram0")
    kernel = Kernel()
    index = kernel.connect([sock.fileno()], export, …)  # the kernel has the socket now: close ours
    …
    kernel.reconfigure(index, [another.fileno()], …)    # replaces connections that are dead, and only those

What the kernel is given it must have for itself: a socket that was passed to it is closed here and never
looked at again. Needs only the standard library, and little of it: zramd.kernel.keeper lives by this module.

The handshake is that of the NBD project's doc/proto.md, the messages are those of the kernel's nbd-netlink.h.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

from zramd.errors import AttachError
from zramd.process import buffers

Address = str | tuple[str, int]  # the path of a unix socket, or host and port

BLOCK_SIZE = 4096  # bytes
MULTI_CONN = 1 << 8  # of an export's flags: several connections see the same data

# ---- The handshake ---------------------------------------------------------------------------------------

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")  # magic, option, length of its data
_REPLY = struct.Struct(">QIII")  # magic, option, type, length of its data
_REPLY_MAGIC = 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_GO = 7
_ACK, _INFO, _ERROR = 1, 3, 1 << 31
_INFO_EXPORT, _INFO_DESCRIPTION, _INFO_BLOCK_SIZE = 0, 2, 3
_MOST = 64 << 10  # bytes in one reply; what a server says in words is far shorter
_MOST_REPLIES = 64  # to one option; a server that has more to say is none
_REASONS = {
    1: "it does not know the option GO",
    2: "its policy forbids it",
    3: "it calls the request invalid",
    4: "it does not support it on its platform",
    5: "it demands TLS, which the kernel's client cannot do",
    7: "it is shutting down",
    8: "it demands another block size",
}


# Of a connection by TCP, in seconds. A host that is switched off says nothing: what was sent and is not
# acknowledged in time ends the connection, and so does silence after that. The kernel alone would wait for a
# quarter of an hour. Shorter, and a cable that is moved would look like a host that has gone.
_UNACKNOWLEDGED = 10
_IDLE, _BETWEEN, _PROBES = 10, 5, 2
_TCP_STEP = 5.0  # a first packet that is lost is sent again after 1 and 3: better begin anew than wait on


class Export(NamedTuple):
    """What a server says of an export: bytes, flags of the protocol, the smallest block it takes, words."""

    size: int
    flags: int
    minimum_block: int
    description: str = ""


def dial(address: Address, timeout: float = 0) -> socket.socket:
    """Return a connection to a server; `timeout` seconds hold for each step until it is the kernel's.

    Without one that is 10 seconds, 5 for TCP. Raises OSError.
    """
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else _family(address))
    try:
        by_tcp = sock.family != socket.AF_UNIX
        sock.settimeout(timeout or (_TCP_STEP if by_tcp else 10.0))
        if by_tcp:
            _notice_silence(sock)
        sock.connect(address)
        buffers.widen(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _notice_silence(sock: socket.socket) -> None:
    """Have a connection by TCP end when its other side is silent; that stays so when the kernel has it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, _IDLE),
        (socket.TCP_KEEPINTVL, _BETWEEN),
        (socket.TCP_KEEPCNT, _PROBES),
        (socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED * 1000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _family(address: tuple[str, int]) -> int:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def handshake(sock: socket.socket, name: str) -> Export:
    """Bring a new connection to where requests may be sent, for the export `name`.

    Raises AttachError when the server refuses or does not speak NBD, OSError when the connection ends.
    """
    magic, option_magic, flags = _GREETING.unpack(_receive(sock, _GREETING.size))
    if magic != b"NBDMAGIC" or option_magic != b"IHAVEOPT" or not flags & _FIXED_NEWSTYLE:
        raise AttachError("the server does not speak the fixed newstyle protocol of NBD")
    export_name = name.encode()
    # The name, and what is asked for beside the size.
    wanted = (_INFO_BLOCK_SIZE, _INFO_DESCRIPTION)
    data = struct.pack(f">I{len(export_name)}sHHH", len(export_name), export_name, len(wanted), *wanted)
    client_flags = struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES))
    sock.sendall(client_flags + _OPTION.pack(b"IHAVEOPT", _GO, len(data)) + data)
    size, export_flags, minimum, description = -1, 0, 1, ""
    for _ in range(_MOST_REPLIES):
        magic, option, kind, length = _REPLY.unpack(_receive(sock, _REPLY.size))
        if magic != _REPLY_MAGIC or option != _GO or length > _MOST:
            raise AttachError("the server's answer is not NBD")
        answer = _receive(sock, length)
        if kind == _ACK:
            break
        if kind & _ERROR:
            raise AttachError(_refusal(name, kind & ~_ERROR, answer))
        if kind == _INFO and length >= 2:
            info = int.from_bytes(answer[:2], "big")
            if info == _INFO_EXPORT and length == 12:
                size, export_flags = struct.unpack(">QH", answer[2:])
            elif info == _INFO_BLOCK_SIZE and length == 14:
                minimum = int.from_bytes(answer[2:6], "big")
            elif info == _INFO_DESCRIPTION:
                description = answer[2:].decode(errors="replace")
    else:
        raise AttachError("the server's answer has no end")
    if size < 0:
        raise AttachError(f"the server does not report the size of export '{name}'")
    if size < BLOCK_SIZE or minimum > BLOCK_SIZE:
        raise AttachError(
            f"export '{name}' has {size} bytes in blocks of {minimum} or more: "
            f"the kernel needs blocks of {BLOCK_SIZE}"
        )
    sock.settimeout(None)
    return Export(size, export_flags, minimum, description)


def _refusal(name: str, error: int, words: bytes) -> str:
    said = " ".join(words.decode(errors="replace").split())
    if error == 6:
        return f"the server has no export '{name}'" + (f": {said}" if said else "")
    return f"the server refuses export '{name}': {said or _REASONS.get(error, f'error {error}')}"


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "the server has closed the connection")
        data += part
    return data


# ---- Messages of netlink ---------------------------------------------------------------------------------

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_GENERIC = struct.Struct("=BBH")  # command, version
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_NESTED = 1 << 15
_REQUEST, _WANT_ACK = 1, 4
_MESSAGE_ERROR = 2
_MOST_ERRORS = 4096  # MAX_ERRNO
_GENERIC_NETLINK = 16
_CONTROL = 16  # the family that knows the families
_GET_FAMILY = 3
_FAMILY_ID, _FAMILY_NAME, _FAMILY_GROUPS = 1, 2, 7
_GROUP_NAME, _GROUP_ID = 1, 2
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1

# linux/nbd-netlink.h
_CONNECT, _DISCONNECT, _RECONFIGURE, _LINK_DEAD, _STATUS = 1, 2, 3, 4, 5
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS, _SOCKETS = 1, 2, 3, 4, 5, 7
_DEAD_CONN_TIMEOUT, _DEVICE_LIST, _BACKEND = 8, 9, 10
_ITEM = 1
_ITEM_INDEX, _ITEM_CONNECTED = 1, 2
_SOCKET_FD = 1


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded to a multiple of 4 bytes."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return an attribute that holds others."""
    return attribute(kind | _NESTED, b"".join(attributes))


def u32(kind: int, value: int) -> bytes:
    """Return an attribute with a number of 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    """Return an attribute with a number of 64 bits."""
    return attribute(kind, struct.pack("=Q", value))


def text(kind: int, value: str) -> bytes:
    """Return an attribute with a string, which ends with a NUL."""
    return attribute(kind, value.encode() + b"\0")


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and value of each attribute; what is torn ends it."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            return
        yield kind & ~_NESTED, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def _number(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)


def message(family: int, command: int, sequence: int, *content: bytes) -> bytes:
    """Return a request to a family, which is answered at least with its success or failure."""
    body = _GENERIC.pack(command, 1, 0) + b"".join(content)
    return _HEADER.pack(_HEADER.size + len(body), family, _REQUEST | _WANT_ACK, sequence, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield type, sequence number and body of each message in what was received."""
    while len(data) >= _HEADER.size:
        length, kind, _, sequence, _ = _HEADER.unpack_from(data)
        if not _HEADER.size <= length <= len(data):
            return
        yield kind, sequence, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def sockets(fds: list[int]) -> bytes:
    """Return the attribute that passes connections to the kernel."""
    return nested(_SOCKETS, *(nested(_ITEM, u32(_SOCKET_FD, fd)) for fd in fds))


# ---- The kernel's NBD client -----------------------------------------------------------------------------


class NoFamilyError(AttachError):
    """The kernel does not know the netlink family of NBD: its module is not loaded, or too old."""


class Kernel:
    """The kernel's NBD devices, each known by its index: 0 is /dev/nbd0."""

    def __init__(self) -> None:
        """Raise NoFamilyError when the kernel has no such thing (now), OSError when there is no netlink."""
        self._socket = _netlink()
        self._sequence = 0
        self._family, self._groups = self._find_family("nbd")

    def close(self) -> None:
        """Close the connection to the kernel; devices stay."""
        self._socket.close()

    def connect(
        self,
        fds: list[int],
        export: Export,
        *,
        index: int | None = None,
        timeout: int = 0,
        dead_conn_timeout: int = 0,
        backend: str = "",
    ) -> int:
        """Make a device of connections that are through their handshake, and return its index.

        `index` None takes a free one. `timeout`: seconds after which a connection whose answer is not there
        counts as dead, 0 for never. `dead_conn_timeout`: seconds for which requests wait for a new
        connection when all are dead, before they fail. `backend` is a name that `reconfigure` must repeat.
        Raises OSError: EBUSY when the device is in use, EPERM without CAP_SYS_ADMIN.
        """
        content = [] if index is None else [u32(_INDEX, index)]
        content += [u64(_SIZE, export.size), u64(_BLOCK_SIZE, BLOCK_SIZE), u64(_SERVER_FLAGS, export.flags)]
        content += [u64(_TIMEOUT, timeout), u64(_DEAD_CONN_TIMEOUT, dead_conn_timeout), sockets(fds)]
        content += [text(_BACKEND, backend)] if backend else []
        for body in self._ask(self._family, _CONNECT, *content):
            for kind, value in attributes(body):
                if kind == _INDEX:
                    return _number(value)
        if index is None:
            raise OSError(errno.EPROTO, "the kernel does not say which device it took")
        return index

    def reconfigure(self, index: int, fds: list[int], backend: str = "") -> None:
        """Replace dead connections. One that is offered beyond their number is dropped, without an error."""
        content = [text(_BACKEND, backend)] if backend else []
        self._ask(self._family, _RECONFIGURE, u32(_INDEX, index), *content, sockets(fds))

    def disconnect(self, index: int) -> None:
        """End a device: what is under way fails. One that is not connected stays as it is."""
        self._ask(self._family, _DISCONNECT, u32(_INDEX, index))

    def status(self) -> dict[int, bool]:
        """Return whether each device is connected."""
        found = {}
        for body in self._ask(self._family, _STATUS):
            for kind, listed in attributes(body):
                for _, item in attributes(listed) if kind == _DEVICE_LIST else ():
                    values = dict(attributes(item))
                    if index := values.get(_ITEM_INDEX):
                        found[_number(index)] = bool(_number(values.get(_ITEM_CONNECTED, b"")))
        return found

    def dead_links(self) -> "DeadLinks":
        """Return a socket that reports connections that die from now on. Raises OSError."""
        return DeadLinks(self._family, self._groups.get("nbd_mc_group", 0))

    def _ask(self, family: int, command: int, *content: bytes) -> list[bytes]:
        """Send a request and return the bodies of its answers, without their generic headers."""
        self._sequence += 1
        self._socket.send(message(family, command, self._sequence, *content))
        answers = []
        while True:
            for kind, sequence, body in messages(self._socket.recv(65536)):
                if sequence != self._sequence:
                    continue
                if kind != _MESSAGE_ERROR:
                    answers.append(body[_GENERIC.size :])
                    continue
                code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else -1
                if code:
                    code = code if 0 < code < _MOST_ERRORS else errno.EPROTO
                    raise OSError(code, os.strerror(code))
                return answers

    def _find_family(self, name: str) -> tuple[int, dict[str, int]]:
        """Return a family's number and the numbers of its groups."""
        try:
            answers = self._ask(_CONTROL, _GET_FAMILY, text(_FAMILY_NAME, name))
        except FileNotFoundError:
            raise NoFamilyError(f"the kernel has no netlink family '{name}'") from None
        family, groups = 0, {}
        for kind, value in attributes(b"".join(answers)):
            if kind == _FAMILY_ID:
                family = _number(value)
            elif kind == _FAMILY_GROUPS:
                for _, group in attributes(value):
                    values = dict(attributes(group))
                    title = values.get(_GROUP_NAME, b"").rstrip(b"\0").decode(errors="replace")
                    groups[title] = _number(values.get(_GROUP_ID, b""))
        if not family:
            raise OSError(errno.EPROTO, f"the kernel does not report the number of '{name}'")
        return family, groups


class DeadLinks:
    """Tells of connections that have died. Poll `fileno()`, then `read()`."""

    def __init__(self, family: int, group: int) -> None:
        self._family = family
        self._socket = _netlink()
        try:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def read(self) -> list[int] | None:
        """Return the device's index for each connection that has died, None if some were lost from view."""
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return None
        return list(self.parse(data))

    def parse(self, data: bytes) -> Iterator[int]:
        """Yield the indexes in what was received."""
        for kind, _, body in messages(data):
            if kind == self._family and body[:1] == bytes([_LINK_DEAD]):
                for key, value in attributes(body[_GENERIC.size :]):
                    if key == _INDEX:
                        yield _number(value)


def _netlink() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _GENERIC_NETLINK)
    try:
        sock.bind((0, 0))
    except BaseException:
        sock.close()
        raise
    return sock
