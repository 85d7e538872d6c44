"""Finds the devices of this machine by their run folders, and talks to their servers.

    for served in servers.every(): ...                    all, also those whose server has died
    servers.find("zram0").ask_json("GET", "/stats")       one, whose server lives

Nothing here needs the compiled core.
"""

import os
import socket
from collections.abc import Iterable
from contextlib import suppress

from zramd import trusted
from zramd.contract import rundir
from zramd.contract.exchange import TIMEOUT, ask, connect, parse, rest
from zramd.contract.handover import SYSTEMD
from zramd.control import life, peer
from zramd.errors import (
    ConfigError,
    DeviceError,
    RundirError,
    UntrustedError,
    UsageError,
    ZramdError,
    is_shortage,
    reason,
)

BETWEEN = 2.0  # seconds to wait for a server that is being started: most need a tenth
_LISTS = ("/classes.json",)  # all else that is JSON is an object
_MAX_HEAD = 8 << 10  # bytes of an answer's header
_MAX_PATH = 4096  # bytes, as the kernel has it


class Served:
    """A device's run folder, and the process that serves it, None when that has died."""

    __slots__ = ("name", "path", "pid")

    def __init__(self, name: str, path: str, pid: int | None) -> None:
        self.name = name
        self.path = path
        self.pid = pid

    def file(self, name: str) -> str:
        """Return the path of a file in the run folder, such as rundir.NBD_SOCKET."""
        return f"{self.path}/{name}"

    def request(self, method: str, path: str, body: str = "", timeout: float = TIMEOUT) -> str:
        """Return what the server answers to one request of its endpoint.

        Raises DeviceError when it does not answer or refuses, UsageError when it finds the request wrong.
        """
        try:
            status, answer = ask(self.path, method, path, body, timeout)
        except TimeoutError:
            raise DeviceError(
                f"{self.name} does not answer within {timeout:g} seconds: look at its process, {self.pid}"
            ) from None
        except OSError as error:
            raise self._silent(error) from None
        return self._judge(path, status, answer)

    def _silent(self, error: OSError) -> DeviceError:
        """Return the error that says why there is no answer: it may have ended just now."""
        if isinstance(error, (FileNotFoundError, ConnectionError)) and error.errno:
            with suppress(RundirError):
                if rundir.holder(self.path) is None:
                    how = "stopped" if self.has_stopped() else "ended"
                    return DeviceError(f"{self.name} has {how} meanwhile")
        return DeviceError(f"{self.name} does not answer: {_why(self.file(rundir.CONTROL_SOCKET), error)}")

    def _judge(self, path: str, status: int, answer: str) -> str:
        if status == 200:
            return answer
        if status == 404:
            raise DeviceError(
                f"{self.name} runs another version of zramd, which does not know '{path}': restart it"
            )
        sentence = answer.splitlines()[0] if answer else f"status {status}"
        raise (UsageError if status == 400 else DeviceError)(f"{self.name}: {sentence}")

    def open_stream(self, method: str, path: str, length: int = -1) -> socket.socket:
        """Return a connection on which a stream comes (GET) or goes (PUT, of `length` bytes, -1: to its end).

        Raises as `request`.
        """
        size = "" if length < 0 else f"Content-Length: {length}\r\n"
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            control.settimeout(TIMEOUT)
            connect(control, self.path)
            control.sendall(f"{method} {path} HTTP/1.1\r\nHost: zramd\r\n{size}\r\n".encode())
            if method == "GET":
                head = b""
                while not head.endswith(b"\r\n\r\n") and len(head) < _MAX_HEAD and (more := control.recv(1)):
                    head += more
                if b" 200 " not in head:
                    self._judge(path, *parse(head + rest(control, TIMEOUT)))
            control.settimeout(None)
        except OSError as error:
            control.close()
            raise self._silent(error) from None
        except BaseException:
            control.close()
            raise
        return control

    def end_stream(self, control: socket.socket, path: str) -> str:
        """Return what the server answers to a stream that was sent; raises as `request`."""
        try:
            status, text = parse(rest(control, None))
        except OSError as error:
            if is_shortage(error):
                raise DeviceError(f"what {self.name} answers cannot be read: {reason(error)}") from None
            raise DeviceError(f"the server of {self.name} has ended meanwhile") from None
        return self._judge(path, status, text)

    def ask_json(self, method: str, path: str, body: str = "", timeout: float = TIMEOUT) -> "dict[str, Any]":
        """Return the JSON object that is the answer; raises as `request`."""
        values: dict[str, Any] = self.decoded(path, self.request(method, path, body, timeout))
        return values

    def decoded(self, path: str, answer: str) -> "Any":
        """Return the JSON object, or list, that an answer to `path` is. Raises DeviceError."""
        import json

        with suppress(ValueError, RecursionError):
            values = json.loads(answer, object_hook=_Answer)
            if isinstance(values, list if path in _LISTS else dict):
                return values
        raise DeviceError(f"{self.name} does not answer {path} in whole: is it stopping?")

    def stats(self) -> "dict[str, Any]":
        """Return every number there is, as stats.json has them."""
        return self.ask_json("GET", "/stats")

    def published(self, name: str, size: int) -> str:
        """Return what a file in the run folder begins with, '' if there is none. A shortage is an OSError.

        The folder may belong to another user, who may have put anything there.
        """
        try:
            folder = trusted.open_folder(self.path, foreign=True)
        except UntrustedError:
            return ""
        except OSError as error:
            if is_shortage(error):
                raise
            return ""
        try:
            return rundir.head(name, folder, size)
        finally:
            os.close(folder)

    def process(self) -> peer.Process:
        """Return the process that serves; it is to be closed. Raises DeviceError."""
        try:
            return peer.find(self.name, self.path)
        except DeviceError:
            self.look_again()  # it has ended just now
            raise

    def look_again(self) -> None:
        """Find out which process serves now. To keep other commands off meanwhile, see zramd.control.life.

        Raises DeviceError when it was stopped or has died.
        """
        self.pid = rundir.holder(self.path)
        if self.pid is None:
            raise self._dead()

    def died(self) -> DeviceError:
        """Return the error that says that the server has died, what became of its data, and what to do."""
        if life.is_busy(self.path):
            return DeviceError(f"{self.name} is being started: try again when it serves")
        return self._dead()

    def has_stopped(self) -> bool:
        """Say whether it has ended in its normal way since it was found: then nothing is left of it."""
        return not _was_used(self.path)

    def _dead(self) -> DeviceError:
        if self.has_stopped():
            return DeviceError(f"{self.name} has stopped meanwhile")
        state = self._state()
        if state == SYSTEMD:
            return DeviceError(
                f"the server of {self.name} has died, its data is with the service manager: "
                "start its service again"
            )
        if state and os.path.exists(state):
            return DeviceError(
                f"the server of {self.name} has died, its data is in its state: start it again with "
                f"state={state}"
            )
        lost = f", and its state '{state}' is gone" if state else ", and its data with it"
        return DeviceError(
            f"the server of {self.name} has died{lost}: start it again, "
            f"or remove what it left behind by 'rm -r {self.path}'"
        )

    def _state(self) -> str:
        """Return where the server has its state, '' if it has none. Raises DeviceError for a shortage."""
        try:
            return self.published(rundir.STATE, _MAX_PATH).strip()
        except OSError as error:
            raise DeviceError(
                f"the server of {self.name} has died, and it is not known whether it has a state: "
                f"{reason(error)}"
            ) from None


class _Answer(dict):  # type: ignore[type-arg]
    """A server's answers; a server of another version may lack some."""

    def __missing__(self, key: str) -> object:
        raise DeviceError(
            f"its server runs another version of zramd, which does not report '{key}': restart it"
        )


TYPE_CHECKING = False  # what typing says too, without the time that it takes to import
if TYPE_CHECKING:
    from typing import Any


def every() -> list[Served]:
    """Return all devices in the usual place, or where zramd.conf has them; also if their server has died."""
    folder = rundir.base()
    names = names_in(folder) if folder else []
    found = {os.path.realpath(path): (name, path) for name in names if _was_used(path := f"{folder}/{name}")}
    for name, path in configured().items():
        if path and _was_used(path):
            found[os.path.realpath(path)] = name, path
    served = [Served(name, path, _server(path)) for name, path in sorted(found.values())]
    return [one for one in served if one.pid is not None or not one.has_stopped()]


def names_in(folder: str) -> list[str]:
    """Return what is in a folder, nothing if it is not there. Raises DeviceError."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DeviceError(f"'{folder}' cannot be read: {reason(error)}") from None


def _was_used(path: str) -> bool:
    return os.path.exists(f"{path}/{rundir.PID}")


def configured() -> dict[str, str]:
    """Return the devices that zramd.conf has, and their run folders where it names them, else ''."""
    from zramd.settings import conffiles

    if not conffiles.are_there("zramd.conf"):
        return {}
    from zramd.settings import devices

    try:
        return devices.load().rundirs
    except ZramdError:  # it is not what was asked for: a device that is served is found all the same
        return {}


def name_of(text: str) -> str:
    """Return the device's name that a word on the command line means: it may be written as /dev/NAME.

    /dev/nbdN and /dev/ublkbN mean the one that is attached there.
    """
    name = text.removeprefix("/dev/")
    if name != text and name.startswith(("nbd", "ublkb")):
        from zramd.kernel import attached

        return attached.name_of(text) or name
    return name


def must_be_a_name(name: str) -> None:
    """Raise UsageError for what no device can be called."""
    from zramd.settings import config

    try:
        config.find("name").parse(name)
    except ConfigError:
        raise _not_a_name(name) from None


def _not_a_name(name: str) -> UsageError:
    return UsageError(f"'{name}' is not a device's name: 'zramd list' shows those that there are")


def look(name: str | None, path: str | None = None) -> Served:
    """Return device `name`, or the one whose run folder is `path`, also if its server has died.

    Raises UsageError when neither is given or no device can be called so, DeviceError when there is none.
    """
    name = None if name is None else name_of(name)
    if path:
        path = os.path.abspath(path)
        missing = f"no server has used '{path}': give the folder that it has as rundir="
    elif name is None:
        raise UsageError("which device? Give its name, as 'zramd list' shows it, or --rundir FOLDER")
    elif not name or name[0] in ".-" or "/" in name or "\0" in name:
        raise _not_a_name(name)
    else:
        path, missing = _place(name)
    try:
        # root follows nobody's links: they may lead to another device than that which was meant.
        folder = trusted.open_folder(path, foreign=True)
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            os.close(os.open(rundir.PID, flags, dir_fd=folder))
        finally:
            os.close(folder)
    except UntrustedError as error:
        raise DeviceError(f"'{path}' is not used: {error}") from None
    except PermissionError:
        raise DeviceError(f"'{path}' cannot be read: permission denied: run this as its owner") from None
    except (OSError, ValueError) as error:
        if is_shortage(error):
            raise
        raise DeviceError(missing) from None
    return Served(name or os.path.basename(path), path, _server(path))


def _place(name: str) -> tuple[str, str]:
    """Return the run folder of device `name`, and the sentence that says that nothing is there.

    One that zramd.conf names comes before the usual one, a living server before one that has died.
    """
    known = configured()
    usual = f"{rundir.base()}/{name}" if rundir.base() else ""
    paths = [path for path in (known.get(name, ""), usual) if path]
    if not paths:
        raise UsageError("no place to look for devices: set XDG_RUNTIME_DIR or give --rundir FOLDER")
    used = [path for path in paths if _was_used(path)]
    living = [path for path in used if rundir.holder(path) is not None]
    if used:
        return (living or used)[0], f"there is no device '{name}': it has just ended"
    must_be_a_name(name)  # a run folder may have any other, too
    if name in known:
        hint = f"'zramd start {name}' starts it"
    elif os.geteuid() and os.path.lexists(f"{rundir.ROOTS}/{name}"):
        hint = "root has one: use sudo"
    elif there := ", ".join(served.name for served in every()):
        hint = f"use one of {there}"
    else:
        hint = f"'zramd start {name} --size 1G' starts it"
    return paths[0], f"there is no device '{name}': {hint}"


def find(name: str | None, path: str | None = None) -> Served:
    """As `look`, and raises DeviceError when the server has died."""
    served = look(name, path)
    if served.pid is None:
        raise served.died()
    return served


def those(names: Iterable[str], folders: Iterable[str]) -> list[Served]:
    """Return the devices with these names and in these run folders, as `find`; without any, all."""
    return [*map(find, names), *(find(None, folder) for folder in folders)] or every()


def _server(path: str) -> int | None:
    """Return the process that serves, None if it has died. Between two, in a restart, wait for the next."""
    import time

    end = time.monotonic() + BETWEEN
    while (pid := rundir.holder(path)) is None and life.is_busy(path) and time.monotonic() < end:
        time.sleep(0.01)
    return pid


def _why(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no '{path}': it is starting, stopping, or runs with endpoint=off"
    if isinstance(error, ConnectionError) and error.errno:
        return f"'{path}': {reason(error)}: is it stopping?"
    return f"'{path}': {reason(error)}"
