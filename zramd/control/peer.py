"""Who serves a device: the process at the other end of its control socket, by the kernel's word.

A pid file holds what somebody wrote there. The folder's owner can write anything, and a server in a PID
namespace of its own writes a number that means another process out here. So no process is sent a signal
because of it. The kernel says which process listens on a socket (SO_PEERCRED), and gives a descriptor of
that very process (SO_PEERPIDFD, since Linux 6.5). Where there is no socket, the process must have the pid
file open.
"""

import errno
import os
import socket
import stat
from contextlib import suppress

from zramd import trusted
from zramd.contract import exchange, rundir
from zramd.errors import DeviceError, UntrustedError, is_shortage, reason, sentence
from zramd.process import pidfd

_SO_PEERPIDFD = 77  # asm-generic/socket.h
_TIMEOUT = 2.0  # seconds; the kernel answers for a server that hangs, unless too many wait for it already


class Process:
    """A process that serves, by a descriptor: it stays this one, whatever becomes of its number."""

    def __init__(self, pid: int, uid: int, fd: int) -> None:
        self.pid = pid
        self.uid = uid
        self.fd = fd

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens if it has ended."""
        import signal

        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)

    def ended(self, timeout: float) -> bool:
        """Wait for its end for so many seconds; say whether that has come."""
        return pidfd.has_ended(self.fd, timeout)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def find(name: str, path: str) -> Process:
    """Return the process that serves device `name` in run folder `path`.

    It has the same owner as the folder, and runs in our PID namespace. Raises DeviceError if that is not so,
    or cannot be found out, or if no process serves.
    """
    try:
        folder = trusted.open_folder(path, foreign=True)
    except (OSError, UntrustedError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise DeviceError(f"{name}: '{path}' is not used: {why}") from None
    try:
        process = _listener(folder) or _holder(folder)
        if process is None:
            raise DeviceError(
                f"{name}: no process of this PID namespace is found that serves '{path}': "
                "if it runs in a container, use zramd in there"
            )
        try:
            _check(process, folder, name, path)
        except BaseException:
            process.close()
            raise
        return process
    except OSError as error:
        raise DeviceError(
            f"{name}: cannot find out which process serves '{path}': {sentence(error)}"
        ) from None
    finally:
        os.close(folder)


def must_be_ours(process: Process, name: str) -> None:
    """Raise DeviceError if the server belongs to another user, who decides what it says and runs."""
    if process.uid != os.geteuid():
        raise DeviceError(
            f"the server of {name} belongs to {trusted.user(process.uid)}, who decides what it runs: "
            "do this as that user"
        )


def _listener(folder: int) -> Process | None:
    """Return the process that listens on the control socket, None if none does. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.settimeout(_TIMEOUT)
        try:
            control.connect(f"/proc/self/fd/{folder}/{rundir.CONTROL_SOCKET}")
        except OSError as error:
            if is_shortage(error) and error.errno != errno.EAGAIN:  # too many wait for it already
                raise
            return None
        pid, uid = exchange.credentials(control)
        try:
            fd = control.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:  # an older kernel, or it has ended
            return _open(pid, uid, folder)
    return Process(pid, uid, fd)


def _holder(folder: int) -> Process | None:
    """Return the process that the pid file names, None if it does not hold that."""
    text = rundir.head(rundir.PID, folder).strip()
    pid = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    try:
        uid = os.stat(f"/proc/{pid}").st_uid
    except FileNotFoundError:
        return None
    return _open(pid, uid, folder)


def _open(pid: int, uid: int, folder: int) -> Process | None:
    """Return a process by its number, if it has the pid file open once we have a descriptor of it."""
    try:
        fd = os.pidfd_open(pid)
    except (OSError, ValueError) as error:
        if is_shortage(error):
            raise
        return None
    try:
        held = os.stat(rundir.PID, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISREG(held.st_mode) and any(
            os.path.samestat(held, found) for found in _files(pid) if found is not None
        ):
            return Process(pid, uid, fd)
    except OSError as error:
        if is_shortage(error):
            os.close(fd)
            raise
    os.close(fd)
    return None


def _files(pid: int) -> "Iterator[os.stat_result | None]":
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield os.stat(f"/proc/{pid}/fd/{name}")
        except OSError:  # closed meanwhile
            yield None


def _check(process: Process, folder: int, name: str, path: str) -> None:
    """Raise DeviceError unless the process is the folder's owner's and of our PID namespace; OSError."""
    owner = os.fstat(folder).st_uid
    if process.uid != owner:
        raise DeviceError(
            f"'{path}' belongs to {trusted.user(owner)}, but the process that serves there belongs to "
            f"{trusted.user(process.uid)}: look what it is"
        )
    # Our own we may always know.
    ours = os.readlink("/proc/self/ns/pid")
    if process.pid <= 0 or _namespace(process.pid) not in ("", ours):
        raise DeviceError(
            f"{name} is served in another PID namespace, in a container perhaps: use zramd in there"
        )


def _namespace(pid: int) -> str:
    """Return what stands for a process's PID namespace, '' if we may not know. Raises OSError."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError as error:
        if is_shortage(error):
            raise
        return ""


TYPE_CHECKING = False  # what typing says too, without the time that it takes to import
if TYPE_CHECKING:
    from collections.abc import Iterator
