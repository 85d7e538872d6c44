"""The image of an arm64 guest: the Debian that scripts/lib/arm64.sh makes, and zramd and its tests in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vm import image, packages
from vm.errors import VmError
from vm.kernel import Kernel

# Not all of the kernels have the file system, or the checksums in it, built in.
BOOT_MODULES = [*image.BOOT_MODULES, "crc32c_generic", "ext4"]
ROOT = Path(__file__).parents[3]
MADE = ROOT / "build/arm64"
TREE = MADE / "tree"
SYSROOT = f"--sysroot={TREE}"
COMPILER = "aarch64-linux-gnu-gcc"
# Where the tests find themselves, their wheels and the build; PYTHONPATH of the guest has zramd already.
TESTS = "root/zramd"
SITE = f"{TESTS}/build/arm64/site"


def prepare(folder: Path, kernel: Kernel) -> image.Images:
    """Return the images, made in `folder` unless they are there from the same ingredients; raises VmError."""
    if not (MADE / "release").is_dir():
        raise VmError("there is no arm64 build: run scripts/vm-swap, or scripts/test --arm64")
    boot = kernel.module_files(BOOT_MODULES)
    later = [path for path in kernel.module_files(image.LATER_MODULES) if path not in boot]
    zram = kernel.module_files(image.ZRAM_MODULES)
    files = dict(_files())
    files |= {f"lib/modules/{path.name}": path for path in (*later, *zram)}
    made_of = [*files.items(), *((path.name, path) for path in (*boot, *sorted(image.GUEST.iterdir())))]
    digest = image.digest([*made_of, ("tree", MADE / "stamp.tree"), ("this", Path(__file__))])
    images = image.Images(
        folder / f"initramfs-{digest}.img",
        folder / f"root-{digest}.img",
        [f"/lib/modules/{path.name}" for path in later],
        [f"/lib/modules/{path.name}" for path in zram],
    )
    with packages.locked(folder):
        if not images.root.exists():
            image.build_initramfs(images.initramfs, TREE / "usr/bin/busybox", boot)
            _build_root(images.root, files)
        image.keep(folder, images)
    return images


def _files() -> Iterator[tuple[str, Path]]:
    """Yield what is added to the tree: paths in the guest, and where each file is taken from."""
    package, site = MADE / "release", MADE / "site"
    yield from ((f"zramd/{path}", package / path) for path in _inside(package))
    yield from ((f"{SITE}/{path}", site / path) for path in _inside(site))
    # What the tests read of the checkout, among it the core's source, whose points to crash at they look for.
    for name in ("tests", "docs", "scripts/lib/bench", "zramd/core"):
        yield from ((f"{TESTS}/{name}/{path}", ROOT / name / path) for path in _inside(ROOT / name))
    yield f"{TESTS}/pyproject.toml", ROOT / "pyproject.toml"


def _inside(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder)


def _build_root(target: Path, files: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        stage = Path(name) / "root"
        # Links to the tree's files, so nothing here may write to one of them.
        image.output("cp", "--archive", "--link", str(TREE), str(stage))
        for path, source in files.items():
            place = stage / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)
        for path, link in (("usr/bin/sh", "busybox"), ("usr/sbin/strace", "../bin/strace")):
            (stage / path).unlink(missing_ok=True)
            (stage / path).symlink_to(link)
        start = stage / "usr/sbin/init"
        start.unlink(missing_ok=True)
        shutil.copy(image.GUEST / "init.sh", start)
        start.chmod(0o755)
        image.compile_tool(stage / "usr/bin/guest_tool", COMPILER, SYSROOT)
        image.make_file_system(target, stage)
