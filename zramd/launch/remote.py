"""A zramd of another machine, as `zramd attach nbd://HOST[:PORT]/NAME` names it.

Here it is called NAME@HOST:PORT: in the records of what is attached, in the kernel, and by `zramd detach`.
"""

import re
import socket
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from zramd.errors import AttachError, ConfigError, UsageError, reason
from zramd.launch.wishes import Wanted
from zramd.settings import config

PORT = 10809  # that IANA has given to NBD
_FORM = "nbd://HOST[:PORT]/NAME"
_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")
_TUNNEL = "put a tunnel of the kernel's below it, such as WireGuard, and use nbd://"


class Remote(NamedTuple):
    """A server of another machine, and the name of its device there; of an IPv6 address without brackets."""

    export: str
    host: str
    port: int

    @property
    def name(self) -> str:
        """What it is called here."""
        return f"{self.export}@{_bracketed(self.host)}:{self.port}"

    @property
    def path(self) -> str:
        """The run folder: on another machine it has none that we see."""
        return ""

    def address(self) -> str:
        """Return HOST:PORT with the host as a number. Raises AttachError.

        A keeper must not ask for names when it acts: that reads files, and waits for others.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise AttachError(f"'{self.host}' is not found: {reason(error)}") from None
        number = socket.getnameinfo(found[0][4], socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
        return f"{_bracketed(number)}:{self.port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_uri(word: str) -> bool:
    """Say whether a word on the command line is a URI, of whatever kind."""
    return _SCHEME.match(word) is not None


def parse(uri: str) -> Remote:
    """Return what a URI names. Raises UsageError, AttachError for one that the kernel cannot speak to."""
    scheme = uri.partition(":")[0].lower()
    if scheme.startswith("nbds"):
        raise AttachError(f"the kernel's NBD client has no TLS, which '{uri}' asks for: {_TUNNEL}")
    if scheme != "nbd":
        more = ": attach a server of this machine by its name" if scheme.startswith("nbd+") else ""
        raise UsageError(f"'{uri}' is not {_FORM}{more}")
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, PORT if parts.port is None else parts.port
    except ValueError:
        raise UsageError(f"'{uri}' is not {_FORM}") from None
    export = unquote(parts.path.removeprefix("/"))
    if not host or not port or not export or parts.username is not None or parts.query or parts.fragment:
        raise UsageError(f"'{uri}' is not {_FORM}")
    try:
        config.find("name").parse(export)
    except ConfigError as error:
        raise UsageError(f"'{uri}': {error}") from None
    return Remote(export, host, port)


def called(word: str) -> str:
    """Return the name here that a word on the command line means, '' if it means one of this machine.

    It is a URI, or the name itself. Raises UsageError, AttachError.
    """
    if is_uri(word):
        return parse(word).name
    if "@" in word and "/" not in word:
        return parse(f"nbd://{word.partition('@')[2]}/{word.partition('@')[0]}").name
    return ""


def refuse_options(folder: str | None, wanted: Wanted) -> None:
    """Raise UsageError for what only a server of this machine can be attached with."""
    given = {
        "--rundir": bool(folder),
        "--config": wanted.configured,
        "--standby": wanted.standby is not None,
        "--nbd-client": wanted.nbd_client,
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise UsageError(f"a server of another machine is attached without {option}: leave it out")
