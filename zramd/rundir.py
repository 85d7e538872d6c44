"""The run folder: who holds it, what is published in it, and what is removed from it.

A live server holds a lock on the `pid` file, so a crashed one leaves nothing that keeps the next from
starting, and no stale process number can be mistaken for a live server.
"""

import fcntl
import os
import socket
import stat
import time
from contextlib import suppress

from zramd import handover
from zramd.errors import RundirError

PID = "pid"
NBD_SOCKET = "nbd.sock"
CONTROL_SOCKET = "control.sock"
DATA_ID = "data_id"  # names the data that the server holds: the same name, the same data
STATS_FILES = ("mm_stat", "io_stat", "frag_ratio", "stats.json", "classes", "metrics.prom")
LOG = "log"  # what a server in the background has to say once it serves
BACKGROUND = "ZRAMD_BACKGROUND"  # in the environment of such a server
LOCK_TIMEOUT = 0.1  # seconds
_FILES = (DATA_ID, *STATS_FILES)
_TEMPORARY = ".new"
_OURS = frozenset((NBD_SOCKET, CONTROL_SOCKET, LOG, *_FILES, *(name + _TEMPORARY for name in _FILES)))


class Rundir:
    """A folder held by this process (and what it forks) until `remove`."""

    def __init__(self, path: str) -> None:
        """Create the folder if needed, take its lock, and clear what a crashed server left.

        Raises RundirError when it cannot be written, is open to other users, or a live server holds it.
        """
        self.path = path
        try:
            self.made = _make(path)
            self._lock = _take_lock(path)
        except OSError as error:
            raise RundirError(f"rundir '{path}' cannot be used: {reason(error)}") from None
        # A socket that was opened by another process and passed on is in use from the start. What systemd has
        # passed on is not ours to remove in the end, what another server has handed over is.
        self._names = _OURS - {NBD_SOCKET} if _holds_socket(self.file(NBD_SOCKET)) else _OURS
        try:
            self._remove_files()
            if handover.takes_over():
                self._names = _OURS
                self.made = self.made or handover.MADE in os.environ
            self.write_pid()
        except OSError as error:
            self.remove()
            raise RundirError(f"rundir '{path}' cannot be written: {reason(error)}") from None

    def file(self, name: str) -> str:
        """Return the path of `name` in the folder."""
        return f"{self.path}/{name}"

    def write_pid(self) -> None:
        """Write this process's number into the pid file; call it again after a fork."""
        text = b"%d\n" % os.getpid()
        os.pwrite(self._lock, text, 0)
        os.ftruncate(self._lock, len(text))

    def publish(self, name: str, text: str) -> None:
        """Replace the file `name` by `text`, so that a reader sees the old or the new text, never a part.

        Raises RundirError when the folder cannot be written.
        """
        try:
            replace_file(self.file(name), text, 0o600)
        except OSError as error:
            raise RundirError(f"rundir '{self.path}' cannot be written: {reason(error)}") from error

    def withdraw(self, name: str) -> None:
        """Remove the file `name`, or at least what it says. Raises RundirError when neither can be done."""
        path = self.file(name)
        try:
            _unlink(path)
        except OSError as error:
            try:
                os.truncate(path, 0)
            except OSError:
                raise RundirError(f"'{path}' cannot be removed: {reason(error)}") from error

    def leave_socket(self) -> None:
        """Leave the NBD socket in the folder: another server has it."""
        self._names -= {NBD_SOCKET}

    def remove(self) -> None:
        """Remove what zramd made in the folder, and the folder if zramd made it and nothing else is in it.

        Never raises: it is what a server does last.
        """
        with suppress(OSError):
            self._remove_files()
            _unlink(self.file(PID))
            if self.made:
                os.rmdir(self.path)

    def _remove_files(self) -> None:
        for name in self._names:
            _unlink(self.file(name))


def replace_file(path: str, text: str, mode: int) -> None:
    """Replace the file by `text`, with these permissions whatever the umask. Raises OSError.

    A reader sees the old text or the new. The new one is made under a name that no reader of *.prom looks at,
    and afresh: in a folder open to others that name could be a link.
    """
    temporary = path + _TEMPORARY
    _unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, mode)
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        _unlink(temporary)
        raise


def holder(path: str) -> int | None:
    """Return the process number of the live server that holds the folder, None if there is none."""
    try:
        fd = os.open(f"{path}/{PID}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_pid(fd)
    finally:
        os.close(fd)
    return None


def in_use(path: str, pid: int) -> RundirError:
    """Return the error that says that a live server holds the folder."""
    return RundirError(
        f"rundir '{path}' is in use by a running server (pid {pid}): stop it or choose another name"
    )


def _make(path: str) -> bool:
    """Make the folder, closed to others, and return whether it is new."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    try:
        os.mkdir(path, 0o700)
        return True
    except FileExistsError:
        pass
    mode = os.stat(path).st_mode
    if not stat.S_ISDIR(mode):
        raise RundirError(f"rundir '{path}' is not a folder")
    if mode & 0o077:
        # The sticky bit marks a folder that users share, such as /tmp: never close that, even if it is empty.
        if mode & stat.S_ISVTX or not set(os.listdir(path)) <= _OURS | {PID}:
            raise RundirError(f"rundir '{path}' is open to other users: give a folder of its own")
        os.chmod(path, 0o700)
    return False


def _take_lock(path: str) -> int:
    """Return the pid file's descriptor with its lock held."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        fd = os.open(f"{path}/{PID}", flags, 0o600)
        if not _locked(fd):
            pid = _read_pid(fd)
            os.close(fd)
            raise in_use(path, pid)
        # A server that stopped between our open and our lock has unlinked the file: then lock the new one.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(f"{path}/{PID}")):
                return fd
        os.close(fd)


def _locked(fd: int) -> bool:
    """Take the lock and say whether that succeeded. Who only looks, `holder`, has it for microseconds."""
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)


def _read_pid(fd: int) -> int:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else 0


def _holds_socket(path: str) -> bool:
    """Say whether this process already has a socket bound to `path`."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family == socket.AF_UNIX and sock.getsockname() == path:
                    return True
        except OSError:
            continue
    return False


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def reason(error: OSError) -> str:
    """Return what the system says, to stand inside a sentence."""
    return (error.strerror or str(error)).lower()
