"""The control socket: HTTP on a unix socket in the run folder.

    curl --unix-socket RUNDIR/control.sock http://zramd/stats

Each connection carries one request. The server's housekeeping thread accepts it, and a short-lived thread
answers with what zramd.server.routes says. When all connections are taken, those that send nothing or do not
take their answer are closed for the next caller, and requests that take long may hold only some of them. Raw
sockets and not http.server: that alone would nearly double the server's memory.
"""

import os
import re
import socket
import threading
import time
from contextlib import suppress

from zramd.core.system.threads import start_thread
from zramd.errors import ZramdError, is_shortage
from zramd.server.routes import LENGTHY, STREAMS_IN, STREAMS_OUT, TEXT, RefusedError, Reply, Routes, Service
from zramd.server.trouble import Troubles

MAX_CONNECTIONS = 16
MAX_LENGTHY = 8  # of them, for what takes long
MAX_FDS = 1  # in one piece of a request: more are dropped by the kernel
MAX_HEADER = 8 << 10
MAX_BODY = 4 << 10  # as one of zram's files takes
ALONE = 0.5  # the same, where no thread can be had and the housekeeping thread answers itself
DEADLINE = 5.0  # seconds for a client to send its request and take the answer
LINGER = 0.5  # seconds to wait for the client's end, so that what it still sends does not destroy the answer

_FAILS = "the control socket does not answer"

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STREAM = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nConnection: close\r\n\r\n"

_REQUEST_LINE = re.compile(rb"([A-Z]{1,8}) (/[!-~]*) HTTP/1\.[01]\r")
_REQUEST_START = re.compile(rb"[A-Z]{0,8}|[A-Z]{1,8} [ -~]*\r?")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    422: "Unprocessable Content",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class _Connection:
    """A client of the endpoint, and how far we are with it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.waits = True  # for the client; else it waits for us
        self.lengthy = False  # what it asked for takes long
        self.thread: threading.Thread | None = None
        self.fds: list[int] = []  # that came with the request

    def receive(self, size: int) -> bytes:
        """Return what comes next; the descriptors that come along are kept until the end. Raises OSError."""
        data, fds, flags, _ = socket.recv_fds(self.sock, size, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        self.fds += fds
        if flags & socket.MSG_CTRUNC:
            raise RefusedError(503, "a descriptor came that could not be taken: raise ulimit -n, or send one")
        return data

    def cut_off(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Endpoint:
    """Listens on `path` and answers for `service`."""

    def __init__(self, path: str, service: Service, troubles: Troubles) -> None:
        """Bind the socket, open to this user only. Raises OSError."""
        self._troubles = troubles
        self._routes = Routes(service)
        self._lock = threading.Lock()  # guards _open and what is said of each in it
        self._open: list[_Connection] = []  # the oldest first
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen(64)
        self._listener.setblocking(False)

    def fileno(self) -> int:
        """Return the listening descriptor, for select and poll."""
        return self._listener.fileno()

    def accept(self) -> None:
        """Take one waiting connection, if there is one, and answer it in a thread of its own.

        Raises OSError while it cannot be taken for lack of something.
        """
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if is_shortage(error) and not isinstance(error, BlockingIOError):
                raise
            return  # it went away while it waited
        connection = _Connection(sock)
        if not self._make_room(connection):
            _turn_away(sock)
            return
        try:
            connection.thread = start_thread("zramd-answer", self._serve, connection, DEADLINE, patience=0)
        except (RuntimeError, MemoryError):
            self._serve(connection, ALONE)

    def close(self) -> None:
        """Stop listening and end the connections that are open."""
        self._listener.close()
        with self._lock:
            waiting = list(self._open)
            for connection in waiting:
                connection.cut_off()
        for connection in waiting:
            if connection.thread is not None:
                connection.thread.join(0.1)

    def _make_room(self, connection: _Connection) -> bool:
        """Take a connection in, in the place of the one that has let us wait longest if all are taken."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                silent = next((one for one in self._open if one.waits), None)
                if silent is None:
                    return False
                silent.cut_off()
                self._open.remove(silent)
            self._open.append(connection)
            return True

    def _serve(self, connection: _Connection, deadline: float) -> None:
        sock = connection.sock
        try:
            try:
                method, path, body, length = _receive(connection, time.monotonic() + deadline)
                self._begin(connection, (method, path), deadline)
                if (method, path) in STREAMS_OUT:
                    sock.sendall(_STREAM.format(STREAMS_OUT[method, path]).encode())
                    self._routes.send(sock.fileno(), path)
                    return
                if (method, path) in STREAMS_IN:
                    reply = self._routes.load(sock.fileno(), body, length)
                else:
                    reply = self._routes.answer(method, path, body, connection.fds)
            except RefusedError as refused:
                reply = refused.reply
            with self._lock:
                connection.waits, connection.lengthy = True, False
            _send(sock, reply, deadline)
            self._troubles.over(_FAILS)
        except (OSError, ZramdError, MemoryError) as error:
            if is_shortage(error):  # else the client is gone
                self._troubles.begin(_FAILS, error)
        finally:
            self._forget(connection)

    def _begin(self, connection: _Connection, what: tuple[str, str], deadline: float) -> None:
        """Take note that a request has come. Raises RefusedError for one more than may take long at once."""
        with self._lock:
            if what in LENGTHY:
                if deadline == ALONE:
                    raise RefusedError(
                        503,
                        "no thread can be started for this: raise ulimit -u, or TasksMax=, or free memory",
                    )
                if sum(one.lengthy for one in self._open) >= MAX_LENGTHY:
                    raise RefusedError(
                        503,
                        f"{MAX_LENGTHY} saves, loads, lists of blocks, compactions, checks or looks at a "
                        "backing are under way: ask again later",
                    )
                connection.lengthy = True
            connection.waits = False

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            if connection in self._open:
                self._open.remove(connection)
            connection.sock.close()
            while connection.fds:
                os.close(connection.fds.pop())


def _receive(connection: _Connection, deadline: float) -> tuple[str, str, bytes, int]:
    """Return method, path without a query, body, and its length.

    Of a stream the body is what came so far, and the length may be -1, up to the end of the connection.

    Raises RefusedError, and OSError when the client is gone.
    """
    data = b""
    while b"\n" not in data:
        if _REQUEST_START.fullmatch(data) is None:
            break  # no request starts like this: do not wait for its end
        data += _some(connection, deadline, len(data))
    line, _, rest = data.partition(b"\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise RefusedError(400, "this is not an HTTP/1.1 request")
    while b"\r\n\r\n" not in (seen := b"\r\n" + rest):
        rest += _some(connection, deadline, len(line) + len(rest))
    header, _, body = seen.partition(b"\r\n\r\n")
    method, path = match[1].decode(), match[2].decode().partition("?")[0]
    stream = (method, path) in STREAMS_IN
    length = _content_length(header, 1 << 62, -1) if stream else _content_length(header, MAX_BODY, 0)
    if length and not body and _waits(line, header):
        connection.sock.settimeout(max(deadline - time.monotonic(), 0.001))
        connection.sock.sendall(_CONTINUE)
    if stream:
        return method, path, body, length
    while len(body) < length:
        body += _some(connection, deadline, 0)
    return method, path, body[:length], length


def _waits(line: bytes, header: bytes) -> bool:
    """Say whether the client wants to hear that it may send its body, as curl does of a large one."""
    fields = [field.partition(b":") for field in header.lower().split(b"\r\n")]
    expects = any(name == b"expect" and value.strip() == b"100-continue" for name, _, value in fields)
    return expects and line.endswith(b"HTTP/1.1\r")


def _content_length(header: bytes, most: int, default: int) -> int:
    length = b""
    for line in header.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"transfer-encoding":
            raise RefusedError(411, "send a body with Content-Length, not in chunks")
        if name.lower() == b"content-length":
            length = value.strip()
            if not length.isdigit():
                raise RefusedError(400, "Content-Length is not a number")
            if len(length) > 19 or int(length) > most:
                raise RefusedError(413, f"a body has at most {most} bytes")
    return int(length) if length else default


def _some(connection: _Connection, deadline: float, have: int) -> bytes:
    """Return what the client sent next, at least a byte."""
    if have >= MAX_HEADER:
        raise RefusedError(431, f"a header has at most {MAX_HEADER} bytes")
    try:
        connection.sock.settimeout(max(deadline - time.monotonic(), 0.001))
        data = connection.receive(4096)
    except TimeoutError:
        raise RefusedError(408, f"the request did not come within {DEADLINE:g} seconds") from None
    if not data:
        raise RefusedError(400, "the request ends too early")
    return data


def _encode(reply: Reply) -> bytes:
    body = reply.body.encode()
    allow = f"Allow: {reply.allow}\r\n" if reply.allow else ""
    header = (
        f"HTTP/1.1 {reply.status} {_REASONS[reply.status]}\r\nContent-Type: {reply.content_type}\r\n"
        f"Content-Length: {len(body)}\r\n{allow}Connection: close\r\n\r\n"
    )
    return header.encode() + body


def _send(connection: socket.socket, reply: Reply, seconds: float) -> None:
    connection.settimeout(seconds)
    connection.sendall(_encode(reply))
    connection.shutdown(socket.SHUT_WR)
    end = time.monotonic() + LINGER
    while (left := end - time.monotonic()) > 0:
        connection.settimeout(left)
        if not connection.recv(4096):
            break


def _turn_away(connection: socket.socket) -> None:
    """Answer 503 without waiting for anything."""
    connection.setblocking(False)
    with suppress(OSError):
        connection.send(_encode(Reply(503, TEXT, f"{MAX_CONNECTIONS} requests are being answered already\n")))
    with suppress(OSError):
        connection.recv(MAX_HEADER)
    connection.close()
