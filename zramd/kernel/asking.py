"""Asks a server on its control socket, with a descriptor passed along if need be.

For the keeper of a ublk device, which acts when nobody can swap: it loads little, and each question has its
limit in time.
"""

import array
import json
import os
import socket
import struct
import time

from zramd import trusted
from zramd.contract import rundir
from zramd.errors import AttachError, UntrustedError

MAX_ANSWER = 64 << 10  # bytes; those that are asked for here have some hundred


def ask(
    folder: str, method: str, path: str, body: object = None, *, fd: int = -1, timeout: float
) -> tuple[int, str]:
    """Send one request to the server of a run folder; return status and text of its answer.

    body: goes as JSON, unless None. fd: goes with the request. Raises OSError when there is no answer within
    `timeout` seconds, or nobody who could give one.
    """
    end = time.monotonic() + timeout
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: zramd\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(timeout)
        _connect(link, folder)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        sent = link.sendmsg([head, data], rights)
        link.sendall((head + data)[sent:])
        answer = bytearray()
        while part := link.recv(4096):
            answer += part
            if len(answer) > MAX_ANSWER:
                raise ConnectionError("what it sends has no end")
            link.settimeout(max(end - time.monotonic(), 0.001))
    return _parsed(bytes(answer))


def ask_json(
    folder: str, method: str, path: str, body: object = None, *, fd: int = -1, timeout: float
) -> dict[str, object]:
    """Return the JSON object that is the answer. Raises as `ask`, and AttachError when it refuses."""
    status, text = ask(folder, method, path, body, fd=fd, timeout=timeout)
    if status != 200:
        raise AttachError(text.split("\n", 1)[0] or f"its server answers {path} with status {status}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise AttachError(f"its server does not answer {path} in whole")
    return found


def _connect(link: socket.socket, path: str) -> None:
    """Connect to the control socket in a run folder, if it is its owner's who listens. Raises OSError."""
    try:
        folder = trusted.open_folder(path, foreign=True)
    except UntrustedError as error:
        raise PermissionError(1, str(error)) from None
    try:
        link.connect(f"/proc/self/fd/{folder}/{rundir.CONTROL_SOCKET}")
        _, uid, _ = struct.unpack("iII", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.fstat(folder).st_uid:
            raise PermissionError(1, "it belongs to another user than its folder")
    finally:
        os.close(folder)


def _parsed(data: bytes) -> tuple[int, str]:
    header, end, text = data.decode(errors="replace").partition("\r\n\r\n")
    status = header.removeprefix("HTTP/1.1 ")[:3]
    if not end or not header.startswith("HTTP/1.1 ") or not (status.isascii() and status.isdigit()):
        raise ConnectionError("what it sends is not an answer")
    return int(status), text
