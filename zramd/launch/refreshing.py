"""What swap on attached devices has freed, given back: zramd.guest.refresh does it, in the device's turn.

A command that wants the device meanwhile gets it at once: a step that is under way is given up, which does no
harm. So a refresh makes neither an attach nor a detach wait, nor does it run beside a restart.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack

from zramd.contract import rundir
from zramd.control import life, servers
from zramd.errors import AttachError, ZramdError, reason, say, sentence
from zramd.guest import notes, steps
from zramd.guest.areas import DISCARD
from zramd.guest.files import GuestError
from zramd.guest.refresh import refresh as refresh_disk
from zramd.kernel import attached
from zramd.launch import attaching
from zramd.launch.sudo import sudo
from zramd.process import interrupts
from zramd.process.steps import step

ANSWERS = 2.0  # seconds within which a server must answer: what it holds is to be read back


def one(name: str, tell: Callable[[str], None], *, dry_run: bool) -> None:
    """Refresh the swap on device `name`; `tell` gets a sentence for each thing done, or why nothing is.

    Raises AttachError, UsageError.
    """
    _must_be_root(name, dry_run)
    name = servers.name_of(name)
    servers.must_be_a_name(name)
    if why := _refresh(name, tell, dry_run):
        tell(f"{name}: {why}")


def every(tell: Callable[[str], None], *, dry_run: bool) -> bool:
    """Refresh all swap there is, as a timer does: of what has nothing to refresh, `tell` hears nothing.

    Return False if something went wrong, which was said.
    """
    _must_be_root("--all", dry_run)
    fine = True
    for name in attached.names():
        try:
            _refresh(name, tell, dry_run)
        except (ZramdError, OSError) as error:
            say(sentence(error))
            fine = False
    return fine


def _must_be_root(whom: str, dry_run: bool) -> None:
    if os.geteuid():
        words = f"refresh {whom}{' --dry-run' if dry_run else ''}"
        raise AttachError(f"only root may refresh swap: run '{sudo(words)}'")
    interrupts.interruptible()


def _refresh(name: str, tell: Callable[[str], None], dry_run: bool) -> str:
    """Refresh the swap on a device; return why nothing was done, '' if something was. Raises AttachError."""
    there = attached.find(name)
    if there is None:
        raise AttachError(f"{name} is not attached")
    disk = there.device
    if not os.path.exists(notes.notes_path(disk)):
        return "there is no swap on it that 'zramd attach --swap' has made"
    folder = _serving(name, there.data)
    if not folder:
        return "left for later, as its server does not answer"

    def wanted() -> str:
        return "another command wants it" if attached.is_wanted(name) or life.is_busy(folder) else ""

    steps.reached = step
    with ExitStack() as stack:
        stack.enter_context(interrupts.told(lambda: attaching.stands(name)))
        try:
            stack.enter_context(attached.turn(name, timeout=0))
            stack.enter_context(notes.turn())
        except (AttachError, GuestError):
            return "left for later, as another command is at work on it"
        if attached.find(name) != there:
            return "left for later, as it is attached anew"
        try:
            known = notes.read_notes(disk)
            if not all(note.flags & DISCARD for note in known.areas.values()):
                return "it is swapped to without discard: what swap has freed stays stored"
            step("refresh.begun")
            todo = refresh_disk(disk, tell, dry_run=dry_run, wanted=wanted)
        except GuestError as error:
            raise AttachError(str(error)) from None
        except OSError as error:
            raise AttachError(f"the swap on {name} cannot be refreshed: {_reason(error)}") from None
    return "" if todo.dead else "nothing is worth it"


def _reason(error: OSError) -> str:
    return f"'{error.filename}': {reason(error)}" if error.filename else reason(error)


def _serving(name: str, data: str) -> str:
    """Return the run folder of the server that holds this data and answers, '' if there is none."""
    try:
        served = servers.look(name)
        if served.pid is None or (data and attached.data_of(served.path) != data):
            return ""
        if os.path.exists(served.file(rundir.CONTROL_SOCKET)):  # it has an endpoint
            served.ask_json("GET", "/health", timeout=ANSWERS)
    except (ZramdError, OSError):
        return ""
    return served.path
