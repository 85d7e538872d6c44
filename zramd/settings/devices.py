"""Configured devices: what /etc/zramd.conf and its drop-ins say.

    configuration = devices.load()          # every device, and everything that is wrong
    device = devices.find("zram0")          # one device, or an exception that says why not
    device.pairs, device.words()            # the server's settings, for config.parse and `zramd serve`

Each section is a device, but [zramd], which has what all devices share. A device's keys are zram-generator's,
zramd's settings under their own names, and what the kernel gets when it attaches the device;
`zramd.settings.keys` has those that are not settings.
docs/zramd.conf teaches all.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zramd import meminfo
from zramd.contract import handover, rundir
from zramd.errors import ConfigError, ZramdError, reason
from zramd.settings import codecs, conffiles, config, expression, keys, network
from zramd.settings.conffiles import Entry, Problem
from zramd.settings.config import Config

CONF = "zramd.conf"
HOST = "zramd"  # the section of what all devices share; no device of zramd.conf can be called so
_SHARED = ("budget",)  # the keys there: settings of each server, unless its section has another value
GENERATOR_CONF = "systemd/zram-generator.conf"
ZRAMSWAP_CONF = "etc/default/zramswap"

Sections = dict[str, dict[str, Entry]]  # name → key → its value; the key '' is the section's head


class SkippedError(ConfigError):
    """The device is configured, but not for this machine; the message says why."""


@dataclass(frozen=True)
class ConfiguredDevice:
    """A configured device; sizes in bytes, times in seconds."""

    name: str
    disksize: int
    pairs: tuple[tuple[str, str], ...]  # the server's settings, for config.parse
    attach: str  # swap: the kernel attaches it and swaps onto it; device: attaches it; no: neither
    swap_priority: int
    swap_areas: int | None  # into which it is divided; None: by its size
    options: str  # swapon's, comma-separated
    timeout: int | None  # after which a request of a lost connection is sent again; None: as attach has it
    dead_conn_timeout: int  # for which requests wait for another server
    connections: int
    # Keys of `pairs` that all devices share: they are for root's servers alone.
    shared: frozenset[str] = frozenset()
    # Where each value was given, FILE:LINE, by its key (no alias); '' is the section's head.
    where: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def rundir(self) -> str:
        """The folder of its sockets and statistics, as root's server has it."""
        folder: str = config.find("rundir").parse(dict(self.pairs).get("rundir", f"/run/zramd/{self.name}"))
        return folder

    def settings(self) -> Config:
        """Return the server's settings, defaults filled in."""
        return config.parse([*(pair for pair in self.pairs if pair[0] != "rundir"), ("rundir", self.rundir)])

    def words(self, others: Iterable[str] = ()) -> list[str]:
        """Return key=value words for `zramd serve`; the key=value words `others` override the configured.

        What all devices share is left out where this process is not root, or has another run folder. Raises
        ConfigError for a key that is no setting.
        """
        words = list(others)
        given = {config.find(key).name: value for key, _, value in (word.partition("=") for word in words)}
        ours = set(given)
        if not is_roots((dict(self.pairs) | given).get("rundir")):
            ours |= self.shared
        return [*(f"{key}={value}" for key, value in self.pairs if key not in ours), *words]

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

    devices: tuple[ConfiguredDevice, ...]  # without those that have problems
    skipped: dict[str, str]  # name of a section that makes no device here → why
    notes: tuple[str, ...]  # one sentence each, with what to do
    problems: tuple[Problem, ...]
    files: tuple[str, ...]  # that count, the weakest first
    rundirs: dict[str, str]  # of all sections, right or wrong: rundir, '' where it is not given
    shared: dict[str, str] = field(default_factory=dict)  # what [zramd] gives to each server

    def has(self, name: str) -> bool:
        """Whether there is a section of this name, be it right or wrong."""
        return name in self.rundirs or any(problem.section == name for problem in self.problems)

    def is_empty(self) -> bool:
        """Whether nothing is there that could be meant: no section, and no error outside of one."""
        return not self.rundirs and not self.problems

    def find(self, name: str) -> ConfiguredDevice:
        """Return the device `name`. Raises SkippedError, and ConfigError if it is wrong or not there."""
        name = name.removeprefix("/dev/")
        config.find("name").parse(name)
        for problem in self.problems:
            if problem.section in ("", name):
                raise ConfigError(str(problem))
        for device in self.devices:
            if device.name == name:
                return device
        if name in self.skipped:
            raise SkippedError(f"{name}: {self.skipped[name]}")
        known = ", ".join(device.name for device in self.devices) or "none"
        wrong = sorted({problem.section for problem in self.problems})
        known += f"; with errors: {', '.join(wrong)}" if wrong else ""
        known += f"; not on this machine: {', '.join(self.skipped)}" if self.skipped else ""
        where = ", ".join(self.files) or f"/etc/{CONF}"
        raise ConfigError(f"there is no device '{name}' in {where}: add a section [{name}] (there: {known})")


def find(name: str, root: str | None = None) -> ConfiguredDevice:
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
        if not file:
            conffiles.refuse_untrusted(path)
        entries, wrong = conffiles.read(path)
        # What is wrong with what all devices share stops all.
        problems += [
            problem._replace(section="") if problem.section == HOST else problem for problem in wrong
        ]
        problems += _add(sections, entries)
    result = build(sections, total_ram(folder), problems)
    notes = [*result.notes, *([] if file else _other_notes(folder, bool(paths), result.devices))]
    files = tuple(str(path) for path in paths)
    return replace(result, notes=tuple(notes), files=files)


def total_ram(root: Path) -> int:
    """Return the machine's memory in whole megabytes, as root/proc/meminfo has it, else /proc/meminfo.

    Raises ZramdError.
    """
    path = root / "proc/meminfo"
    try:
        memory = meminfo.read("MemTotal", str(path) if path.exists() else meminfo.PATH)
    except OSError as error:
        raise ZramdError(f"{path}: {reason(error)}") from None
    if memory is None:
        raise ZramdError(f"{path}: it has no line 'MemTotal: … kB'")
    return memory >> 20


def _add(sections: Sections, entries: list[Entry]) -> list[Problem]:
    """Put one file's entries over those of weaker files, and return what is wrong with them."""
    problems: list[Problem] = []
    seen: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        where, section, key, value = entry
        try:
            if not section:
                raise ConfigError(_outside(key, value))
            config.find("name").parse(section)
            if section == HOST and key and key not in _SHARED:
                raise ConfigError(
                    f"{key} = {value}: [{HOST}] is for what all devices share ({', '.join(_SHARED)}): give a "
                    "device another name"
                )
            if key in keys.REFUSED:
                raise ConfigError(f"{key} = {value}: {keys.REFUSED[key]}")
            if key:
                key = keys.canonical(key)
        except ConfigError as error:
            problems.append(Problem(where, "" if section == HOST else section, str(error)))
            continue
        meaning = keys.TWINS.get(key, key)
        first = seen.setdefault((section, meaning), entry)
        if key and first is not entry:
            text = f"{entry.key} = {value} is a second value: {first.key} = {first.value} is at {first.where}"
            problems.append(Problem(where, "" if section == HOST else section, text))
            continue
        values = sections.setdefault(section, {})
        for twin in [old for old in values if keys.TWINS.get(old, old) == meaning]:
            del values[twin]
        values[key] = entry
    return problems


def _outside(key: str, value: str) -> str:
    if key.startswith("set!"):
        return f"{key} = {value}: {keys.no_commands(key)}"
    return (
        f"{key} = {value} is before any section: write [zram0] above it"
        if key
        else "[] has no name: write [zram0]"
    )


def build(sections: Sections, ram: int, known: Iterable[Problem] = ()) -> Configuration:
    """Return the devices that `sections` mean on a machine of `ram` megabytes.

    `known` problems are in the result, too. A section with a problem makes no device; a problem outside of
    sections leaves none.
    """
    found: list[ConfiguredDevice] = []
    skipped: dict[str, str] = {}
    rundirs: dict[str, str] = {}
    notes: list[str] = []
    problems = list(known)
    shared = _shared(sections.get(HOST, {}), problems)
    for name, values in sections.items():
        if name == HOST:
            continue
        section = _Section(name, values, ram, shared)
        section.read()
        problems += section.problems
        rundirs[name] = section.parsed.get("rundir") or ""
        if section.skipped:
            skipped[name] = section.skipped
        elif not section.problems:
            found.append(section.device())
            notes += section.notes
    _check_paths(found, problems)
    _check_addresses(found, problems)
    _check_floors(found, problems)
    wrong = {problem.section for problem in problems}
    devices = tuple(device for device in found if wrong.isdisjoint(("", device.name)))
    return Configuration(devices, skipped, tuple(notes), tuple(problems), (), rundirs, shared)


def _shared(values: dict[str, Entry], problems: list[Problem]) -> dict[str, str]:
    """Return what all servers are given; what is wrong there is as wrong as what is outside of sections."""
    found = {}
    for key, entry in values.items():
        if key:
            try:
                config.find(key).parse(entry.value)
                found[key] = entry.value
            except ConfigError as error:
                problems.append(Problem(entry.where, "", f"{key}: {error}"))
    return found


def is_roots(folder: str | None) -> bool:
    """Say whether a server with this run folder, None for the usual one, is given what all devices share."""
    return os.geteuid() == 0 and (folder is None or os.path.dirname(os.path.abspath(folder)) == rundir.ROOTS)


def shared() -> dict[str, str]:
    """Return what [zramd] gives each of root's servers.

    Raises ConfigError for what is wrong there, or outside of every section: it may be meant; ZramdError.
    """
    if not conffiles.are_there(CONF):
        return {}
    configuration = load()
    for problem in configuration.problems:
        if not problem.section:
            raise ConfigError(str(problem))
    return configuration.shared


def _check_paths(found: list[ConfiguredDevice], problems: list[Problem]) -> None:
    """Two devices cannot have one folder or file, by whatever path they name it."""
    owners: dict[str, tuple[str, str]] = {}  # real path → section and key that have it
    for device in found:
        settings = device.settings()
        paths = [(key, getattr(settings, key)) for key in ("rundir", "state", "backing", "metrics_file")]
        paths += [("rundir", f"{settings.rundir}/{name}") for name in rundir.NAMES]
        for key, path in paths:
            if not path or path == handover.SYSTEMD:
                continue
            owner, its_key = owners.setdefault(os.path.realpath(path), (device.name, key))
            if (owner, its_key) != (device.name, key):
                value = getattr(settings, key)
                text = f"{key} = {value} is also {its_key} of [{owner}]: use another"
                if owner != device.name and key == its_key:
                    text = f"{key} = {value} is also that of [{owner}]: use another"
                problems.append(Problem(device.where.get(key) or device.where[""], device.name, text))
                break


def _check_addresses(found: list[ConfiguredDevice], problems: list[Problem]) -> None:
    """Two devices cannot listen on one port of one address; all addresses of a machine are each of them."""
    taken: dict[int, dict[str, str]] = {}  # port → host → section
    for device in found:
        listen = device.settings().listen
        if not listen:
            continue
        where = network.address(listen)
        host, hosts = where.host.lower(), taken.setdefault(where.port, {})
        owner = next((owner for other, owner in hosts.items() if other == host or not (other and host)), None)
        if owner is not None:
            text = f"listen = {listen}: [{owner}] listens on port {where.port} there: use another port"
            problems.append(Problem(device.where["listen"], device.name, text))
        hosts.setdefault(host, device.name)


def _check_floors(found: list[ConfiguredDevice], problems: list[Problem]) -> None:
    """What is kept for the devices that share a budget must fit into it."""
    kept = 0
    for device in found:
        settings = device.settings()
        if "budget" not in device.shared or not settings.budget_floor:
            continue
        kept += settings.budget_floor
        if kept > settings.budget:
            text = (
                f"budget_floor = {settings.budget_floor}: with those above {_amount(kept)} are kept, and the "
                f"budget has {_amount(settings.budget)}: lower a budget_floor, or raise the budget"
            )
            problems.append(Problem(device.where["budget_floor"], device.name, text))


def _amount(size: int) -> str:
    return f"{size} bytes" if size < 1 << 64 else f"{size / expression.MEGABYTE:g} megabytes"


class _Section:
    """Turns the values of one section into a device, a reason for none, or problems."""

    def __init__(self, name: str, values: dict[str, Entry], ram: int, shared: dict[str, str]) -> None:
        self.name, self.values, self.ram, self.shared = name, values, ram, shared
        self.parsed: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.skipped = ""

    def read(self) -> None:
        for setting in (*keys.table(self.ram), *config.SETTINGS):
            entry = self.values.get(setting.name)
            text = entry.value if entry else setting.default
            try:
                self.parsed[setting.name] = None if text is None else setting.parse_of_file(text)
            except ConfigError as error:
                self.wrong(setting.name, str(error))
        folder = self.parsed.get("rundir")
        if folder is not None and os.path.dirname(folder) != rundir.ROOTS:
            self.shared = {}  # those are of one folder
        for key in self.shared:
            if key not in self.values:
                self.parsed[key] = config.find(key).parse(self.shared[key])
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
            self.wrong(key, f"'{self.values[key].value}' is {_amount(size)}: use at most 4T")
            return
        limit = parsed["zram-resident-limit"]
        try:
            config.find("mem_limit").parse(str(limit))
        except ConfigError:
            self.wrong(
                "zram-resident-limit",
                f"'{self.values['zram-resident-limit'].value}' is {_amount(limit)}: use less",
            )
        self.check_small(key, size)
        self.check_small("zram-resident-limit", limit)
        self.check_small("mem_limit", parsed["mem_limit"])
        if size > 32 * ram_bytes:
            self.note(
                key, f"{self.quote(key)} is {size // ram_bytes} times the memory: no compression reaches that"
            )
        elif self.parsed["attach"] == "swap" and 2 * size > ram_bytes:
            self.note(
                key,
                f"{self.quote(key)} is more than half of this machine's {self.ram} MB: at its limit the OOM "
                "killer may end more programs than it must, see docs/swapping.md: use at most ram / 2",
            )
        self.check_algorithms()
        self.check_attach()
        self.check_front()
        self.check_network()
        try:
            config.refuse_floor(parsed)
        except ConfigError as error:
            self.wrong("budget_floor", str(error).partition(": ")[2])
        if parsed["budget_floor"] and not parsed["budget"]:
            self.note("budget_floor", f"{self.quote('budget_floor')} has no effect without budget")
        for key in ("writeback_age", "writeback_limit"):
            if key in self.values and not parsed["backing"]:
                self.note(key, f"{self.quote(key)} has no effect without backing")

    def check_front(self) -> None:
        if self.parsed["front"] != "ublk":
            return
        if name := config.nbds_own(self.parsed):
            self.wrong(name, "is for front = nbd: leave it out with front = ublk")
        if not self.parsed["endpoint"]:
            self.wrong("endpoint", "off leaves no way to attach a device of front = ublk: use on")

    def check_network(self) -> None:
        if self.parsed["listen"] and self.parsed["attach"] != "no":
            text = "this machine's kernel comes by a socket, and there is none then: add attach = no"
            self.wrong("listen", text)
            return
        try:
            network.check(self.parsed)
        except ConfigError as error:
            key = "listen" if self.parsed["listen"] else "tls" if self.parsed["tls"] else "clients"
            self.problems.append(Problem(self.place(key), self.name, str(error)))

    def check_algorithms(self) -> None:
        pair = self.parsed["compression-algorithm"]
        hot = self.parsed["comp_algorithm"] if "comp_algorithm" in self.values else pair.comp_algorithm
        if "recompression" not in self.values:
            return
        if pair.recompression:
            self.wrong("recompression", f"{self.quote('compression-algorithm')} has one already: remove one")
            return
        try:
            codecs.must_gain(hot, self.parsed["recompression"])
        except ConfigError as error:
            self.wrong("recompression", str(error))

    def check_small(self, key: str, size: int) -> None:
        """Look whether a size of less than a megabyte was meant in another unit."""
        if key not in self.values or not 0 < size < expression.MEGABYTE:
            return
        text = self.values[key].value
        if key not in ("zram-size", "zram-resident-limit"):
            self.note(
                key, f"{self.quote(key)} is {size} bytes: if megabytes were meant, use zram-size or a unit"
            )
        elif expression.is_number(text):
            self.note(key, f"{self.quote(key)} is {size} bytes: for a share of the memory write ram * {text}")
        else:
            self.note(key, f"{self.quote(key)} is {size} bytes: a number without a unit is megabytes")

    def check_attach(self) -> None:
        attach, areas = self.parsed["attach"], self.parsed["swap-areas"] or 1
        if attach == "swap" and areas > 1 and self.parsed["swap-priority"] < areas - 1:
            self.wrong(
                "swap-areas",
                f"{areas} areas need swap-priority = {areas - 1} or more, because the first one has the "
                f"highest, and {self.quote('swap-priority')}",
            )
        if attach != "swap":
            for key in ("swap-priority", "swap-areas", "options", "fs-type"):
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

    def device(self) -> ConfiguredDevice:
        parsed = self.parsed
        pairs = {"name": self.name, "disksize": str(parsed["disksize"])}
        shared = {key: value for key, value in self.shared.items() if key not in self.values}
        pairs |= shared
        if parsed["attach"] == "swap":
            pairs["swap"] = "local"  # the machine that serves is the one that swaps
        for key, entry in self.values.items():
            if key == "zram-resident-limit":
                pairs["mem_limit"] = str(parsed[key])
            elif key == "compression-algorithm":
                pairs |= {name: value for name, value in parsed[key]._asdict().items() if value}
            elif (
                key in parsed
                and key != "disksize"
                and any(key == setting.name for setting in config.SETTINGS)
            ):
                pairs[key] = entry.value
        return ConfiguredDevice(
            name=self.name,
            disksize=parsed["disksize"],
            pairs=tuple(pairs.items()),
            attach=parsed["attach"],
            swap_priority=parsed["swap-priority"],
            swap_areas=parsed["swap-areas"],
            options=parsed["options"],
            timeout=parsed["timeout"],
            dead_conn_timeout=parsed["dead-conn-timeout"],
            connections=parsed["connections"],
            shared=frozenset(shared),
            where={key: entry.where for key, entry in self.values.items()},
        )


def _other_notes(root: Path, configured: bool, devices: tuple[ConfiguredDevice, ...]) -> list[str]:
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
