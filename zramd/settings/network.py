"""How a device is reached over a network: `listen`, `tls`, `clients`, as a user writes them.

    address(text)     where to listen
    tls(text)         how clients prove who they are, and where that is kept
    names(text)       who may come
    check(values)     raises ConfigError for what does not go together

No file is opened and no name resolved here: zramd.conf is read on machines, too, that do not serve.
"""

import re
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from zramd.errors import ConfigError

PORT = 10809  # NBD's own, by IANA
MOST_NAMES = 1000
MIN_IDLE = 10  # seconds
MAX_IDLE = 86400
OF_NETWORK = ("listen", "tls", "clients", "client_idle", "handshake_limit")

_LISTEN = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<port>[^:]*))?")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,63}")  # what a key's and a certificate's name may both be
_WAYS = "use psk:FILE or x509:FOLDER, or off where the network below is encrypted"


class Address(NamedTuple):
    """Where to listen. host: '' for all addresses of the machine; an IPv6 address has no brackets."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can come there: as far as the text says, without asking a resolver."""
        if self.host.lower() == "localhost":
            return True
        host = self.host.partition("%")[0]
        return (_is(socket.AF_INET, host) and host.startswith("127.")) or _is_one(host)


class Tls(NamedTuple):
    """How clients prove who they are. way: psk, x509, off, or '' where nothing was said."""

    way: str
    path: str  # of the keys' file, or of the certificates' folder


def address(text: str) -> Address:
    """Return what a value of `listen` means. Raises ConfigError."""
    match = _LISTEN.fullmatch(text)
    if match is None:
        hint = f"write [{text}]" if _is(socket.AF_INET6, text.partition("%")[0]) else "use HOST:PORT"
        raise ConfigError(f"'{text}' is not an address: {hint}, or :PORT for all addresses")
    host, port = match["host"], match["port"]
    number = PORT
    if port is not None:
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise ConfigError(f"'{text}' has no port that can be listened on, '{port}': use 1 to 65535")
        number = int(port)
    if host.startswith("["):
        inside, percent, scope = host[1:-1].partition("%")
        if not _is(socket.AF_INET6, inside) or (percent and not re.fullmatch(r"[\w.-]{1,15}", scope, re.A)):
            raise ConfigError(
                f"'{text}' has no IPv6 address in its brackets: write it as [2001:db8::1]:{PORT}"
            )
        if _is_link_local(inside) and not scope:
            raise ConfigError(f"'{text}' is on which link? Write it as [{inside}%INTERFACE]:{number}")
        return Address("" if _packed(inside) == bytes(16) else host[1:-1], number)  # ::, however written
    if host in ("", "*"):
        if not text:
            raise ConfigError("'' is not an address: use HOST:PORT, or :PORT for all addresses")
        return Address("", number)
    last = host.rpartition(".")[2]
    if re.fullmatch(r"[0-9]+|0[xX].*", last):  # the resolver takes 127.1 and 0x7f000001 for addresses, too
        if not _is(socket.AF_INET, host):
            raise ConfigError(f"'{text}' has no IPv4 address, '{host}': use four numbers from 0 to 255")
        return Address(host, number)
    if _HOST.fullmatch(host) is None:
        raise ConfigError(
            f"'{text}' has no host's name, '{host}': use letters, digits, - and ., or an address"
        )
    return Address(host, number)


def listen(text: str) -> str:
    """Return a value of `listen` as it was given, '' for none. Raises ConfigError."""
    if text:
        address(text)
    return text


def tls(text: str) -> Tls:
    """Return what a value of `tls` means, as `tls_text` has checked it."""
    way, _, path = text.partition(":")
    return Tls(way, path)


def tls_text(text: str, absolute: Any) -> str:
    """Return a value of `tls` with a path that holds everywhere, '' for none. Raises ConfigError.

    absolute: makes a path so. What begins with %d is in the folder of the service's credentials, which only
    the service knows.
    """
    way, _, path = text.partition(":")
    if text.lower() in ("", "off"):
        return text.lower()
    if way.lower() not in ("psk", "x509") or not path or "\0" in path:
        raise ConfigError(f"'{text}' is not a way to know a client: {_WAYS}")
    if path != "%d" and not path.startswith("%d/"):
        path = absolute(path)
    return f"{way.lower()}:{path}"


def names(text: str) -> list[str]:
    """Return the names of clients. Raises ConfigError."""
    found: list[str] = []
    for word in text.split(",") if text else []:
        name = word.strip()
        if _NAME.fullmatch(name) is None:
            raise ConfigError(
                f"'{name}' is not a client's name: use 1 to 64 letters, digits, _ . @ + or -, with commas "
                "between"
            )
        if name in found:
            raise ConfigError(f"'{name}' is there twice: name each client once")
        found.append(name)
    if len(found) > MOST_NAMES:
        raise ConfigError(
            f"there are {len(found)} names: use at most {MOST_NAMES}, or none, for all with a key"
        )
    return found


def clients(text: str) -> str:
    """Return the names of clients with single commas between. Raises ConfigError."""
    return ",".join(names(text))


def check(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings of the network that do not go together."""
    way = tls(values["tls"]).way
    if not values["listen"]:
        if way:
            raise ConfigError(
                f"tls={values['tls']} is for a network: say where to listen, such as listen=:{PORT}"
            )
        if values["clients"]:
            raise ConfigError(
                f"clients={values['clients']} is for a network: add listen=:{PORT} and tls=psk:FILE"
            )
        return
    where = address(values["listen"])
    if values["swap"] == "local":
        raise ConfigError(
            f"listen={values['listen']} is for other machines, swap=local for this machine's kernel, which "
            "comes by a socket of its own: leave one out"
        )
    if not way and not where.is_loopback:
        raise ConfigError(
            f"listen={values['listen']} gives the device to everyone on the network: add tls=psk:FILE or "
            "tls=x509:FOLDER, or tls=off where the network below is encrypted, as by WireGuard"
        )
    if values["clients"] and way not in ("psk", "x509"):
        raise ConfigError(
            f"clients={values['clients']}: without TLS nobody knows who a client is: add tls=psk:FILE or "
            "tls=x509:FOLDER"
        )


def _is(family: int, text: str) -> bool:
    try:
        socket.inet_pton(family, text)
    except (OSError, ValueError):
        return False
    return True


def _packed(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, host)


def _is_one(host: str) -> bool:
    return _is(socket.AF_INET6, host) and _packed(host) == bytes(15) + b"\1"


def _is_link_local(host: str) -> bool:
    packed = _packed(host)
    return packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
