"""What a service may do for its backing: a drop-in of zramd@NAME.service, as zramd.conf has it.

The units shipped let a server see no device, and write to no folder but its own. Which ones a backing needs,
only the configuration says, so they are added to the one service that needs them.
"""

import os
import re
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

from zramd import trusted
from zramd.contract.rundir import replace_file
from zramd.errors import UnitsError, UntrustedError, reason
from zramd.settings import conffiles, devices

FOLDER = "etc/systemd/system"
NAME = "zramd-backing.conf"
MARK = (
    "# Written by 'zramd backing allow'. Run that again when zramd.conf gives the device another backing.\n"
)
_PATH = re.compile(r"/[\w./+@:=-]+", re.ASCII)
# Required: without its disk a server fails, and is started again. A boot waits for swap, and so for that, and
# for ever where a start takes more than 2 s: systemd gives up after 5 of them in 10 s.
# The target is of devices that a unit makes, as cryptsetup's does: at shutdown that unit takes one away only
# after what has an After= the target (systemd.special(7)).
_DEVICE = """\
[Unit]
Requires={unit}.device
After={unit}.device blockdev@{unit}.target
[Service]
PrivateDevices=no
DevicePolicy=closed
DeviceAllow={path} rw
"""
_FILE = """\
[Unit]
RequiresMountsFor={path}
[Service]
ReadWritePaths={path}
"""


def allow(name: str) -> list[str]:
    """Let the service of a configured device use its backing, and nothing else that was allowed before.

    Return sentences that say what was done. Raises UnitsError, ConfigError.
    """
    root = conffiles.root_folder()
    device = devices.find(name)
    if root == Path("/") and os.geteuid():
        raise UnitsError("only root may change what a service is allowed: use sudo")
    path = device.settings().backing
    drop_in = root / FOLDER / f"zramd@{device.name}.service.d" / NAME
    if path:
        # Of another system than this, /dev says nothing.
        _write(root, drop_in, MARK + drop_in_for(in_dev(path) if root == Path("/") else path))
        done = [f"wrote {drop_in}", f"next: systemctl restart zramd@{device.name}"]
    elif _remove(root, drop_in):
        done = [f"removed {drop_in}: {device.name} has no backing"]
    else:
        done = [f"{device.name} has no backing: there is nothing to allow"]
    if root == Path("/") and os.path.isdir("/run/systemd/system"):
        subprocess.run(["systemctl", "daemon-reload"], check=False)
    return done


def in_dev(path: str) -> str:
    """Return the name in /dev of a block device, and a file's path as it is. Raises UnitsError.

    Links are followed only as far as to /dev: those in there lead to the same disk after the next boot.
    """
    try:
        if path.startswith("/dev/") or not stat.S_ISBLK(os.stat(path).st_mode):
            return path
    except OSError:
        return path  # it may be attached later
    found = path
    while True:
        folder, name = os.path.split(found)
        found = os.path.join(os.path.realpath(folder), name)
        if found.startswith("/dev/"):
            return found
        if not os.path.islink(found):
            raise UnitsError(
                f"'{path}' is a block device outside of /dev: give the backing by its name there"
            )
        found = os.path.join(os.path.dirname(found), os.readlink(found))


def drop_in_for(path: str) -> str:
    """Return what a unit needs for this backing, a device by its name in /dev. Raises UnitsError."""
    if not _PATH.fullmatch(path):
        raise UnitsError(
            f"'{path}' has characters that a unit cannot have in a path: give the backing by another name"
        )
    if path.startswith("/dev/"):
        return _DEVICE.format(path=path, unit=unit_name(path))
    return _FILE.format(path=path)


def unit_name(path: str) -> str:
    """Return what systemd calls a path in the names of units, as systemd-escape --path does."""
    return "".join(
        "-" if letter == "/" else letter if re.match(r"[\w:.]", letter, re.ASCII) else f"\\x{ord(letter):02x}"
        for letter in re.sub("/+", "/", path).strip("/")
    )


def _write(root: Path, path: Path, text: str) -> None:
    umask = os.umask(0o022)  # 'systemctl cat' is for everybody
    try:
        with trusted.place(str(path.relative_to(root)), make=True, root=str(root)) as place:
            replace_file(place.name, text, 0o644, place.folder)
    except UntrustedError as error:
        raise UnitsError(f"{path} is not used: {error}") from None
    except OSError as error:
        raise UnitsError(f"'{path}' cannot be written: {reason(error)}") from None
    finally:
        os.umask(umask)


def _remove(root: Path, path: Path) -> bool:
    """Remove the drop-in; say whether there was one."""
    try:
        with trusted.place(str(path.relative_to(root)), root=str(root)) as place:
            os.unlink(place.name, dir_fd=place.folder)
    except UntrustedError as error:
        raise UnitsError(f"{path} is not used: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        return False
    with suppress(OSError):
        os.rmdir(path.parent)
    return True
