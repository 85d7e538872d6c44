"""What `zramd serve` tells the user once its server answers: by a small process beside it.

The process that the user has started is the server by then, which has other things to do.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from zramd import __version__
from zramd.contract import rundir
from zramd.control import life
from zramd.errors import ZramdError
from zramd.launch import spawn, ublkway
from zramd.launch.nbdkit import Options
from zramd.launch.sudo import sudo, zramd
from zramd.launch.uris import uri
from zramd.process import pidfd
from zramd.settings.config import Config


def start(settings: Config, text: str) -> None:
    """Run `watch` in a process that is nobody's child, so that the server has none that it does not know."""
    pid = os.getpid()
    made = not os.path.lexists(settings.rundir)  # then zramd makes the run folder
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        if os.fork() == 0 and not watch(pid, lambda: spawn.is_ready(settings, pid), text):
            _clear(settings, pid, made)
    finally:
        os._exit(0)


def greeting(settings: Config, options: Options, pid: int) -> str:
    """Return what the user is told once the server answers: where it is, and three commands to try next."""
    where = uri(settings, options)
    folder = shlex.quote(settings.rundir)
    tls = options.values.get("--tls") == "require"
    if not options.other_transport and not settings.listen and not tls:  # the kernel has no TLS
        attach = attach_command(settings)
    elif where:
        attach = f"nbdinfo {shlex.quote(where)}"
    else:
        attach = "see nbdkit's options that you gave"
    if settings.endpoint:
        usual = settings.rundir == f"{rundir.base()}/{settings.name}"
        look = "watch         " + zramd(f"top {settings.name if usual else f'--rundir {folder}'}")
    else:
        look = f"read stats    cat {folder}/mm_stat {folder}/frag_ratio"
    reached = f"NBD URI       {where or 'as nbdkit was told'}"
    if settings.front == "ublk":
        reached = "front         ublk: this machine's kernel, once it is attached"
    return (
        f"zramd {__version__} serves {settings.name}, {settings.disksize} bytes\n"
        f"  {reached}\n"
        f"  stats folder  {settings.rundir}\n"
        "try next:\n"
        f"  attach        {attach}\n"
        f"  {look}\n"
        f"  stop          Ctrl-C, or: kill {pid}\n"
    )


def attach_command(settings: Config) -> str:
    """Return what attaches a device, as this user has to write it.

    Attaching is root's business, and root looks for a device by its name elsewhere than other users. Where
    this machine has no ublk, it is said why that is of no use.
    """
    if settings.front == "ublk" and (why := ublkway.never()):
        return f"not on this machine: {why}"
    usual = settings.rundir == f"{rundir.ROOTS}/{settings.name}"
    return sudo(f"attach {settings.name if usual else f'--rundir {shlex.quote(settings.rundir)}'}")


def watch(pid: int, ready: Callable[[], bool], text: str) -> bool:
    """Print `text` once `ready` says so, and return True; give up silently when process `pid` has ended."""
    end = time.monotonic() + spawn.READY_TIMEOUT
    # It reports the end at once: a caller may wait for the end of our output before it reaps that process.
    process = pidfd.open_number(pid)
    while process is not None and time.monotonic() < end:
        if ready():
            sys.stdout.write(text)
            sys.stdout.flush()
            return True
        if pidfd.has_ended(process, 0.02):
            break
    return False


def _clear(settings: Config, pid: int, made: bool) -> None:
    """Remove what a server has left that did not get so far as to serve: nbdkit may end without a word to it.

    It does so when it cannot listen, say on a port that is in use. Else that would look like one that died.
    """
    with suppress(OSError, ZramdError):
        turn = life.take(settings.rundir, settings.name)
        rundir.clear(settings.rundir, pid)
        turn.made = made
        turn.done()
