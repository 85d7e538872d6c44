"""Finds and reads configuration files as systemd does: a main file and drop-ins, in four folders.

`find` gives the files in the order in which they are read, so that a later value replaces an earlier one;
`read` gives the lines of one file. What the lines mean is `zramd.settings.devices`' business.
"""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from zramd.errors import ConfigError, UntrustedError, ZramdError, reason

TYPE_CHECKING = False  # what typing says too, without the time that it takes to import
if TYPE_CHECKING:
    from pathlib import Path

# The first has the highest precedence.
FOLDERS = ("run", "etc", "usr/local/lib", "usr/lib")
MAX_BYTES = 1 << 20  # of a file: a configuration has a few thousand

_SECTION = re.compile(r"\[([^\[\]]*)\]")
_VALUE = re.compile(r"([^=:]*)[=:](.*)", re.DOTALL)  # zram-generator takes both; what comes first counts


class Entry(NamedTuple):
    """One line: a section's head (key is '') or a value."""

    where: str  # FILE:LINE
    section: str  # '': before any section
    key: str
    value: str


class Problem(NamedTuple):
    """Something in a file that cannot be used: one sentence that quotes it, and the remedy."""

    where: str  # FILE:LINE
    section: str  # '': concerns the whole file
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def root_folder(root: str | None = None) -> "Path":
    """Return the folder that stands for /: `root`, else what ZRAMD_ROOT says, else / itself."""
    from pathlib import Path

    return Path(root or os.environ.get("ZRAMD_ROOT") or "/")


def are_there(name: str) -> bool:
    """Say whether `find` is worth the time that it takes to import what it needs."""
    root = os.environ.get("ZRAMD_ROOT") or "/"
    files = [f"{root}/{folder}/{name}" for folder in FOLDERS]
    return any(os.path.lexists(file) or os.path.isdir(f"{file}.d") for file in files)


def find(root: "Path", name: str) -> "list[Path]":
    """Return the main file `name` and the drop-ins NAME.d/*.conf that count, the weakest first.

    Of main files, the one in the highest folder counts alone. Drop-ins come in the order of their file names,
    over all folders; of two with one name, the one in the higher folder counts. A link to /dev/null hides
    what is below it and counts for nothing. Raises ZramdError for a folder that cannot be read.
    """
    main = [path for folder in FOLDERS if os.path.lexists(path := root / folder / name)][:1]
    drop_ins: dict[str, Path] = {}
    for folder in FOLDERS:
        try:
            names = os.listdir(root / folder / f"{name}.d")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ZramdError(f"{root / folder / name}.d: {reason(error)}") from None
        for file in names:
            if file.endswith(".conf") and not file.startswith("."):
                drop_ins.setdefault(file, root / folder / f"{name}.d" / file)
    return [path for path in [*main, *(drop_ins[file] for file in sorted(drop_ins))] if not _masks(path)]


def _masks(path: "Path") -> bool:
    return os.path.realpath(path) == os.devnull


def refuse_untrusted(path: "Path") -> None:
    """Raise ZramdError if another user has made a file or may change it: root does what stands there."""
    from zramd import trusted

    try:
        trusted.resolve(str(path))
    except UntrustedError as error:
        raise ZramdError(f"{path} is not used: {error}: have it owned by root, with mode 644") from None
    except OSError as error:
        raise ZramdError(f"{path}: {reason(error)}") from None


def read(path: "Path") -> tuple[list[Entry], list[Problem]]:
    """Return the lines of a file, and those that are none.

    Raises ConfigError if the file is not there or is not text, ZramdError if it cannot be read.
    """
    return parse(text(path).split("\n"), str(path))


def text(path: "Path") -> str:
    """Return what is in a file, without the mark (BOM) that some editors begin it with. Raises as `read`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: there is no such file") from None
    except ValueError:  # a NUL in its name
        raise ConfigError(f"{path}: this is not a file's name") from None
    except OSError as error:
        raise ZramdError(f"{path} cannot be read: {reason(error)}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: it has more than {MAX_BYTES} bytes: this is no configuration")
    try:
        found = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text: write it anew") from None
    if "\0" in found:
        raise ConfigError(f"{path}: byte {data.index(0)} is a NUL: this is no text")
    return found.removeprefix("\ufeff")


def parse(lines: Iterable[str], name: str) -> tuple[list[Entry], list[Problem]]:
    """Return the entries of `lines`, and the lines that are none; `name` is the file's."""
    entries: list[Entry] = []
    problems: list[Problem] = []
    section: str | None = ""  # None: after a head that cannot be read, what follows belongs nowhere
    for number, line in enumerate(lines, 1):
        line, where = line.strip(), f"{name}:{number}"
        if not line or line[0] in "#;":
            continue
        if line.startswith("["):
            match = _SECTION.fullmatch(line)
            if match is None:
                problems.append(
                    Problem(where, "", f"'{line}' is not a section: write [zram0] and nothing else")
                )
                section = None
                continue
            section = match[1].strip()
            entries.append(Entry(where, section, "", ""))
            continue
        if section is None:
            continue
        match = _VALUE.fullmatch(line)
        key, value = (match[1].strip(), match[2].strip()) if match else ("", "")
        if not key:
            problems.append(
                Problem(where, section, f"'{line}' is neither KEY = VALUE, nor [NAME], nor # comment")
            )
            continue
        if _is_quoted(value):
            value = value[1:-1]
        entries.append(Entry(where, section, key, value))
    return entries, problems


def line(key: str, value: str) -> str:
    """Return the line that `parse` reads as this entry."""
    return f'{key} = "{value}"' if _is_quoted(value) or value != value.strip() else f"{key} = {value}"


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
