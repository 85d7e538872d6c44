"""Numbers as a user writes them, in decimal digits: none in any other spelling that Python knows."""

import re

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
