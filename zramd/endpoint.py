"""The control socket: HTTP on a unix socket in the run folder.

    curl --unix-socket RUNDIR/control.sock http://zramd/stats

One request for each connection. The server's housekeeping thread accepts; a short-lived thread answers, with
what zramd.routes says.
Raw sockets and not http.server: that alone would nearly double the server's memory.
"""

import os
import re
import socket
import threading
import time
from contextlib import suppress

from zramd.routes import STREAMS_IN, STREAMS_OUT, TEXT, RefusedError, Reply, Routes, Service

MAX_CONNECTIONS = 16
MAX_HEADER = 8 << 10
MAX_BODY = 1 << 10
DEADLINE = 5.0  # seconds for a client to send its request and take the answer
LINGER = 0.5  # seconds to wait for the client's end, so that what it still sends does not destroy the answer

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n\r\n"

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


class Endpoint:
    """Listens on `path` and answers for `service`."""

    def __init__(self, path: str, service: Service) -> None:
        """Bind the socket, open to this user only. Raises OSError."""
        self._routes = Routes(service)
        self._lock = threading.Lock()  # guards _open
        self._open: dict[socket.socket, threading.Thread] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen(64)
        self._listener.setblocking(False)

    def fileno(self) -> int:
        """Return the listening descriptor, for select and poll."""
        return self._listener.fileno()

    def accept(self) -> None:
        """Take one waiting connection, if there is one, and answer it in a thread of its own."""
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it went away while it waited
        with self._lock:
            full = len(self._open) >= MAX_CONNECTIONS
            if not full:
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._open[connection] = thread
        if full:
            _turn_away(connection)
            return
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._forget(connection)

    def close(self) -> None:
        """Stop listening and end the connections that are open."""
        self._listener.close()
        with self._lock:
            waiting = list(self._open.items())
            for connection, _ in waiting:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for _, thread in waiting:
            thread.join(0.1)

    def _serve(self, connection: socket.socket) -> None:
        deadline = time.monotonic() + DEADLINE
        try:
            try:
                method, path, body, length = _receive(connection, deadline)
                if (method, path) in STREAMS_OUT:
                    connection.sendall(_STREAM)
                    self._routes.save(connection.fileno(), path)
                    return
                if (method, path) in STREAMS_IN:
                    reply = self._routes.load(connection.fileno(), body, length)
                else:
                    reply = self._routes.answer(method, path, body)
            except RefusedError as refused:
                reply = refused.reply
            _send(connection, reply)
        except OSError:
            pass  # the client is gone: there is nobody to tell
        finally:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            del self._open[connection]
            connection.close()


def _receive(connection: socket.socket, deadline: float) -> tuple[str, str, bytes, int]:
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
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        connection.sendall(_CONTINUE)
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


def _some(connection: socket.socket, deadline: float, have: int) -> bytes:
    """Return what the client sent next, at least a byte."""
    if have >= MAX_HEADER:
        raise RefusedError(431, f"a header has at most {MAX_HEADER} bytes")
    try:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        data = connection.recv(4096)
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


def _send(connection: socket.socket, reply: Reply) -> None:
    connection.settimeout(DEADLINE)
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
        connection.send(_encode(Reply(503, TEXT, f"{MAX_CONNECTIONS} connections are open already\n")))
    with suppress(OSError):
        connection.recv(MAX_HEADER)
    connection.close()
