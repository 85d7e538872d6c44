"""Named moments in the life of a server, at which a test may hold a process: see tests/interruption.

    step("restart.told")

does nothing unless ZRAMD_STEPS names a unix socket. Then the process sends its number and the step's name
there, and goes on when the other end says so, or closes.
"""

import os

ASKED = "ZRAMD_STEPS"  # in the environment
_path = os.environ.get(ASKED, "")


def step(name: str) -> None:
    """Say that the process is at this step, and wait until it may go on, if somebody asked for that."""
    if _path:
        _reached(name)


def inherited() -> dict[str, str]:
    """Return what a process with an environment of its own needs, to be held too."""
    return {ASKED: _path} if _path else {}


def _reached(name: str) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        try:
            link.connect(_path)
            link.sendall(f"{os.getpid()} {name}\n".encode())
            link.recv(1)
        except OSError:  # nobody is there any more
            pass
