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

from zramd.errors import ConfigError, printable
from zramd.settings import codecs, conffiles, config, devices, expression, keys
from zramd.settings.conffiles import Entry, Problem
from zramd.settings.devices import Sections

_DEVICE = re.compile(r"zram[0-9]+", re.ASCII)
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z_0-9]*)=(.*)", re.ASCII)
_COMMENTED = re.compile(r"#\s*(?:ALGO|PERCENT|PERCENTAGE|PRIORITY)=.*")
_TAKEN_OVER = ("zram-size", "zram-resident-limit", "host-memory-limit", "swap-priority", "options")
_OBSOLETE = ("memory-limit", "zram-fraction", "max-zram-size")
_KNOWN = (*_TAKEN_OVER, "compression-algorithm", "fs-type", "mount-point", "writeback-device")
# Of zram-tools: what counts, and what older versions had. What values may be is what its arithmetic takes.
_ZRAMSWAP = {
    "ALGO": (r"[A-Za-z0-9_-]+", "an algorithm"),
    "PERCENT": (r"[0-9]{1,6}", "a whole number"),
    "SIZE": (r"[0-9]{1,9}", "a number of megabytes without a unit"),
    "PRIORITY": (r"-1|[0-9]{1,5}", "a whole number"),
}
_WRITEBACK = (
    "zramd itself writes what nobody has asked for in an hour, at most 1G a day (writeback_age, "
    "writeback_limit), to a device that is blank, or after 'zramd backing format'"
)
_ZRAMSWAP_OLD = {"PERCENTAGE": "PERCENT", "ALLOCATION": "SIZE"}
_ZRAMSWAP_ALL = {*_ZRAMSWAP, *_ZRAMSWAP_OLD, "CORES"}
# Other programs whose files are easily taken for one of those two, and keys that show which.
_OTHERS = {
    "zram-init": r"(?:type|flag|size|mlim|back|icmp|idle|wlim|notr|maxs|algo|labl|uuid|args)[0-9]+"
    r"|num_devices|(?:un)?load_on_(?:start|stop)",
    "systemd-swap": r"(?:zswap|zram|swapfc|swapfu|swapd)_\w+",
    "log2ram": r"PATH_DISK|LOG_DISK_SIZE|ZL2R|COMP_ALG|USE_RSYNC|JOURNALD_AWARE|NOTIFICATION_COMMAND",
    "armbian-zram-config": r"(?:ZRAM|MEM_LIMIT)_PERCENTAGE|ZRAM_MAX_DEVICES|(?:SWAP|RAMLOG|TMP)_ALGORITHM",
    "zram-swap": r"_zram_\w+|_comp_factor",
    "zramen": r"ZRAM_(?:SIZE|MAX_SIZE|COMP_ALGORITHM|PRIORITY|STREAMS)",
    "dphys-swapfile": r"CONF_\w+",
}


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
    """Return what the files mean: zramswap's if it is one file of its words, else zram-generator's.

    Raises ConfigError for files that are not there or neither program's, ZramdError for those that cannot
    be read.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    lines: list[str] = []
    for path in paths:
        lines = conffiles.text(path).split("\n")  # read once: it may be a pipe
        found, wrong = conffiles.parse(lines, str(path))
        entries += found
        problems += wrong
    files = [str(path) for path in paths]
    sections = any(entry.section or not entry.key for entry in entries)
    if len(paths) == 1 and not sections and _is_zramswap(paths[0], lines):
        return Translation(*_from_zramswap(str(paths[0]), lines), files)
    _must_be_generators(entries, problems, files)
    return Translation(*_from_generator(entries), problems, files)


def _is_zramswap(path: Path, lines: list[str]) -> bool:
    """Whether a file without sections is zramswap's: by its name, or since it has zram-tools' words alone."""
    lines = [stripped for line in lines if (stripped := line.strip())]
    assignments = [match for line in lines if (match := _ASSIGNMENT.fullmatch(line))]
    known = [match for match in assignments if match[1] in _ZRAMSWAP_ALL]
    # Many programs call something SIZE: zram-tools' has no unit. CORES says nothing at all.
    telling = any(
        re.fullmatch(_ZRAMSWAP["SIZE"][0], _words(match[2])) if match[1] == "SIZE" else match[1] != "CORES"
        for match in known
    )
    named, alone = path.name == Path(devices.ZRAMSWAP_CONF).name, len(known) == len(assignments)
    if all(line.startswith("#") for line in lines):  # as it is shipped
        return named or any(_COMMENTED.match(line) for line in lines)
    return telling and (named or alone)


def _must_be_generators(entries: list[Entry], problems: list[Problem], files: list[str]) -> None:
    """Raise ConfigError for what is not zram-generator's configuration."""
    names = ", ".join(files)
    others = {
        program
        for program, words in _OTHERS.items()
        if any(re.fullmatch(f"(?:export +)?(?:{words})", entry.key) for entry in entries)
    }
    own = [entry for entry in entries if _DEVICE.fullmatch(entry.section)]
    if own:
        foreign = next((entry for entry in own if _is_zramds(entry.key)), None)
        if foreign is not None:
            raise ConfigError(
                f"{foreign.where}: {foreign.key} is zramd's own: use the file as it is, as /etc/zramd.conf"
            )
        return
    if any(entry.key.startswith("set!") for entry in entries) and not others:
        return
    if all(_is_generators_place(Path(file)) for file in files) and not (entries or problems):
        return  # nothing but comments
    what = f"this is {' or '.join(sorted(others))}'s file" if others else "nothing in it is theirs"
    raise ConfigError(
        f"{names}: not a configuration of zram-generator or zram-tools, {what}: "
        "write a [zram0] by hand, as docs/zramd.conf shows"
    )


def _is_zramds(key: str) -> bool:
    if not key or key in _KNOWN or key in _OBSOLETE:
        return False
    try:
        return bool(keys.canonical(key))
    except ConfigError:
        return False


def _is_generators_place(path: Path) -> bool:
    name = Path(devices.GENERATOR_CONF).name
    return name in (path.name, path.parent.name.removesuffix(".d"))


def _words(text: str) -> str:
    """Return what a shell would make of the right side of an assignment, '\\0' if that takes a shell."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return "\0"
    return "\0" if len(words) > 1 or re.search(r"[$`;&|<>()]", text) else "".join(words)


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
            try:
                if not config.find("backing").parse_of_file(entry.value):
                    continue
            except ConfigError as error:
                note(entry, f"{error}: it is left out")
                continue
            result["backing"] = entry._replace(key="backing")
            note(entry, _WRITEBACK)
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
        return []  # devices.build reports it
    return [
        f"{entry.where}: {entry.key} = {entry.value}: {number} is a size here, a factor in zram-generator"
        for number in numbers
    ]


def _algorithm(text: str) -> tuple[str, list[str]]:
    """Return zramd's words for zram-generator's algorithms, '' for none, and what is not honoured."""
    texts: list[str] = []
    hot = cold = ""
    for word in codecs.words(text):
        name, _, parameters = word.removesuffix(")").partition("(")
        if not name:
            if not codecs.is_idle(word):
                texts.append(f"{word} is left out: zramd recompresses what is idle, whatever else it is")
        elif not hot and name not in codecs.LEVELS:
            hot = "lz4"
            texts.append(f"zramd has no {name}, and uses lz4 instead")
        elif not hot:
            hot = name + _level(name, parameters, texts)
        elif name != codecs.COLD or cold:
            texts.append(f"{word} is left out: zramd recompresses by {codecs.COLD}, once")
        else:
            cold = name + _level(name, parameters, texts)
    if cold and (useless := _useless(hot, cold)):
        texts.append(f"{useless}: it is left out")
        cold = ""
    return " ".join(filter(None, (hot, cold))), texts


def _useless(hot: str, cold: str) -> str:
    """Return why an algorithm gains nothing over another, "" if it does."""
    try:
        written = codecs.comp_algorithm(hot), codecs.recompression(cold)
    except ConfigError:
        return ""  # devices.build reports it
    try:
        codecs.must_gain(*written)
    except ConfigError as error:
        return str(error)
    return ""


def _level(name: str, parameters: str, texts: list[str]) -> str:
    """Return an algorithm's level among its parameters, as it is written; the others are not honoured."""
    level = ""
    for parameter in filter(None, re.split(r"[,\s]+", parameters)):
        if parameter.startswith("level="):
            level = f"({parameter})"
        else:
            texts.append(f"zramd's {name} has no parameter {parameter.partition('=')[0]}")
    return level


def _from_zramswap(name: str, lines: list[str]) -> tuple[Sections, list[str], list[Problem]]:
    """Read ALGO, PERCENT, SIZE (megabytes) and PRIORITY, as shell assignments.

    What cannot be read is a problem where it may change what those are, else a note.
    """
    section = {"": Entry(name, "zram0", "", "")}
    notes: list[str] = []
    problems: list[Problem] = []
    values: dict[str, Entry] = {}
    for number, line in enumerate(lines, 1):
        where, shown = f"{name}:{number}", line.strip()
        match = _ASSIGNMENT.fullmatch(shown)
        value = _words(match[2]) if match else "\0"
        if not shown or shown.startswith("#"):
            continue
        if match and match[1] not in (*_ZRAMSWAP, *_ZRAMSWAP_OLD):
            plain = value != "\0"
            what = (
                f"{shown}: zramd has nothing of this kind" if plain else f"'{shown}' is not a plain KEY=VALUE"
            )
            notes.append(f"{where}: {what}: it is left out")
        elif match and value != "\0":
            values[match[1]] = Entry(where, "zram0", match[1], value)
        else:
            problems.append(Problem(where, "zram0", f"'{shown}' is not a plain KEY=VALUE: write its result"))
    for old, new in _ZRAMSWAP_OLD.items():
        if (entry := values.pop(old, None)) and entry.value:
            taken = not (values.get(new) and values[new].value)
            what = "it is taken as that" if taken else f"{new} is given, which counts"
            notes.append(f"{entry.where}: {old}={entry.value}: it is called {new} now: {what}")
            if taken:
                values[new] = entry

    def take(entry: Entry, key: str, value: str) -> None:
        section[key] = Entry(entry.where, "zram0", key, value)

    for word, entry in values.items():
        shape, what = _ZRAMSWAP[word]
        if not entry.value:
            continue
        if re.fullmatch(shape, entry.value) is None:
            text = f"{entry.key}={entry.value}: zram-tools takes {what}"
            problems.append(Problem(entry.where, "zram0", text))
        elif word == "ALGO":
            value, texts = _algorithm(entry.value)
            notes += [f"{entry.where}: {word}={entry.value}: {text}" for text in texts]
            if value:
                take(entry, "compression-algorithm", value)
        elif word == "PRIORITY":
            take(entry, "swap-priority", entry.value)
        elif word == "PERCENT":
            take(entry, "zram-size", f"ram * {entry.value} / 100")
        elif values.get("PERCENT") and values["PERCENT"].value:
            text = "PERCENT is given, which overrides it: it is left out"
            notes.append(f"{entry.where}: {entry.key}={entry.value}: {text}")
        else:
            take(entry, "zram-size", entry.value)
    if "zram-size" not in section:
        section["zram-size"] = Entry(name, "zram0", "zram-size", "256")  # zramswap's default
    return {"zram0": section}, notes, problems


def text(translation: Translation, problems: Iterable[Problem] | None = None) -> str:
    """Return a zramd.conf that means the same, its notes as comments.

    `problems` are those that `devices.build` found (None: the translation's own). A section that has one is
    no more than a comment, so that it means nothing before somebody has mended it.
    """
    problems = list(translation.problems if problems is None else problems)
    lines = [
        f"# Made by 'zramd config import' from {', '.join(translation.files)}.",
        "# Both must not run: docs/configuration.md says how to turn the other off.",
    ]
    for head, sentences in (
        ("Not taken over, or read otherwise:", translation.notes),
        ("Not understood. Mend these, then take the # away below:", problems),
    ):
        if sentences:
            lines += ["#", f"# {head}"]
            lines += [f"#   {printable(str(sentence))}" for sentence in sentences]
    wrong = {problem.section for problem in problems}
    for name, values in translation.sections.items():
        mark = "" if wrong.isdisjoint(("", name)) else "#"
        lines += ["", f"{mark}[{name}]"]
        lines += [mark + conffiles.line(key, entry.value) for key, entry in values.items() if key]
    return "\n".join(lines) + "\n"
