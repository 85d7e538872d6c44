"""What `zramd tiers` prints, from what a server reports."""

from typing import Any

import pytest
from support.numbers import TIERS, WRITEBACK

from zramd.commands import tiers
from zramd.top.cells import ASCII, MONO, Glyphs


def stats(**changes: object) -> dict[str, Any]:
    return {"name": "zram0", "comp_algorithm": "lz4", "tiers": {**TIERS, **changes}}


def out(**changes: object) -> dict[str, Any]:
    """What the server of a device with a backing device tells."""
    return {**stats(), "writeback": {**WRITEBACK, **changes}}


def row(text: str, label: str) -> list[str]:
    """The words of the row that begins with a label, without its bar."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.strip().removeprefix(label).replace("█", " ").split("  ▏")[0].split()


@pytest.mark.parametrize("glyphs", [MONO, ASCII])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reason": "word " * 60},
        {
            "hot_pages": 0,
            "cold_pages": 0,
            "raw_pages": 0,
            "same_pages": 0,
            "hot_data_size": 0,
            "cold_data_size": 0,
        },
        {"hot_pages": 1 << 30, "hot_data_size": 1 << 42, "recompressed": 1 << 40, "saved_bytes": 1 << 50},
        {"ages": [[10, 0], [None, 1], ["idle", 1 << 30]]},
        {"mode": "off", "recompression": "off"},
        {"mode": "a word of another version"},
    ],
)
def test_it_fits_into_80_columns(glyphs: Glyphs, changes: dict[str, object]) -> None:
    text = tiers.report(stats(**changes), glyphs)
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii() or glyphs is MONO
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_what_is_where() -> None:
    text = tiers.report(stats(), ASCII)
    assert text.startswith("zram0: hot lz4, cold zstd(level=5) after 5 min: calm\n")
    assert row(text, "hot")[:6] == ["61234", "48", "%", "239.2M", "88M", "2.72"]
    assert row(text, "cold")[:6] == ["52210", "41", "%", "203.9M", "44M", "4.64"]
    assert row(text, "raw")[:6] == ["1203", "1", "%", "4.7M", "4.7M", "1.00"]
    assert row(text, "same")[:6] == ["14000", "11", "%", "54.7M", "0B", "-"]
    assert row(text, "all") == ["128647", "100", "%", "502.5M", "136.7M", "3.68"]


def test_the_ages_are_a_histogram() -> None:
    text = tiers.report(stats(ages=[[10, 1], [300, 60], [3600, 0], [None, 30], ["idle", 9]]), ASCII)
    bars = {label: row(text, label) for label in ("10 s", "5 min", "1 h", "longer ago", "marked idle")}
    assert {label: words[0] for label, words in bars.items()} == {
        **{"10 s": "1", "5 min": "60", "1 h": "0"},
        **{"longer ago": "30", "marked idle": "9"},
    }
    lengths = {label: words[-1].count("#") for label, words in bars.items()}
    assert lengths["1 h"] == 0, "nothing has no bar"
    assert lengths["10 s"] == 1, "something is seen"
    assert lengths["5 min"] == pytest.approx(2 * lengths["longer ago"], abs=1)


def test_what_was_done_and_why_not_more() -> None:
    text = tiers.report(stats(), ASCII)
    assert row(text, "made cold") == ["230", "53313", "27M", "saved,", "1311", "tried", "in", "vain"]
    assert row(text, "made hot")[:2] == ["12", "340"]
    assert row(text, "processor") == ["2.31", "s"]
    assert text.endswith("\nNot more now: nothing has been cold for long enough.\n")
    assert tiers.report(stats(mode="off"), ASCII).startswith("zram0: hot lz4, recompression is off\n")
    assert "after 5 min: memory is wanted\n" in tiers.report(stats(mode="wanted"), ASCII)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(10, "10 s"), (90, "90 s"), (300, "5 min"), (3600, "1 h"), (5400, "90 min"), (86400, "1 d"), (0, "0 s")],
)
def test_durations(seconds: int, shown: str) -> None:
    assert tiers.duration(seconds) == shown


@pytest.mark.parametrize("glyphs", [MONO, ASCII])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reason": "word " * 60, "mode": "full"},
        {"mode": "off", "out_pages": 0, "out_data_size": 0},
        {"writeback_limit": 0, "limit_left": None},
        {"bd_read_errors": 1 << 30, "bd_write_errors": 1 << 30},
        {"backing_bad": 1 << 50, "backing_size": 1 << 60, "backing_free": 1, "out_live_bytes": 1 << 55},
        {"bd_writes": 1 << 60, "reclaimed_bytes": 1 << 59, "written_out": 1 << 40, "writeback_age": 86399},
    ],
)
def test_what_is_out_fits_into_80_columns(glyphs: Glyphs, changes: dict[str, object]) -> None:
    text = tiers.report(out(**changes), glyphs)
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii() or glyphs is MONO
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_what_is_out() -> None:
    text = tiers.report(out(), ASCII)
    assert text.startswith(
        "zram0: hot lz4, cold zstd(level=5) after 5 min: calm\n"
        "       out to /dev/disk/by-partlabel/swap-out after 1 h: calm\n"
    )
    lines = [line for line in text.splitlines() if line.startswith("out")]
    assert lines[0].split()[1:6] == ["1200000", "90", "%", "4.6G", "1.2G"]
    assert row(text, "all") == ["1328647", "100", "%", "5.1G", "1.3G", "3.88"]
    assert row(text, "sent out") == ["4500", "1400000", "1.7G", "written,", "90M", "of", "it", "moved"]
    assert row(text, "came back")[:2] == ["7", "2300"]
    assert " ".join(row(text, "backing")) == "8G 2G in use, 63 % of that live, 128K given up"
    assert row(text, "a day") == ["1G", "700M", "may", "be", "written", "now"]
    assert "errors" not in text
    assert text.endswith(
        "\nNo more cold now: nothing has been cold for long enough.\n"
        "No more out now: nobody has left a whole extent of blocks alone for 1 h.\n"
    )


def test_a_backing_device_that_fails_or_has_no_limit() -> None:
    text = tiers.report(out(bd_read_errors=1, bd_write_errors=2, writeback_limit=0, limit_left=None), ASCII)
    assert row(text, "errors") == ["3", "1", "reads", "and", "2", "writes", "of", "it", "failed"]
    assert row(text, "a day") == ["no", "limit"]
    for left in (0, 2, (64 << 10) - 1):  # an extent is written, or nothing
        used_up = tiers.report(out(limit_left=left), ASCII)
        assert row(used_up, "a day") == ["1G", "nothing", "may", "be", "written", "now"]
    assert row(tiers.report(out(limit_left=64 << 10), ASCII), "a day")[:2] == ["1G", "64K"]
    assert "swap-out: off\n" in tiers.report(out(mode="off"), ASCII)
    assert "after 1 h: paused\n" in tiers.report(out(mode="paused"), ASCII)
    empty = tiers.report(out(backing_free=8 << 30, backing_bad=0, out_live_bytes=0), ASCII)
    assert row(empty, "backing") == ["8G", "0B", "in", "use"]


def test_a_path_cannot_write_on_the_terminal() -> None:
    assert "\x1b" not in tiers.report(out(backing="/dev/\x1b[2J"), MONO)


def test_without_a_backing_device_nothing_is_said_of_one() -> None:
    text = tiers.report(stats(), ASCII)
    for word in ("out", "backing", "a day", "came back"):
        assert not any(line.strip().startswith(word) for line in text.splitlines())
