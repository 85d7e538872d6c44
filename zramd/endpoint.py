"""The control socket: HTTP on a unix socket in the run folder.

    curl --unix-socket RUNDIR/control.sock http://zramd/stats

One request for each connection. The server's housekeeping thread accepts; a short-lived thread answers.
Raw sockets and not http.server: that alone would nearly double the server's memory.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Protocol

from zramd import prometheus, stats
from zramd.config import parse_size
from zramd.errors import ConfigError

MAX_CONNECTIONS = 16
MAX_HEADER = 8 << 10
MAX_BODY = 1 << 10
DEADLINE = 5.0  # seconds for a client to send its request and take the answer
LINGER = 0.5  # seconds to wait for the client's end, so that what it still sends does not destroy the answer
COMPACT_TIMEOUT = 60.0

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
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Service(Protocol):
    """What the endpoint shows and steers."""

    def snapshot(self) -> stats.Snapshot: ...
    def classes(self) -> list[stats.ClassRow]: ...
    def health(self) -> dict[str, str | int]: ...
    def compact(self, timeout: float) -> int:
        """Return the pages freed."""

    def set_mem_limit(self, size: int) -> int:
        """Return the limit as it is then."""

    def reset(self) -> bool:
        """Drop all data; return False, with nothing done, while a client is connected."""

    def reset_mem_used_max(self) -> None: ...


class Reply(NamedTuple):
    """An answer: status code, content type, body, and the methods a 405 allows."""

    status: int
    content_type: str
    body: str
    allow: str = ""


class _RefusedError(Exception):
    """The request is answered with an error status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.reply = Reply(status, _TEXT, sentence + "\n")


Handler = Callable[[bytes], Reply]


class Endpoint:
    """Listens on `path` and answers for `service`."""

    def __init__(self, path: str, service: Service) -> None:
        """Bind the socket, open to this user only. Raises OSError."""
        self._service = service
        self._routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": self._index},
            "/stats": {"GET": self._stats},
            "/mm_stat": {"GET": self._mm_stat},
            "/io_stat": {"GET": self._io_stat},
            "/classes": {"GET": self._classes},
            "/metrics": {"GET": self._metrics},
            "/health": {"GET": self._health},
            "/compact": {"POST": self._compact},
            "/mem_limit": {"PUT": self._mem_limit},
            "/mem_used_max": {"POST": self._mem_used_max},
            "/reset": {"POST": self._reset},
        }
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

    def answer(self, method: str, path: str, body: bytes) -> Reply:
        """Return the answer to one request."""
        methods = self._routes.get(path)
        if methods is None:
            return Reply(404, _TEXT, f"no such path '{path}'; there are:\n{self._paths()}")
        handler = methods.get(method)
        if handler is None:
            allow = ", ".join(methods)
            return Reply(405, _TEXT, f"{path} takes {allow}, not {method}\n", allow)
        try:
            return handler(body)
        except _RefusedError as refused:
            return refused.reply
        except Exception as error:
            return Reply(500, _TEXT, f"{error or type(error).__name__}\n")

    def _paths(self) -> str:
        return "".join(f"{method} {path}\n" for path, methods in self._routes.items() for method in methods)

    def _index(self, body: bytes) -> Reply:
        return Reply(200, _TEXT, self._paths())

    def _stats(self, body: bytes) -> Reply:
        return Reply(200, _JSON, stats.to_json(self._service.snapshot()))

    def _mm_stat(self, body: bytes) -> Reply:
        return Reply(200, _TEXT, stats.mm_stat(self._service.snapshot()))

    def _io_stat(self, body: bytes) -> Reply:
        return Reply(200, _TEXT, stats.io_stat(self._service.snapshot()))

    def _classes(self, body: bytes) -> Reply:
        return Reply(200, _TEXT, stats.classes_table(self._service.classes()))

    def _metrics(self, body: bytes) -> Reply:
        text = prometheus.exposition(self._service.snapshot(), self._service.classes())
        return Reply(200, _PROMETHEUS, text)

    def _health(self, body: bytes) -> Reply:
        return _json(**self._service.health())

    def _compact(self, body: bytes) -> Reply:
        freed = self._service.compact(COMPACT_TIMEOUT)
        return _json(pages_freed=freed, frag_ratio=round(self._service.snapshot().frag_ratio, 4))

    def _mem_limit(self, body: bytes) -> Reply:
        try:
            size = parse_size(body.decode("ascii", "backslashreplace").strip())
        except ConfigError as error:
            raise _RefusedError(400, f"mem_limit: {error}") from None
        return _json(mem_limit=self._service.set_mem_limit(size))

    def _mem_used_max(self, body: bytes) -> Reply:
        self._service.reset_mem_used_max()
        return _json(mem_used_max=self._service.snapshot().mem_used_max)

    def _reset(self, body: bytes) -> Reply:
        if not self._service.reset():
            raise _RefusedError(409, "device is in use: disconnect every client before a reset")
        return _json(reset=True)

    def _serve(self, connection: socket.socket) -> None:
        deadline = time.monotonic() + DEADLINE
        try:
            try:
                reply = self.answer(*_receive(connection, deadline))
            except _RefusedError as refused:
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


def _json(**values: str | int | float) -> Reply:
    return Reply(200, _JSON, json.dumps(values) + "\n")


def _receive(connection: socket.socket, deadline: float) -> tuple[str, str, bytes]:
    """Return method, path without a query, and body.

    Raises _RefusedError, and OSError when the client is gone.
    """
    data = b""
    while b"\n" not in data:
        if _REQUEST_START.fullmatch(data) is None:
            break  # no request starts like this: do not wait for its end
        data += _some(connection, deadline, len(data))
    line, _, rest = data.partition(b"\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise _RefusedError(400, "this is not an HTTP/1.1 request")
    while b"\r\n\r\n" not in (seen := b"\r\n" + rest):
        rest += _some(connection, deadline, len(line) + len(rest))
    header, _, body = seen.partition(b"\r\n\r\n")
    length = _content_length(header)
    while len(body) < length:
        body += _some(connection, deadline, 0)
    return match[1].decode(), match[2].decode().partition("?")[0], body[:length]


def _content_length(header: bytes) -> int:
    length = b"0"
    for line in header.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"transfer-encoding":
            raise _RefusedError(411, "send a body with Content-Length, not in chunks")
        if name.lower() == b"content-length":
            length = value.strip()
    if not length.isdigit():
        raise _RefusedError(400, "Content-Length is not a number")
    if len(length) > 9 or int(length) > MAX_BODY:
        raise _RefusedError(413, f"a body has at most {MAX_BODY} bytes")
    return int(length)


def _some(connection: socket.socket, deadline: float, have: int) -> bytes:
    """Return what the client sent next, at least a byte."""
    if have >= MAX_HEADER:
        raise _RefusedError(431, f"a header has at most {MAX_HEADER} bytes")
    try:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        data = connection.recv(4096)
    except TimeoutError:
        raise _RefusedError(408, f"the request did not come within {DEADLINE:g} seconds") from None
    if not data:
        raise _RefusedError(400, "the request ends too early")
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
        connection.send(_encode(Reply(503, _TEXT, f"{MAX_CONNECTIONS} connections are open already\n")))
    with suppress(OSError):
        connection.recv(MAX_HEADER)
    connection.close()
