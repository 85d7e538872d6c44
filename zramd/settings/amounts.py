"""Numbers as a user writes them, in decimal digits: none in any other spelling that Python knows."""

import re

from zramd.errors import ConfigError

_SUFFIXES = "KMGTPE"
_SIZE = re.compile(r"(0x[0-9a-f]+|0[0-7]*|[1-9][0-9]*)(?:([KMGTPE])(?:i?B)?|B)?", re.IGNORECASE | re.ASCII)
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(rf"([0-9.]+) ?({'|'.join(_UNITS)})?", re.ASCII)


def whole(text: str, least: int, most: int) -> int | None:
    """Return a whole number, None if the text is none from `least` to `most`."""
    return int(text) if _WHOLE.fullmatch(text) and least <= int(text) <= most else None


def number(text: str, least: float, most: float) -> float | None:
    """Return a number, perhaps with a fraction, None if the text is none from `least` to `most`."""
    return float(text) if _NUMBER.fullmatch(text) and least <= float(text) <= most else None


def duration(text: str, least: float, most: float) -> float | None:
    """Return the seconds of 300, 90s, 5min, 1.5h or 1d; None: it is no time from `least` to `most`."""
    match = _DURATION.fullmatch(text)
    seconds = number(match[1], 0, most) if match else None
    if match is None or seconds is None:
        return None
    seconds *= _UNITS[match[2] or "s"]
    return seconds if least <= seconds <= most else None


def parse_size(text: str) -> int:
    """Return the bytes that `text` means, read as the kernel's memparse does.

    Decimal, 0x hexadecimal or 0 octal digits, then K M G T P or E in either case (1024-based), then
    optionally B or iB. Raises ConfigError when any other character is left.
    """
    match = _SIZE.fullmatch(text)
    if match is None or len(text) > 64:
        raise ConfigError(f"'{text}' is not a size: {_size_hint(text)}")
    digits, suffix = match.groups()
    if digits[:2].lower() == "0x":
        number = int(digits, 16)
    else:
        number = int(digits, 8 if digits.startswith("0") else 10)
    size = number << 10 * (_SUFFIXES.index(suffix.upper()) + 1) if suffix else number
    if size >= 1 << 64:
        raise ConfigError(f"'{text}' does not fit in 64 bits")
    return size


def _size_hint(text: str) -> str:
    """Return what a user may have meant by something that is no size."""
    if len(text) <= 64:
        close = "".join(text.split())
        if close != text and _SIZE.fullmatch(close):
            return f"write {close}"
        match = re.fullmatch(r"([0-9]*[.,][0-9]+)([KMGTPE])(?:i?B)?", close, re.IGNORECASE | re.ASCII)
        if match:
            power = _SUFFIXES.index(match[2].upper())
            whole = round(float(match[1].replace(",", ".")) * 1024)
            return f"write {whole}{('B' + _SUFFIXES)[power]}"
        if re.fullmatch(r"[0-9.]+%", close, re.ASCII):
            return (
                f"in zramd.conf write zram-size = ram * {close[:-1]} / 100, elsewhere a number such as 512M"
            )
    return "use a number with an optional K, M, G, T, P or E, such as 512M"
