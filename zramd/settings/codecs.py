"""Compression algorithms as users write them: zram's names, and a level as zram-generator has it."""

import re

from zramd.errors import ConfigError

MAX_LEVEL = 19  # of zstd: those above take more memory than a block can use
USUAL_LEVEL = 3  # zstd's own, where none is given
OFF = ("off", "no", "false", "0")
DEFAULT_RECOMPRESSION = "zstd(level=5)"

_ZSTD = re.compile(r"zstd\s*(?:\(\s*level\s*=\s*([0-9]{1,9})\s*\))?", re.ASCII)


def recompression(text: str) -> str:
    """Return the algorithm for what is cold, without blanks and leading zeros, or off. Raises ConfigError."""
    if text.lower() in OFF:
        return "off"
    match = _ZSTD.fullmatch(text)
    if match is None:
        raise ConfigError(f"'{text}' does not recompress: use zstd, zstd(level=N) or off")
    if match[1] is None:
        return "zstd"
    if not 1 <= int(match[1]) <= MAX_LEVEL:
        raise ConfigError(f"'{text}' is out of range: use zstd(level=N) with N from 1 to {MAX_LEVEL}")
    return f"zstd(level={int(match[1])})"


def cold_level(written: str) -> int:
    """Return the level that what `recompression` returned means, 0: none."""
    match = _ZSTD.fullmatch(written)
    return int(match[1] or USUAL_LEVEL) if match else 0
