"""The NBD URI of a server, from nbdkit's options: what a client on this machine is given as it stands."""

import os
import re
import socket
from contextlib import suppress
from urllib.parse import quote

from zramd.contract import rundir
from zramd.launch import tlsfiles
from zramd.launch.nbdkit import Options
from zramd.settings import network
from zramd.settings.config import Config


def uri(settings: Config, options: Options) -> str:
    """Return the NBD URI that clients on this machine use, '' if nbdkit's options leave it open."""
    given = {**options.values, **_of_network(settings)}
    tls = given.get("--tls") == "require"
    scheme = "nbds" if tls else "nbd"
    user, parameters = _tls(given) if tls else ("", {})
    if settings.clients and "tls-psk-file" in parameters:
        user = network.names(settings.clients)[0]
    path = given.get("-U", given.get("--unix", ""))
    if not options.other_transport and not settings.listen:
        path = f"{settings.rundir}/{rundir.NBD_SOCKET}"
    if path and path != "-":
        parameters = {"socket": os.path.abspath(path), **parameters}
        scheme, host = f"{scheme}+unix", ""
    else:
        port = _port(given.get("-p", given.get("--port", "10809")))
        words = {"-p", "--port", "-i", "--ipaddr", "--ip-addr"}
        if not port or ("--vsock" not in given and words.isdisjoint(given)):
            return ""
        host = f"{_host(given)}:{port}"
        if "--vsock" in given:
            scheme, host = f"{scheme}+vsock", f"1:{port}"
    query = "&".join(f"{key}={quote(os.fsencode(value))}" for key, value in parameters.items())
    user = f"{quote(os.fsencode(user))}@" if user else ""
    return f"{scheme}://{user}{host}/{settings.name}" + (f"?{query}" if query else "")


def _of_network(settings: Config) -> dict[str, str]:
    """Return nbdkit's options for `listen` and `tls`, with the user's own file of keys."""
    if not settings.listen:
        return {}
    where, way = network.address(settings.listen), network.tls(settings.tls).way
    given = {"-p": str(where.port), **({"-i": where.host} if where.host else {})}
    if way in ("psk", "x509"):
        given["--tls"] = "require"
        given["--tls-psk" if way == "psk" else "--tls-certificates"] = tlsfiles.path(settings)
        given |= {"--tls-verify-peer": ""} if way == "x509" else {}
    return given


def _host(given: dict[str, str]) -> str:
    # localhost need not have an address of IPv6.
    default = "::1" if "-6" in given or "--ipv6-only" in given else "localhost"
    host = given.get("-i", given.get("--ipaddr", given.get("--ip-addr", default)))
    return f"[{host.replace('%', '%25')}]" if ":" in host else host


def _port(text: str) -> str:
    """Return a port's number, '' for one that is chosen later or unknown; /etc/services may have its name."""
    try:
        number = int(text) if re.fullmatch("[0-9]{1,9}", text) else socket.getservbyname(text, "tcp")
    except (OSError, ValueError):  # ValueError: no text at all
        return ""
    return str(number) if number else ""


def _tls(given: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Return the user and the URI's parameters with which a client on this machine is let in."""
    if "--tls-psk" in given:
        file = os.path.abspath(given["--tls-psk"])
        user = ""
        with suppress(OSError), open(file, errors="surrogateescape") as keys:
            lines = [line for line in keys if not line.startswith("#")]  # USER:KEY
            user = next((line.partition(":")[0] for line in lines if ":" in line), "")
        return user, {"tls-psk-file": file}
    home = os.environ.get("HOME", "")
    if "--tls-certificates" in given:
        folders = [given["--tls-certificates"]]
    else:  # nbdkit looks there by itself, but clients do not
        own = [f"{home}/.pki/nbdkit", f"{home}/.config/pki/nbdkit"] if os.geteuid() else []
        folders = [*own, "/etc/pki/nbdkit"]
    # A client that has to show a certificate looks for it there as well: a server's folder may have none.
    wanted = "client-cert.pem" if "--tls-verify-peer" in given else "ca-cert.pem"
    there = [folder for folder in folders if os.path.exists(f"{folder}/{wanted}")]
    return "", {"tls-certificates": os.path.abspath(there[0])} if there else {}
