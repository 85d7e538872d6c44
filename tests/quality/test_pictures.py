"""The pictures of `zramd top` in the README are what the present program draws of tests/quality/top.jsonl.

How that was recorded, and how it is drawn: scripts/pictures --help, scripts/pictures/top.py.
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from pictures import samples, top

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
NAMES = ["top-light.svg", "top-dark.svg"]


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    """The pictures as they are drawn now."""
    return top.pictures()


def test_pictures_show_what_top_draws(drawn: dict[str, str]) -> None:
    assert list(drawn) == NAMES
    stale = [name for name, picture in drawn.items() if (PICTURES / name).read_text() != picture]
    if stale:
        pytest.fail(
            f"zramd top draws something else than docs/pictures/{', '.join(stale)}: "
            "run scripts/pictures, and look at what it has drawn",
            pytrace=False,
        )


def test_another_number_is_another_picture(drawn: dict[str, str], tmp_path: Path) -> None:
    *taken, last = samples.read(top.RECORD)
    record = tmp_path / "top.jsonl"
    samples.write(record, [*taken, last._replace(stats=last.stats | {"name": "other7"})])
    for name, picture in top.pictures(record).items():
        assert ">other7<" in picture
        assert picture != drawn[name]


@pytest.mark.parametrize("name", NAMES)
def test_picture_stands_alone(name: str) -> None:
    """It is small, says what it shows to who cannot see it, and asks for nothing from elsewhere."""
    text = (PICTURES / name).read_text()
    assert len(text.encode()) < 40_000
    picture = ElementTree.fromstring(text)
    kinds = [element.tag.rpartition("}")[2] for element in picture.iter()]
    assert set(kinds) == {"svg", "title", "desc", "style", "rect", "path", "circle", "g", "text"}
    assert kinds[1:3] == ["title", "desc"]
    assert picture[0].text == "zramd top"
    assert "stored in" in (picture[1].text or "")
    assert picture.attrib["role"] == "img"
    assert {picture[0].attrib["id"], picture[1].attrib["id"]} == set(
        picture.attrib["aria-labelledby"].split()
    )
    assert text.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    assert "url(" not in text
    looks = {element.attrib["class"] for element in picture.iter() if "class" in element.attrib}
    assert looks == set(re.findall(r"\.([^.{}]*)\{fill:#", text))


def test_all_panels_have_something_to_show() -> None:
    """A record in which nothing happens would make a picture of nothing."""
    shown = top.draw(top.RECORD).display
    rows = {row.split()[0]: row for row in shown if row.strip()}
    for word in ("read", "write", "trim", "compact"):
        assert rows[word].split()[1] not in ("0", "0/s"), rows[word]
    assert len({glyph for row in shown[6:10] for glyph in row} & set("▁▂▃▄▅▆▇")) > 2, "the frag ratio changes"
    assert rows["stored"].count("█") > 2 * rows["spent"].count("█") > 20


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    record = tmp_path / "none.json"
    with pytest.raises(top.NotDrawnError, match=r"zramd top cannot draw .*none\.json: .*No such file"):
        top.draw(record)
