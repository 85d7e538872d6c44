"""What zram's files take and show of recompression and of writing back: the words of recompress, idle,
recomp_algorithm, writeback, writeback_limit and writeback_limit_enable.

A word that is unknown, doubled, without a value or out of range is refused, and nothing is done. (The kernel
took an unknown type for none until 7.1, and recompressed the whole device.)
"""

import os
import re
import select
import time
from typing import Protocol

from zramd.errors import UsageError, printable
from zramd.server.ages import SWEEP
from zramd.server.tiers import Pass
from zramd.server.withoutbacking import WritePass
from zramd.settings import amounts, codecs
from zramd.settings.values import MAX_COLD_AGE

HOT = tuple(codecs.LEVELS)
COLD = (codecs.COLD,)
TYPES = {
    "idle": frozenset(("idle",)),
    "huge": frozenset(("huge",)),
    "huge_idle": frozenset(("huge", "idle")),
}
WRITE_TYPES = {**TYPES, "incompressible": frozenset(("incompressible",))}
MAX_THRESHOLD = 4096  # bytes: a raw block has as many, and none has more
MAX_PAGES = 1 << 30  # blocks of the largest device
MAX_IDLE = 1e12  # seconds: any time
PRIORITY = 1  # the only one: zram has three algorithms to recompress by, zramd one
PIECE = 64 << 10  # bytes of block_state that are made at a time
_RECOMPRESS = ("type", "threshold", "max_pages", "algo", "priority")
_ALGORITHM = ("algo", "priority")
_WRITEBACK = ("type", "page_index", "page_indexes")
MAX_LEFT = 1 << 40  # blocks of what is left of writeback_limit: 4 PiB


class Source(Protocol):
    """What block_state is made of: see Device.block_state."""

    @property
    def disksize(self) -> int: ...
    def block_state(self, buf: bytearray, first: int, now: int, sweep: int) -> tuple[int, int]: ...


def recompress(text: str) -> Pass:
    """Return what `recompress` is to do. Without a word that is all blocks, as the kernel has it.

    Raises UsageError for anything else than: type=, threshold=, max_pages=, algo=, priority=, in any order.
    """
    found = _pairs(text, _RECOMPRESS)
    _check_algorithm(found)
    kinds: frozenset[str] = frozenset()
    if "type" in found:
        kinds = _choice("type", found["type"], TYPES)
    threshold = _number("threshold", found.get("threshold", "0"), 0, MAX_THRESHOLD)
    pages = _number("max_pages", found["max_pages"], 1, MAX_PAGES) if "max_pages" in found else 0
    return Pass(kinds, threshold, pages)


def idle(text: str) -> float | None:
    """Return for how many seconds nobody has asked for the blocks that `idle` is to mark; None: all blocks.

    Raises UsageError for anything else than `all`, seconds, or, which is ours, a time with a unit; and for
    one that no block's age can tell, for else younger blocks would be marked.
    """
    if text == "all":
        return None
    seconds = amounts.duration(text, 0, MAX_IDLE)
    if seconds is None:
        raise UsageError(f"'{printable(text)}' is not an age: use all, or a time such as 300, 5min or 1h")
    if seconds > MAX_COLD_AGE:
        raise UsageError(
            f"'{printable(text)}' is too long: of a block that nobody asked for in "
            f"{MAX_COLD_AGE // 3600} hours its age tells no more"
        )
    return seconds


def recompression(text: str, now: str) -> str:
    """Return the setting `recompression` that a text for recomp_algorithm means; `now` is how it is.

    zram's is algo=zstd priority=1: the level stays what it is, for zram has another file for that. Anything
    else is the setting itself, such as zstd(level=5), and not looked at here. Raises UsageError.
    """
    if not any(word.partition("=")[0] in _ALGORITHM for word in text.split()):
        return text
    found = _pairs(text, _ALGORITHM)
    if "algo" not in found:
        raise UsageError("no algorithm is named: write it as in 'algo=zstd priority=1'")
    _check_algorithm(found)
    return now if now.partition("(")[0] == found["algo"] else found["algo"]


def writeback(text: str, blocks: int) -> WritePass:
    """Return what `writeback` is to do on a device of so many blocks.

    Raises UsageError for anything else than one type=, or page_index= and page_indexes=FIRST-LAST, as many as
    one likes. A type may stand alone, without its key, as kernels before 6.16 have it.
    """
    if text.strip() in WRITE_TYPES:
        return WritePass(WRITE_TYPES[text.strip()])
    found = _words(text, _WRITEBACK, several=_WRITEBACK[1:])
    if not found:
        raise UsageError("nothing is named to write back: write it as in 'type=idle', or 'page_indexes=0-99'")
    if "type" not in dict(found):
        return WritePass(frozenset(), tuple(_range(key, value, blocks) for key, value in found))
    if len(found) > 1:
        raise UsageError("type= and numbers of blocks exclude each other: ask for one, then for the other")
    return WritePass(_choice("type", found[0][1], WRITE_TYPES))


def writeback_limit(text: str) -> int:
    """Return the bytes that `writeback_limit` is to leave, from blocks of 4096. Raises UsageError."""
    return _number("writeback_limit", text, 0, MAX_LEFT) << 12


def writeback_limit_enable(text: str) -> bool:
    """Return whether there is to be a limit. Raises UsageError for anything else than 0 and 1."""
    return bool(_number("writeback_limit_enable", text, 0, 1))


def bring_back(text: str) -> None:
    """Raise UsageError for any word: everything comes back, and nobody is to believe that it is less."""
    if text:
        raise UsageError(f"'{printable(text)}' is too much: everything is brought back that is out")


def shown(names: tuple[str, ...], chosen: str) -> str:
    """Return the line in which zram shows algorithms: the one that is used in brackets."""
    return "".join(f"[{name}] " if name == chosen else f"{name} " for name in names) + "\n"


def comp_algorithm(setting: str) -> str:
    """Return zram's comp_algorithm for the setting of that name, such as zstd(level=3)."""
    return shown(HOT, setting.partition("(")[0])


def recomp_algorithm(setting: str) -> str:
    """Return zram's recomp_algorithm for the setting `recompression`: nothing when that is off."""
    name = setting.partition("(")[0]
    return f"#{PRIORITY}: {shown(COLD, name)}" if name in COLD else ""


def send_block_state(device: Source, fd: int, patience: float) -> None:
    """Write zram's block_state to a descriptor, piece by piece; `patience`: seconds in which nothing moves.

    The time of an access is one of the clock since boot, as in the kernel. Raises OSError, TimeoutError.
    """
    piece = bytearray(PIECE)
    view = memoryview(piece)
    now = int(time.clock_gettime(time.CLOCK_BOOTTIME))
    block, blocks = 0, device.disksize >> 12
    while block < blocks:
        written, block = device.block_state(piece, block, now, int(SWEEP))
        _send(fd, view[:written], patience)


def _send(fd: int, data: memoryview, patience: float) -> None:
    """Write all of it, whether the descriptor waits for its reader or not. Raises OSError, TimeoutError."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        if not poll.poll(patience * 1000):
            raise TimeoutError("nobody takes what is sent")
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            continue


def _pairs(text: str, known: tuple[str, ...]) -> dict[str, str]:
    """Return the values of words key=value. Raises UsageError for one that is unknown, doubled, or empty."""
    return dict(_words(text, known))


def _words(text: str, known: tuple[str, ...], several: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Return keys and values in their order; those of `several` may come again. Raises as _pairs does."""
    found: list[tuple[str, str]] = []
    for word in re.findall(r"[^ \t\r\n]+", text):
        key, _, value = word.partition("=")
        if key not in known:
            raise UsageError(f"unknown word '{printable(word)}': {_usable(word, known)}")
        if not value:
            raise UsageError(f"'{printable(word)}' has no value: write it as in {_EXAMPLES[key]}")
        if key not in several and key in dict(found):
            raise UsageError(f"'{key}' is given twice: once is enough")
        found.append((key, value))
    return found


_EXAMPLES = {
    "type": "type=idle",
    "threshold": "threshold=300",
    "max_pages": "max_pages=10000",
    "algo": "algo=zstd",
    "priority": "priority=1",
    "page_index": "page_index=42",
    "page_indexes": "page_indexes=0-99",
}


def _usable(word: str, known: tuple[str, ...]) -> str:
    if word in (WRITE_TYPES if "page_index" in known else TYPES) and "type" in known:
        return f"did you mean 'type={word}'?"
    return f"use some of {', '.join(f'{key}=' for key in known)}"


def _choice(key: str, value: str, choices: dict[str, frozenset[str]]) -> frozenset[str]:
    if value not in choices:
        raise UsageError(f"unknown {key} '{printable(value)}': use one of {', '.join(choices)}")
    return choices[value]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(key: str, text: str, least: int, most: int) -> int:
    """Return a decimal number. Raises UsageError for anything else, and for one out of range."""
    if not _is_number(text) or len(text) > 19 or not least <= int(text) <= most:
        raise UsageError(f"{key} cannot be '{printable(text)}': use a whole number from {least} to {most}")
    return int(text)


def _range(key: str, text: str, blocks: int) -> tuple[int, int]:
    """Return the first block that is named, and the one after the last. Raises UsageError."""
    first, dash, last = text.partition("-") if key == "page_indexes" else (text, "-", text)
    if not dash:
        raise UsageError(f"{key} cannot be '{printable(text)}': write it as in {_EXAMPLES[key]}")
    begin, end = (_number(key, number, 0, blocks - 1) for number in (first, last))
    if begin > end:
        raise UsageError(f"{key} cannot be '{text}': the lower number comes first, as in {key}={end}-{begin}")
    return begin, end + 1


def _check_algorithm(found: dict[str, str]) -> None:
    """Raise UsageError when words name another algorithm, or priority, than there is."""
    algo = found.get("algo", COLD[0])
    if algo not in COLD:
        raise UsageError(f"no algorithm '{printable(algo)}' recompresses: use {' or '.join(COLD)}")
    if "priority" in found and (
        not _is_number(found["priority"]) or found["priority"].lstrip("0") != str(PRIORITY)
    ):
        raise UsageError(
            f"priority cannot be '{printable(found['priority'])}': there is one algorithm to recompress by, "
            f"with priority {PRIORITY}"
        )
