"""A service manager that is a test: it keeps what a service gives it, as systemd does, and passes that on."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

from support.run import PATIENCE

# What a manager does between fork and exec: the descriptors go to 3 and up, and the process is told so.
PASS = """
import fcntl, os, sys
fds, names, command = sys.argv[1].split(), sys.argv[2], sys.argv[3:]
out_of_the_way = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 200) for fd in fds]
for fd in fds:
    os.close(int(fd))
for place, fd in enumerate(out_of_the_way, 3):
    os.dup2(fd, place)
    os.close(fd)
if fds:
    os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=names)
os.execvp(command[0], command)
"""


class ServiceManager:
    """What systemd is to one service; `path` is its NOTIFY_SOCKET.

    Messages are read with take(), all that there are, or one by one with next(), which waits.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self.kept: list[tuple[str, int]] = []  # name and descriptor, in the order in which they came
        self.said: list[str] = []  # the lines of all messages that were taken
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.setblocking(False)

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *more: tuple[str, int],
        output: IO[bytes] | None = None,
        errors: IO[bytes] | int | None = None,
    ) -> subprocess.Popen[str]:
        """Run a command as the service, with the descriptors of `more` and then those that are kept."""
        passed = [*more, *self.kept]
        fds = [fd for _, fd in passed]
        names = ":".join(name for name, _ in passed)
        words = [sys.executable, "-I", "-S", "-c", PASS, " ".join(map(str, fds)), names, *command]
        env = {**environment, "NOTIFY_SOCKET": str(self.path)}
        return subprocess.Popen(words, env=env, pass_fds=fds, stdout=output, stderr=errors, text=True)

    def take(self) -> None:
        """Read all that has been sent: keep descriptors, and let go of those that are not wanted any more."""
        while True:
            try:
                text, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            except BlockingIOError:
                return
            lines = text.decode().splitlines()
            self.said += lines
            words = dict(line.split("=", 1) for line in lines)
            if words.get("FDSTORE") == "1":
                assert words["FDPOLL"] == "0"  # or systemd polls it, and lets go of it at its end
                for fd in fds:
                    self._keep(words["FDNAME"], fd)
            elif words.get("FDSTOREREMOVE") == "1":
                self.let_go(words["FDNAME"])

    def _keep(self, name: str, fd: int) -> None:
        """Keep one descriptor; systemd has each file once."""
        if any(os.path.sameopenfile(fd, kept) for _, kept in self.kept):
            os.close(fd)
        else:
            self.kept.append((name, fd))

    def let_go(self, name: str | None = None) -> None:
        """Close what is kept by a name, None: all."""
        for kept in [kept for kept in self.kept if name in (None, kept[0])]:
            self.kept.remove(kept)
            os.close(kept[1])

    def next(self) -> str:
        """The next message; fails the test if none comes."""
        if not select.select([self._socket], [], [], 20 * PATIENCE)[0]:
            pytest.fail("the service has told its manager nothing")
        return self._socket.recv(4096).decode()

    def next_status(self) -> str:
        """The status that the next message must be."""
        message = self.next()
        assert message.startswith("STATUS=")
        return message.removeprefix("STATUS=")

    def close(self) -> None:
        """End it, and let go of all."""
        self._socket.close()
        self.let_go()
