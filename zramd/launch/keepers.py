"""Starts the process that makes a kernel device and stays, and ends it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import zramd
from zramd.errors import AttachError
from zramd.kernel import attached
from zramd.kernel.attached import Attached
from zramd.process import steps

ENDS = 5.0  # seconds in which a keeper that is told to end must have ended


def start(module: str, name: str, words: list[str], undo: Callable[[int], None]) -> tuple[int, int]:
    """Start a keeper of zramd `name`; return its device's number and its own process number.

    Where it does not get so far, `undo` is called with the process number. Raises AttachError.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(zramd.__file__)))
    environment = {
        "PYTHONPATH": package,
        "PYTHONMALLOC": "malloc",  # Python's own allocator asks the kernel for memory now and then
        "MALLOC_ARENA_MAX": "1",
        "LD_BIND_NOW": "1",
        **steps.inherited(),
    }
    keeper = subprocess.Popen(
        [sys.executable, "-S", "-P", "-m", module, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env=environment,
        start_new_session=True,
    )
    assert keeper.stdout is not None
    try:
        said = " ".join(keeper.stdout.read().decode(errors="replace").split())
    except BaseException:
        keeper.terminate()  # it takes back what it has done
        with suppress(subprocess.TimeoutExpired):
            keeper.wait(ENDS)
        undo(keeper.pid)
        raise
    if not said.startswith("ok "):
        undo(keeper.pid)
        raise AttachError(f"{name} cannot be attached: {said or 'its keeper has died'}")
    return int(said.removeprefix("ok ")), keeper.pid


def find(there: Attached) -> int:
    """Return a descriptor of the process that keeps a device, -1 if none lives."""
    if not there.keeper:
        return -1
    with suppress(ProcessLookupError):
        keeper = os.pidfd_open(there.keeper)
        now = attached.find(there.name)
        if now and (now.device, now.keeper) == (there.device, there.keeper):
            return keeper
        os.close(keeper)  # it has left its number to another process
    return -1


def end(keeper: int) -> None:
    """Tell the process of this descriptor to end, unless that is -1."""
    if keeper >= 0:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(keeper, signal.SIGTERM)
