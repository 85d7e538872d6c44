"""How the value of each setting is read: a text, as a user writes it, becomes what a Config has.

Each function takes a text and returns the value. The ConfigError is a sentence that quotes the text and
says what to write instead. zramd.settings.codecs and zramd.settings.network have those of theirs.
"""

import os
import re
from collections.abc import Callable
from typing import Any

from zramd.errors import ConfigError
from zramd.settings import amounts, network
from zramd.settings.amounts import parse_size

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


def boolean(text: str) -> bool:
    """Read on or off, in any of the words for it. Raises ConfigError."""
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ConfigError(f"'{text}' is neither on nor off: use one of them") from None


# ---- Words ------------------------------------------------------------------------------------------------


def _one_of(text: str, what: str, *words: str) -> str:
    if text.lower() not in words:
        raise ConfigError(f"'{text}' is not {what}: use {', '.join(words[:-1])} or {words[-1]}")
    return text.lower()


def pool_full(text: str) -> str:
    """Read the error that clients get when the pool is full. Raises ConfigError."""
    return _one_of(text, "an error number", "enospc", "eio")


def front(text: str) -> str:
    """Read how clients reach the device. Raises ConfigError."""
    return _one_of(text, "a front", "nbd", "ublk", "auto")


def thread_model(text: str) -> str:
    """Read how many threads a client has. Raises ConfigError."""
    return _one_of(text, "a thread model", "auto", "parallel", "serialize_requests")


def swap(text: str) -> str:
    """Read whose swap the device is. Raises ConfigError."""
    if text.lower() not in ("other", "local"):
        raise ConfigError(f"'{text}' is neither other nor local")
    return text.lower()


def name(text: str) -> str:
    """Read the name of a device. Raises ConfigError."""
    if _NAME.fullmatch(text) is None:
        raise ConfigError(
            f"'{text}' is not a name: use 1 to 64 letters, digits, _ . or -, not starting with . or -"
        )
    return text


# ---- Sizes, in bytes --------------------------------------------------------------------------------------


def _size(text: str, least: int, most: int, those: str) -> int:
    size = parse_size(text)
    if not least <= size <= most:
        raise ConfigError(f"'{text}' is out of range: use {those}")
    return size


def disksize(text: str) -> int:
    """Read the size of a device in bytes, rounded up to pages. Raises ConfigError."""
    return -(-_size(text, 1, MAX_DISKSIZE, "more than 0 and at most 4T") // PAGE_SIZE) * PAGE_SIZE


def step(text: str) -> int:
    """Read how many bytes compaction moves at a time. Raises ConfigError."""
    return _size(text, PAGE_SIZE, 1 << 30, "4K to 1G")


def reserve(text: str) -> int:
    """Read how many bytes are kept ready. Raises ConfigError."""
    return _size(text, 1 << 20, 1 << 30, "1M to 1G")


def budget(text: str) -> int:
    """Read how many bytes devices may take together; 0: no budget. Raises ConfigError."""
    size = parse_size(text)
    if 0 < size < PAGE_SIZE:
        raise ConfigError(f"'{text}' is less than one page: use 4K or more, or 0 for none")
    return size


def writeback_limit(text: str) -> int:
    """Read how many bytes may be written to the backing in a day; 0: no limit. Raises ConfigError."""
    if text.lower() == "off":
        return 0
    size = parse_size(text)
    if not size:  # to the kernel's zram that means: nothing
        raise ConfigError(
            f"'{text}' cannot be set: use off for no limit, 64K for an extent a day, or no backing to have "
            "nothing written"
        )
    if size < MIN_WRITEBACK_LIMIT:
        raise ConfigError(f"'{text}' is out of range: use 64K or more, or off for no limit")
    return size


SIZES = (parse_size, disksize, budget, step, reserve, writeback_limit)

# ---- Other numbers ----------------------------------------------------------------------------------------


def client_limit(text: str) -> int:
    """Read a number of connections. Raises ConfigError."""
    limit = amounts.whole(text, 1, MAX_CLIENTS)
    if limit is None:
        raise ConfigError(f"'{text}' is out of range: use 1 to {MAX_CLIENTS} connections")
    return limit


def _number(text: str, low: float, high: float, unit: str) -> float:
    found = amounts.number(text, low, high)
    if found is None:
        raise ConfigError(f"'{text}' is out of range: use {low:g} to {high:g} {unit}")
    return found


def percent(text: str) -> float:
    """Read a percentage, with or without its sign. Raises ConfigError."""
    return _number(text.removesuffix("%"), 0.1, 100, "percent")


def seconds(text: str) -> float:
    """Read the seconds between two looks at something. Raises ConfigError."""
    return _number(text, 0.01, 3600, "seconds")


def seconds_or_never(text: str) -> float:
    """Read such seconds; 0: never. Raises ConfigError."""
    return 0.0 if text == "0" else seconds(text)


def age(text: str) -> float:
    """Read the seconds for which nobody has asked for a block. Raises ConfigError."""
    found = amounts.duration(text, MIN_COLD_AGE, MAX_COLD_AGE)
    if found is None:
        raise ConfigError(
            f"'{text}' is out of range: use {MIN_COLD_AGE} seconds to {MAX_COLD_AGE // 3600} hours, "
            "such as 300, 5min or 1h"
        )
    return found


def idle(text: str) -> float:
    """Read the seconds after which a silent client is cut off; 0: never. Raises ConfigError."""
    low, high = network.MIN_IDLE, network.MAX_IDLE
    found = 0.0 if text == "0" else amounts.duration(text, low, high)
    if found is None:
        raise ConfigError(
            f"'{text}' is out of range: use {low} seconds to {high // 3600} hours, such as "
            "90s or 1h, or 0 for never"
        )
    return found


# ---- Paths: absolute, from the present folder; "" stays ---------------------------------------------------


def _absolute(text: str) -> str:
    found = f"/{os.path.abspath(text).lstrip('/')}"  # it would keep two slashes
    try:
        os.fsencode(found).decode()
    except UnicodeEncodeError:
        raise ConfigError(f"'{found}' is no path in this locale: set LC_ALL=C.UTF-8") from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"'{found}' is not UTF-8 text, as nbdkit's Python wants it: use another path"
        ) from None
    return found


def path(text: str) -> str:
    """Read the path of a file or a device. Raises ConfigError."""
    if "\0" in text:
        raise ConfigError(f"'{text}' is not a path")
    return _absolute(text) if text else ""


def backing(text: str) -> str:
    """Read where blocks go that leave memory; '' or none, as zram's backing_dev has it: nowhere.

    Raises ConfigError.
    """
    return "" if text == "none" else path(text)


def state(text: str) -> str:
    """Read where the state is: a path, or systemd. Raises ConfigError."""
    return text if text == "systemd" else path(text)


def rundir(text: str) -> str:
    """Read the path of a run folder. Raises ConfigError."""
    if not text or "\0" in text:
        raise ConfigError(f"'{text}' is not a folder")
    found = _absolute(text)
    if len(os.fsencode(found)) > MAX_RUNDIR_BYTES:
        raise ConfigError(f"'{text}' is too long for a socket's path: use at most {MAX_RUNDIR_BYTES} bytes")
    return found


def metrics_file(text: str) -> str:
    """Read the path of a file for node_exporter. Raises ConfigError."""
    if "\0" in text or text.endswith("/"):
        raise ConfigError(f"'{text}' is not a file: use a path that ends in .prom, as node_exporter expects")
    if text and not text.endswith(".prom"):
        raise ConfigError(f"'{text}' does not end in .prom: node_exporter would not look at it")
    return _absolute(text) if text else ""


def tls(text: str) -> str:
    """Read what a client needs, with the path of its keys or certificates. Raises ConfigError."""
    return network.tls_text(text, _absolute)


_PATHS = (backing, state, rundir, metrics_file, tls)


def is_path(parse: Callable[[str], Any]) -> bool:
    """Say whether what `parse` reads is a path, or has one in it, which it makes one from / on."""
    return parse in _PATHS


def is_relative(parse: Callable[[str], Any], text: str) -> bool:
    """Say whether `text`, which `parse` reads, has a path that depends on the present folder.

    Raises what `parse` does.
    """
    if not is_path(parse):
        return False
    given, found = ((value.partition(":")[2] if parse is tls else value) for value in (text, parse(text)))
    return found.startswith("/") and not given.startswith("/")
