"""Debian's kernel for virtual machines: found, downloaded, and unpacked without being installed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vm import packages
from vm.errors import VmError

META_PACKAGE = "linux-image-cloud-amd64"
_IMAGE_PACKAGE = re.compile(r"linux-image-(\d[\w.+~-]*-cloud-amd64)$")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: its release, as `uname -r` tells it, its image, and the folder of its modules."""

    release: str
    image: Path
    modules: Path

    def module_files(self, wanted: Iterable[str]) -> list[Path]:
        """Return the files of the modules and of all that they depend on, each after those it needs."""
        files = {_module_name(path): path for path in self.modules.rglob("*.ko")}

        def depends(name: str) -> list[str]:
            if name not in files:
                raise VmError(f"the kernel {self.release} has no module '{name}'")
            return module_depends(files[name].read_bytes())

        return [files[name] for name in load_order(wanted, depends)]


def prepare(folder: Path) -> Kernel:
    """Return the kernel, downloaded into `folder` if it is not there yet; raises VmError."""
    folder.mkdir(parents=True, exist_ok=True)
    package = image_package(packages.run("apt-cache", "depends", META_PACKAGE, cwd=folder))
    if package is None:
        packages.refresh_lists(folder)
        package = image_package(packages.run("apt-cache", "depends", META_PACKAGE, cwd=folder))
    if package is None:
        raise VmError(f"apt does not know {META_PACKAGE}: run 'apt-get update' as root")
    target = folder / package
    packages.unpack(package, target)
    release = package.removeprefix("linux-image-")
    return Kernel(release, target / f"boot/vmlinuz-{release}", target / f"lib/modules/{release}")


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


def _module_name(path: Path) -> str:
    return path.stem.replace("-", "_")
