"""Verbs that take a device to a file and back: save, load.

What reads a stream is in the compiled core, which is imported only to do so: the help works without it.
"""

import argparse
import io
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress

from zramd import trusted
from zramd.commands import Commands, Parser, add_device
from zramd.control import busy, servers
from zramd.errors import DeviceError, SaveError, UntrustedError, UsageError, reason, say, tell
from zramd.kernel import attached, swap
from zramd.process import inherited, interrupts
from zramd.process.steps import step

COPY = 1 << 20  # bytes of a pipe that are sent at once
SHOW_INTERVAL = 0.2  # seconds between two looks at the progress
NAME_MAX = 255  # bytes of a file's name: linux/limits.h
RECORD = 16  # bytes of a record beside the payload, at most
_SAVE_ELSEWHERE = "save to a folder of your own, or to - and a pipe"


def save(arguments: argparse.Namespace) -> int:
    """Save a device to a file.

    Raises UsageError for a closed standard output or a terminal, DeviceError, SaveError.
    """
    interrupts.interruptible()
    file = _file(arguments, "save")
    served = servers.find(arguments.name, arguments.rundir)
    if file == "-" and 1 in inherited.missing:
        raise UsageError("standard output is closed: a device cannot be saved to it")
    if file == "-" and os.isatty(1):
        raise UsageError("a saved device is not for a terminal: use a file, or a pipe")
    with nullcontext() if file == "-" else _place(file, _SAVE_ELSEWHERE) as place:
        if place is not None:
            _check_target(place, arguments.force)
        if not arguments.live:
            busy.refuse(served, "save", ", or save it with --live, blocks of different moments")
        in_use = _in_use(served)
        numbers = served.stats()
        total = numbers["compr_data_size"] + numbers["pages_stored"] * RECORD
        started = time.monotonic()
        with served.open_stream("GET", "/save/live" if arguments.live else "/save") as control:
            if place is None:
                found = _copy(served, control, 1, "standard output", _progress("saved", total))
            else:
                with interrupts.told(lambda: f"'{file}' is as it was"):
                    found = _write(served, control, place, total)
    tell(f"{_summary(found)}, {_speed(found['bytes'], started)}")
    _warn(found)
    if in_use:
        say(in_use)
    return 0


@contextmanager
def _place(file: str, remedy: str) -> Iterator[trusted.Place]:
    """Yield the place of a file, in a folder that one other user may own: see docs/security.md.

    Raises DeviceError if somebody else may put something there, or has done so.
    """
    try:
        with ExitStack() as stack:
            try:
                place = stack.enter_context(trusted.place(file, hosted=True))
                if place.magic and os.path.isfile(place.shown):  # /dev/stdout, and a shell's > FILE
                    shown = os.path.realpath(place.shown)
                    place = stack.enter_context(trusted.place(shown, hosted=True))
            except OSError as error:
                raise _cannot("be used", file, error) from None
            yield place
    except UntrustedError as error:
        raise DeviceError(f"'{file}' is not used: {error}: {remedy}") from None


def _in_use(served: servers.Served) -> str:
    """Return the warning that a save of a device in use is worth, '' for one that is not."""
    clients, stats = served.ask_json("GET", "/health").get("clients", 0), served.stats()
    devices = attached.devices(stats["name"], stats["disksize"])
    uses = [use for device in devices for use in swap.uses(device)]
    if not uses and not clients:
        return ""
    what = f"is in use as {', '.join(uses)}" if uses else f"has {clients} client{'s' * (clients > 1)}"
    return (
        f"{served.name} {what}: what was not written to it yet is not in the file: "
        "unmount file systems first, and do not count on swap"
    )


def _check_target(place: trusted.Place, force: bool) -> None:
    """Raise UsageError when something is in the way that is not a saved device; UntrustedError."""
    from zramd.core.device.saving import MAGIC

    file = place.shown
    try:
        status = os.stat(place.name, dir_fd=place.folder, follow_symlinks=place.magic)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"'{file}' is not a regular file: use one, or - for standard output")
        with open(place.open(), "rb") as there:
            if status.st_size and there.read(len(MAGIC)) != MAGIC and not force:
                raise UsageError(f"'{file}' is something else than a saved device: --force overwrites it")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _cannot("be read", file, error) from None


def _write(
    served: servers.Served, control: socket.socket, place: trusted.Place, total: int
) -> dict[str, int]:
    """Write the stream to a file of its own, and put that in its place once it is whole and on the disk."""
    file = place.shown
    # One that nobody can guess, nor another save share. The name may be as long as one can be.
    tail = f".{os.urandom(8).hex()}.partial"
    partial = os.fsdecode(os.fsencode(place.name)[: NAME_MAX - len(tail)]) + tail
    try:
        fd, named = place.beside(partial)
    except OSError as error:
        raise _cannot("be written", file, error) from None
    try:
        step("save.opened")
        found = _copy(served, control, fd, file, _progress("saved", total))
        os.fsync(fd)
        step("save.whole")
        interrupts.finish()
        place.put(fd, partial, named)
        _sync_folder(place.folder)
    except OSError as error:
        raise _cannot("be written", file, error) from None
    finally:
        os.close(fd)
        with suppress(OSError):
            os.unlink(partial, dir_fd=place.folder)
    return found


def _sync_folder(folder: int) -> None:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy(
    served: servers.Served,
    control: socket.socket,
    fd: int,
    what: str,
    progress: Callable[[int], None] | None,
) -> dict[str, int]:
    """Copy a save from the server, checking it on the way."""
    from zramd.core.device import saving

    try:
        with _unblocked(fd, os.O_WRONLY) as target:
            return saving.verify_stream(control.fileno(), copy=target, progress=progress)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _cannot("be written", what, error) from None
    except SaveError as error:
        hint = ": stop what writes to it, or use --live" if error.cause == "changed" else ""
        if error.cause == "cut off":
            raise DeviceError(
                f"{served.name} was not saved: its server ended, or gave up, meanwhile"
            ) from None
        raise DeviceError(f"{served.name} was not saved: {error}{hint}") from None
    finally:
        _end_progress(progress)


@contextmanager
def _unblocked(fd: int, how: int) -> Iterator[int]:
    """Have a pipe wait in poll, and not in read or write: a Ctrl-C that comes just before that is not seen.

    Others may hold the same open pipe, as a shell does: it is opened once more, and what they see stays.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        yield fd
        return
    again = os.open(f"/proc/self/fd/{fd}", how | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield again
    finally:
        os.close(again)


def load(arguments: argparse.Namespace) -> int:
    """Load a saved device into a running one, or only check it. Raises UsageError, DeviceError, SaveError."""
    interrupts.interruptible()
    file = _file(arguments, "load")
    if arguments.check:
        return _check(file)
    served = servers.find(arguments.name, arguments.rundir)
    started = time.monotonic()
    emptied = ""
    with _open_trusted(file) as source, interrupts.told(lambda: f"{served.name} is not loaded{emptied}"):
        regular = stat.S_ISREG(os.fstat(source.fileno()).st_mode)
        if arguments.force:
            if regular:  # what is there is not dropped for a file that cannot be loaded
                _verify(source.fileno(), file)
                source.seek(0)
            served.request("POST", "/reset")
            emptied = ", but empty"
            step("load.reset")
        length = os.fstat(source.fileno()).st_size if regular else -1
        with served.open_stream("PUT", "/load", length) as control:
            step("load.begun")
            _send(source.fileno(), control, length)
            interrupts.finish()  # what was sent whole is loaded, and said to be
            step("load.sent")
            try:
                answer = served.end_stream(control, "/load")
            except DeviceError as error:
                raise DeviceError(f"'{file}' is not loaded: {error}") from None
    found = served.decoded("/load", answer)
    print(f"{_summary(found)}, {_speed(found['bytes'], started)}")
    _warn(found)
    return 0


def _send(fd: int, control: socket.socket, length: int) -> None:
    """Send a file, as much of it as the server takes: it says then why not all."""
    progress = _progress("loaded", length)
    sent = 0
    try:
        while data := os.read(fd, COPY):
            control.sendall(data)
            sent += len(data)
            if progress is not None:
                progress(sent)
        control.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        _end_progress(progress)


def _check(file: str) -> int:
    """Check a file and print what is in it."""
    with _open(file) as source:
        found = _verify(source.fileno(), file)
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(found["saved_at"]))
    rows = {
        "disksize": f"{found['disksize']} bytes",
        "saved": when,
        "blocks": f"{found['blocks']} of {found['disksize'] // 4096}",
        "same": f"{found['same']} (one word, repeated)",
        "lz4": f"{found['blocks'] - found['same'] - found['raw'] - found['lost'] - found['cold']}",
        "zstd": f"{found['cold']}",
        "raw": f"{found['raw']}",
        "lost": f"{found['lost']}",
        "payload": f"{found['payload_bytes']} bytes",
        "changes": f"{found['changes']} requests while it was saved",
    }
    print("".join(f"{name:<9} {value}\n" for name, value in rows.items()), end="")
    return 0


def _verify(fd: int, file: str) -> dict[str, int]:
    from zramd.core.device import saving

    try:
        size = os.fstat(fd).st_size
        with _unblocked(fd, os.O_RDONLY) as source:
            return saving.verify_stream(source, progress=_progress("checked", size))
    except SaveError as error:
        raise DeviceError(f"'{file}' cannot be used: {error}") from None


@contextmanager
def _open_trusted(file: str) -> Iterator[io.FileIO]:
    """Yield a file that nobody but its folder's owner may have put there, or standard input."""
    if file == "-":  # what comes by a pipe, the user vouches for
        with _open(file) as source:
            yield source
        return
    remedy = f"to load it all the same: zramd load … - < {shlex.quote(file)}"
    with _place(file, remedy) as place:
        try:
            fd = place.open(any_kind=True)
        except OSError as error:
            raise _cannot("be read", file, error) from None
        with io.FileIO(fd) as source:
            yield source


def _open(file: str) -> io.FileIO:
    try:
        if file == "-":
            if 0 in inherited.missing:
                raise UsageError("standard input is closed: give a FILE, or something to read")
            return io.FileIO(0, closefd=False)
        return io.FileIO(file)
    except OSError as error:
        raise _cannot("be read", file, error) from None


def _file(arguments: argparse.Namespace, verb: str) -> str:
    """Return FILE: the last word, where NAME is not needed the only one."""
    if arguments.file is None and (arguments.rundir or getattr(arguments, "check", False)):
        arguments.name, arguments.file = None, arguments.name
    if not arguments.file:
        raise UsageError(f"which file? Write it as in 'zramd {verb} NAME FILE'")
    file: str = arguments.file
    return file


def _cannot(what: str, file: str, error: OSError) -> DeviceError:
    return DeviceError(f"'{file}' cannot {what}: {reason(error)}")


def _progress(what: str, total: int) -> Callable[[int], None] | None:
    """Return what shows the progress on a terminal; None: there is none, or nothing to compare with."""
    if not sys.stderr.isatty() or total <= 0:
        return None
    shown = time.monotonic()

    def show(done: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= SHOW_INTERVAL:
            shown = time.monotonic()
            sys.stderr.write(f"\r{what} {min(100 * done // total, 100)} % ")
            sys.stderr.flush()

    return show


def _end_progress(progress: Callable[[int], None] | None) -> None:
    if progress is not None:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _summary(found: dict[str, int]) -> str:
    return f"{found['blocks']} blocks, {found['bytes']} bytes"


def _speed(size: int, started: float) -> str:
    return f"{size / max(time.monotonic() - started, 1e-6) / 1e6:.0f} MB/s"


def _warn(found: dict[str, int]) -> None:
    if found["changes"]:
        say(
            f"{found['changes']} requests changed the device while it was saved: "
            "its blocks are of different moments"
        )
    if found["lost"]:
        say(f"{found['lost']} blocks are lost: reading them is an error")


def _add(commands: Commands, name: str, run: object, text: str) -> Parser:
    parser = commands.add_parser(name, description=text)
    add_device(parser)
    parser.add_argument("file", metavar="FILE", nargs="?", help="the file, or - for a pipe")
    parser.set_defaults(run=run)
    return parser


def add(commands: Commands) -> None:
    """Add the verbs."""
    parser = _add(
        commands,
        "save",
        save,
        "Save a whole device to a file, compressed as it stands. The file is as the device was at one "
        "moment: if a client changes it meanwhile, the save is given up.",
    )
    parser.add_argument(
        "--live", action="store_true", help="save it while it changes: blocks are from different moments"
    )
    parser.add_argument("--force", action="store_true", help="overwrite a file that is not a saved device")
    parser = _add(
        commands,
        "load",
        load,
        "Load a saved device into a running one that is empty, has no clients and is not smaller. "
        "All of it is checked; when something is wrong, the device is left empty.",
    )
    parser.add_argument("--check", action="store_true", help="only check the file and say what is in it")
    parser.add_argument("--force", action="store_true", help="drop what the device holds first")
