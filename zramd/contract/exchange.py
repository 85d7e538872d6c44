"""One request to a server on its control socket, and the answer: HTTP, as far as it is needed.

Commands ask by it, and the keeper of a ublk device, which acts when nobody can swap: so it loads little, each
question has its limit in time, and each answer in size.
"""

import array
import os
import socket
import struct
import time

from zramd import trusted
from zramd.contract import rundir
from zramd.errors import UntrustedError

TIMEOUT = 10.0  # seconds to wait for an answer
MAX_ANSWER = 16 << 20  # bytes; the longest is a hundredth of that


def ask(
    path: str, method: str, url: str, body: str = "", timeout: float = TIMEOUT, *, fd: int = -1, most: int = 0
) -> tuple[int, str]:
    """Send one request to the control socket in run folder `path`; return status and body of the answer.

    A descriptor `fd` goes along. Raises OSError when there is no answer, or more than `most` bytes (0:
    MAX_ANSWER), TimeoutError when it takes too long.
    """
    data = os.fsencode(body)
    head = f"{method} {url} HTTP/1.1\r\nHost: zramd\r\nContent-Length: {len(data)}\r\n\r\n"
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.settimeout(timeout)
        connect(control, path)
        words = os.fsencode(head) + data
        if left := words[control.sendmsg([words], rights) :]:
            control.sendall(left)  # what is empty would be an error where the answer is there already
        return parse(rest(control, timeout, most))


def connect(control: socket.socket, path: str) -> None:
    """Connect to the server of run folder `path`. Raises OSError, also if it is not the folder's owner's.

    Another user whose folder it is may have put a link to somebody's in its place since we have looked.
    """
    try:
        folder = trusted.open_folder(path, foreign=True)
    except UntrustedError:
        raise PermissionError(1, "its folder has become another user's link") from None
    try:
        control.connect(f"/proc/self/fd/{folder}/{rundir.CONTROL_SOCKET}")
        if credentials(control)[1] != os.fstat(folder).st_uid:
            raise PermissionError(1, "it belongs to another user than its folder")
    finally:
        os.close(folder)


def credentials(control: socket.socket) -> tuple[int, int]:
    """Return number (0: of another PID namespace) and user of the process that listens at the other end."""
    pid, uid, _ = struct.unpack("iII", control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def rest(control: socket.socket, seconds: float | None, most: int = 0) -> bytes:
    """Return all that comes within so many seconds, None: until its end. Raises as `ask`."""
    end = time.monotonic() + (seconds or 0)
    data = bytearray()
    while len(data) <= (most or MAX_ANSWER):
        if seconds is not None:
            control.settimeout(max(end - time.monotonic(), 0.001))
        part = control.recv(65536)
        if not part:
            return bytes(data)
        data += part
    raise ConnectionError("what it sends has no end")


def parse(data: bytes) -> tuple[int, str]:
    """Return status and body of an answer. Raises ConnectionError for what is none."""
    header, end, content = data.decode(errors="replace").partition("\r\n\r\n")
    status = header.removeprefix("HTTP/1.1 ")[:3]
    if not end or not header.startswith("HTTP/1.1 ") or not (status.isascii() and status.isdigit()):
        raise ConnectionError("what it sends is not an answer")
    return int(status), content
