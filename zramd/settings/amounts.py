"""Numbers as a user writes them, in decimal digits: none in any other spelling that Python knows."""

import re

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")


def whole(text: str, least: int, most: int) -> int | None:
    """Return a whole number, None if the text is none from `least` to `most`."""
    return int(text) if _WHOLE.fullmatch(text) and least <= int(text) <= most else None


def number(text: str, least: float, most: float) -> float | None:
    """Return a number, perhaps with a fraction, None if the text is none from `least` to `most`."""
    return float(text) if _NUMBER.fullmatch(text) and least <= float(text) <= most else None
