"""A terminal of a fixed size, and what a program shows on it."""

import os
import pty
import subprocess
import termios
from collections.abc import Callable, Mapping, Sequence

import pyte

TERM = "xterm-256color"


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    columns: int,
    rows: int,
    until: Callable[[pyte.Screen], bool] = lambda screen: False,
) -> tuple[pyte.Screen, int]:
    """Run a command on a terminal of its own; return what that shows in the end, and the exit status.

    It is ended as soon as `until` says so of what it has drawn: its screen is then as it was at that moment.
    """
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    ours, its = pty.openpty()
    try:
        termios.tcsetwinsize(its, (rows, columns))
        process = subprocess.Popen(
            command,
            env={**environment, "TERM": TERM, "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
        )
    finally:
        os.close(its)
    try:
        while data := _read(ours):
            stream.feed(data)
            if until(screen):
                break
    finally:
        os.close(ours)  # a program that is still there is told that its terminal has gone
        process.terminate()
        status = process.wait()
    return screen, status


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # nobody has the other end open any more
        return b""
