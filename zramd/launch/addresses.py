"""Whether a server can listen where `listen` says: asked before nbdkit is, which would say little."""

import errno
import socket

from zramd.errors import DeviceError, reason
from zramd.settings import network
from zramd.settings.config import Config


def check(settings: Config) -> None:
    """Bind each address that `listen` means, and let it go again.

    Raises DeviceError for a host that is not known, an address that is not this machine's, a port that is in
    use or closed to this user.
    """
    where = network.address(settings.listen)
    try:
        found = socket.getaddrinfo(
            where.host or None, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise DeviceError(
            f"listen={settings.listen}: '{where.host}' is no host that this machine knows ({why}): use an "
            "address of its own, or :PORT for all"
        ) from None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nbdkit does
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # without IPv6 the resolver may know it all the same
                raise DeviceError(
                    f"listen={settings.listen}: {_why(error, str(address[0]), where.port)}"
                ) from None


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use by another program: use another port, or stop that"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"'{host}' is not an address of this machine: use one that 'ip address' shows, or :PORT for all"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not listen on port {port}: use one from 1024 on"
    return f"{reason(error)}: use another address"
