"""Debian's kernel for virtual machines: found, downloaded, and unpacked without being installed."""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vm import packages
from vm.errors import VmError

SUITES = ("bookworm", "trixie")  # those whose kernels the tests boot: 6.1, 6.12


@dataclass(frozen=True)
class Flavour:
    """One of Debian's kernels: the package that depends on it, what it runs on, its page in bytes."""

    package: str = "linux-image-cloud-amd64"
    architecture: str = ""  # this machine's
    suite: str = ""  # the one asked for
    page: int = 4096


# The kernels of arm64, by their pages.
ARM64 = {
    "4k": Flavour("linux-image-cloud-arm64", "arm64", "trixie"),
    "16k": Flavour("linux-image-arm64-16k", "arm64", "trixie", 16384),
}
_IMAGE_PACKAGE = re.compile(r"linux-image-\d[\w.+~-]*$")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: its release, as `uname -r` tells it, its image, and the folder of its modules."""

    release: str
    image: Path
    modules: Path
    flavour: Flavour = Flavour()

    def module_files(self, wanted: Iterable[str]) -> list[Path]:
        """Return the files of the modules and of all that they depend on, each after those it needs.

        What is built into the kernel needs none.
        """
        built_in, files = self._built_in(), self._files()

        def depends(name: str) -> list[str]:
            if name not in files:
                raise VmError(f"the kernel {self.release} has no module '{name}'")
            files[name] = _unpacked(files[name])
            return module_depends(files[name].read_bytes())

        return [
            files[name] for name in load_order((name for name in wanted if name not in built_in), depends)
        ]

    def has(self, wanted: Iterable[str]) -> bool:
        """Whether the kernel has all these modules, as files or built in."""
        return set(wanted) <= self._built_in() | self._files().keys()

    def _built_in(self) -> set[str]:
        return {_module_name(Path(line)) for line in self._table("builtin")}

    def _files(self) -> dict[str, Path]:
        """Return the modules' files by their names, compressed ones included."""
        files = {_module_name(path): path for path in self.modules.rglob("*.ko")}
        for path in self.modules.rglob("*.ko.xz"):  # as Debian 13 has them
            files.setdefault(_module_name(path.with_suffix("")), path)
        return files

    def _table(self, name: str) -> list[str]:
        """Return the lines of one of the kernel's own tables of its modules, none if it has none."""
        path = self.modules / f"modules.{name}"
        return path.read_text().splitlines() if path.exists() else []


def prepare(folder: Path, suite: str = "", flavour: Flavour = Flavour()) -> Kernel:
    """Return the kernel of a suite of Debian, "" for this machine's; raises VmError.

    It is downloaded into `folder` unless it is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with packages.locked(folder):
        source = packages.source(suite or flavour.suite, folder, flavour.architecture)
        package = _image_package_of(source, folder, flavour)
        if package is None:
            source.refresh(folder)
            package = _image_package_of(source, folder, flavour)
        if package is None:
            raise VmError(f"apt does not know {flavour.package}: run 'apt-get update' as root")
        target = folder / package
        packages.unpack(package, target, source)
    release = package.removeprefix("linux-image-")
    modules = next(path for path in (target / "usr/lib/modules", target / "lib/modules") if path.exists())
    return Kernel(release, target / f"boot/vmlinuz-{release}", modules / release, flavour)


def _image_package_of(source: packages.Source, folder: Path, flavour: Flavour) -> str | None:
    try:
        return image_package(source.apt("apt-cache", "depends", flavour.package, cwd=folder))
    except VmError:  # it has no lists yet
        return None


def image_package(depends: str) -> str | None:
    """Return the kernel's own package, from what `apt-cache depends` says; None if it names none."""
    for line in depends.splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "Depends" and _IMAGE_PACKAGE.match(value):
            return value
    return None


def module_depends(content: bytes) -> list[str]:
    """Return the names of the modules that a module needs, from its file's content."""
    match = _DEPENDS.search(b"\0" + content)
    return match[1].decode().split(",") if match and match[1] else []


def load_order(wanted: Iterable[str], depends: Callable[[str], list[str]]) -> list[str]:
    """Return the names in an order in which they can be loaded, with all that they depend on, none twice."""
    order: list[str] = []

    def add(name: str) -> None:
        if name not in order:
            for needed in depends(name):
                add(needed.replace("-", "_"))
            order.append(name)

    for name in wanted:
        add(name)
    return order


def _unpacked(path: Path) -> Path:
    """Return the module's file as the kernel wants it, beside the one that is compressed."""
    if path.suffix != ".xz":
        return path
    plain = path.with_suffix("")
    partial = path.with_suffix(".partial")
    partial.write_bytes(lzma.decompress(path.read_bytes()))
    partial.rename(plain)
    return plain


def _module_name(path: Path) -> str:
    return path.stem.replace("-", "_")
