"""The systemd units of this installation: written, and removed again.

What is not / is another system's: its links are followed as they will be in there, and nothing outside is
read or written. What root starts at each boot may belong to nobody else.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

import zramd
from zramd import trusted
from zramd.contract.rundir import replace_file
from zramd.errors import UnitsError, UntrustedError, UsageError, reason
from zramd.settings import conffiles, devices

UNITS = (
    *("zramd@.service", "zramd-attach@.service", "zramd-refresh.service", "zramd-refresh.timer"),
    *("zramd-net@.service", "zramd.slice"),
)
MARK = (
    "# Installed by 'zramd install-units'; 'zramd remove-units' removes it. To change it: systemctl edit.\n"
)
COMMAND = "/usr/local/bin/zramd"  # what stands in the units as they are shipped
PACKAGED = "usr/lib/systemd/system"  # where a distribution's packages have theirs
_SERVICES = ("zramd@", "zramd-net@", "zramd-attach@")
HIDDEN = ("/home", "/root", "/run/user")  # from the services: ProtectHome=


def install(arguments: argparse.Namespace) -> int:
    """Write the units, and an example configuration if there is none, and have systemd read them.

    Raises UnitsError.
    """
    root, folder = _places(arguments)
    command = _command(root)
    _refuse_packaged(root, command)
    changed = False
    for name in UNITS:
        target = folder / name
        old = _read(root, target)
        if old is not None and not old.startswith(MARK):
            raise UnitsError(f"{target} is not from 'zramd install-units': remove it or use another --prefix")
        text = MARK + (shipped("systemd") / name).read_text().replace(COMMAND, command)
        if old == text:
            print(f"unchanged  {target}")
            continue
        _write(root, target, text)
        changed = True
        print(f"{'installed' if old is None else 'updated  '}  {target}")
    _install_example(root)
    _reload(root, changed)
    if not arguments.root:
        print("next: look at /etc/zramd.conf, then 'systemctl enable --now zramd@zram0'")
    return 0


def remove(arguments: argparse.Namespace) -> int:
    """Remove what `install` has written. What the user has changed stays."""
    root, folder = _places(arguments)
    found = [target for name in UNITS if (_read(root, target := folder / name) or "").startswith(MARK)]
    if found:
        _refuse_in_use(root)
        if _live(root) and any(target.suffix == ".timer" for target in found):
            _systemctl("stop", "zramd-refresh.timer")
    for target in found:
        _unlink(root, target)
        print(f"removed  {target}")
    if not found:
        print(f"there are no units of zramd in {folder}")
    example = root / "etc/zramd.conf"
    text = _read(root, example)
    if text is not None and text == (shipped("docs") / "zramd.conf").read_text():
        _unlink(root, example)
        print(f"removed  {example}")
    elif text is not None:
        print(f"kept     {example}: it is yours")
    _reload(root, bool(found))
    return 0


def shipped(folder: str) -> Path:
    """Return where files that are no code lie: in the package, or beside it in a checkout."""
    package = Path(zramd.__file__).resolve().parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def _places(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Return what stands for /, and the folder of the units in there."""
    root = Path(arguments.root or "/").absolute()
    if arguments.root == "" or not root.is_dir():
        raise UsageError(f"--root '{arguments.root}' is not a folder")
    prefix = Path(arguments.prefix)
    if not prefix.is_absolute():
        raise UsageError(f"--prefix '{arguments.prefix}' is not an absolute path: use one such as /usr/local")
    if not arguments.root and os.geteuid():
        raise UnitsError("only root may install and remove units: use sudo, or --root FOLDER to try it out")
    return root, root / prefix.relative_to("/") / "lib/systemd/system"


def _command(root: Path) -> str:
    """Return the path of this installation's command, as a service started from `root` sees it."""
    command = os.path.realpath(sys.argv[0])
    if os.path.basename(command) != "zramd":  # python -m zramd
        command = f"{sysconfig.get_path('scripts')}/zramd"
    needed = (command, os.path.realpath(sys.executable), os.path.realpath(zramd.__file__))
    if not os.path.isfile(command) or not _runs(command):
        raise UnitsError(
            f"'{command}' does not run by itself: install zramd, 'python3 -m venv /opt/zramd' and "
            "'/opt/zramd/bin/pip install' it, then '/opt/zramd/bin/zramd install-units'"
        )
    for path in needed:
        inside = _inside(path, root)
        if any(inside.startswith(f"{folder}/") for folder in HIDDEN) or not _readable(path):
            raise UnitsError(
                f"'{path}' is closed to services: install zramd and its Python elsewhere, say /opt/zramd"
            )
    _refuse_anothers(needed)
    if not re.fullmatch(r"[\w./+@:=-]+", inside := _inside(command, root)):
        raise UnitsError(
            f"'{inside}' has characters that a unit cannot have in a path: install zramd elsewhere"
        )
    return inside


def _refuse_anothers(needed: tuple[str, ...]) -> None:
    """Raise UnitsError if another user owns, or may change, what the services would run as root."""
    package = Path(zramd.__file__).resolve().parent
    beside = package.with_name("nbdkit_plugin.py")
    files = (
        [Path(path) for path in needed] + [beside] + [path for path in package.rglob("*") if path.is_file()]
    )
    try:
        for file in files:
            trusted.resolve(str(file))
    except UntrustedError as error:
        raise UnitsError(
            f"{error}, and services would run it as root: install zramd as root, say in /opt/zramd"
        ) from None
    except OSError as error:
        raise UnitsError(f"'{error.filename}' cannot be read: {reason(error)}") from None


def _refuse_packaged(root: Path, command: str) -> None:
    """Raise UnitsError if a package has brought units of this command: ours would hide its next ones."""
    unit = root / PACKAGED / UNITS[0]
    text = _read(root, unit)
    if text is not None and not text.startswith(MARK) and f"={command} serve " in text:
        raise UnitsError(f"the units of '{command}' are there: its package has put them into {unit.parent}")


def _inside(path: str, root: Path) -> str:
    return f"/{os.path.relpath(path, root)}" if Path(path).is_relative_to(root) else path


def _runs(command: str) -> bool:
    environment = {"PATH": os.defpath}
    try:
        done = subprocess.run(
            [command, "--version"], env=environment, cwd="/", capture_output=True, text=True, errors="replace"
        )
    except OSError:
        return False
    return done.stdout == f"zramd {zramd.__version__}\n"


def _readable(path: str) -> bool:
    """Say whether root can read a file without CAP_DAC_OVERRIDE, which the services do not have."""
    for place in (Path(path), *Path(path).parents):
        found = place.stat()
        wanted = 5 if place.is_dir() else 4
        if (found.st_mode >> (6 if found.st_uid == 0 else 0)) & wanted != wanted:
            return False
    return True


def _install_example(root: Path) -> None:
    found = _configuration(root)
    if found:
        print(f"kept       {found}")
        return
    target = root / "etc" / devices.CONF
    _write(root, target, (shipped("docs") / devices.CONF).read_text())
    print(f"installed  {target}, an example")


def _configuration(root: Path) -> Path | None:
    """Return a file of the configuration that `root` has, if there is one."""
    for folder in conffiles.FOLDERS:
        main, drop_ins = root / folder / devices.CONF, root / folder / f"{devices.CONF}.d"
        with suppress(FileNotFoundError, NotADirectoryError), _place(root, main) as place:
            os.stat(place.name, dir_fd=place.folder, follow_symlinks=False)
            return main
        names = [name for name in _names(root, drop_ins) if name.endswith(".conf")]
        if names:
            return drop_ins / names[0]
    return None


@contextmanager
def _place(root: Path, path: Path, make: bool = False) -> Iterator[trusted.Place]:
    """Yield the place of a path below `root`. Raises UnitsError, FileNotFoundError, NotADirectoryError."""
    try:
        with trusted.place(str(path.relative_to(root)), make=make, root=str(root)) as place:
            yield place
    except UntrustedError as error:
        raise UnitsError(f"{path} is not used: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UnitsError(f"'{path}' cannot be used: {reason(error)}") from None


def _read(root: Path, path: Path) -> str | None:
    try:
        with _place(root, path) as place:
            fd = os.open(place.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place.folder)
            with open(fd, errors="replace") as file:
                return file.read()
    except FileNotFoundError:
        return None


def _write(root: Path, path: Path, text: str) -> None:
    """Replace a file, which everybody may read whatever the umask; as the folders that are made for it."""
    umask = os.umask(0o022)
    try:
        with _place(root, path, make=True) as place:
            replace_file(place.name, text, 0o644, place.folder)
    finally:
        os.umask(umask)


def _unlink(root: Path, path: Path) -> None:
    with _place(root, path) as place:
        os.unlink(place.name, dir_fd=place.folder)


def _refuse_in_use(root: Path) -> None:
    """Raise UnitsError when a service is enabled or active."""
    used = _enabled(root)
    if _live(root):
        shown = _systemctl(
            "list-units", "--plain", "--no-legend", *(f"{service}*.service" for service in _SERVICES)
        )
        used |= {
            line.split()[0] for line in shown.splitlines() if line.split()[2:3] not in ([], ["inactive"])
        }
    if used:
        names = " ".join(sorted(used))
        raise UnitsError(f"{names} is enabled or active: 'systemctl disable --now {names}' first")


def _enabled(root: Path) -> set[str]:
    """Return the services of ours that another unit wants."""
    found = set()
    for name in _names(root, root / "etc/systemd/system"):
        if name.endswith(".wants"):
            found |= set(_names(root, root / "etc/systemd/system" / name))
    return {name for name in found if any(fnmatch(name, f"{service}*.service") for service in _SERVICES)}


def _names(root: Path, folder: Path) -> list[str]:
    """Return what is in a folder below `root`, nothing if it is not there."""
    try:
        at = trusted.open_folder(str(folder.relative_to(root)), root=str(root))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except UntrustedError as error:
        raise UnitsError(f"{folder} is not used: {error}") from None
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)
    finally:
        os.close(at)


def _reload(root: Path, changed: bool) -> None:
    if changed and _live(root):
        _systemctl("daemon-reload")


def _live(root: Path) -> bool:
    """Say whether `root` is this machine's, and systemd runs it."""
    return root == Path("/") and os.path.isdir("/run/systemd/system")


def _systemctl(*words: str) -> str:
    done = subprocess.run(
        ["systemctl", *words], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise UnitsError(f"'systemctl {' '.join(words)}' failed: {' '.join(done.stderr.split())}")
    return done.stdout
