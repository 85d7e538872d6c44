"""What the guest boots from: a small initramfs, and a root image that is never written."""

from __future__ import annotations

import compileall
import hashlib
import os
import py_compile
import shutil
import stat
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vm import packages
from vm.errors import VmError
from vm.kernel import Kernel

GUEST = Path(__file__).parent / "guest"
BOOT_MODULES = ["virtio_pci", "virtio_blk"]
LATER_MODULES = ["virtio_net", "nbd"]  # loaded by the modes that need them
ZRAM_MODULES = ["lz4", "zstd", "zram"]  # the kernel's own, to compare with
DM_MODULES = ["dm_mod", "dm_flakey", "dm_delay"]  # disks that fail, or are slow
UBLK_MODULES = ["ublk_drv"]  # which Debian 12's kernel lacks
NETWORK_MODULES = ["veth", "sch_netem", "wireguard"]  # cables that are long and lose packets, and a tunnel
MD_MODULES = ["raid1", "raid0"]
PROGRAMS = ["mkswap", "swapon", "swapoff", "addpart", "blkid", "dmsetup", "nbd-client", "nbdkit", "strace"]
PROGRAMS += ["blkdiscard", "ip", "tc", "wg", "mdadm", "lvm"]
PLUGINS = ["python", "file"]  # of nbdkit; a file on a tmpfs is what survives a server
# Of Python's library: what no server needs. Folders that begin with config- hold what links against Python.
LEFT_OUT = ("test", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "distutils", "unittest")
UNUSED_FOR = 24 * 3600  # seconds after which an image that nobody boots is removed
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Images:
    """Files to boot from."""

    initramfs: Path
    root: Path
    later_modules: list[str]  # paths in the guest, in the order in which to load them
    zram_modules: list[str]
    dm_modules: list[str] = field(default_factory=list)
    ublk_modules: list[str] = field(default_factory=list)  # none where the kernel lacks it
    network_modules: list[str] = field(default_factory=list)
    md_modules: list[str] = field(default_factory=list)


def prepare(folder: Path, kernel: Kernel, package: Path) -> Images:
    """Return the images, made in `folder` unless they are there from the same ingredients; raises VmError.

    `package` is the folder that holds zramd's release build.
    """
    folder.mkdir(parents=True, exist_ok=True)
    boot = kernel.module_files(BOOT_MODULES)
    later = [path for path in kernel.module_files(LATER_MODULES) if path not in boot]
    files = dict(_root_files(package))
    zram, mapper = kernel.module_files(ZRAM_MODULES), kernel.module_files(DM_MODULES)
    ublk = kernel.module_files(UBLK_MODULES) if kernel.has(UBLK_MODULES) else []
    network, md = kernel.module_files(NETWORK_MODULES), kernel.module_files(MD_MODULES)
    modules = (*later, *zram, *mapper, *ublk, *network, *md)
    files |= {f"lib/modules/{path.name}": path for path in modules}
    made_of = digest([*files.items(), *((path.name, path) for path in (*boot, *sorted(GUEST.iterdir())))])
    images = Images(
        folder / f"initramfs-{made_of}.img",
        folder / f"root-{made_of}.img",
        [f"/lib/modules/{path.name}" for path in later],
        [f"/lib/modules/{path.name}" for path in zram],
        [f"/lib/modules/{path.name}" for path in mapper],
        [f"/lib/modules/{path.name}" for path in ublk],
        [f"/lib/modules/{path.name}" for path in network],
        [f"/lib/modules/{path.name}" for path in md],
    )
    with packages.locked(folder):
        if not images.root.exists():
            build_initramfs(images.initramfs, _program("busybox"), boot)
            _build_root(images.root, files)
        keep(folder, images)
    return images


def keep(folder: Path, images: Images) -> None:
    """Note that the images are in use, and remove those that were not for long."""
    for path in (images.initramfs, images.root):
        os.utime(path)
    _remove_unused(folder)


# ---- The initramfs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One file of a cpio archive; `device` is the number of a character device, as major and minor."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def initramfs_entries(busybox: bytes, init: bytes, modules: list[tuple[str, bytes]]) -> list[Entry]:
    """Return what stands in the initramfs; `modules` are names and contents, in the order of loading."""
    order = "".join(f"{name}\n" for name, _ in modules)
    return [
        *(Entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules", "mnt", "proc")),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("bin/busybox", stat.S_IFREG | 0o755, busybox),
        Entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"),
        Entry("init", stat.S_IFREG | 0o755, init),
        Entry("modules/order", stat.S_IFREG | 0o644, order.encode()),
        *(Entry(f"modules/{name}", stat.S_IFREG | 0o644, content) for name, content in modules),
    ]


def cpio(entries: Iterable[Entry]) -> bytes:
    """Return the entries as an archive that the kernel unpacks (cpio's "newc")."""
    archive = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], 1):
        name = entry.name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file, device that it is, name's length, sum
        fields = [number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device, len(name), 0]
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def build_initramfs(target: Path, busybox: Path, modules: list[Path]) -> None:
    """Make the archive of a static busybox and the modules that the root needs."""
    contents = [(path.name, path.read_bytes()) for path in modules]
    archive = cpio(initramfs_entries(busybox.read_bytes(), (GUEST / "initramfs.sh").read_bytes(), contents))
    partial = target.with_suffix(".partial")
    partial.write_bytes(archive)
    partial.rename(target)


# ---- The root image --------------------------------------------------------------------------------------


def _root_files(package: Path) -> Iterator[tuple[str, Path]]:
    """Yield each file of the root image: its path in the guest, and where it is taken from."""
    yield "bin/busybox", _program("busybox")
    version = sysconfig.get_python_version()
    folder = Path(output("nbdkit", "--dump-config").partition("\nplugindir=")[2].partition("\n")[0])
    plugins = [folder / f"nbdkit-{name}-plugin.so" for name in PLUGINS]
    programs = [_program(name) for name in PROGRAMS]
    binaries = [*programs, Path(f"/usr/bin/python{version}"), *plugins]
    for path in binaries:
        yield f"usr/sbin/{path.name}" if path in programs else str(path.relative_to("/")), path
    library = Path(f"/usr/lib/python{version}")
    for path in _python_files(library):
        yield str(path.relative_to("/")), path
        if path.suffix == ".so":
            binaries.append(path)
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyi", ".pyx", ".pxd"):
            yield f"zramd/{path.relative_to(package)}", path
            if path.suffix == ".so":
                binaries.append(path)
    for path in _libraries(binaries):
        yield str(path.relative_to("/")), path


def _python_files(library: Path) -> Iterator[Path]:
    for path in sorted(library.rglob("*")):
        parts = path.relative_to(library).parts
        if not any(part in LEFT_OUT or part.startswith("config-") for part in parts) and path.is_file():
            yield path


def _libraries(binaries: list[Path]) -> list[Path]:
    """Return the shared libraries that the binaries need, by the paths where the loader looks for them."""
    found = set()
    for line in output("ldd", *map(str, binaries)).splitlines():
        words = line.split()
        if "=>" in words and "not" in words:
            raise VmError(f"a library is missing: {line.strip()}")
        found |= {Path(word) for word in words if word.startswith("/") and not word.endswith(":")}
    return sorted(found)


def _build_root(target: Path, files: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        stage = Path(name) / "root"
        for folder in ("bin", "sbin", "dev", "proc", "sys", "run", "tmp"):
            (stage / folder).mkdir(parents=True)
        for path, source in files.items():
            place = stage / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)  # with its time: Python compares it with its compiled file's
        (stage / "bin/sh").symlink_to("busybox")
        shutil.copy(GUEST / "init.sh", stage / "sbin/init")
        (stage / "sbin/init").chmod(0o755)
        python = next(path for path in files if path.startswith("usr/bin/python"))
        (stage / "usr/bin/python3").symlink_to(Path(python).name)
        never_checked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(stage / "zramd", quiet=2, invalidation_mode=never_checked)
        compile_tool(stage / "bin/guest_tool")
        make_file_system(target, stage)


def make_file_system(target: Path, stage: Path) -> None:
    """Make the image `target` of a file system that holds what is in `stage`, and is full with it."""
    size = sum(path.lstat().st_size + 4096 for path in stage.rglob("*") if not path.is_symlink())
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    options = ["-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", str(stage)]
    output("mke2fs", *options, str(partial), f"{size * 5 // 4 // 1024 + 4096}k")
    partial.rename(target)


def compile_tool(target: Path, *compiler: str) -> None:
    """Compile the program that works in the guest: heartbeat, workload, and more."""
    sources = sorted(str(path) for path in GUEST.glob("*.c"))
    words = ["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(target), *sources]
    output(*(compiler or ("cc",)), *words)


# ---- Helpers ---------------------------------------------------------------------------------------------


def _program(name: str) -> Path:
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise VmError(f"{name} is not installed: run scripts/vm-swap as root once")
    return Path(found)


def output(name: str, *arguments: str) -> str:
    """Run a program and return what it prints; raises VmError with what it complains of."""
    command = [shutil.which(name, path=_PATH) or name, *arguments]
    environment = {"PATH": _PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise VmError(f"{name} cannot be run: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise VmError(
            f"{name} failed with status {error.returncode}: {' '.join(error.stderr.split())}"
        ) from None
    return done.stdout


def digest(files: Iterable[tuple[str, Path]]) -> str:
    """Return a hash of the files' names and, instead of their contents, of their sizes and times."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for name, path in files:
        status = path.stat()
        found.update(f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


def _remove_unused(folder: Path) -> None:
    """Remove images that were not booted for a day. One in use stays readable where it is open."""
    for path in folder.glob("*.img"):
        if time.time() - path.stat().st_mtime > UNUSED_FOR:
            path.unlink()
