"""The metrics beside the run folder, where another user may read them: node_exporter's textfile collector.

The run folder is closed to others, and node_exporter runs as another user, which may own the collector's
folder: the numbers are no secret, and no link in there leads us to another place.
"""

import errno
import os
from contextlib import suppress

from zramd import trusted
from zramd.contract.rundir import replace_file
from zramd.errors import RundirError, UntrustedError, reason

_OURS = "# HELP zramd_"


class MetricsFile:
    """A file that everybody may read, replaced whole, and removed at the end."""

    def __init__(self, path: str, device: str) -> None:
        """Look whether the file can be written there, and write nothing: it may be a living server's.

        Raises RundirError when it cannot, or is not one that this device made.
        """
        self.path = path
        self._check(device)

    def make(self) -> None:
        """Make the file, empty: node_exporter skips such a file without a complaint. Raises RundirError."""
        self.publish("")

    def publish(self, text: str) -> None:
        """Replace the file by `text`. Raises RundirError when it cannot be written."""
        try:
            with trusted.place(self.path, foreign=True) as place:
                replace_file(place.name, text, 0o644, place.folder)
        except OSError as error:
            raise self._failed(error) from error
        except UntrustedError as error:
            raise self._refused(f"{error}: give a path without it") from None

    def remove(self) -> None:
        """Remove the file. Never raises."""
        with suppress(OSError, UntrustedError), trusted.place(self.path, foreign=True) as place:
            os.unlink(place.name, dir_fd=place.folder)

    def _check(self, device: str) -> None:
        """What is there is replaced, so it must be what a server of this device left when it was killed."""
        try:
            with trusted.place(self.path, foreign=True) as place:
                head = _head(place)
        except FileNotFoundError:
            head = ""
        except OSError as error:
            raise self._failed(error) from None
        except UntrustedError as error:
            raise self._refused(f"{error}: give a path without it") from None
        if head and not head.startswith(_OURS):
            raise self._refused("it holds something else: give a file of its own")
        if head and f'{{device="{device}"' not in head:
            raise self._refused("it holds another device's metrics: give each device a file of its own")
        try:
            _look(os.path.dirname(self.path))
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> RundirError:
        remedy = "use a folder that is there and open to this user"
        if error.errno in (errno.EACCES, errno.EROFS) and "NOTIFY_SOCKET" in os.environ:
            remedy = "let the service write there, by 'systemctl edit': docs/systemd.md, 'Paths'"
        return self._refused(f"{reason(error)}: {remedy}")

    def _refused(self, why: str) -> RundirError:
        return RundirError(f"metrics_file '{self.path}' cannot be written: {why}")


def _look(folder: str) -> None:
    """Raise OSError unless a file can be made in the folder: one without a name is."""
    flags = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
    try:
        os.close(os.open(folder, flags, 0o600))
    except OSError as error:
        # Some file systems (NFS, FUSE, overlays of old kernels) know no files without a name.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def _head(place: trusted.Place) -> str:
    """Return what the file begins with. Raises OSError."""
    fd = os.open(place.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place.folder)
    try:
        return os.read(fd, 4096).decode(errors="replace")
    finally:
        os.close(fd)
