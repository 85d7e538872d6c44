"""Other programs' configurations in zramd's words: zram-generator's, and zramswap's of Debian's zram-tools.

What zramd cannot do is named in the notes; nothing is left out silently. What comes out is for
`devices.build`, and for `text`, which writes a zramd.conf.
"""

import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from zramd import conffiles, devices, expression, keys
from zramd.conffiles import Entry, Problem
from zramd.devices import Sections
from zramd.errors import ConfigError

_DEVICE = re.compile(r"zram[0-9]+", re.ASCII)
_ALGORITHM = re.compile(r"([^()\s]*)(?:\(([^()]*)\))?")
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z_0-9]*)=(.*)", re.ASCII)
_TAKEN_OVER = ("zram-size", "zram-resident-limit", "host-memory-limit", "swap-priority", "options")
_KNOWN = (*_TAKEN_OVER, "compression-algorithm", "fs-type", "mount-point", "writeback-device")


class Translation(NamedTuple):
    """A configuration in zramd's words."""

    sections: Sections
    notes: list[str]  # FILE:LINE, what is not honoured or read otherwise, and what to do
    problems: list[Problem]  # lines that nobody could read
    files: list[str]


def find(root: Path) -> list[Path]:
    """Return the files that are there to be taken over: zram-generator's, else zramswap's, else none."""
    files = conffiles.find(root, devices.GENERATOR_CONF)
    zramswap = root / devices.ZRAMSWAP_CONF
    return files or ([zramswap] if zramswap.exists() else [])


def read(paths: list[Path]) -> Translation:
    """Return what the files mean: zramswap's if it is one file of shell assignments, else zram-generator's.

    Raises ConfigError and ZramdError for files that are not there or cannot be read.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    for path in paths:
        found, wrong = conffiles.read(path)
        entries += found
        problems += wrong
    files = [str(path) for path in paths]
    if len(paths) == 1 and _is_zramswap(paths[0], entries):
        return Translation(*_from_zramswap(paths[0]), [], files)
    return Translation(*_from_generator(entries), problems, files)


def _is_zramswap(path: Path, entries: list[Entry]) -> bool:
    """Whether a file is of shell assignments; zramswap's own is nothing but comments at first."""
    if not entries:
        return path.suffix != ".conf"
    return all(_ASSIGNMENT.fullmatch(f"{entry.key}={entry.value}") and not entry.section for entry in entries)


def _from_generator(entries: Iterable[Entry]) -> tuple[Sections, list[str]]:
    notes: list[str] = []
    raw: Sections = {}  # the last value wins, as there
    for entry in entries:
        if not entry.section:
            notes.append(f"{entry.where}: {_global(entry)}")
        elif _DEVICE.fullmatch(entry.section):
            raw.setdefault(entry.section, {})[entry.key] = entry
        elif not entry.key:
            notes.append(
                f"{entry.where}: [{entry.section}] is not zramN: zram-generator leaves it out, so does this"
            )
    sections: Sections = {}
    for name, values in raw.items():
        section, more = _section(name, values)
        notes += more
        if section is not None:
            sections[name] = section
    return sections, notes


def _global(entry: Entry) -> str:
    if entry.key.startswith("set!"):
        return f"{entry.key} = {entry.value}: {keys.no_commands(entry.key)}"
    return (
        f"{entry.key} = {entry.value} is before any section: zram-generator leaves it out, and so does this"
    )


def _section(name: str, values: dict[str, Entry]) -> tuple[dict[str, Entry] | None, list[str]]:
    """Return one device's values in zramd's words (None: zramd cannot make it) and notes."""
    notes: list[str] = []

    def note(entry: Entry, text: str) -> None:
        notes.append(f"{entry.where}: {entry.key} = {entry.value}: {text}")

    fs_type, mount_point = values.get("fs-type"), values.get("mount-point")
    for entry in (mount_point, fs_type):
        if entry and not (entry.key == "fs-type" and entry.value == "swap"):
            note(entry, f"zramd makes swap alone, and no file system: [{name}] is left out")
            return None, notes
    result = {"": values.get("") or Entry("", name, "", "")}
    result |= _size(name, values, notes)
    for key, entry in values.items():
        if key in ("zram-size", "zram-resident-limit"):
            notes += _unit_notes(entry)
        if key in _TAKEN_OVER:
            result.setdefault(key, entry)
        elif key == "memory-limit":
            result["host-memory-limit"] = entry._replace(key="host-memory-limit")
        elif key == "compression-algorithm":
            value, texts = _algorithm(entry.value)
            for text in texts:
                note(entry, text)
            if value:
                result[key] = entry._replace(value=value)
        elif key == "writeback-device":
            note(entry, "zramd keeps pages that do not compress in memory, and writes nothing back")
        elif key not in ("", "fs-type", "zram-fraction", "max-zram-size"):
            close = get_close_matches(key, _KNOWN, n=1)
            hint = f": did you mean '{close[0]}'?" if close else ""
            note(entry, f"zram-generator does not know this key and leaves it out, and so does this{hint}")
    return result, notes


def _size(name: str, values: dict[str, Entry], notes: list[str]) -> dict[str, Entry]:
    """Return the obsolete zram-fraction and max-zram-size, which override zram-size, as zram-size."""
    fraction, most = values.get("zram-fraction"), values.get("max-zram-size")
    given = fraction or most
    if given is None:
        return {}
    text = f"int(ram * {fraction.value if fraction else '0.5'})"
    if most and most.value != "none":
        text = f"min({text}, {most.value})"
    notes.append(f"{given.where}: {given.key} = {given.value} is obsolete: it is taken as zram-size = {text}")
    return {"zram-size": Entry(given.where, name, "zram-size", text)}


def _unit_notes(entry: Entry) -> list[str]:
    try:
        numbers = expression.units(entry.value)
    except ConfigError:
        return []  # devices.build tells it
    return [
        f"{entry.where}: {entry.key} = {entry.value}: {number} is a size here, a factor in zram-generator"
        for number in numbers
    ]


def _algorithm(text: str) -> tuple[str, list[str]]:
    """Return zramd's word for zram-generator's algorithms, '' for none, and what is not honoured."""
    texts: list[str] = []
    value, first = "", True
    for word in re.findall(r"[^\s()]*\([^()]*\)|[^\s()]+", text):
        match = _ALGORITHM.fullmatch(word)
        name, parameters = (match[1], match[2]) if match else (word, None)
        if not name:
            texts.append(f"({parameters}) is for recompression, which zramd does not have")
        elif not first:
            texts.append(f"{name} is for recompression, which zramd does not have")
        else:
            first = False
            if name != "lz4":
                texts.append(f"zramd has lz4 alone, and uses it instead of {name}")
                continue
            value = "lz4"
            for parameter in re.split(r"[,\s]+", parameters or ""):
                if parameter.startswith("level="):
                    value = f"lz4({parameter})"
                elif parameter:
                    texts.append(f"zramd's lz4 has no parameter {parameter.partition('=')[0]}")
    return value, texts


def _from_zramswap(path: Path) -> tuple[Sections, list[str]]:
    """Read ALGO, PERCENT, SIZE (megabytes) and PRIORITY, as shell assignments."""
    section = {"": Entry(str(path), "zram0", "", "")}
    notes: list[str] = []
    values: dict[str, Entry] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}:{number}"
        match = _ASSIGNMENT.fullmatch(line.strip())
        try:
            words = shlex.split(match[2], comments=True) if match else []
        except ValueError:
            match, words = None, []
        if match and len(words) < 2 and not re.search(r"[$`]", line):
            values[match[1]] = Entry(where, "zram0", match[1], words[0] if words else "")
        elif line.strip() and not line.lstrip().startswith("#"):
            notes.append(f"{where}: '{line.strip()}' is not a plain KEY=VALUE: it is left out")

    def take(name: str, key: str, value: str) -> None:
        section[key] = Entry(values[name].where, "zram0", key, value)

    for name, entry in values.items():
        if not entry.value:
            continue
        if name == "ALGO":
            value, texts = _algorithm(entry.value)
            notes += [f"{entry.where}: {name}={entry.value}: {text}" for text in texts]
            if value:
                take(name, "compression-algorithm", value)
        elif name == "PRIORITY":
            take(name, "swap-priority", entry.value)
        elif name == "SIZE" and not (values.get("PERCENT") and values["PERCENT"].value):
            take(name, "zram-size", entry.value)
        elif name == "PERCENT":
            take(name, "zram-size", f"ram * {entry.value} / 100")
        else:
            why = (
                "PERCENT is given, which overrides it" if name == "SIZE" else "zramd has nothing of this kind"
            )
            notes.append(f"{entry.where}: {name}={entry.value}: {why}: it is left out")
    if "zram-size" not in section:
        section["zram-size"] = Entry(str(path), "zram0", "zram-size", "256")  # zramswap's default
    return {"zram0": section}, notes


def text(translation: Translation) -> str:
    """Return a zramd.conf that means the same, its notes as comments."""
    lines = [
        f"# Made by 'zramd config import' from {', '.join(translation.files)}.",
        "# Both must not run: docs/configuration.md says how to turn the other off.",
    ]
    if translation.notes:
        lines += ["#", "# Not taken over, or read otherwise:"]
        lines += [f"#   {note}" for note in translation.notes]
    for name, values in translation.sections.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {entry.value}" for key, entry in values.items() if key]
    return "\n".join(lines) + "\n"
