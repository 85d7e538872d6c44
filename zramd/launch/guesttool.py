"""What a guest's administrator needs, as files: zramd-guest, which is zramd.guest in one, and its units."""

import io
import os
import zipfile
from pathlib import Path

import zramd
from zramd.errors import UsageError, reason
from zramd.launch.units import shipped

PROGRAM = "zramd-guest"
UNITS = ("zramd-guest.service", "zramd-guest-refresh.service", "zramd-guest-refresh.timer")
PACKAGE = "zramd_guest"  # in the archive: the guest may have a zramd of its own
_START = f"import sys\n\nfrom {PACKAGE}.__main__ import main\n\nsys.exit(main())\n"
_TIME = (1980, 1, 1, 0, 0, 0)  # the same source makes the same file


def write(folder: str) -> list[str]:
    """Make a folder with all of it, and return the files' paths. Raises UsageError."""
    try:
        os.mkdir(folder)
    except FileExistsError:
        raise UsageError(f"'{folder}' is there already: give a folder that is to be made") from None
    except OSError as error:
        raise UsageError(f"the folder '{folder}' cannot be made: {reason(error)}") from None
    program = Path(folder, PROGRAM)
    program.write_bytes(archive())
    program.chmod(0o755)
    for name in UNITS:
        Path(folder, name).write_bytes((shipped("systemd") / name).read_bytes())
    return [f"{folder}/{name}" for name in (PROGRAM, *UNITS)]


def archive() -> bytes:
    """Return the program: an archive of modules, which Python runs, after a line for the kernel."""
    packed = io.BytesIO()
    packed.write(b"#!/usr/bin/python3 -I\n")
    sources = sorted(Path(zramd.__file__).parent.glob("guest/*.py"))
    with zipfile.ZipFile(packed, "w") as file:
        for name, content in (
            ("__main__.py", _START.encode()),
            *((f"{PACKAGE}/{path.name}", path.read_bytes()) for path in sources),
        ):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o644 << 16
            file.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()
