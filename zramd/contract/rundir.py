"""The run folder: which process holds it, what is published in it, and what is removed from it.

A live server holds a lock on the `pid` file, so a crashed one leaves nothing that keeps the next from
starting, and no stale process number can be mistaken for a live server. A server that was stopped removes
the file; one that crashed, or left to a successor, does not: by that the successor knows whether to go on.

The folder is held open and worked in by its descriptor. If it is removed and another one takes its name,
nothing is written there and nothing removed: it is another server's.
"""

import errno
import os
import re
import socket
import stat
import time
from collections.abc import Iterable
from contextlib import suppress

from zramd import lockfile, resident, trusted
from zramd.contract import handover
from zramd.errors import RundirError, UntrustedError, is_shortage, reason, sentence

ROOTS = "/run/zramd"  # where root's run folders lie
PID = "pid"
NBD_SOCKET = "nbd.sock"
CONTROL_SOCKET = "control.sock"
COMPACT_TIMEOUT = 60.0  # seconds that an answer to POST /compact takes at most: the work may go on
DATA_ID = "data_id"  # names the data that the server holds: the same name, the same data
STATS_FILES = (
    *("disksize", "comp_algorithm", "recomp_algorithm", "backing_dev", "bd_stat"),
    *("mm_stat", "io_stat", "frag_ratio", "stats.json", "classes", "metrics.prom"),
)
STATE = "state_path"  # where the server's state is: what died with it, and what did not
LOG = "log"  # what a server in the background has to say once it serves
OLD_LOG = "log.1"  # and what the one before it said, if that did not stop in its normal way
BUDGET = ".budget"  # of the devices whose run folders lie beside it; no device can be called so
STANDBY = "standby"  # the number of the process that waits to take over, which holds its lock
# The keys of those who may come, where not all of the user's may: see zramd.launch.tlsfiles. nbdkit reads
# its file at each handshake, so the server, one on standby and the next one have one each.
KEYS = ("zramd-keys.0", "zramd-keys.1", "zramd-keys.2")
SOCKETS = "sockets.sock"  # of a restart, for a moment
BACKGROUND = "ZRAMD_BACKGROUND"  # in the environment of such a server
LOCK_TIMEOUT = 1.0  # seconds; a process that only looks holds the lock for microseconds
_FILES = (DATA_ID, STATE, *STATS_FILES)
_TEMPORARY = ".new"
_FIRST = (STATE, DATA_ID, STATE + _TEMPORARY, DATA_ID + _TEMPORARY)  # what a server publishes before all else
_NOBODY_ELSES = frozenset((*_FIRST, "mm_stat", "io_stat", "frag_ratio"))
_TRIES = 2  # of a removal: what fails once, for lack of memory say, may not fail again
_ANOTHER = "give a folder of its own, one that is not there yet"
_SHOWN = frozenset((CONTROL_SOCKET, SOCKETS, *_FILES, *(name + _TEMPORARY for name in _FILES)))
_OURS = _SHOWN | {NBD_SOCKET, LOG, OLD_LOG, STANDBY, *KEYS}
NAMES = (PID, *sorted(_OURS))  # all that may be in the folder


def budget_file(folder: str) -> str:
    """Return the file of the budget in which a device with this run folder may have a part."""
    return f"{os.path.dirname(folder)}/{BUDGET}"


def base() -> str:
    """Return the folder in which run folders lie: root's own, or the user's. '' for a user who has none."""
    if os.geteuid() == 0:
        return ROOTS
    folder = os.environ.get("XDG_RUNTIME_DIR")
    return f"{folder}/zramd" if folder and _is_a_users(folder) else ""


def _is_a_users(folder: str) -> bool:
    """Say whether a user's folder is not another one's: su and sudo may leave that in the environment."""
    try:
        return trusted.is_trusted(os.stat(folder).st_uid)
    except OSError:
        return True  # whatever looks in there says what is wrong with it


class Rundir:
    """A folder held by this process (and what it forks) until `remove`."""

    def __init__(self, path: str) -> None:
        """Create the folder if needed, take its lock, and clear what a crashed server left.

        Raises RundirError when it cannot be written, is open to other users, or a live server holds it, and
        when this process is to take over from a server that was stopped.
        """
        self.path = path
        try:
            if handover.must_be_left():
                self.made = False
                try:
                    os.stat(f"{path}/{PID}")
                except FileNotFoundError:
                    raise RundirError(handover.STOPPED) from None
                self._folder, self._lock = _take(path)
            else:
                self.made, self._folder, self._lock = _make_and_take(path)
        except OSError as error:
            raise RundirError(f"rundir '{path}' cannot be used: {reason(error)}") from None
        self._names = _OURS - {NBD_SOCKET}
        self._held: dict[str, resident.Held] = {}
        try:
            # A socket that was opened by another process and passed on is in use from the start. What systemd
            # has passed on is not ours to remove in the end, what another server has handed over is.
            if not _holds_socket(self.file(NBD_SOCKET)):
                self._names = _OURS
            self.write_pid()
            self._keep_log()
            # Where the state is stands there until it is replaced: somebody may still take over, and by it
            # the folder of a server that is killed now is known for one.
            for name in _telling_last(self._names - {LOG, OLD_LOG, STATE, STANDBY, *KEYS}):
                self._unlink(name)
            if handover.takes_over():
                self._names = _OURS
            self.made = self.made or handover.MADE in os.environ
        except OSError as error:
            # What another server needs that takes over in our place stays.
            self.leave() if handover.takes_over() else self.remove()
            raise RundirError(f"rundir '{path}' cannot be written: {reason(error)}") from None

    def file(self, name: str) -> str:
        """Return the path of `name` in the folder."""
        return f"{self.path}/{name}"

    def write_pid(self) -> None:
        """Write this process's number into the pid file; call it again after a fork."""
        write_whole(self._lock, b"%d\n" % os.getpid())
        self._held[PID] = resident.hold(self._lock)

    def publish(self, name: str, text: str) -> None:
        """Replace the file `name` by `text`, so that a reader sees the old or the new text, never a part.

        Raises RundirError when the folder cannot be written, or is no longer the one at its path.
        """
        try:
            self._must_be_ours()
            replace_file(name, text, 0o600, self._folder)
        except OSError as error:
            raise RundirError(f"rundir '{self.path}' cannot be written: {reason(error)}") from error
        if name in _FIRST:
            self._held[name] = resident.hold_file(name, self._folder)

    def open_log(self) -> int:
        """Return a descriptor that appends to the log. Raises as `publish`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._must_be_ours()
            return os.open(LOG, flags, 0o600, dir_fd=self._folder)
        except OSError as error:
            raise RundirError(f"'{self.file(LOG)}' cannot be written: {reason(error)}") from error

    def withdraw(self, name: str) -> None:
        """Remove the file `name`, or at least what it says. Raises RundirError when neither can be done."""
        try:
            self._unlink(name)
        except OSError as error:
            try:
                flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(name, flags, dir_fd=self._folder))
            except OSError:
                raise RundirError(f"'{self.file(name)}' cannot be removed: {reason(error)}") from error

    def _must_be_ours(self) -> None:
        if not self.is_ours():
            raise RundirError(
                f"rundir '{self.path}' was removed, or another one is in its place: nothing finds this "
                f"server there any more: its clients are served until 'kill {os.getpid()}'"
            )

    def is_ours(self) -> bool:
        """Say whether the folder at the path is still this one. Raises OSError when that cannot be told."""
        return lockfile.stands_at(self._folder, self.path, follow=True)

    def leave(self) -> None:
        """Leave the folder to the server that takes over: it finds the process number that this one had.

        Never raises, as `remove`.
        """
        self._surely_remove(_SHOWN - {STATE, DATA_ID})

    def remove(self) -> None:
        """Remove what zramd made in the folder, and the folder if zramd made it and nothing else is in it.

        Never raises: it is what a server does last. Its number goes last, and stays if anything else does: by
        that the next process knows that these files are a server's.
        """
        if self._surely_remove(self._names) and self._surely_remove({PID}) and self.made:
            for _ in range(_TRIES):
                with suppress(OSError):
                    if self.is_ours():
                        os.rmdir(self.path)
                    break

    def _surely_remove(self, names: Iterable[str]) -> bool:
        """Remove all files that can be removed, and say whether all could.

        One that cannot keeps no other, and is tried again.
        """
        left = _telling_last(names)
        for _ in range(_TRIES):
            for name in list(left):
                with suppress(OSError):
                    self._unlink(name)
                    left.remove(name)
        return not left

    def _keep_log(self) -> None:
        """Keep what a server has said that crashed, or that this one takes over from."""
        with suppress(FileNotFoundError):
            if os.stat(LOG, dir_fd=self._folder, follow_symlinks=False).st_size:
                os.replace(LOG, OLD_LOG, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def _unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder)


class Standby:
    """The place of the one process that waits to take a folder over; its file shows that there is one."""

    def __init__(self, folder: str) -> None:
        """Take the place. Raises RundirError when another process has it, or it cannot be had."""
        self._path = f"{folder}/{STANDBY}"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._lock = os.open(self._path, flags, 0o600)
            if not lockfile.ofd_take(self._lock):
                raise RundirError(f"another server is on standby for '{folder}' already")
            write_whole(self._lock, b"%d\n" % os.getpid())
        except OSError as error:
            raise RundirError(f"'{self._path}' cannot be written: {reason(error)}") from None
        # We will write there when the server has ended.
        self._pid_file = resident.hold_file(f"{folder}/{PID}")

    def leave(self) -> None:
        """Give the place up. Never raises."""
        with suppress(OSError):
            if lockfile.stands_at(self._lock, self._path):
                os.unlink(self._path)
        os.close(self._lock)


def standby(path: str) -> int | None:
    """Return the process that is on standby for a folder, None if there is none. Raises as `holder`."""
    return _process(f"{path}/{STANDBY}")


def _telling_last(names: Iterable[str]) -> list[str]:
    """Return names in the order in which to remove them: after a kill, what is left shows what it was."""
    return sorted(names, key=_NOBODY_ELSES.__contains__)


def write_whole(fd: int, data: bytes) -> None:
    """Have a file hold `data` and nothing else. Raises OSError."""
    trusted.write_at_start(fd, data)
    os.ftruncate(fd, len(data))


def replace_file(path: str, text: str, mode: int, folder: int | None = None) -> None:
    """Replace the file by `text`, with these permissions whatever the umask. Raises OSError.

    A reader sees the old text or the new. The new one is made under a name that no reader of *.prom looks at,
    and afresh: in a folder open to others that name could be a link. `path` is relative to `folder`, a
    descriptor, if that is given.
    """
    temporary = path + _TEMPORARY
    _unlink(temporary, folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, mode)
            file.write(text)
        os.replace(temporary, path, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        _unlink(temporary, folder)
        raise


def holder(path: str) -> int | None:
    """Return the process number of the live server that holds the folder, None if there is none.

    It is what stands there, to be shown. Whom to send a signal, zramd.control.peer knows. Raises RundirError
    when that is not known for lack of something: it does not mean that none exists.
    """
    return _process(f"{path}/{PID}")


def _process(path: str) -> int | None:
    """Return the number in a file, None if no process holds the lock of it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if is_shortage(error):
            raise _untold(error) from error
        return None
    try:
        return _read_pid(fd) if _is_locked(fd) else None
    except OSError as error:
        raise _untold(error) from error
    finally:
        os.close(fd)


def _untold(error: OSError) -> RundirError:
    return RundirError(f"cannot find out which process serves: {sentence(error)}")


def is_ours_alone(path: str) -> bool:
    """Say whether nothing but what servers make is in a folder."""
    return set(os.listdir(path)) <= _OURS | {PID}


def clear(path: str, pid: int) -> None:
    """Remove what process `pid` has left in the folder when it was killed while it started. Never raises.

    The folder may belong to another user, who puts something else in its place meanwhile.
    """
    with suppress(OSError, UntrustedError, RundirError):
        folder = trusted.open_folder(path, foreign=True)
        try:
            its = _is_file(PID, folder) and head(PID, folder) in (f"{pid}\n", "")
            if its and holder(f"/proc/self/fd/{folder}") is None:
                for name in (*_telling_last(_OURS), PID):
                    _unlink(name, folder)
        finally:
            os.close(folder)


def in_use(path: str, pid: int) -> RundirError:
    """Return the error that says that a live server holds the folder."""
    return RundirError(
        f"rundir '{path}' is in use by a running server (pid {pid}): stop it or choose another name"
    )


def make(path: str) -> bool:
    """Make the folder, closed to others, if it is not there; say whether it is new. Raises RundirError."""
    try:
        return _make(path)
    except OSError as error:
        raise RundirError(f"rundir '{path}' cannot be used: {reason(error)}") from None


def _make(path: str) -> bool:
    """Make the folder, closed to others, and return whether it is new.

    One that is there stays as it is, or is refused: nothing that the user may have put there is removed
    later, and one that others may look into is not closed to them, for it may be /mnt. What we put there is.
    """
    fd = -1
    try:
        with trusted.place(path, make=True) as place:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW * (not place.magic)
            while fd < 0:
                try:
                    os.mkdir(place.name, 0o700, dir_fd=place.folder)
                    return True
                except FileExistsError:
                    with suppress(FileNotFoundError):  # a server that stops has just removed it
                        fd = os.open(place.name, flags, dir_fd=place.folder)
    except NotADirectoryError:
        if not os.path.exists(path):
            raise
        raise RundirError(f"rundir '{path}' is not a folder") from None
    except UntrustedError as error:
        raise RundirError(f"rundir '{path}' is not used: {error}: {_ANOTHER}") from None
    try:
        status = os.fstat(fd)
        try:
            trusted.check_folder(status, path)
        except UntrustedError as error:
            raise RundirError(f"rundir '{path}' is not used: {error}: {_ANOTHER}") from None
        names, left = _files(fd)
        if names and not left:
            if (pid := holder(path)) is not None:
                raise in_use(path, pid)
            raise RundirError(
                f"rundir '{path}' has a file '{names[0]}' that zramd would replace, and no server has left "
                f"it: {_ANOTHER}"
            )
        # The sticky bit marks a folder that users share, such as /tmp.
        shared = status.st_mode & stat.S_ISVTX or not set(os.listdir(fd)) <= _OURS | {PID}
        if status.st_mode & 0o077 and shared:
            raise RundirError(f"rundir '{path}' is open to other users: {_ANOTHER}")
    finally:
        os.close(fd)
    return False


def _files(folder: int) -> tuple[list[str], bool]:
    """Return the files with one of our names, and whether a server has left them, or they are the user's own.

    A server leaves its number, and files that nobody else has. What is no file is nobody's work. Keys are put
    there for a server that is about to start, and nobody else's files are called so.
    """
    number = head(PID, folder)  # first: it is the first that comes, and the last that goes
    names = [name for name in os.listdir(folder) if name in _OURS - {*KEYS} or name == PID]
    names = [name for name in names if _is_file(name, folder)]
    if number == "":  # one that was killed before it wrote it
        return [name for name in names if name != PID], False
    left = names == [PID] or not _NOBODY_ELSES.isdisjoint(names)
    return names, left and re.fullmatch(r"[0-9]+\n", number) is not None


def _is_file(name: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.lstat(name, dir_fd=folder).st_mode)
    except FileNotFoundError:  # a server that starts or stops has just removed it
        return False


def _is_there(name: str, folder: int) -> bool:
    try:
        os.lstat(name, dir_fd=folder)
        return True
    except FileNotFoundError:
        return False


def head(name: str, folder: int, size: int = 256) -> str:
    """Return the first `size` bytes of a file, '' if there is none. Raises OSError for lack of something."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if is_shortage(error):
            raise
        return ""
    try:
        return os.read(fd, size).decode(errors="replace") if stat.S_ISREG(os.fstat(fd).st_mode) else ""
    finally:
        os.close(fd)


def _make_and_take(path: str) -> tuple[bool, int, int]:
    """Make the folder if it is not there; return whether it was not, and as `_take`."""
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        made = _make(path)
        try:
            return made, *_take(path)
        except FileNotFoundError:  # a server that stops has just removed it
            if time.monotonic() > end:
                raise


def _take(path: str) -> tuple[int, int]:
    """Return the descriptors of the folder and of its pid file, whose lock is held then."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return folder, _take_lock(folder, path)
    except BaseException:
        os.close(folder)
        raise


def _take_lock(folder: int, path: str) -> int:
    """Return the pid file's descriptor with its lock held. Raises FileNotFoundError without the folder."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        is_new = not _is_there(PID, folder)
        fd = os.open(PID, flags, 0o600, dir_fd=folder)
        try:
            if not _locked(fd):
                raise in_use(path, _read_pid(fd))
            # A server that stopped between our open and our lock has unlinked the file: then lock the new.
            if lockfile.stands_at(fd, PID, folder=folder):
                return fd
        except OSError:
            if is_new and not os.fstat(fd).st_size:
                os.unlink(PID, dir_fd=folder)
            os.close(fd)
            raise
        except RundirError:
            os.close(fd)
            raise
        os.close(fd)


def _locked(fd: int) -> bool:
    """Take the lock and say whether that succeeded.

    There are two, of the whole file. The first can be asked for without being taken, so that a process that
    only looks keeps no server from starting. The second is that of servers before: they know no other, and
    a look for one of theirs has to take it, for microseconds.
    """
    if not lockfile.ofd_take(fd):
        return False
    end = time.monotonic() + LOCK_TIMEOUT
    while not lockfile.take(fd):
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def _is_locked(fd: int) -> bool:
    return lockfile.ofd_is_taken(fd) or lockfile.is_taken(fd)


def _read_pid(fd: int) -> int:
    text = os.pread(fd, 32, 0).strip() if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    return int(text) if text.isdigit() and len(text) < 10 else 0  # whatever stands there


def _holds_socket(path: str) -> bool:
    """Say whether this process has a socket bound to `path`. Raises OSError when that cannot be told."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family == socket.AF_UNIX and sock.getsockname() == path:
                    return True
        except OSError as error:
            if error.errno != errno.EBADF:  # the one by which they were listed
                raise
    return False


def _unlink(path: str, folder: int | None) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path, dir_fd=folder)
