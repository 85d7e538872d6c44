"""Settings: one table feeds the plugin's keys, the launcher's help and docs/reference.md.

Read `SETTINGS`, then `parse`, which turns the `key=value` pairs of a command line into a `Config`.
How each text is read is in zramd.settings.values.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from zramd.contract import rundir
from zramd.errors import ConfigError
from zramd.settings import codecs, network, values
from zramd.settings.amounts import parse_size


class Setting(NamedTuple):
    """One setting: the name the user writes, how its value is read, and what is told about it."""

    name: str
    parse: Callable[[str], Any]
    default: str | None  # as a user would write it; None: required, or computed from others
    example: str
    help: str
    aliases: tuple[str, ...] = ()
    shown_default: str = ""  # what help and docs print where `default` cannot say it
    fixed: str = ""  # why it cannot be changed while the device is served; "": it can
    zero: str = ""  # the word for a value of 0, where that number is not to be written

    @property
    def is_size(self) -> bool:
        """Whether the value is a number of bytes."""
        return self.parse in values.SIZES

    @property
    def is_path(self) -> bool:
        """Whether its value is a path, or has one in it."""
        return values.is_path(self.parse)

    def parse_of_file(self, text: str) -> Any:
        """Return what `text` means in a configuration file, which is read from any folder.

        Raises ConfigError as `parse` does, and for a path that depends on that folder.
        """
        if values.is_relative(self.parse, text):
            raise ConfigError(
                f"'{text}' depends on the folder in which a command runs: write the whole path, from / on"
            )
        return self.parse(text)

    @property
    def default_text(self) -> str:
        """The default as documentation shows it."""
        return self.shown_default or self.default or ""


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "disksize",
        values.disksize,
        None,
        "1G",
        "size of the device in bytes before compression, rounded up to 4096, at most 4T",
        aliases=("size",),
        shown_default="required",
        fixed="clients were told the size when they connected",
    ),
    Setting(
        "name",
        values.name,
        "zram0",
        "swap0",
        "name of the device and of the NBD export",
        fixed="clients know the device by it",
    ),
    Setting(
        "mem_limit",
        parse_size,
        "0",
        "512M",
        "most bytes the pool may take; 0: no limit",
    ),
    Setting(
        "budget",
        values.budget,
        "0",
        "64G",
        "most bytes that the pools of all devices take together whose run folders lie in one folder and that "
        "have a budget; the last one counts; 0: the device has no part in it",
    ),
    Setting(
        "budget_floor",
        parse_size,
        "0",
        "1G",
        "with budget: bytes of it that are kept for this device, whatever others want",
        aliases=("budget-floor",),
        fixed="what is kept for the device is made sure of when it starts",
    ),
    Setting(
        "comp_algorithm",
        codecs.comp_algorithm,
        "lz4",
        "zstd(level=3)",
        "compressor of what is written: lz4, lz4hc, zstd or none, or one with a level: lz4(level=N) with N "
        "from 1 to 65537: higher is faster and compresses less; lz4hc(level=N), 3 to 9; zstd(level=N), 1 to "
        "19; a second one is recompression's",
        fixed="compressors are set up when the device is made",
    ),
    Setting(
        "rundir",
        values.rundir,
        None,
        "/run/zramd/swap0",
        "folder for the sockets and the statistics, closed to other users",
        shown_default="/run/zramd/NAME as root, else $XDG_RUNTIME_DIR/zramd/NAME",
        fixed="clients know the sockets in it",
    ),
    Setting(
        "state",
        values.state,
        "",
        "/dev/shm/swap0.state",
        "file on a tmpfs that holds all data: the next server started with it carries on where this one "
        "ended, however it ended; systemd: in a service, let the service manager keep it",
        shown_default="none: the data ends with the server",
        fixed="the data is in it",
    ),
    Setting(
        "verify",
        values.boolean,
        "off",
        "on",
        "store a checksum with each block and check it on each read: a block that changed in memory is an "
        "error (EIO), never wrong data",
        fixed="what is stored already has checksums or has none",
    ),
    Setting(
        "pool_full",
        values.pool_full,
        "enospc",
        "eio",
        "error that clients get when the pool is full: enospc or eio",
        fixed="nbdkit reads it once, when it starts",
    ),
    Setting(
        "swap",
        values.swap,
        "other",
        "local",
        "local: this machine's own kernel swaps to the device, so lock all memory and never wait for more; "
        "other: anyone else uses it",
        fixed="its measures are taken before the first client comes",
    ),
    Setting(
        "reserve",
        values.reserve,
        "8M",
        "32M",
        "with swap=local: memory kept ready for pages to come, beside mem_limit, 1M to 1G",
        fixed="its memory is locked before the first client comes",
    ),
    Setting(
        "front",
        values.front,
        "nbd",
        "auto",
        "how the device is reached: nbd: by any number of clients, on sockets of nbdkit's; ublk: by this "
        "machine's kernel alone, faster and without nbdkit, on Linux 6.0 or later; auto: ublk where root "
        "can have it and nothing of nbdkit's is asked for, else nbd",
        fixed="clients reach the device by it",
    ),
    Setting(
        "thread_model",
        values.thread_model,
        "auto",
        "parallel",
        "serialize_requests: one thread for each client; parallel: several; auto: one, and several with "
        "backing, if nbdkit is 1.34 or later",
        fixed="nbdkit asks for it once, when it starts",
    ),
    Setting(
        "client_limit",
        values.client_limit,
        "1000",
        "64",
        "most client connections at once, including those still being made; more are turned away",
    ),
    Setting(
        "listen",
        network.listen,
        "",
        "[::]:10809",
        "address to serve on, for other machines, instead of the unix socket: HOST:PORT, "
        "[IPV6]:PORT, or :PORT "
        f"for all addresses; without :PORT {network.PORT}",
        shown_default="none: the unix socket nbd.sock in rundir",
        fixed="clients come by it",
    ),
    Setting(
        "tls",
        values.tls,
        "",
        "psk:/etc/zramd/swap0.psk",
        "with listen: what a client needs. psk:FILE: a key of that file; x509:FOLDER: a "
        "certificate that the CA "
        "there has signed; off: nothing, for a network that is encrypted below",
        shown_default="none: then listen takes this machine's own addresses only",
        fixed="nbdkit reads it once, when it starts; a restart reads the files again",
    ),
    Setting(
        "clients",
        network.clients,
        "",
        "guest1,guest2",
        "with tls: names of those who may open the device, of keys or certificates (CN), with commas between",
        shown_default="everyone who has a key or certificate",
        fixed="the keys are chosen when the server starts",
    ),
    Setting(
        "client_idle",
        values.idle,
        "0",
        "1h",
        "over TCP: time after which a client that has asked for nothing is cut off, in "
        "seconds or with a unit "
        f"(s, min, h), from {network.MIN_IDLE} seconds to {network.MAX_IDLE // 3600} hours; 0: never",
    ),
    Setting(
        "handshake_limit",
        values.client_limit,
        "32",
        "8",
        "over TCP: most connections in their handshake at once; others wait their turn for a moment, and are "
        "turned away",
    ),
    Setting("compaction", values.boolean, "on", "off", "compact in the background"),
    Setting(
        "compaction_threshold",
        values.percent,
        "2",
        "10",
        "percent of the pool's pages that must be freeable before background compaction starts",
    ),
    Setting(
        "compaction_near_limit",
        values.percent,
        "90",
        "75",
        "percent of mem_limit, or of the budget, in use from which anything freeable is worth compacting",
    ),
    Setting("compaction_interval", values.seconds, "1", "0.5", "seconds between checks whether to compact"),
    Setting(
        "compaction_step",
        values.step,
        "64K",
        "256K",
        "bytes of objects moved before looking at other requests",
    ),
    Setting(
        "recompression",
        codecs.recompression,
        None,
        "zstd(level=3)",
        "how blocks are compressed again once nobody asks for them: zstd, zstd(level=N) with N from 1 to "
        f"{codecs.LEVELS[codecs.COLD][1]} [{codecs.LEVELS[codecs.COLD][2]}], or off",
        shown_default=f"{codecs.DEFAULT_RECOMPRESSION}; off with comp_algorithm=zstd or none",
    ),
    Setting(
        "cold_age",
        values.age,
        "5min",
        "1h",
        "time for which nobody has asked for a block before it is recompressed, in seconds or with a unit "
        f"(s, min, h), {values.MIN_COLD_AGE} seconds to {values.MAX_COLD_AGE // 3600} hours; less when "
        "memory is short",
    ),
    Setting(
        "backing",
        values.backing,
        "",
        "/dev/sdb1",
        "block device, or preallocated file, to which blocks go that nobody has asked for in a long time",
        aliases=("writeback-device",),
        shown_default="none: all data stays in memory",
    ),
    Setting(
        "writeback_age",
        values.age,
        "1h",
        "30min",
        "with backing: time for which nobody has asked for a block before it leaves memory, written as that "
        "of cold_age; less when memory is short",
    ),
    Setting(
        "writeback_limit",
        values.writeback_limit,
        "1G",
        "10G",
        "with backing: most bytes that are written to it in a day, 64K or more, or off",
        zero="off",
    ),
    Setting(
        "stats_interval",
        values.seconds_or_never,
        "1",
        "10",
        "seconds between checks whether to write the stats files, which happens when a number has changed, "
        "and every 30 seconds; 0: no files",
    ),
    Setting(
        "metrics_file",
        values.metrics_file,
        "",
        "/var/lib/prometheus/node-exporter/swap0.prom",
        "second metrics.prom, readable by all users, for node_exporter's textfile collector",
        shown_default="none",
        fixed="the file is made when the server starts",
    ),
    Setting(
        "endpoint",
        values.boolean,
        "on",
        "off",
        "answer HTTP on control.sock in rundir",
        fixed="other settings are changed through it",
    ),
)

_BY_KEY = {key: setting for setting in SETTINGS for key in (setting.name, *setting.aliases)}


class Config(NamedTuple):
    """Every setting, checked; sizes in bytes, times in seconds, shares in percent.

    (No dataclass: importing that takes a server a megabyte and a half.)

    writeback_limit: 0 for none. listen, tls and clients as zramd.settings.network reads them.
    """

    disksize: int
    name: str
    mem_limit: int
    budget: int
    budget_floor: int
    comp_algorithm: str
    rundir: str
    state: str
    verify: bool
    pool_full: str
    swap: str
    reserve: int
    front: str
    thread_model: str
    client_limit: int
    listen: str
    tls: str
    clients: str
    client_idle: float
    handshake_limit: int
    compaction: bool
    compaction_threshold: float
    compaction_near_limit: float
    compaction_interval: float
    compaction_step: int
    recompression: str
    cold_age: float
    backing: str
    writeback_age: float
    writeback_limit: int
    stats_interval: float
    metrics_file: str
    endpoint: bool

    @property
    def codec(self) -> codecs.Codec:
        """The algorithm of what is written, and its level."""
        return codecs.parse(self.comp_algorithm)

    @property
    def cold_level(self) -> int:
        """zstd's level for what is cold, 0: nothing is recompressed."""
        return codecs.cold_level(self.recompression)


def default_rundir(name: str) -> str:
    """Return the folder for device `name` when none is given.

    Raises ConfigError for an ordinary user without XDG_RUNTIME_DIR.
    """
    if os.geteuid() == 0:
        return values.rundir(f"/run/zramd/{name}")
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not base:
        raise ConfigError("no place for the run folder: set XDG_RUNTIME_DIR or give rundir=FOLDER")
    return values.rundir(f"{base}/zramd/{name}")


def find(key: str) -> Setting:
    """Return the setting that `key` (a name or an alias) means; raises ConfigError if there is none."""
    try:
        return _BY_KEY[key]
    except KeyError:
        pass
    from difflib import get_close_matches  # only here: it costs the daemon memory for nothing

    close = get_close_matches(key, _BY_KEY, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(s.name for s in SETTINGS)}"
    raise ConfigError(f"unknown setting '{key}': {hint}")


def parse(pairs: Iterable[tuple[str, str]]) -> Config:
    """Return the Config that the pairs mean, defaults filled in.

    Raises ConfigError, one sentence that quotes the culprit, for an unknown key, a value that cannot be
    used, a second value for one setting (also through an alias), or a missing disksize.
    """
    given: dict[str, str] = {}
    found: dict[str, Any] = {}
    for key, text in pairs:
        setting = find_once(key, text, given)
        found[setting.name] = value(setting, text)
    for setting in SETTINGS:
        if setting.name not in found and setting.default is not None:
            found[setting.name] = value(setting, setting.default)
    if "disksize" not in found:
        raise ConfigError("disksize is missing: give the size of the device, such as disksize=1G")
    found.setdefault("recompression", codecs.default_recompression(found["comp_algorithm"]))
    codecs.must_gain(found["comp_algorithm"], found["recompression"])
    if found["metrics_file"] and not found["stats_interval"]:
        raise ConfigError(
            f"metrics_file='{found['metrics_file']}' would never be written: stats_interval is 0, use 1"
        )
    if "rundir" not in found:
        found["rundir"] = default_rundir(found["name"])
    if found["front"] == "ublk" and (name := nbds_own(found)):
        text = written(name, found[name])
        raise ConfigError(f"{name}={text} is for front=nbd: leave it out with front=ublk")
    if found["front"] == "ublk" and not found["endpoint"]:
        raise ConfigError("endpoint=off leaves no way to attach a device of front=ublk: use endpoint=on")
    network.check(found)
    refuse_floor(found)
    _refuse_own_names(found)
    return Config(**found)


def refuse_floor(found: Mapping[str, Any]) -> None:
    """Raise ConfigError for a floor that is more than the budget."""
    floor, budget = found["budget_floor"], found["budget"]
    if floor > budget > 0:
        raise ConfigError(f"budget_floor: {floor} bytes are more than the budget, {budget} bytes")


def nbds_own(found: Mapping[str, Any]) -> str:
    """Return a setting that means nothing but to front=nbd and is not as usual, '' if there is none."""
    for name in ("thread_model", "client_limit", *network.OF_NETWORK):
        if found[name] != find(name).parse(find(name).default or ""):
            return name
    return ""


def _refuse_own_names(found: dict[str, Any]) -> None:
    """Raise ConfigError for a file that the server itself makes, replaces and removes in its run folder."""
    for key in ("state", "backing", "metrics_file"):
        folder, name = os.path.split(found[key])
        if folder == found["rundir"] and name in rundir.NAMES:
            raise ConfigError(
                f"{key}='{found[key]}' is the name of a file of the server's own: use another name"
            )


def find_once(key: str, text: str, given: dict[str, str]) -> Setting:
    """Return the setting that a key names, and note its text in `given`, by the setting's name.

    Raises ConfigError for an unknown key, and for a second value of one setting.
    """
    setting = find(key)
    if setting.name in given:
        raise ConfigError(
            f"{key}='{text}' is a second value: {setting.name} is already '{given[setting.name]}'"
        )
    given[setting.name] = text
    return setting


def value(setting: Setting, text: str) -> Any:
    """Return what `text` means as the value of a setting; raises ConfigError."""
    try:
        return setting.parse(text)
    except ConfigError as error:
        raise ConfigError(f"{setting.name}: {error}") from None


def written(name: str, value: object) -> str:
    """Return the value of setting `name` as a user writes it, and as `parse` takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    setting = _BY_KEY.get(name)
    if setting is not None and setting.zero and value == 0:
        return setting.zero
    return f"{value:g}" if isinstance(value, float) else str(value)


def help_text() -> str:
    """Return the table of all settings as the command line's help shows it."""
    width = max(len(setting.name) for setting in SETTINGS)
    lines = []
    for setting in SETTINGS:
        aliases = "".join(f" (also {alias}=)" for alias in setting.aliases)
        lines.append(f"  {setting.name:<{width}}  {setting.help}{aliases} [{setting.default_text}]\n")
    return "".join(lines)
