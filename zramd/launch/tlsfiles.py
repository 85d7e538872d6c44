"""The files behind `tls`: looked at before a server starts, and made into options of nbdkit's.

    options(settings)       what nbdkit is told of TLS; raises ConfigError, one sentence for whatever is wrong
    put(settings, argv)     with `clients`: writes the file of keys that is named there, before nbdkit runs
    sweep(folder)           removes those that no server has any more
    path(settings)          the file or folder that `tls` names, as this process finds it

nbdkit itself says little: a file that it cannot use is found out by the first client. What is looked at: the
file exists, is ours or root's, is closed to other users, is what it should be, and is valid now.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from zramd import trusted
from zramd.contract import rundir
from zramd.errors import ConfigError, RundirError, UntrustedError, reason
from zramd.settings import network
from zramd.settings.config import Config

if TYPE_CHECKING:
    import ssl

MAX_BYTES = 1 << 20  # of a file: keys of 10,000 clients
MIN_KEY = 16  # bytes: a shorter one may be guessed
CA, CERTIFICATE, KEY = "ca-cert.pem", "server-cert.pem", "server-key.pem"  # as nbdkit calls them
REVOKED = "ca-crl.pem"  # need not be there
OPTIONS = {"--tls", "--tls-psk", "--tls-certificates", "--tls-verify-peer"}

_MAKE_PSK = "'psktool -u NAME -p FILE' makes one"
_KEY = re.compile(r"[0-9A-Fa-f]+")


def options(settings: Config) -> list[str]:
    """Return nbdkit's options for the `tls` and `clients` of a server. Raises ConfigError."""
    way = network.tls(settings.tls).way
    if way == "psk":
        file = path(settings)
        _lines(settings)
        if settings.clients:
            taken = _in_use(settings.rundir)
            file = f"{settings.rundir}/{next(name for name in rundir.KEYS if name not in taken)}"
        return ["--tls=require", f"--tls-psk={file}"]
    if way == "x509":
        folder = path(settings)
        _check_certificates(folder)
        return ["--tls=require", f"--tls-certificates={folder}", "--tls-verify-peer"]
    return ["--tls=off"] if settings.listen else []


def has_own(settings: Config) -> bool:
    """Say whether a server has a file of keys in its run folder."""
    return bool(settings.clients) and network.tls(settings.tls).way == "psk"


def put(settings: Config, argv: list[str]) -> None:
    """Write the file of keys that a command line names, if it is in the run folder, which is there.

    Raises ConfigError when the user's file has changed for the worse, RundirError.
    """
    if not has_own(settings):
        return
    file = next(word.partition("=")[2] for word in argv if word.startswith("--tls-psk="))
    try:
        rundir.replace_file(file, _lines(settings), 0o600)
    except OSError as error:
        raise RundirError(f"'{file}' cannot be written: {reason(error)}") from None


def sweep(folder: str) -> None:
    """Remove from a run folder the keys of servers that have gone. Never raises."""
    with suppress(OSError, RundirError):
        taken = _in_use(folder)
        for name in rundir.KEYS:
            if name not in taken:
                with suppress(FileNotFoundError):
                    os.unlink(f"{folder}/{name}")


def _in_use(folder: str) -> set[str]:
    """Return which files of keys the server and the one on standby have. Raises RundirError."""
    found: set[str] = set()
    for pid in (rundir.holder(folder), rundir.standby(folder)):
        if pid is not None:
            with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as line:
                words = line.read().decode(errors="replace").split("\0")
                found |= {word.rpartition("/")[2] for word in words if word.startswith("--tls-psk=")}
    return found


def path(settings: Config) -> str:
    """Return the file or folder that `tls` names, '' if none. Raises ConfigError where %d means nothing."""
    found = network.tls(settings.tls).path
    if found != "%d" and not found.startswith("%d/"):
        return found
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not folder:
        raise ConfigError(
            f"tls={settings.tls}: %d is the folder of a service's credentials, and this is no service that "
            "has any: add LoadCredential= to its unit, or name another file"
        )
    return folder + found.removeprefix("%d")


def keys(text: str, file: str) -> dict[str, str]:
    """Return the keys in a file of psktool's, NAME:HEX a line, by name; `file` is what messages call it.

    Raises ConfigError for a line that is none, a name that is there twice, and a file without any.
    """
    found: dict[str, str] = {}
    where: dict[str, int] = {}
    if text.startswith("\ufeff"):
        raise ConfigError(
            f"tls: '{file}' begins with a byte order mark, which nbdkit takes for a part of the name: run "
            f"\"sed -i '1s/^\\xef\\xbb\\xbf//' '{file}'\""
        )
    for number, line in enumerate(text.split("\n"), 1):
        if line.endswith("\r"):
            raise ConfigError(
                f"tls: line {number} of '{file}' ends as on Windows, which nbdkit takes for a part of the "
                f"key: run \"sed -i 's/\\r$//' '{file}'\""
            )
        if not line or line.startswith("#"):
            continue
        name, colon, key = line.partition(":")
        if not colon or not name:
            raise ConfigError(f"tls: line {number} of '{file}' is not NAME:KEY: {_MAKE_PSK}")
        if name in where:
            raise ConfigError(
                f"tls: '{name}' is there twice in '{file}', in lines {where[name]} and {number}: remove one"
            )
        if not _KEY.fullmatch(key) or len(key) % 2:
            raise ConfigError(
                f"tls: the key of '{name}' in '{file}' is not in hexadecimal digits: {_MAKE_PSK}"
            )
        if len(key) < 2 * MIN_KEY:
            raise ConfigError(
                f"tls: the key of '{name}' in '{file}' has {len(key) // 2} bytes and could be guessed: use "
                f"{MIN_KEY} or more: {_MAKE_PSK}"
            )
        where[name], found[name] = number, key
    if not found:
        raise ConfigError(f"tls: '{file}' has no key: {_MAKE_PSK}")
    return found


def _lines(settings: Config) -> str:
    """Return the lines of keys that a server has: all of the user's file, or those of `clients` alone.

    Raises ConfigError.
    """
    file = path(settings)
    text = _text(file, secret=True)
    found = keys(text, file)
    for name in network.names(settings.clients):
        if name not in found:
            raise ConfigError(
                f"clients: '{name}' has no key in '{file}': run \"psktool -u {name} -p '{file}'\", or "
                "leave it out"
            )
    chosen = network.names(settings.clients) or found
    return "".join(f"{name}:{found[name]}\n" for name in chosen)


def _text(file: str, *, secret: bool) -> str:
    """Return what is in a file that nobody else may change; nor read, if it is secret. Raises ConfigError."""
    try:
        with trusted.place(file) as place:
            fd = place.open()
        with open(fd, "rb") as opened:
            status = os.fstat(fd)
            data = opened.read(MAX_BYTES + 1)
    except UntrustedError as error:
        raise ConfigError(f"tls: {error}: use a file of your own") from None
    except FileNotFoundError:
        raise ConfigError(f"tls: there is no file '{file}': make it, or name another one") from None
    except OSError as error:
        raise ConfigError(
            f"tls: '{file}' cannot be read: {reason(error)}: let user {os.geteuid()} read it, as whom the "
            "server runs"
        ) from None
    # A group may read what is root's, as it is the custom with ssl-cert.
    if secret and status.st_mode & (0o004 if status.st_uid == 0 else 0o044):
        raise ConfigError(
            f"tls: other users may read '{file}': run \"chmod 600 '{file}'\", and make new keys"
        )
    if len(data) > MAX_BYTES:
        raise ConfigError(f"tls: '{file}' has more than {MAX_BYTES} bytes: it is not what it should be")
    if not data:
        raise ConfigError(f"tls: '{file}' is empty: docs/network.md says how to make it")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"tls: '{file}' is not text: docs/network.md says how to make it") from None


def _check_certificates(folder: str) -> None:
    """Raise ConfigError unless a folder has what nbdkit needs there, and it is valid now."""
    if not os.path.isdir(folder):
        raise ConfigError(f"tls: there is no folder '{folder}': make it with {CA}, {CERTIFICATE} and {KEY}")
    files = {name: f"{folder}/{name}" for name in (CA, CERTIFICATE, KEY)}
    for name, file in files.items():
        text = _text(file, secret=name == KEY)
        if name == KEY:
            if "PRIVATE KEY-----" not in text:
                raise ConfigError(
                    f"tls: '{file}' has no private key: 'certtool --generate-privkey' makes one"
                )
            continue
        for begin, end in _validities(text, file):
            _check_time(file, begin, end)
    revoked = f"{folder}/{REVOKED}"
    if os.path.lexists(revoked) and "-----BEGIN X509 CRL-----" not in _text(revoked, secret=False):
        raise ConfigError(f"tls: '{revoked}' lists no revoked certificates: 'certtool --generate-crl' does")
    _check_pair(files[CERTIFICATE], files[KEY], files[CA])


def _check_time(file: str, begin: float, end: float) -> None:
    now = time.time()
    if now > end:
        day = time.strftime("%Y-%m-%d", time.gmtime(end))
        raise ConfigError(f"tls: the certificate in '{file}' was valid until {day}: make a new one")
    if now < begin:
        day = time.strftime("%Y-%m-%d", time.gmtime(begin))
        raise ConfigError(f"tls: the certificate in '{file}' is valid from {day} on: set the clock, or wait")


def _check_pair(certificate: str, key: str, ca: str) -> None:
    """Raise ConfigError for a certificate that is not the key's, or that no client of the CA would accept."""
    import ssl  # only here: it takes longer than all else

    def refuse() -> str:
        raise ConfigError(f"tls: '{key}' has a passphrase, and nobody to give it: remove that")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError:
        raise ConfigError(f"tls: '{ca}' has no certificate that can be used: certtool makes one") from None
    try:
        context.load_cert_chain(certificate, key, refuse)
    except ssl.SSLError as error:
        why = (error.reason or "no reason given").lower().replace("_", " ")
        raise ConfigError(
            f"tls: '{key}' is not the key of '{certificate}' ({why}): make both again"
        ) from None
    why = _refused_by_clients(context, ca)
    if why:
        raise ConfigError(
            f"tls: clients would refuse '{certificate}' ({why}): have '{ca}' sign it, for a server "
            "(tls_www_server)"
        )


def _refused_by_clients(server: "ssl.SSLContext", ca: str) -> str:
    """Return why a client that trusts the CA alone refuses the server's certificate, "" if it does not.

    The two shake hands in memory.
    """
    import ssl

    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # by which name clients come, only they know
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as GnuTLS: who is in the file is trusted
    client.set_ciphers("DEFAULT:@SECLEVEL=0")  # how long keys are is for GnuTLS to judge
    client.load_verify_locations(ca)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)]
    try:
        for end in ends:  # the client's hello, then the answer with the certificate
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
        with suppress(ssl.SSLWantReadError):
            ends[0].do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except ssl.SSLError:  # something that OpenSSL does not do; GnuTLS may
        return ""
    return ""


def _validities(text: str, file: str) -> Iterator[tuple[float, float]]:
    """Yield from when and until when each certificate in a text is valid, in seconds of time.time()."""
    import base64

    blocks = re.findall(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", text, re.DOTALL)
    if not blocks:
        raise ConfigError(f"tls: '{file}' has no certificate: certtool makes one, as docs/network.md says")
    for block in blocks:
        try:
            yield _validity(base64.b64decode("".join(block.split()), validate=True))
        except (ValueError, IndexError):
            raise ConfigError(f"tls: a certificate in '{file}' is damaged: make it again") from None


def _validity(der: bytes) -> tuple[float, float]:
    """Return from when and until when a certificate is valid: RFC 5280, section 4.1. Raises ValueError."""
    certificate = _value(der, 0)[1]
    body = _value(certificate, 0)[1]
    at = 0
    if body[0] == 0xA0:  # the version; then number, algorithm, issuer
        at = _value(body, at)[2]
    for _ in range(3):
        at = _value(body, at)[2]
    validity = _value(body, at)[1]
    kind, begin, at = _value(validity, 0)
    return _moment(kind, begin), _moment(*_value(validity, at)[:2])


def _value(data: bytes, at: int) -> tuple[int, bytes, int]:
    """Return the kind and the content of the DER value at an offset, and the offset behind it."""
    kind, length, start = data[at], data[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length, start = int.from_bytes(data[start : start + count], "big"), start + count
    if start + length > len(data):
        raise ValueError("cut off")
    return kind, data[start : start + length], start + length


def _moment(kind: int, text: bytes) -> float:
    """Return the seconds of a UTCTime (0x17) or a GeneralizedTime."""
    from calendar import timegm

    digits = text.decode().removesuffix("Z")
    if kind == 0x17:
        digits = ("19" if digits[:2] >= "50" else "20") + digits
    return timegm(time.strptime(digits, "%Y%m%d%H%M%S"))
