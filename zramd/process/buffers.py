"""The send buffers of unix sockets, which say how much of large requests and answers is under way at once.

What is sent over a unix socket stays in the sender's buffer until the other side has read it. Linux gives it
208 KiB (net.core.wmem_default), one and a half requests of 128 KiB: then the two sides wait for each other in
turn. A larger one takes no memory until so much is under way; then that is the kernel's, and counts for the
sender's cgroup. TCP finds a size by itself, and does it better without this.
"""

import socket
from contextlib import suppress

SEND_BUFFER = 1 << 20  # bytes asked for; Linux doubles them, for what it needs beside. 4 MiB is no faster
# Past net.core.wmem_max, with CAP_NET_ADMIN. From asm-generic/socket.h: Python has no name for it.
_SO_SNDBUFFORCE = 32


def widen(sock: socket.socket) -> None:
    """Give a unix socket the send buffer SEND_BUFFER, or what we may. None gets smaller; never raises."""
    if sock.family != socket.AF_UNIX:
        return
    with suppress(OSError):
        has = size(sock)
        if has >= 2 * SEND_BUFFER:
            return
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
        except PermissionError:
            # As far as net.core.wmem_max lets us, which may be less than wmem_default has given already.
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                if size(probe) > has:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


def size(sock: socket.socket) -> int:
    """Return the bytes of a socket's send buffer, with what Linux needs beside."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
