"""Settings: one table feeds the plugin's keys, the launcher's help and docs/reference.md.

Read `SETTINGS`, then `parse`, which turns the `key=value` pairs of a command line into a `Config`.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from zramd.contract import rundir
from zramd.errors import ConfigError
from zramd.settings import amounts, codecs, network
from zramd.settings.amounts import parse_size as parse_size

PAGE_SIZE = 4096  # bytes
MAX_DISKSIZE = 4 << 40  # the core has the same: handles have 31 bits
MAX_CLIENTS = 65536
MIN_COLD_AGE = 10  # seconds: a sweep
MAX_COLD_AGE = 5 * 3600  # the oldest that a block's age can tell is some more
MIN_WRITEBACK_LIMIT = 64 << 10  # an extent: less would never be written
# sun_path holds 107 bytes and a NUL; control.sock is the longest socket name in the folder.
MAX_RUNDIR_BYTES = 107 - len("/control.sock")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_BOOLEANS = {"on": True, "yes": True, "true": True, "1": True}
_BOOLEANS |= {"off": False, "no": False, "false": False, "0": False}


def _disksize(text: str) -> int:
    size = -(-parse_size(text) // PAGE_SIZE) * PAGE_SIZE
    if not 0 < size <= MAX_DISKSIZE:
        raise ConfigError(f"'{text}' is out of range: use more than 0 and at most 4T")
    return size


def _step(text: str) -> int:
    size = parse_size(text)
    if not PAGE_SIZE <= size <= 1 << 30:
        raise ConfigError(f"'{text}' is out of range: use 4K to 1G")
    return size


def _reserve(text: str) -> int:
    size = parse_size(text)
    if not 1 << 20 <= size <= 1 << 30:
        raise ConfigError(f"'{text}' is out of range: use 1M to 1G")
    return size


def _client_limit(text: str) -> int:
    limit = amounts.whole(text, 1, MAX_CLIENTS)
    if limit is None:
        raise ConfigError(f"'{text}' is out of range: use 1 to {MAX_CLIENTS} connections")
    return limit


def _name(text: str) -> str:
    if _NAME.fullmatch(text) is None:
        raise ConfigError(
            f"'{text}' is not a name: use 1 to 64 letters, digits, _ . or -, not starting with . or -"
        )
    return text


def _absolute(text: str) -> str:
    path = os.path.abspath(text)
    try:
        os.fsencode(path).decode()
    except UnicodeEncodeError:
        raise ConfigError(f"'{path}' is no path in this locale: set LC_ALL=C.UTF-8") from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"'{path}' is not UTF-8 text, as nbdkit's Python wants it: use another path"
        ) from None
    return path


def _rundir(text: str) -> str:
    if not text or "\0" in text:
        raise ConfigError(f"'{text}' is not a folder")
    path = _absolute(text)
    if len(os.fsencode(path)) > MAX_RUNDIR_BYTES:
        raise ConfigError(f"'{text}' is too long for a socket's path: use at most {MAX_RUNDIR_BYTES} bytes")
    return path


def _metrics_file(text: str) -> str:
    if "\0" in text or text.endswith("/"):
        raise ConfigError(f"'{text}' is not a file: use a path that ends in .prom, as node_exporter expects")
    if text and not text.endswith(".prom"):
        raise ConfigError(f"'{text}' does not end in .prom: node_exporter would not look at it")
    return _absolute(text) if text else ""


def _state(text: str) -> str:
    if "\0" in text:
        raise ConfigError(f"'{text}' is not a path")
    return _absolute(text) if text and text != "systemd" else text


def _backing(text: str) -> str:
    if "\0" in text:
        raise ConfigError(f"'{text}' is not a path")
    return _absolute(text) if text else ""


def _writeback_limit(text: str) -> int:
    if text.lower() == "off":
        return 0
    size = parse_size(text)
    if 0 < size < MIN_WRITEBACK_LIMIT:
        raise ConfigError(f"'{text}' is out of range: use 64K or more, or off for no limit")
    return size


def _boolean(text: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ConfigError(f"'{text}' is neither on nor off: use one of them") from None


def _pool_full(text: str) -> str:
    if text.lower() not in ("enospc", "eio"):
        raise ConfigError(f"'{text}' is not an error number: use enospc or eio")
    return text.lower()


def _tls(text: str) -> str:
    return network.tls_text(text, _absolute)


def _idle(text: str) -> float:
    low, high = network.MIN_IDLE, network.MAX_IDLE
    seconds = 0.0 if text == "0" else amounts.duration(text, low, high)
    if seconds is None:
        raise ConfigError(
            f"'{text}' is out of range: use {low} seconds to {high // 3600} hours, such as "
            "90s or 1h, or 0 for never"
        )
    return seconds


def _swap(text: str) -> str:
    if text.lower() not in ("other", "local"):
        raise ConfigError(f"'{text}' is neither other nor local")
    return text.lower()


def _front(text: str) -> str:
    if text.lower() not in ("nbd", "ublk", "auto"):
        raise ConfigError(f"'{text}' is not a front: use nbd, ublk or auto")
    return text.lower()


def _thread_model(text: str) -> str:
    if text.lower() not in ("auto", "parallel", "serialize_requests"):
        raise ConfigError(f"'{text}' is not a thread model: use auto, parallel or serialize_requests")
    return text.lower()


def _number(text: str, low: float, high: float, unit: str) -> float:
    found = amounts.number(text, low, high)
    if found is None:
        raise ConfigError(f"'{text}' is out of range: use {low:g} to {high:g} {unit}")
    return found


def _percent(text: str) -> float:
    return _number(text.removesuffix("%"), 0.1, 100, "percent")


def _seconds(text: str) -> float:
    return _number(text, 0.01, 3600, "seconds")


def _age(text: str) -> float:
    seconds = amounts.duration(text, MIN_COLD_AGE, MAX_COLD_AGE)
    if seconds is None:
        raise ConfigError(
            f"'{text}' is out of range: use {MIN_COLD_AGE} seconds to {MAX_COLD_AGE // 3600} hours, "
            "such as 300, 5min or 1h"
        )
    return seconds


def _seconds_or_never(text: str) -> float:
    return 0.0 if text == "0" else _seconds(text)


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

    @property
    def is_size(self) -> bool:
        """Whether the value is a number of bytes."""
        return self.parse in (parse_size, _disksize, _step, _reserve, _writeback_limit)

    @property
    def default_text(self) -> str:
        """The default as documentation shows it."""
        return self.shown_default or self.default or ""


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "disksize",
        _disksize,
        None,
        "1G",
        "size of the device in bytes before compression, rounded up to 4096, at most 4T",
        aliases=("size",),
        shown_default="required",
        fixed="clients were told the size when they connected",
    ),
    Setting(
        "name",
        _name,
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
        parse_size,
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
        _rundir,
        None,
        "/run/zramd/swap0",
        "folder for the sockets and the statistics, closed to other users",
        shown_default="/run/zramd/NAME as root, else $XDG_RUNTIME_DIR/zramd/NAME",
        fixed="clients know the sockets in it",
    ),
    Setting(
        "state",
        _state,
        "",
        "/dev/shm/swap0.state",
        "file on a tmpfs that holds all data: the next server started with it carries on where this one "
        "ended, however it ended; systemd: in a service, let the service manager keep it",
        shown_default="none: the data ends with the server",
        fixed="the data is in it",
    ),
    Setting(
        "verify",
        _boolean,
        "off",
        "on",
        "store a checksum with each block and check it on each read: a block that changed in memory is an "
        "error (EIO), never wrong data",
        fixed="what is stored already has checksums or has none",
    ),
    Setting(
        "pool_full",
        _pool_full,
        "enospc",
        "eio",
        "error that clients get when the pool is full: enospc or eio",
        fixed="nbdkit reads it once, when it starts",
    ),
    Setting(
        "swap",
        _swap,
        "other",
        "local",
        "local: this machine's own kernel swaps to the device, so lock all memory and never wait for more; "
        "other: anyone else uses it",
        fixed="its measures are taken before the first client comes",
    ),
    Setting(
        "reserve",
        _reserve,
        "8M",
        "32M",
        "with swap=local: memory kept ready for pages to come, beside mem_limit, 1M to 1G",
        fixed="its memory is locked before the first client comes",
    ),
    Setting(
        "front",
        _front,
        "nbd",
        "auto",
        "how the device is reached: nbd: by any number of clients, on sockets of nbdkit's; ublk: by this "
        "machine's kernel alone, faster and without nbdkit, on Linux 6.0 or later; auto: ublk where root "
        "can have it and nothing of nbdkit's is asked for, else nbd",
        fixed="clients reach the device by it",
    ),
    Setting(
        "thread_model",
        _thread_model,
        "auto",
        "parallel",
        "serialize_requests: one thread for each client; parallel: several; auto: one, and several with "
        "backing, if nbdkit is 1.34 or later",
        fixed="nbdkit asks for it once, when it starts",
    ),
    Setting(
        "client_limit",
        _client_limit,
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
        _tls,
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
        _idle,
        "0",
        "1h",
        "over TCP: time after which a client that has asked for nothing is cut off, in "
        "seconds or with a unit "
        f"(s, min, h), from {network.MIN_IDLE} seconds to {network.MAX_IDLE // 3600} hours; 0: never",
    ),
    Setting(
        "handshake_limit",
        _client_limit,
        "32",
        "8",
        "over TCP: most connections in their handshake at once; others wait their turn for a moment, and are "
        "turned away",
    ),
    Setting("compaction", _boolean, "on", "off", "compact in the background"),
    Setting(
        "compaction_threshold",
        _percent,
        "2",
        "10",
        "percent of the pool's pages that must be freeable before background compaction starts",
    ),
    Setting(
        "compaction_near_limit",
        _percent,
        "90",
        "75",
        "percent of mem_limit, or of the budget, in use from which anything freeable is worth compacting",
    ),
    Setting("compaction_interval", _seconds, "1", "0.5", "seconds between checks whether to compact"),
    Setting(
        "compaction_step", _step, "64K", "256K", "bytes of objects moved before looking at other requests"
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
        _age,
        "5min",
        "1h",
        "time for which nobody has asked for a block before it is recompressed, in seconds or with a unit "
        f"(s, min, h), {MIN_COLD_AGE} seconds to {MAX_COLD_AGE // 3600} hours; less when memory is short",
    ),
    Setting(
        "backing",
        _backing,
        "",
        "/dev/sdb1",
        "block device, or preallocated file, to which blocks go that nobody has asked for in a long time",
        aliases=("writeback-device",),
        shown_default="none: all data stays in memory",
    ),
    Setting(
        "writeback_age",
        _age,
        "1h",
        "30min",
        "with backing: time for which nobody has asked for a block before it leaves memory, written as that "
        "of cold_age; less when memory is short",
    ),
    Setting(
        "writeback_limit",
        _writeback_limit,
        "1G",
        "10G",
        "with backing: most bytes that are written to it in a day, 64K or more, or off",
    ),
    Setting(
        "stats_interval",
        _seconds_or_never,
        "1",
        "10",
        "seconds between checks whether to write the stats files, which happens when a number has changed, "
        "and every 30 seconds; 0: no files",
    ),
    Setting(
        "metrics_file",
        _metrics_file,
        "",
        "/var/lib/prometheus/node-exporter/swap0.prom",
        "second metrics.prom, readable by all users, for node_exporter's textfile collector",
        shown_default="none",
        fixed="the file is made when the server starts",
    ),
    Setting(
        "endpoint",
        _boolean,
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
        return _rundir(f"/run/zramd/{name}")
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not base:
        raise ConfigError("no place for the run folder: set XDG_RUNTIME_DIR or give rundir=FOLDER")
    return _rundir(f"{base}/zramd/{name}")


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
    values: dict[str, Any] = {}
    for key, text in pairs:
        setting = find_once(key, text, given)
        values[setting.name] = value(setting, text)
    for setting in SETTINGS:
        if setting.name not in values and setting.default is not None:
            values[setting.name] = value(setting, setting.default)
    if "disksize" not in values:
        raise ConfigError("disksize is missing: give the size of the device, such as disksize=1G")
    values.setdefault("recompression", codecs.default_recompression(values["comp_algorithm"]))
    codecs.must_gain(values["comp_algorithm"], values["recompression"])
    if values["metrics_file"] and not values["stats_interval"]:
        raise ConfigError(
            f"metrics_file='{values['metrics_file']}' would never be written: stats_interval is 0, use 1"
        )
    if "rundir" not in values:
        values["rundir"] = default_rundir(values["name"])
    if values["front"] == "ublk" and (name := nbds_own(values)):
        raise ConfigError(f"{name}={written(values[name])} is for front=nbd: leave it out with front=ublk")
    if values["front"] == "ublk" and not values["endpoint"]:
        raise ConfigError("endpoint=off leaves no way to attach a device of front=ublk: use endpoint=on")
    network.check(values)
    refuse_floor(values)
    _refuse_own_names(values)
    return Config(**values)


def refuse_floor(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a floor that is more than the budget."""
    floor, budget = values["budget_floor"], values["budget"]
    if floor > budget > 0:
        raise ConfigError(f"budget_floor: {floor} bytes are more than the budget, {budget} bytes")


def nbds_own(values: Mapping[str, Any]) -> str:
    """Return a setting that means nothing but to front=nbd and is not as usual, '' if there is none."""
    for name in ("thread_model", "client_limit", *network.OF_NETWORK):
        if values[name] != find(name).parse(find(name).default or ""):
            return name
    return ""


def _refuse_own_names(values: dict[str, Any]) -> None:
    """Raise ConfigError for a file that the server itself makes, replaces and removes in its run folder."""
    for key in ("state", "backing", "metrics_file"):
        folder, name = os.path.split(values[key])
        if folder == values["rundir"] and name in rundir.NAMES:
            raise ConfigError(
                f"{key}='{values[key]}' is the name of a file of the server's own: use another name"
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


def written(value: object) -> str:
    """Return a setting's value as a user writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def help_text() -> str:
    """Return the table of all settings as the command line's help shows it."""
    width = max(len(setting.name) for setting in SETTINGS)
    lines = []
    for setting in SETTINGS:
        aliases = "".join(f" (also {alias}=)" for alias in setting.aliases)
        lines.append(f"  {setting.name:<{width}}  {setting.help}{aliases} [{setting.default_text}]\n")
    return "".join(lines)
