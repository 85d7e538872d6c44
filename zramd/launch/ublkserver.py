"""The server's command line with front=ublk: there is no nbdkit, so none of its options either."""

import os
import sys

from zramd.errors import UsageError, say
from zramd.kernel import ublk
from zramd.launch import ublkway
from zramd.launch.nbdkit import Options
from zramd.settings import config
from zramd.settings.config import Config

MODULE = "zramd.server"
_WITHOUT = "a device of front=ublk has no clients but this machine's kernel"


def command(pairs: list[tuple[str, str]]) -> list[str]:
    """Return the command line for settings whose paths are absolute."""
    return [sys.executable, "-P", "-m", MODULE, *(f"{key}={value}" for key, value in pairs)]


def is_one(line: list[str]) -> bool:
    """Say whether a process's command line is a server's without nbdkit."""
    return any(line[at : at + 2] == ["-m", MODULE] for at in range(1, len(line) - 1))


def check(options: Options) -> None:
    """Raise UsageError for what is asked of nbdkit."""
    if options.sockets:
        raise UsageError(f"{_WITHOUT}: do not pass sockets (LISTEN_FDS), or use front=nbd")
    if options.before or options.after:
        word = (options.before or options.after)[0]
        raise UsageError(f"'{word}' is for nbdkit: {_WITHOUT}: leave it out, or use front=nbd")


def choose(settings: Config, options: Options, *, for_others: bool = False) -> str:
    """Return which front front=auto is, and say why. `for_others`: zramd.conf leaves the device to them."""
    why = "it has attach = no, and others may use it" if for_others else _why_not(settings, options)
    if "run '" not in why:  # else the remedy is another front
        why = why.partition(": ")[0]
    say(f"front=auto: {'nbd, because ' + why if why else 'ublk'}")
    return "nbd" if why else "ublk"


def _why_not(settings: Config, options: Options) -> str:
    """Return why ublk cannot be had, or would not do what is asked for, '' if it can.

    A service sees no devices, and needs none: `zramd attach`, a service of its own, hands it over.
    """
    if options.sockets or options.before or options.after:
        return "nbdkit's options or sockets are given"
    if name := config.nbds_own(settings._asdict()):
        return f"{name}={config.written(name, getattr(settings, name))} is for it"
    if os.geteuid():
        return "only root attaches ublk's devices"
    return ublkway.never() or ublk.absent() if "NOTIFY_SOCKET" in os.environ else ublkway.unavailable()
