"""What SIGINT, SIGTERM and SIGHUP do to a command: it takes back what it has begun, or it finishes it."""

import atexit
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from zramd.errors import printable, tell
from zramd.process import pidfd

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # those that people and programs interrupt with


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C: what is under way is cleaned up as after that."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def interruptible() -> None:
    """Have SIGTERM and SIGHUP clean up as Ctrl-C does; who ignores them, as nohup has it, goes on to."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _interrupt)


def finish() -> None:
    """From now on let no signal keep this command from finishing what it has begun, and from saying so."""
    # When Python ends it gives signals their own meaning back, and one that came then would be the status.
    atexit.register(signal.pthread_sigmask, signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)  # children would inherit SIG_IGN


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)


@contextmanager
def told(sentence: Callable[[], str]) -> Iterator[None]:
    """If a signal interrupts what is inside, say what that means for the device."""
    try:
        yield
    except KeyboardInterrupt:
        tell(f"zramd: interrupted: {printable(sentence())}")
        raise


@contextmanager
def blocked() -> Iterator[None]:
    """Let a signal wait until the end of the `with`: a process that was begun is known then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Undo `blocked` in a process that was begun there."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end(process: int, seconds: float) -> None:
    """End a server that did not get so far as to serve, by its pidfd: in its normal way if it can."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, number)
        if pidfd.has_ended(process, seconds):
            return
