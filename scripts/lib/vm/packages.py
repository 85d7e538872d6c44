"""Debian's packages, downloaded and unpacked without being installed."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from vm.errors import VmError


def unpack(package: str, target: Path) -> None:
    """Unpack the package into the folder `target`, whole or not at all, unless it exists; raises VmError."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        # As root, apt downloads as a user who may not write here, and says so at length.
        sandbox = ["-o", "APT::Sandbox::User=root"]
        try:
            run("apt-get", *sandbox, "download", package, cwd=work)
        except VmError:  # the lists are older than what the mirror still has
            refresh_lists(work)
            run("apt-get", *sandbox, "download", package, cwd=work)
        (archive,) = work.glob("*.deb")
        run("dpkg-deb", "-x", str(archive), "unpacked", cwd=work)
        (work / "unpacked").rename(target)


def refresh_lists(folder: Path) -> None:
    """Let apt learn what the mirror has now, if this user may."""
    if os.geteuid() == 0:
        run("apt-get", "update", cwd=folder)


def run(*command: str, cwd: Path) -> str:
    """Return what the command prints; raises VmError with what it complains about."""
    try:
        return subprocess.run(
            command, cwd=cwd, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
        ).stdout
    except OSError as error:
        raise VmError(f"{command[0]} cannot be run: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise VmError(f"'{' '.join(command)}' failed: {' '.join(error.stderr.split())}") from None
