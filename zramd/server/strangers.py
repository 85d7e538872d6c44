"""Clients from a network: whether nbdkit was told what the settings say, and who may open the device.

With tls=psk nbdkit has only the keys of those who may come. A certificate is shown to nbdkit, which says
whose it is once the handshake is over.
"""

import re
from collections.abc import Iterator

from zramd.errors import ConfigError, ZramdError
from zramd.server import sockets
from zramd.settings import network
from zramd.settings.config import Config

# One attribute of a distinguished name, RFC 4514; its value may have commas that are escaped.
_ATTRIBUTE = re.compile(r"(?P<type>[A-Za-z0-9.-]+)=(?P<value>(?:[^,+\\]|\\.)*)(?P<end>[,+]|$)", re.DOTALL)
_ESCAPED = re.compile(r"\\(?:([0-9A-Fa-f]{2})|(.))", re.DOTALL)


def check(config: Config, *, can_tell: bool) -> None:
    """Raise ConfigError if nbdkit serves otherwise than the settings say. Call it before nbdkit listens.

    can_tell: whether this nbdkit says whose certificate a client has shown.
    """
    if not config.listen:
        return
    way = network.tls(config.tls).way
    words = sockets.told()
    tls = "require" if way in ("psk", "x509") else "off"
    if f"--tls={tls}" not in words or not ("-p" in words or sockets.listening()):
        raise ConfigError(
            f"listen={config.listen} is for 'zramd serve' and 'zramd start', which give nbdkit the options "
            "for it: to run nbdkit yourself, give it -i, -p and --tls instead"
        )
    if way == "x509" and config.clients and not can_tell:
        raise ConfigError(
            f"clients={config.clients}: this nbdkit does not say whose certificate a client has: use "
            "nbdkit 1.40 or later, tls=psk:FILE, or a CA for this device alone"
        )


def refuse(config: Config, dn: str) -> None:
    """Raise ZramdError unless the subject of a client's certificate is one of `clients`: by its one CN."""
    found = common_names(dn)
    if len(found) != 1 or found[0] not in network.names(config.clients):
        who = "', '".join(found) or dn
        raise ZramdError(f"client '{who}' is none of clients={config.clients}: add its name, if it may come")


def common_names(dn: str) -> list[str]:
    """Return the CNs in a distinguished name as RFC 4514 writes it; [] for what is none."""
    return [_plain(value) for kind, value in _attributes(dn) if kind.upper() in ("CN", "2.5.4.3")]


def _attributes(dn: str) -> Iterator[tuple[str, str]]:
    at, found = 0, []
    while at < len(dn):
        match = _ATTRIBUTE.match(dn, at)
        if match is None:
            return
        found.append((match["type"], match["value"]))
        at = match.end()
        if match["end"] and at == len(dn):  # it ends in a comma: cut off
            return
    yield from found


def _plain(value: str) -> str:
    """Return a value without its escapes; one that is no text has no name that could be meant."""
    data = _ESCAPED.sub(lambda m: chr(int(m[1], 16)) if m[1] else m[2], value)
    return data if data.isascii() else value
