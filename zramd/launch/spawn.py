"""A server in the background: started, heard, and looked at until it answers.

Its standard error is a pipe to us. The server turns to a file of its own once it serves: the pipe's end shows
that, and what came before it says why a server did not get so far.
"""

import os
import re
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from zramd.contract import exchange, rundir
from zramd.errors import DeviceError, RundirError, sentence
from zramd.process import inherited, interrupts, pidfd
from zramd.settings.config import Config

READY_TIMEOUT = 30.0  # seconds after which the watcher gives up: the server says itself what is wrong
_TOOK_OVER = "zramd: took over "  # what a server says that does well: zramd.server.opening
_BEFORE_REASON = r"nbdkit: (error: )?(.*nbdkit_plugin\.py: \w+: error: )?|zramd: "


def spawn(
    argv: list[str], prepare: Callable[[], None] = lambda: None, folder: str = "."
) -> tuple[int, int | None, int]:
    """Run a program as nobody's child, in a session of its own.

    Return its number, its pidfd (None if it has ended already), and its standard error.

    Nobody's child because nbdkit may ask the kernel to be ended together with its parent. It stands in
    `folder` and has no descriptors of ours; then `prepare` is called in it, which may give it some. Raises
    DeviceError when it could not be started.
    """
    errors, to_errors = os.pipe()
    numbers, to_numbers = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            between = os.getpid()
            pid = os.fork()
            if pid:
                os.write(to_numbers, b"%d" % pid)
            else:
                while os.getppid() == between:
                    time.sleep(0.001)
                null = os.open(os.devnull, os.O_RDWR)
                for source, target in ((null, 0), (null, 1), (to_errors, 2)):
                    os.dup2(source, target)
                to_errors = 2  # `prepare` may put something else in its place
                os.chdir(folder)
                inherited.leave_manager()
                inherited.close_others(words=argv)
                prepare()
                interrupts.unblock()
                os.execvp(argv[0], argv)
        except OSError as error:
            os.write(to_errors, f"{argv[0]}: {error}\n".encode())
        finally:
            os._exit(1)
    os.close(to_errors)
    os.close(to_numbers)
    os.waitpid(child, 0)
    with open(numbers, "rb") as file:
        number = file.read()
    if not number:  # and never 0: a signal to that ends our whole process group
        with open(errors, errors="replace") as said:
            raise DeviceError(f"no process can be started for it: {said.read().strip()}")
    pid = int(number)
    try:
        return pid, pidfd.open_number(pid), errors
    except OSError:  # it cannot be watched: it has only just begun, and holds nothing
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.close(errors)
        raise


def read_until(reader: int, end: float) -> str:
    """Return what comes from a pipe until its end, or until `end` on the clock of time.monotonic()."""
    said = b""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while poll.poll(max(end - time.monotonic(), 0) * 1000):
        data = os.read(reader, 4096)
        if not data:
            break
        said += data
    return said.decode(errors="replace")


def reason(said: str) -> str:
    """Return the sentence in what a server has said before it ended."""
    lines = [line for line in said.splitlines() if line.strip() and _TOOK_OVER not in line]
    errors = [line for line in lines if line.startswith("nbdkit: ")] or lines
    if errors and errors[-1].endswith("error running this script"):
        # Python has said why before, at the end of a traceback.
        errors = lines[: lines.index(errors[-1])] or errors
    if errors and errors[-1].strip(" :") == "MemoryError":
        return "not enough memory"
    return re.sub(f"^(?:{_BEFORE_REASON})", "", errors[-1]) if errors else "it gave no reason"


def is_ready(settings: Config, pid: int) -> bool:
    """Say whether the server that is process `pid` answers: it, and not another one of the same name."""
    return not why_not_ready(settings, pid)


def why_not_ready(settings: Config, pid: int) -> str:
    """Return why one has to wait for the server that is process `pid`, '' if it answers."""
    try:
        if rundir.holder(settings.rundir) != pid:
            return "it has not taken its run folder"
        if not settings.endpoint:
            # nbdkit makes its socket first, and it may be elsewhere; ublk needs none.
            made = (f"{settings.rundir}/{name}" for name in (rundir.NBD_SOCKET, rundir.DATA_ID))
            return "" if any(map(os.path.exists, made)) else "it has not made its socket"
        status, answer = exchange.ask(settings.rundir, "GET", "/health", timeout=1)
    except (OSError, RundirError) as error:
        return f"its control socket: {sentence(error)}" if isinstance(error, OSError) else str(error)
    ours = status == 200 and re.search(rf'"pid": {pid}\b', answer) is not None
    return "" if ours else "another one answers"
