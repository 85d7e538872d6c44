"""Debian's packages, of this machine's suite or another, downloaded and unpacked without being installed."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vm.errors import VmError

# As root, apt downloads as a user who may not write where we do, and says so at length.
_OPTIONS = ("-o", "APT::Sandbox::User=root")


@dataclass(frozen=True)
class Source:
    """Where packages come from; `options` are what apt is told of it."""

    options: tuple[str, ...] = _OPTIONS
    own_lists: bool = False  # not those of this machine, which only root may write

    def apt(self, program: str, *words: str, cwd: Path) -> str:
        """Return what one of apt's programs prints; raises VmError."""
        return run(program, *self.options, *words, cwd=cwd)

    def refresh(self, folder: Path) -> None:
        """Let apt learn what the mirror has now, if this user may."""
        if self.own_lists or os.geteuid() == 0:
            self.apt("apt-get", "update", cwd=folder)


MACHINE = Source()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others from downloading or making anything in the folder meanwhile."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def source(suite: str, folder: Path, architecture: str = "") -> Source:
    """Return where the packages of a suite of Debian come from: "" is this machine's own; raises VmError.

    Of another suite or architecture apt keeps its lists in `folder`, with this machine's mirror, proxies and
    keys.
    """
    if suite in ("", platform.freedesktop_os_release().get("VERSION_CODENAME")) and not architecture:
        return MACHINE
    place = folder.absolute() / "-".join(word for word in ("apt", suite, architecture) if word)
    (place / "lists/partial").mkdir(parents=True, exist_ok=True)
    (place / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    (place / "sources.list").write_text(f"deb {_mirror(folder)} {suite} main\n")
    settings: dict[str, object] = {
        "Dir::Etc::sourcelist": place / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": place / "lists",
        "Dir::Cache": place / "cache",
    }
    if architecture:
        settings |= {"APT::Architecture": architecture, "APT::Architectures": architecture}
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    return Source((*_OPTIONS, *options), own_lists=True)


def _mirror(folder: Path) -> str:
    """Return the address of the mirror that this machine has Debian from."""
    question = ("apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages")
    answer = run(*question, cwd=folder)
    if "Debian " not in answer:
        MACHINE.refresh(folder)
        answer = run(*question, cwd=folder)
    for line in answer.splitlines():
        label, _, address = line.partition(" ")
        if label == "Debian":
            return address
    raise VmError("apt knows no mirror of Debian here: run 'apt-get update' as root")


def unpack(package: str, target: Path, where: Source = MACHINE) -> None:
    """Unpack the package into the folder `target`, whole or not at all, unless it exists; raises VmError."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        try:
            where.apt("apt-get", "download", package, cwd=work)
        except VmError:  # the lists are older than what the mirror still has
            where.refresh(work)
            where.apt("apt-get", "download", package, cwd=work)
        (archive,) = work.glob("*.deb")
        run("dpkg-deb", "-x", archive.name, "unpacked", cwd=work)
        (work / "unpacked").rename(target)


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
