"""How scripts/pictures makes a picture of a terminal's screen."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pyte
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "lib"))

from pictures import samples, screen, svg
from pictures.svg import CELL_HEIGHT, CELL_WIDTH, DARK, LIGHT, MARGIN, Theme
from support.samples import sample

from zramd.control.samples import Histogram, rates

TOP = svg.BAR + MARGIN - CELL_HEIGHT // 2
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
NAMESPACE = "{http://www.w3.org/2000/svg}"


def drawn(text: str, theme: Theme = DARK) -> ElementTree.Element:
    """The picture of a screen of 40x3 that shows a text with its escape sequences."""
    shown = pyte.Screen(40, 3)
    pyte.Stream(shown).feed(text)
    return ElementTree.fromstring(svg.picture(shown, theme, "a <title>", "a & b"))


def words(picture: ElementTree.Element) -> list[tuple[str | None, int, int, str | None]]:
    """Each text of the screen: its words, column, row, and length."""
    return [
        (
            text.text,
            (int(text.attrib["x"]) - MARGIN) // CELL_WIDTH,
            (int(text.attrib["y"]) - TOP) // CELL_HEIGHT,
            text.get("textLength"),
        )
        for text in picture.iter(f"{NAMESPACE}text")
        if "class" in text.attrib
    ]


def boxes(picture: ElementTree.Element) -> list[tuple[str, list[float]]]:
    """Each box of the screen: its colour, and x, y, width, height from the screen's corner."""
    (shapes,) = picture.iter(f"{NAMESPACE}g")
    return [
        (path.attrib["fill"], [float(x) - MARGIN, float(y) - TOP, float(width), float(height)])
        for path in shapes
        for x, y, width, height in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-\3z", path.attrib["d"])
    ]


class TestWords:
    def test_each_phrase_has_its_place_and_length(self) -> None:
        text = "stored at  once\r\n   x    y\r\n    end"
        assert words(drawn(text)) == [
            ("stored at", 0, 0, "90"),
            ("once", 11, 0, "40"),
            ("x", 3, 1, None),
            ("y", 8, 1, None),
            ("end", 4, 2, "30"),
        ]

    @pytest.mark.parametrize("gap", range(1, 8))
    def test_any_gap(self, gap: int) -> None:
        found = words(drawn("ab" + " " * gap + "cd"))
        assert found[-1][0] == ("ab cd" if gap == 1 else "cd")
        assert found[-1][1] == (0 if gap == 1 else 2 + gap)

    def test_marks_are_escaped(self) -> None:
        picture = drawn("a<b>&c")
        assert words(picture)[0][0] == "a<b>&c"
        assert picture[0].text == "a <title>"
        assert picture[1].text == "a & b"

    def test_looks(self) -> None:
        picture = drawn("plain\x1b[1;38;5;220mbold\x1b[0m")
        plain, bold = (text.attrib["class"] for text in picture.iter(f"{NAMESPACE}text") if text.get("class"))
        rules = dict(re.findall(r"\.(\w+)\{([^}]*)\}", picture.findtext(f"{NAMESPACE}style") or ""))
        assert rules[plain] == f"fill:{DARK.words}"
        assert rules[bold] == "fill:#ffd700;font-weight:bold"

    def test_any_number_of_looks(self) -> None:
        picture = drawn("".join(f"\x1b[38;5;{colour}mw" for colour in range(17, 117)))
        rules = dict(re.findall(r"\.(c\d+)\{fill:(#\w{6})\}", picture.findtext(f"{NAMESPACE}style") or ""))
        looks = [text.attrib["class"] for text in picture.iter(f"{NAMESPACE}text") if text.get("class")]
        assert len(looks) == 100
        assert set(looks) == set(rules)
        assert len({*rules.values()}) == len(rules) > 50

    def test_reverse(self) -> None:
        picture = drawn("\x1b[7mkey\x1b[0m")
        assert boxes(picture) == [(DARK.words, [0, 0, 3 * CELL_WIDTH, CELL_HEIGHT])]
        assert f"fill:{DARK.background}" in (picture.findtext(f"{NAMESPACE}style") or "")


class TestShapes:
    def test_neighbours_are_one_box(self) -> None:
        picture = drawn("\x1b[38;5;75m███▌\x1b[0m x")
        assert boxes(picture) == [
            ("#5fafff", [0, 0, 3 * CELL_WIDTH, CELL_HEIGHT]),
            ("#5fafff", [3 * CELL_WIDTH, 0, CELL_WIDTH / 2, CELL_HEIGHT]),
        ]
        assert words(picture) == [("x", 5, 0, None)]

    def test_columns_stand_on_the_ground(self) -> None:
        found = boxes(drawn("\r\n▂▂█"))
        assert [box for _, box in found] == [
            [0, 2 * CELL_HEIGHT - 5, 2 * CELL_WIDTH, 5],
            [2 * CELL_WIDTH, CELL_HEIGHT, CELL_WIDTH, CELL_HEIGHT],
        ]

    @pytest.mark.parametrize("mark", "┃┊■")
    def test_marks_do_not_join(self, mark: str) -> None:
        one, two = boxes(drawn(mark)), boxes(drawn(mark * 2))
        assert one
        assert len(two) == 2 * len(one)
        assert all(width <= CELL_WIDTH for _, (_, _, width, _) in two)

    def test_all_of_a_colour_screen_are_known(self) -> None:
        from zramd.top.cells import COLOUR

        glyphs = {*"".join(COLOUR)} - {" "}
        assert {glyph for glyph in glyphs if 0x2500 <= ord(glyph) < 0x2600} == set(svg.SHAPES)


class TestColours:
    def test_contrast(self) -> None:
        assert svg.contrast("#000000", "#ffffff") == pytest.approx(21)
        assert svg.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)

    @pytest.mark.parametrize("theme", [LIGHT, DARK])
    def test_words_can_be_read(self, theme: Theme) -> None:
        for colour in ("#ffffff", "#000000", "#5faf5f", "#d7af5f", "#8a8a8a", "#5f0087", theme.background):
            shown = svg.readable(colour, theme.background)
            assert svg.contrast(shown, theme.background) >= svg.CONTRAST
            if svg.contrast(colour, theme.background) >= svg.CONTRAST:
                assert shown == colour

    def test_what_is_not_read_keeps_its_colour(self) -> None:
        assert "fill:#626262}" in (drawn("\x1b[38;5;241m···\x1b[0m").findtext(f"{NAMESPACE}style") or "")


class TestScreen:
    def test_size_status_and_what_is_shown(self) -> None:
        shown, status = screen.run(["sh", "-c", "stty size; exit 3"], ENVIRONMENT, 70, 20)
        assert shown.display[0].strip() == "20 70"
        assert status == 3

    def test_ends_what_does_not_end_by_itself(self) -> None:
        shown, status = screen.run(
            ["sh", "-c", "echo ready; exec sleep 600"],
            ENVIRONMENT,
            70,
            20,
            until=lambda seen: "ready" in seen.display[0],
        )
        assert shown.display[0].strip() == "ready"
        assert status != 0


def test_record(tmp_path: Path) -> None:
    """What is written is read again; the last two samples in whole, of the others what histories need."""
    buckets = {"read": Histogram((1.0, float("inf")), (3, 4))}
    taken = [
        sample(uptime=10.0 + second, reads=100 * second)._replace(latencies=buckets) for second in range(4)
    ]
    path = tmp_path / "top.jsonl"
    samples.write(path, taken)
    found = list(samples.read(path))
    assert found[-2:] == [
        one._replace(stats={name: value for name, value in one.stats.items() if name != "latency"})
        for one in taken[-2:]
    ]
    for old, new in ((0, 1), (1, 2)):
        assert rates(found[old], found[new]).per_second == rates(taken[old], taken[new]).per_second
