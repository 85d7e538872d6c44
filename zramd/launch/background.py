"""What a command does around a server that it begins."""

import os
import socket
import stat
from contextlib import suppress

from zramd.contract import rundir
from zramd.settings.config import Config

LAST_WORDS = 4096  # bytes of a log in which its last line is looked for


def refuse_another(settings: Config) -> None:
    """Raise RundirError if a server has come while we waited for our turn."""
    pid = rundir.holder(settings.rundir)
    if pid is not None:
        raise rundir.in_use(settings.rundir, pid)


def give(words: dict[str, str], *kept: int) -> None:
    """Give the program that this process becomes words in its environment, and descriptors."""
    os.environ.update(words)
    for fd in kept:
        os.set_inheritable(fd, True)


def clear_socket(path: str) -> None:
    """Remove the socket that nbdkit is to make (-U PATH) at `path`, if a server left it that was killed.

    Nobody listens on such a one, and nbdkit would only say that the address is in use.
    """
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        status = os.lstat(path)
        if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid():
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def last_words(folder: str) -> str:
    """Return the last line that the server of a run folder has written to its log, '' if there is none."""
    with suppress(OSError), open(f"{folder}/{rundir.LOG}", "rb") as log:
        log.seek(max(os.fstat(log.fileno()).st_size - LAST_WORDS, 0))
        lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""
