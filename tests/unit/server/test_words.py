"""zram's words: each is what zram's documentation says, and everything else is refused."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.numbers import WRITEBACK

from zramd.errors import ConfigError, UsageError
from zramd.server import words
from zramd.server.routes import Routes
from zramd.server.tiers import Pass
from zramd.server.writeback import WritePass
from zramd.settings import config

IDLE, HUGE, BOTH = frozenset(["idle"]), frozenset(["huge"]), frozenset(["idle", "huge"])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", Pass()),
        (" \t\n", Pass()),
        ("type=idle", Pass(IDLE)),
        ("type=huge", Pass(HUGE)),
        ("type=huge_idle", Pass(BOTH)),
        ("threshold=3000", Pass(threshold=3000)),
        ("threshold=0", Pass()),
        ("threshold=4096", Pass(threshold=4096)),
        ("max_pages=1", Pass(max_pages=1)),
        ("max_pages=1073741824", Pass(max_pages=1 << 30)),
        ("algo=zstd", Pass()),
        ("priority=1", Pass()),
        ("algo=zstd priority=1", Pass()),
        # The lines of zram's documentation, as far as zramd has the algorithm.
        ("type=huge_idle threshold=2000", Pass(BOTH, 2000)),
        ("type=idle max_pages=42", Pass(IDLE, 0, 42)),
        ("type=huge priority=1", Pass(HUGE)),
        ("max_pages=9 algo=zstd  threshold=8\ttype=huge priority=1\n", Pass(HUGE, 8, 9)),
    ],
)
def test_recompress(text: str, wanted: Pass) -> None:
    assert words.recompress(text) == wanted


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("type=hgue", "unknown type 'hgue': use one of idle, huge, huge_idle"),
        ("type=Idle", "unknown type 'Idle'"),
        ("type=idle,huge", "unknown type 'idle,huge'"),
        ("type=incompressible", "unknown type 'incompressible'"),
        ("type", "'type' has no value: write it as in type=idle"),
        ("type=", "'type=' has no value"),
        ("idle", "unknown word 'idle': did you mean 'type=idle'?"),
        ("all", "unknown word 'all': use some of type=, threshold=, max_pages=, algo=, priority="),
        ("typ=idle", "unknown word 'typ=idle'"),
        ("TYPE=idle", "unknown word 'TYPE=idle'"),
        ("=idle", "unknown word '=idle'"),
        ("=", "unknown word '='"),
        ("type = idle", "'type' has no value"),
        ("type=idle type=idle", "'type' is given twice"),
        ("threshold=1 type=idle threshold=1", "'threshold' is given twice"),
        ("type=idle page_index=1", "unknown word 'page_index=1'"),
        ("type=idle\u2003threshold=300", "unknown type"),
        ("threshold=4097", "threshold cannot be '4097': use a whole number from 0 to 4096"),
        ("threshold=-1", "threshold cannot be '-1'"),
        ("threshold=+1", "threshold cannot be '\\+1'"),
        ("threshold=1K", "threshold cannot be '1K'"),
        ("threshold=0x10", "threshold cannot be '0x10'"),
        ("threshold=1.5", "threshold cannot be '1.5'"),
        ("threshold=1_000", "threshold cannot be '1_000'"),
        ("threshold=٣", "threshold cannot be '٣'"),
        ("threshold=²", "threshold cannot be '²'"),
        ("threshold=1=2", "threshold cannot be '1=2'"),
        ("threshold=" + "9" * 900, "threshold cannot be '9+'"),
        ("max_pages=0", "max_pages cannot be '0': use a whole number from 1 to 1073741824"),
        ("max_pages=1073741825", "max_pages cannot be '1073741825'"),
        ("max_pages=many", "max_pages cannot be 'many'"),
        ("algo=lz4", "no algorithm 'lz4' recompresses: use zstd"),
        ("algo=zstd(level=5)", "no algorithm 'zstd\\(level=5\\)' recompresses: use zstd"),
        ("priority=0", "priority cannot be '0': there is one algorithm to recompress by, with priority 1"),
        ("priority=2", "priority cannot be '2'"),
        ("priority=x", "priority cannot be 'x'"),
        ("type=idle priority=", "'priority=' has no value"),
        ("\x00", r"unknown word '\\x00'"),
        ("\x1b[2J=", r"unknown word '\\x1b\[2J='"),
    ],
)
def test_recompress_refuses(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^{sentence}") as refused:
        words.recompress(text)
    assert len(str(refused.value).splitlines()) == 1


ANY_WORD = st.one_of(
    st.sampled_from(
        ["type", "threshold", "max_pages", "algo", "priority", "idle", "huge", "", "=", " ", "1"]
    ),
    st.text(max_size=4),
)
# Texts that are nearly right are more telling than noise.
ANY_TEXT = st.one_of(
    st.text(),
    st.lists(st.tuples(ANY_WORD, st.sampled_from(["=", "", " ", "=="]), ANY_WORD).map("".join)).map(" ".join),
)
GRAMMAR = re.compile(
    r"type=(idle|huge|huge_idle)|threshold=[0-9]{1,19}|max_pages=[0-9]{1,19}|algo=zstd|priority=0*1", re.ASCII
)


class Queue:
    """The service that a request for recompression, or for writing out, comes to."""

    disksize = 16 * 4096

    def __init__(self) -> None:
        self.tiers = self.writeback = self.device = self
        self.passes: list[Pass | WritePass] = []

    def submit(self, wanted: Pass | WritePass) -> None:
        self.passes.append(wanted)

    def snapshot(self) -> Any:
        return SimpleNamespace(writeback=WRITEBACK)


def meaning(text: str) -> Pass | None:
    """What zram's grammar, read in another way than zramd reads it, makes of a text; None: nothing."""
    found = [word for word in re.split(r"[ \t\r\n]+", text.strip()) if word]
    values = dict(word.partition("=")[::2] for word in found)
    if len(values) < len(found) or not all(GRAMMAR.fullmatch(word) for word in found):
        return None
    threshold, pages = int(values.get("threshold", 0)), int(values.get("max_pages", 1))
    if threshold > 4096 or not 1 <= pages <= 1 << 30:
        return None
    kinds = frozenset(values["type"].split("_")) if "type" in values else frozenset()
    return Pass(kinds, threshold, pages if "max_pages" in values else 0)


@given(ANY_TEXT)
@example("type=idle")
@example("threshold=4096 max_pages=1")
@example("type=huge algo=zstd priority=01")
def test_a_text_is_of_the_grammar_or_refused_in_one_sentence_and_nothing_is_queued(text: str) -> None:
    queue = Queue()
    reply = Routes(cast(Any, queue)).answer("PUT", "/recompress", text.encode())
    wanted = meaning(text)
    if wanted is not None:
        assert (reply.status, queue.passes) == (200, [wanted])
    else:
        assert (reply.status, queue.passes) == (400, [])
        assert reply.body.endswith("\n")
        assert reply.body[:-1].isprintable(), "one line, which a terminal can show"


def of_kinds(*kinds: str) -> WritePass:
    return WritePass(frozenset(kinds))


def of_blocks(*ranges: tuple[int, int]) -> WritePass:
    return WritePass(frozenset(), ranges)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # zram's own lines, old and new.
        ("idle", of_kinds("idle")),
        ("huge", of_kinds("huge")),
        ("huge_idle", of_kinds("huge", "idle")),
        ("incompressible", of_kinds("incompressible")),
        ("type=idle", of_kinds("idle")),
        ("type=huge", of_kinds("huge")),
        (" type=huge_idle\n", of_kinds("huge", "idle")),
        ("type=incompressible", of_kinds("incompressible")),
        ("page_index=15", of_blocks((15, 16))),
        ("page_index=0", of_blocks((0, 1))),
        ("page_indexes=1-15", of_blocks((1, 16))),
        ("page_indexes=3-3", of_blocks((3, 4))),
        (
            "page_indexes=1-4 page_index=14 page_index=9 page_indexes=10-11",
            of_blocks((1, 5), (14, 15), (9, 10), (10, 12)),
        ),
        ("page_index=7 page_index=7", of_blocks((7, 8), (7, 8))),
    ],
)
def test_writeback(text: str, wanted: WritePass) -> None:
    assert words.writeback(text, 16) == wanted


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "nothing is named to write back: write it as in 'type=idle', or 'page_indexes=0-99'"),
        (" \n", "nothing is named"),
        ("type=hgue", "unknown type 'hgue': use one of idle, huge, huge_idle, incompressible"),
        ("type=all", "unknown type 'all'"),
        ("all", "unknown word 'all': use some of type=, page_index=, page_indexes="),
        ("Idle", "unknown word 'Idle'"),
        ("idle huge", "unknown word 'idle': did you mean 'type=idle'\\?"),
        ("incompressible page_index=1", "unknown word 'incompressible': did you mean 'type=incompressible'"),
        ("type=idle type=huge", "'type' is given twice"),
        ("type=", "'type=' has no value: write it as in type=idle"),
        ("page_index", "'page_index' has no value: write it as in page_index=42"),
        ("page_indexes=", "'page_indexes=' has no value: write it as in page_indexes=0-99"),
        ("type=idle page_index=1", "type= and numbers of blocks exclude each other"),
        ("page_indexes=1-4 type=huge", "type= and numbers of blocks exclude each other"),
        ("threshold=300", "unknown word 'threshold=300'"),
        ("page_index=16", "page_index cannot be '16': use a whole number from 0 to 15"),
        ("page_index=-1", "page_index cannot be '-1'"),
        ("page_index=1-3", "page_index cannot be '1-3'"),
        ("page_index=0x1", "page_index cannot be '0x1'"),
        ("page_index=٣", "page_index cannot be '٣'"),
        ("page_index=" + "9" * 900, "page_index cannot be '9+'"),
        ("page_indexes=3", "page_indexes cannot be '3': write it as in page_indexes=0-99"),
        ("page_indexes=3-", "page_indexes cannot be ''"),
        ("page_indexes=-3", "page_indexes cannot be ''"),
        ("page_indexes=1-2-3", "page_indexes cannot be '2-3'"),
        ("page_indexes=0-16", "page_indexes cannot be '16'"),
        ("page_indexes=5-4", "page_indexes cannot be '5-4': the lower number comes first, as in .*=4-5$"),
        ("page_index=1 page_index=16", "page_index cannot be '16'"),
        ("\x1b[2J", r"unknown word '\\x1b\[2J'"),
    ],
)
def test_writeback_refuses(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^{sentence}") as refused:
        words.writeback(text, 16)
    assert str(refused.value).isprintable()


ANY_BLOCKS = st.lists(
    st.tuples(
        st.sampled_from(["type", "page_index", "page_indexes", "idle", ""]),
        st.sampled_from(["=", "=", "=", "", " "]),
        st.one_of(
            st.from_regex(r"[0-9]{1,3}-?[0-9]{0,3}", fullmatch=True),
            st.sampled_from(["idle", "huge", "huge_idle", "incompressible", "", "0-15", "15"]),
            st.text(max_size=3),
        ),
    ).map("".join)
).map(" ".join)
WRITE_GRAMMAR = re.compile(
    r"(?:type=)?(idle|huge|huge_idle|incompressible)|((?:page_index=[0-9]{1,19}|page_indexes=[0-9]{1,19}-[0-9]{1,19})"
    r"(?:[ \t\r\n]+(?:page_index=[0-9]{1,19}|page_indexes=[0-9]{1,19}-[0-9]{1,19}))*)",
    re.ASCII,
)


def write_meaning(text: str) -> WritePass | None:
    """What zram's grammar makes of a text for a device of 16 blocks, by one expression; None: nothing."""
    match = WRITE_GRAMMAR.fullmatch(text.strip())
    if match is None or match[1]:
        return of_kinds(*match[1].split("_")) if match else None
    ranges = []
    for first, last in re.findall(r"=([0-9]+)-?([0-9]*)", match[2]):
        ranges.append((int(first), int(last or first) + 1))
    return of_blocks(*ranges) if all(a < b <= 16 for a, b in ranges) else None


@given(st.one_of(ANY_BLOCKS, st.text()))
@example("huge_idle")
@example("page_index=15 page_indexes=0-15")
@example("page_indexes=15-0")
def test_a_text_names_what_is_written_out_or_is_refused_in_one_sentence(text: str) -> None:
    queue = Queue()
    reply = Routes(cast(Any, queue)).answer("POST", "/writeback", text.encode())
    wanted = write_meaning(text)
    if wanted is not None:
        assert (reply.status, queue.passes) == (200, [wanted])
    else:
        assert (reply.status, queue.passes) == (400, [])
        assert reply.body.endswith("\n")
        assert reply.body[:-1].isprintable()


@pytest.mark.parametrize(("text", "left"), [("0", 0), ("102400", 400 << 20), (str(1 << 40), 1 << 52)])
def test_writeback_limit_counts_in_blocks(text: str, left: int) -> None:
    assert words.writeback_limit(text) == left


@pytest.mark.parametrize("text", ["", "off", "1G", "-1", "0x10", "1.5", str((1 << 40) + 1), "1 2", "٣"])
def test_writeback_limit_refuses(text: str) -> None:
    with pytest.raises(UsageError, match=r"^writeback_limit cannot be '.*': use a whole number from 0 to"):
        words.writeback_limit(text)


def test_writeback_limit_enable() -> None:
    assert [words.writeback_limit_enable(text) for text in "01"] == [False, True]
    for text in ("", "2", "on", "-1", "true"):
        with pytest.raises(UsageError, match=r"^writeback_limit_enable cannot be '.*': use a whole number"):
            words.writeback_limit_enable(text)


def test_bring_back_takes_no_word() -> None:
    words.bring_back("")
    with pytest.raises(UsageError, match=r"^'page_index=1' is too much"):
        words.bring_back("page_index=1")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("all", None), ("0", 0), ("300", 300), ("18000", 18000), ("5min", 300), ("1.5h", 5400), ("5h", 18000)],
)
def test_idle(text: str, seconds: float | None) -> None:
    assert words.idle(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "ALL", "all 300", "300 all", "-1", "+1", "0x10", "3OO", "٣", "²", "9" * 30, "\x00", "age=300"),
        *("5m", "min", "1h30min", "1e3", "inf", "nan", "1..5"),
    ],
)
def test_idle_refuses(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"is not an age: use all, or a time such as 300, 5min or 1h$"
    ) as refused:
        words.idle(text)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("text", ["18001", "86400", "1d", "5.1h"])
def test_idle_refuses_what_no_age_tells(text: str) -> None:
    """Blocks of 6 hours are not to be marked for it."""
    with pytest.raises(UsageError, match=f"^'{text}' is too long: .* in 5 hours its age tells no more$"):
        words.idle(text)


@given(st.one_of(st.text(), st.from_regex(r"[0-9.]{0,5} ?(s|min|h|d|m|)", fullmatch=True)))
def test_idle_takes_all_or_a_time_and_nothing_else(text: str) -> None:
    try:
        seconds = words.idle(text)
    except UsageError:
        assert text != "all"
        assert re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) is None
    else:
        is_time = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+) ?(s|min|h|d)?", text, re.ASCII)
        assert text == "all" if seconds is None else is_time


@pytest.mark.parametrize(
    ("text", "now", "setting"),
    [
        ("algo=zstd priority=1", "off", "zstd"),
        ("priority=1 algo=zstd", "off", "zstd"),
        ("algo=zstd", "off", "zstd"),
        ("algo=zstd", "zstd(level=9)", "zstd(level=9)"),
        ("zstd(level=5)", "off", "zstd(level=5)"),
        ("off", "zstd", "off"),
        ("", "zstd", ""),  # for the setting to refuse
        ("nonsense", "zstd", "nonsense"),
    ],
)
def test_recomp_algorithm(text: str, now: str, setting: str) -> None:
    assert words.recompression(text, now) == setting


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("algo=lz4", "no algorithm 'lz4' recompresses"),
        ("algo=", "'algo=' has no value"),
        ("priority=1", "no algorithm is named: write it as in 'algo=zstd priority=1'"),
        ("algo=zstd priority=2", "priority cannot be '2'"),
        ("algo=zstd algo=zstd", "'algo' is given twice"),
        ("algo=zstd level=5", "unknown word 'level=5': use some of algo=, priority="),
        ("zstd priority=1", "unknown word 'zstd'"),
    ],
)
def test_recomp_algorithm_refuses(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^{sentence}"):
        words.recompression(text, "off")


@pytest.mark.parametrize("name", ["lz4", "lz4hc", "zstd", "none", "lzo"])
def test_every_algorithm_that_can_be_set_is_in_the_list(name: str) -> None:
    try:
        config.value(config.find("comp_algorithm"), name)
    except ConfigError:
        assert f"[{name}]" not in words.comp_algorithm(name)
    else:
        assert f"[{name}] " in words.comp_algorithm(name)


def test_algorithms_are_shown_as_zram_shows_them() -> None:
    assert words.shown(("lzo-rle", "lzo", "lz4"), "lz4") == "lzo-rle lzo [lz4] \n"
    assert words.recomp_algorithm("zstd(level=3)") == "#1: [zstd] \n"
    assert words.recomp_algorithm("off") == ""
