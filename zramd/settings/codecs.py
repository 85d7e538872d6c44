"""Compression algorithms as users write them: zram's names, a level in parentheses as zram-generator has it.

What is written is compressed by the one of comp_algorithm, what is cold again by the one of recompression.
"""

import re
from typing import NamedTuple

from zramd.errors import ConfigError

# Each algorithm's levels: the first, the last, and that of whoever gives none. The core has the same.
LEVELS = {"lz4": (1, 65537, 1), "lz4hc": (3, 9, 9), "zstd": (1, 19, 3), "none": (0, 0, 0)}
COLD = "zstd"  # the one that recompresses
OFF = ("off", "no", "false", "0")
AVAILABLE = "lz4, lz4hc, zstd or none, or one with a level, such as zstd(level=3)"
# Of memory pages, level 3 leaves 0.647 of lz4's pool, 4 0.638 and 5 0.633, at 16, 20 and 28 us a block.
DEFAULT_RECOMPRESSION = "zstd(level=4)"

_WORD = re.compile(r"([^()\s]+)\s*(?:\(\s*level\s*=\s*([0-9]{1,9})\s*\))?", re.ASCII)
# A name with its parameters, parameters alone, or what is neither.
_WORDS = re.compile(r"[^\s()]*\([^()]*\)|[^\s()]+|[()]")


class Codec(NamedTuple):
    """An algorithm at a level of its own; for lz4 that is its acceleration."""

    name: str
    level: int


def parse(text: str) -> Codec:
    """Return what one algorithm, such as lz4 or zstd(level=3), means. Raises ConfigError."""
    match = _WORD.fullmatch(text)
    if match is None and len(words(text)) > 1 and all(word[-1] not in "(" for word in words(text)):
        raise ConfigError(
            f"'{text}' is more than one algorithm: use comp_algorithm for what is written and recompression "
            "for what is cold"
        )
    if match is None or match[1] not in LEVELS:
        raise ConfigError(f"'{text}' is not available: use {AVAILABLE}")
    first, last, usual = LEVELS[match[1]]
    level = int(match[2]) if match[2] else usual
    if match[2] and not last:
        raise ConfigError(f"'{text}' is not available: {match[1]} has no level")
    if first <= level <= last:
        return Codec(match[1], level)
    raise ConfigError(f"'{text}' is out of range: use {match[1]}(level=N) with N from {first} to {last}")


def comp_algorithm(text: str) -> str:
    """Return one algorithm as `parse` reads it, without blanks and leading zeros; raises ConfigError."""
    codec = parse(text)
    return f"{codec.name}(level={codec.level})" if "(" in text else codec.name


def recompression(text: str) -> str:
    """Return the algorithm for what is cold, as `comp_algorithm` does, or "off"; raises ConfigError."""
    if text.lower() in OFF:
        return "off"
    match = _WORD.fullmatch(text)
    if match is None or match[1] != COLD:
        raise ConfigError(f"'{text}' does not recompress: use {COLD}, {COLD}(level=N) or off")
    return comp_algorithm(text)


def cold_level(written: str) -> int:
    """Return the level that what `recompression` returned means, 0: none."""
    return 0 if written == "off" else parse(written).level


def default_recompression(written: str) -> str:
    """Return the recompression of whoever gives none, beside a comp_algorithm."""
    return DEFAULT_RECOMPRESSION if parse(written).name in ("lz4", "lz4hc") else "off"


def must_gain(hot: str, cold: str) -> None:
    """Raise ConfigError for a recompression that makes nothing smaller than the comp_algorithm did."""
    written = parse(hot)
    if written.name == COLD and 0 < cold_level(cold) <= written.level:
        raise ConfigError(
            f"recompression='{cold}' makes nothing smaller than comp_algorithm='{hot}' did: "
            "use a higher level, or off"
        )


def words(text: str) -> list[str]:
    """Return the algorithms of a list such as `lz4 zstd(level=3) (type=idle)`, each with its parameters."""
    return _WORDS.findall(text)


class Pair(NamedTuple):
    """What zram-generator's compression-algorithm means: both as they are written, "" for none."""

    comp_algorithm: str
    recompression: str


def pair(text: str) -> Pair:
    """Return what zram-generator's list means: the first compresses, the second recompresses what is idle.

    Raises ConfigError for what zramd does not do.
    """
    found = words(text)
    names = [word for word in found if not word.startswith("(")]
    for word in found:
        if word.startswith("(") and not is_idle(word):
            raise ConfigError(
                f"'{word}' is not available: zramd recompresses what is idle, (type=idle), by itself"
            )
    if not names:
        raise ConfigError(f"'{text}' names no algorithm: use {AVAILABLE}")
    if len(names) > 2:
        raise ConfigError(f"'{text}' is more than two algorithms: zramd recompresses by {COLD} alone")
    made = Pair(comp_algorithm(names[0]), recompression(names[1]) if len(names) > 1 else "")
    if made.recompression:
        must_gain(*made)
    return made


def is_idle(word: str) -> bool:
    """Whether a word of such a list asks for what zramd does: to recompress what is idle."""
    return "".join(word.split()) == "(type=idle)"
