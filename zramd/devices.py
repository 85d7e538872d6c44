"""Configured devices: what /etc/zramd.conf and its drop-ins say.

    configuration = devices.load()          # every device, and everything that is wrong
    device = devices.find("zram0")          # one device, or an exception that says why not
    device.pairs, device.words()            # the server's settings, for config.parse and `zramd serve`

Each section is a device. Its keys are zram-generator's, zramd's settings under their own names, and what
the kernel is told when it attaches the device; `keys` has those that are not settings. docs/zramd.conf
teaches all.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zramd import conffiles, config, expression
from zramd.conffiles import Entry, Problem
from zramd.config import Config, Setting
from zramd.errors import ConfigError, ZramdError

CONF = "zramd.conf"
DEFAULT_SIZE = "min(ram / 2, 4096)"  # zram-generator's

# zram-generator's words for settings of zramd.
TWINS = {
    "zram-size": "disksize",
    "zram-resident-limit": "mem_limit",
    "compression-algorithm": "comp_algorithm",
}
# Words of zram-generator that zramd refuses, and what to do instead.
REFUSED = {
    "mount-point": "zramd mounts nothing: use attach = device, and mkfs and mount in a unit of your own",
    "writeback-device": "zramd keeps all data in memory: remove it",
    "zram-fraction": "it is obsolete: use zram-size = ram * FRACTION",
    "max-zram-size": "it is obsolete: use zram-size = min(…, MEGABYTES)",
    "memory-limit": "it is obsolete: use host-memory-limit",
    "name": "the section's name is the device's: remove it",
}
GENERATOR_CONF = "systemd/zram-generator.conf"
ZRAMSWAP_CONF = "etc/default/zramswap"

Sections = dict[str, dict[str, Entry]]  # name → key → its value; the key '' is the section's head


class SkippedError(ConfigError):
    """The device is configured, but not for this machine; the message says why."""


@dataclass(frozen=True)
class Device:
    """A configured device; sizes in bytes, times in seconds."""

    name: str
    disksize: int
    pairs: tuple[tuple[str, str], ...]  # the server's settings, for config.parse
    attach: str  # swap: the kernel attaches it and swaps onto it; device: attaches it; no: neither
    swap_priority: int
    options: str  # swapon's, comma-separated
    timeout: int  # of an answer; 0: none
    dead_conn_timeout: int
    connections: int
    where: dict[str, str] = field(default_factory=dict, compare=False)  # key as written → FILE:LINE

    @property
    def rundir(self) -> str:
        """The folder of its sockets and statistics, as root's server has it."""
        return dict(self.pairs).get("rundir", f"/run/zramd/{self.name}")

    def settings(self) -> Config:
        """Return the server's settings, defaults filled in."""
        return config.parse([*(pair for pair in self.pairs if pair[0] != "rundir"), ("rundir", self.rundir)])

    def words(self, others: Iterable[str] = ()) -> list[str]:
        """Return key=value words for `zramd serve`; the key=value words `others` override the configured.

        Raises ConfigError for a key that is no setting.
        """
        words = list(others)
        given = {config.find(word.partition("=")[0]).name for word in words}
        return [*(f"{key}={value}" for key, value in self.pairs if key not in given), *words]

    @property
    def attached(self) -> bool:
        """Whether this machine's kernel attaches it."""
        return self.attach != "no"

    @property
    def swaps(self) -> bool:
        """Whether this machine swaps onto it."""
        return self.attach == "swap"


@dataclass(frozen=True)
class Configuration:
    """Everything that was read."""

    devices: tuple[Device, ...]
    skipped: dict[str, str]  # name of a section that makes no device here → why
    notes: tuple[str, ...]  # one sentence each, with what to do
    problems: tuple[Problem, ...]
    files: tuple[str, ...]  # that count, the weakest first

    def find(self, name: str) -> Device:
        """Return the device `name`. Raises SkippedError, and ConfigError if it is wrong or not there."""
        for problem in self.problems:
            if problem.section in ("", name):
                raise ConfigError(str(problem))
        for device in self.devices:
            if device.name == name:
                return device
        if name in self.skipped:
            raise SkippedError(f"{name}: {self.skipped[name]}")
        known = ", ".join(device.name for device in self.devices) or "none"
        where = ", ".join(self.files) or f"/etc/{CONF}"
        raise ConfigError(f"there is no device '{name}' in {where}: add a section [{name}] (there: {known})")


def find(name: str, root: str | None = None) -> Device:
    """Return the configured device `name`, as Configuration.find does."""
    return load(root).find(name)


def load(root: str | None = None, file: str | None = None) -> Configuration:
    """Return what is configured: by zramd.conf and its drop-ins, or by one `file`.

    `root` stands for / (default: $ZRAMD_ROOT, else /), also for proc/meminfo where it has one. What is wrong
    is in the result. Raises ZramdError only if a file cannot be read at all.
    """
    folder = conffiles.root_folder(root)
    paths = [Path(file)] if file else conffiles.find(folder, CONF)
    sections: Sections = {}
    problems: list[Problem] = []
    for path in paths:
        entries, wrong = conffiles.read(path)
        problems += wrong + _add(sections, entries)
    result = build(sections, total_ram(folder))
    notes = [*result.notes, *([] if file else _other_notes(folder, bool(paths), result.devices))]
    files = tuple(str(path) for path in paths)
    return Configuration(result.devices, result.skipped, tuple(notes), (*problems, *result.problems), files)


def total_ram(root: Path) -> int:
    """Return the machine's memory in whole megabytes, as root/proc/meminfo has it, else /proc/meminfo."""
    path = root / "proc/meminfo"
    try:
        text = (path if path.exists() else Path("/proc/meminfo")).read_text()
    except OSError as error:
        raise ZramdError(f"{path}: {error.strerror}") from None
    match = re.search(r"^MemTotal:\s*([0-9]+) kB$", text, re.MULTILINE)
    if match is None:
        raise ZramdError(f"{path}: there is no line 'MemTotal: … kB' in it")
    return int(match[1]) >> 10


def _priority(text: str) -> int:
    if re.fullmatch(r"-1|[0-9]{1,5}", text, re.ASCII) is None or int(text) > 32767:
        raise ConfigError(f"'{text}' is not a priority: use -1 (the kernel chooses) to 32767 (used first)")
    return int(text)


def _swapon_options(text: str) -> str:
    words = [word for word in (part.strip() for part in text.split(",")) if word]
    for word in words:
        if word.startswith("pri="):
            raise ConfigError(f"'{word}': use swap-priority = {word[4:]} instead")
        if word not in ("discard", "discard=once", "discard=pages", "defaults", "nofail", "noauto"):
            raise ConfigError(
                f"'{word}' is not an option of swapon: use discard, discard=once or discard=pages"
            )
    return ",".join(words)


def _attach(text: str) -> str:
    if text not in ("swap", "device", "no"):
        raise ConfigError(f"'{text}' is not a way to attach: use swap, device or no")
    return text


def _whole(low: int, high: int, unit: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) is None or not low <= int(text) <= high:
            raise ConfigError(f"'{text}' is out of range: use {low} to {high} {unit}")
        return int(text)

    return parse


def _fs_type(text: str) -> str:
    if text != "swap":
        raise ConfigError(
            f"'{text}' is not made by zramd: use attach = device, and mkfs in a unit of your own"
        )
    return text


def keys(ram: int) -> tuple[Setting, ...]:
    """Return the keys of a section that are not settings of the server; `ram` in megabytes."""

    def size(text: str) -> int:
        return expression.size(text, ram)

    def limit(text: str) -> int | None:
        return None if text == "none" else size(text)

    return (
        Setting(
            "zram-size", size, DEFAULT_SIZE, "ram / 4", "size of the device, an expression; 0: no device"
        ),
        Setting(
            "zram-resident-limit", size, "0", "ram / 8", "most memory that the pool may take, an expression"
        ),
        Setting("host-memory-limit", limit, "none", "8192", "no device where there is more memory than this"),
        Setting(
            "compression-algorithm", config.find("comp_algorithm").parse, "lz4", "lz4(level=4)", "compressor"
        ),
        Setting(
            "attach", _attach, "swap", "no", "what this machine's kernel does with it: swap, device or no"
        ),
        Setting("fs-type", _fs_type, "swap", "swap", "for zram-generator's sake: swap is all there is"),
        Setting("swap-priority", _priority, "100", "32767", "-1 to 32767, higher is used first"),
        Setting("options", _swapon_options, "discard", "discard", "options of swapon, comma-separated"),
        Setting("timeout", _whole(0, 86400, "seconds"), "0", "60", "seconds for an answer; 0: for ever"),
        Setting(
            "dead-conn-timeout",
            _whole(0, 86400, "seconds"),
            "30",
            "120",
            "seconds in which the server may be started again before requests fail; 0: none",
        ),
        Setting(
            "connections", _whole(1, 16, "connections"), "1", "2", "connections of the kernel to the server"
        ),
    )


def _add(sections: Sections, entries: list[Entry]) -> list[Problem]:
    """Put one file's entries over those of weaker files, and return what is wrong with them."""
    known = {setting.name for setting in keys(1)}
    problems: list[Problem] = []
    seen: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        where, section, key, value = entry
        try:
            if not section:
                raise ConfigError(_outside(key, value))
            config.find("name").parse(section)
            if key in REFUSED:
                raise ConfigError(f"{key} = {value}: {REFUSED[key]}")
            if key and key not in known:
                key = _find(key, known)
        except ConfigError as error:
            problems.append(Problem(where, section, str(error)))
            continue
        meaning = TWINS.get(key, key)
        first = seen.setdefault((section, meaning), entry)
        if key and first is not entry:
            text = f"{entry.key} = {value} is a second value: {first.key} = {first.value} is at {first.where}"
            problems.append(Problem(where, section, text))
            continue
        values = sections.setdefault(section, {})
        for twin in [old for old in values if TWINS.get(old, old) == meaning]:
            del values[twin]
        values[key] = entry
    return problems


def no_commands(key: str) -> str:
    """Return why zram-generator's set!VARIABLE is not honoured."""
    variable = key.removeprefix("set!")
    return f"zramd runs no commands: write the value where '{variable}' is used"


def _outside(key: str, value: str) -> str:
    if key.startswith("set!"):
        return f"{key} = {value}: {no_commands(key)}"
    return (
        f"{key} = {value} is before any section: write [zram0] above it"
        if key
        else "[] has no name: write [zram0]"
    )


def _find(key: str, known: set[str]) -> str:
    """Return the name of the setting that `key` means; raises ConfigError with the nearest of all keys."""
    from difflib import get_close_matches

    settings = {name: s.name for s in config.SETTINGS for name in (s.name, *s.aliases) if s.name != "name"}
    if key in settings:
        return settings[key]
    close = get_close_matches(key, [*known, *settings], n=1)
    hint = f"did you mean '{close[0]}'?" if close else "docs/zramd.conf has all keys"
    raise ConfigError(f"unknown key '{key}': {hint}")


def build(sections: Sections, ram: int) -> Configuration:
    """Return the devices that `sections` mean on a machine of `ram` megabytes."""
    found: list[Device] = []
    skipped: dict[str, str] = {}
    notes: list[str] = []
    problems: list[Problem] = []
    for name, values in sections.items():
        section = _Section(name, values, ram)
        section.read()
        problems += section.problems
        if section.skipped:
            skipped[name] = section.skipped
        elif not section.problems:
            found.append(section.device())
            notes += section.notes
    _check_folders(found, problems)
    wrong = {problem.section for problem in problems}
    devices = tuple(device for device in found if device.name not in wrong)
    return Configuration(devices, skipped, tuple(notes), tuple(problems), ())


def _check_folders(found: list[Device], problems: list[Problem]) -> None:
    folders: dict[str, str] = {}
    for device in found:
        if other := folders.get(device.rundir):
            text = f"rundir = {device.rundir} is also that of [{other}]: use another"
            where = device.where.get("rundir") or device.where[""]
            problems.append(Problem(where, device.name, text))
        folders[device.rundir] = device.name


class _Section:
    """Turns the values of one section into a device, a reason for none, or problems."""

    def __init__(self, name: str, values: dict[str, Entry], ram: int) -> None:
        self.name, self.values, self.ram = name, values, ram
        self.parsed: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.skipped = ""

    def read(self) -> None:
        for setting in (*keys(self.ram), *config.SETTINGS):
            entry = self.values.get(setting.name)
            text = entry.value if entry else setting.default
            try:
                self.parsed[setting.name] = None if text is None else setting.parse(text)
            except ConfigError as error:
                self.wrong(setting.name, str(error))
        if not self.problems:
            self.check()

    def wrong(self, key: str, text: str) -> None:
        entry = self.values.get(key)
        written = entry.key if entry else key  # an alias, perhaps
        self.problems.append(Problem(self.place(key), self.name, f"{written}: {text}"))

    def place(self, key: str) -> str:
        return (self.values.get(key) or self.values.get("") or Entry("default", "", "", "")).where

    def quote(self, key: str) -> str:
        entry = self.values.get(key)
        return f"{entry.key} = {entry.value}" if entry else f"{key} is not given"

    def check(self) -> None:
        """Look at values that depend on each other."""
        parsed, ram_bytes = self.parsed, self.ram * expression.MEGABYTE
        limit = parsed["host-memory-limit"]
        if limit is not None and limit < ram_bytes:
            self.skipped = (
                f"no device: {self.quote('host-memory-limit')} is less than the {self.ram} MB "
                f"that this machine has ({self.place('host-memory-limit')})"
            )
            return
        key = "disksize" if "disksize" in self.values else "zram-size"
        size = parsed[key]
        if key == "zram-size" and size == 0:
            self.skipped = f"no device: {self.quote(key)} is 0 here ({self.place(key)})"
            return
        try:
            self.parsed["disksize"] = size = config.find("disksize").parse(str(size))
        except ConfigError:
            self.wrong(key, f"'{self.values[key].value}' is {size} bytes: use at most 4T")
            return
        if size < expression.MEGABYTE:
            self.note(
                key, f"{self.quote(key)} is {size} bytes: if megabytes were meant, use zram-size or a unit"
            )
        if size > 32 * ram_bytes:
            self.note(
                key, f"{self.quote(key)} is {size // ram_bytes} times the memory: no compression reaches that"
            )
        self.check_attach()

    def check_attach(self) -> None:
        attach = self.parsed["attach"]
        if attach != "swap":
            for key in ("swap-priority", "options", "fs-type"):
                if key in self.values:
                    self.note(key, f"{self.quote(key)} has no effect with attach = {attach}")
        elif self.parsed["swap"] == "other" and "swap" in self.values:
            self.wrong(
                "swap", "'other' would let this machine's swap deadlock: use local, or attach = no or device"
            )
        elif "discard" not in re.split("[,=]", self.parsed["options"]):
            self.note(
                "options", f"{self.quote('options')}: without discard, memory of freed swap never comes back"
            )
        if attach == "no":
            for key in ("timeout", "dead-conn-timeout", "connections"):
                if key in self.values:
                    self.note(key, f"{self.quote(key)} has no effect with attach = no")

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{self.place(key)}: {text}")

    def device(self) -> Device:
        parsed = self.parsed
        pairs = {"name": self.name, "disksize": str(parsed["disksize"])}
        if parsed["attach"] == "swap":
            pairs["swap"] = "local"  # the machine that serves is the one that swaps
        for key, entry in self.values.items():
            if key == "zram-resident-limit":
                pairs["mem_limit"] = str(parsed[key])
            elif key == "compression-algorithm":
                pairs["comp_algorithm"] = parsed[key]
            elif (
                key in parsed
                and key != "disksize"
                and any(key == setting.name for setting in config.SETTINGS)
            ):
                pairs[key] = entry.value
        return Device(
            name=self.name,
            disksize=parsed["disksize"],
            pairs=tuple(pairs.items()),
            attach=parsed["attach"],
            swap_priority=parsed["swap-priority"],
            options=parsed["options"],
            timeout=parsed["timeout"],
            dead_conn_timeout=parsed["dead-conn-timeout"],
            connections=parsed["connections"],
            where={key: entry.where for key, entry in self.values.items()},
        )


def _other_notes(root: Path, configured: bool, devices: tuple[Device, ...]) -> list[str]:
    """Return what is to be said about other programs that make swap on zram."""
    others = (
        (
            "zram-generator",
            root / "usr/lib/systemd/system-generators/zram-generator",
            conffiles.find(root, GENERATOR_CONF),
            "ln -s /dev/null /etc/systemd/system-generators/zram-generator",
        ),
        (
            "zram-tools",
            root / "usr/sbin/zramswap",
            [root / ZRAMSWAP_CONF],
            "systemctl disable --now zramswap",
        ),
    )
    notes = []
    for program, path, files, off in others:
        if not any(file.exists() for file in files):
            continue
        if not configured:
            text = (
                f"zramd does not start what is configured for {program}: 'zramd config import' takes it over"
            )
            notes.append(f"{files[0]}: {text}")
        elif path.exists() and any(device.swaps for device in devices):
            notes.append(f"{files[0]}: {program} swaps to devices of its own as well: '{off}' turns it off")
    return notes
