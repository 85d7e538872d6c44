"""Opens what may be trusted: nothing that another user has made, owns, or may replace.

    with trusted.place("/dev/shm/swap0.state") as place:     its folder, by descriptor, and its name in there
        fd = place.open(os.O_RDWR, private=True)             what is opened is what was looked at
        fd = place.create()                                  made by us, whatever was planted

A path is walked from / on, one name after the other, and each name is looked at by the descriptor that is
then used: so it matters neither what others change meanwhile, nor how fs.protected_symlinks and its like are
set. We trust root, ourselves, and the owner of /, who can replace all that is below (in a user namespace that
is a user whom we have no name for).

Every refusal is an UntrustedError, which says what it is and whose. The caller adds what to do.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from zramd.errors import UntrustedError

_LINKS = 40  # as the kernel has it
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# A FIFO is not waited for, a terminal does not become ours.
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Place:
    """A name in a folder, which may or may not be there. The folder's descriptor is good for `dir_fd`."""

    def __init__(self, folder: int, name: str, shown: str, magic: bool, host: int | None) -> None:
        self.folder = folder
        self.name = name
        self.shown = shown
        self.magic = magic  # one of /proc/PID/fd: the kernel knows better than the text of the link
        self.host = host  # the other user to whom the folder, or one on the way, belongs

    def open(self, flags: int = os.O_RDONLY, *, private: bool = False, any_kind: bool = False) -> int:
        """Return a descriptor of what is there. Raises UntrustedError as `check_file`, OSError.

        any_kind: what is no regular file may be ours or root's: a FIFO then waits for its other end.
        """
        how = _SAFE & ~(os.O_NOFOLLOW * self.magic)
        if any_kind and not self.magic:
            there = os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
            any_kind = not stat.S_ISREG(there.st_mode)
            if any_kind:
                _check_owner(there, self.shown)
        fd = os.open(self.name, flags | (how & ~(os.O_NONBLOCK * any_kind)), dir_fd=self.folder)
        try:
            status = os.fstat(fd)
            # A pipe that the shell gave us, or a memory file: without a name, nobody else comes to it.
            named = not self.magic or (stat.S_ISREG(status.st_mode) and status.st_nlink)
            if named and any_kind and not stat.S_ISREG(status.st_mode):
                _check_owner(status, self.shown)
            elif named:
                check_file(status, self.shown, private=private, host=self.host)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def create(self, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
        """Return the descriptor of a new file. Raises FileExistsError if anything is there, OSError."""
        return os.open(self.name, flags | os.O_CREAT | os.O_EXCL | _SAFE, mode, dir_fd=self.folder)

    def beside(self, name: str) -> tuple[int, bool]:
        """Return the descriptor of a new private file that is to get this place, and whether it has `name`.

        One without a name leaves nothing, whatever ends us; but not every file system has such.
        Raises OSError, and UntrustedError where what we make belongs to another user, as on a FAT of theirs.
        """
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            fd, named = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=self.folder), False
        except OSError:
            flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            fd, named = os.open(name, flags, 0o600, dir_fd=self.folder), True
        owner = os.fstat(fd).st_uid
        if not is_trusted(owner):
            os.close(fd)
            if named:
                os.unlink(name, dir_fd=self.folder)
            raise UntrustedError(
                f"whatever is made in '{os.path.dirname(self.shown)}' belongs to {user(owner)}"
            )
        return fd, named

    def put(self, fd: int, name: str, named: bool) -> None:
        """Have what `beside` has made take this place, whatever is there. Raises OSError."""
        if not named:
            os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, dst_dir_fd=self.folder, follow_symlinks=True)
        os.rename(name, self.name, src_dir_fd=self.folder, dst_dir_fd=self.folder)

    def open_or_create(self, flags: int = os.O_RDWR) -> int:
        """Return the descriptor of a private file, a new one if there is none. Raises as `open`."""
        while True:
            with suppress(FileNotFoundError):
                return self.open(flags, private=True)
            with suppress(FileExistsError):
                return self.create(flags)


@contextmanager
def place(
    path: str, *, make: bool = False, foreign: bool = False, hosted: bool = False, root: str = "/"
) -> Iterator[Place]:
    """Yield the Place of `path`; links on the way, and at its end, count if we or root made them.

    make: folders that are missing are made, for others to look into.
    foreign: folders on the way may belong to other users, for what is no secret and does no harm.
    hosted: they may belong to one other user, and nobody else may write to them: what is made in there is
    ours; that user can only rename or remove it. What exists already may be theirs.
    root: a folder that stands for /. Whoever owns what is in there, and whatever its links say, nothing
    outside is reached.

    Raises UntrustedError, OSError.
    """
    walk = _Walk(root, make, foreign, hosted)
    try:
        yield walk.to(path)
    finally:
        walk.close()


def open_folder(path: str, *, make: bool = False, foreign: bool = False, root: str = "/") -> int:
    """Return the descriptor of a folder, good for `dir_fd`; the rest as with `place`."""
    walk = _Walk(root, make, foreign)
    try:
        return os.dup(walk.to(path, folder=True).folder)
    finally:
        walk.close()


def resolve(path: str) -> str:
    """Return the path without links, once nobody else can have made or replace what is there, or comes there.

    What is there may be of any kind, and may be missing. Raises UntrustedError, OSError.
    """
    with place(path) as found:
        shown = found.shown
        if found.magic:
            return os.path.realpath(shown) if os.path.isfile(shown) else shown
        with suppress(FileNotFoundError):
            status = os.stat(found.name, dir_fd=found.folder, follow_symlinks=False)
            _check_owner(status, shown)
            if stat.S_ISREG(status.st_mode):
                check_file(status, shown)
        return shown


def check_file(status: os.stat_result, shown: str, *, private: bool = False, host: int | None = None) -> None:
    """Raise UntrustedError unless this is a regular file that nobody else may change, but for user `host`.

    private: nor has it a second name somewhere else. (See `close_to_others` for which users may read it.)
    """
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedError(f"'{shown}' is not a regular file")
    _check_owner(status, shown, host)
    if _others_write(status, host):
        raise UntrustedError(f"other users may write to '{shown}'")
    if private and status.st_nlink > 1:
        raise UntrustedError(f"'{shown}' has another name elsewhere, a hard link")


def close_to_others(fd: int, shown: str) -> None:
    """Let nobody else read a file of ours. Raises UntrustedError if somebody may have it open already."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if not mode & 0o077 or not os.fstat(fd).st_nlink:  # what has no name cannot be opened
        return
    os.fchmod(fd, 0o600)
    try:
        # The kernel grants this lease only where no other descriptor of the file is open.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        os.fchmod(fd, mode)
        raise UntrustedError(f"other users may read '{shown}', and somebody has it open") from None


def check_folder(status: os.stat_result, shown: str, host: int | None = None) -> None:
    """Raise UntrustedError unless nobody else, but for user `host`, may replace what we have in a folder."""
    _check_owner(status, shown, host)
    if _others_write(status, host) and not status.st_mode & stat.S_ISVTX:
        raise UntrustedError(f"other users may write to folder '{shown}'")


def is_trusted(uid: int) -> bool:
    """Say whether a user is root, ourselves, or the owner of /."""
    return uid in (0, os.geteuid()) or uid == os.stat("/").st_uid


def user(uid: int) -> str:
    """Return how a user is called."""
    import pwd

    try:
        return f"user '{pwd.getpwuid(uid).pw_name}'"
    except KeyError:
        return f"user {uid}"


def _check_owner(status: os.stat_result, shown: str, host: int | None = None) -> None:
    if not is_trusted(status.st_uid) and status.st_uid != host:
        raise UntrustedError(f"'{shown}' belongs to {user(status.st_uid)}")


def _others_write(status: os.stat_result, host: int | None = None) -> bool:
    """Say whether others may write; a group with a user's own number is that user's alone, by convention."""
    ours = status.st_gid == os.getegid() == os.geteuid() or status.st_gid == host
    return bool(status.st_mode & (0o002 if ours else 0o022))


class _Walk:
    """The folders from / to where we are, as descriptors: so '..' cannot lead anywhere else."""

    def __init__(self, root: str, make: bool, foreign: bool, hosted: bool = False) -> None:
        self._inside = root != "/"
        self._make, self._foreign, self._hosted = make, foreign or self._inside, hosted
        self._host: tuple[int, int] | None = None  # the other user, and the file system of that folder
        self._root = root.rstrip("/")
        self._folders = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        self._names: list[str] = []  # of those after the first
        self._ahead: list[str] = []  # names that are still to be walked, the next one last

    def to(self, path: str, folder: bool = False) -> Place:
        """Return the place of `path`, or that of what is in the folder `path`."""
        self._ahead = _parts(path if self._inside else os.path.abspath(path))
        links = 0
        while self._ahead:
            name = self._ahead.pop()
            last = not self._ahead and not folder
            if name == "..":
                self._leave()
                continue
            try:
                fd = os.open(name, _LOOK, dir_fd=self._folders[-1])
            except FileNotFoundError:
                if last:
                    break
                if not self._make:
                    raise
                with suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=self._folders[-1])
                self._ahead.append(name)
                continue
            status, shown = os.fstat(fd), self._shown(name)
            if stat.S_ISDIR(status.st_mode) and not last:
                self._names.append(name)
                self._folders.append(fd)
                if not self._foreign:
                    self._check(status, shown)
                continue
            try:
                if not stat.S_ISLNK(status.st_mode):
                    if last:
                        break
                    raise _error(errno.ENOTDIR)
                if not self._inside and not is_trusted(status.st_uid):
                    raise UntrustedError(f"'{shown}' is a link that {user(status.st_uid)} has made")
                if last and not self._inside and self._names[:1] == ["proc"] and self._names[-1] == "fd":
                    return Place(self._folders[-1], name, shown, True, None)
                links += 1
                if links > _LINKS:
                    raise _error(errno.ELOOP)
                self._follow(os.readlink("", dir_fd=fd))
            finally:
                os.close(fd)
        else:
            name = "."
        return Place(self._folders[-1], name, self._shown(name), False, self._host and self._host[0])

    def _check(self, status: os.stat_result, shown: str) -> None:
        """Raise UntrustedError for a folder that is not to be walked into."""
        if self._hosted and self._host is None and not is_trusted(status.st_uid):
            self._host = status.st_uid, status.st_dev
        if self._host is None:
            check_folder(status, shown)
            return
        host, file_system = self._host
        check_folder(status, shown, host)
        if status.st_dev != file_system:  # FUSE: a user's own program, which tells whatever it likes
            raise UntrustedError(f"'{shown}' is a mount in a folder of {user(host)}")

    def _follow(self, target: str) -> None:
        while target.startswith("/") and self._names:
            self._leave()
        self._ahead += _parts(target)

    def _leave(self) -> None:
        if self._names:
            self._names.pop()
            os.close(self._folders.pop())

    def _shown(self, name: str) -> str:
        return "/".join([self._root, *self._names, name])

    def close(self) -> None:
        """Close all descriptors."""
        for folder in self._folders:
            os.close(folder)


def _parts(path: str) -> list[str]:
    """Return the names in a path, the first one last."""
    return [part for part in path.split("/") if part not in ("", ".")][::-1]


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def write_at_start(fd: int, data: bytes) -> None:
    """Write all of `data` at the beginning of a file: the system may take a part of it at a time."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)
