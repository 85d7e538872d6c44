"""zramd.settings.amounts: numbers as a user writes them, and no other spelling that Python knows."""

import pytest

from zramd.settings import amounts


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-1", -1), ("10", 10), ("007", 7)])
def test_whole(text: str, value: int) -> None:
    assert amounts.whole(text, -1, 10) == value


@pytest.mark.parametrize(
    "text", ["", "-2", "11", "1.0", "1_0", "+1", " 1", "1\n", "\u0661", "\u00b2", "1" * 30, "x"]
)
def test_no_whole(text: str) -> None:
    assert amounts.whole(text, -1, 10) is None


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("0.5", 0.5), (".5", 0.5), ("5.", 5), ("10", 10)])
def test_number(text: str, value: float) -> None:
    assert amounts.number(text, 0, 10) == value


@pytest.mark.parametrize(
    "text", ["", ".", "-1", "11", "1e0", "nan", "inf", "1_0", " 1", "1\n", "\u0661", "9" * 400]
)
def test_no_number(text: str) -> None:
    assert amounts.number(text, 0, 10) is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60), ("60s", 60), ("1min", 60), (".5 h", 1800), ("1h", 3600), ("1d", 86400)]
)
def test_duration(text: str, seconds: float) -> None:
    assert amounts.duration(text, 60, 86400) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "s", ".", "59", "0.9min", "1.1d", "1w", "5m", "1e2", "1  h", " 1h", "1h ", "-1h", "9" * 400 + "s"],
)
def test_no_duration(text: str) -> None:
    assert amounts.duration(text, 60, 86400) is None
