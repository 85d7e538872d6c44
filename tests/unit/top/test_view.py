"""What `zramd top` draws, without a terminal and without a server."""

from typing import Any

import pytest
from support.numbers import TIERS, WRITEBACK
from support.samples import sample

from zramd.control.samples import Histogram, Sample, Watch
from zramd.top import cells, view
from zramd.top.cells import ASCII, COLOUR, MONO, Glyphs
from zramd.top.view import Frame

MIB = 1 << 20
GROUPS = ("10%", "20%", "30%", "40%", "50%", "60%", "70%", "80%", "90%", "99%", "100%")


def classes(*rows: tuple[int, dict[str, int]]) -> list[dict[str, Any]]:
    """Size classes of (size, zspages by fullness group)."""
    return [{"size": size, "zspages": dict.fromkeys(GROUPS, 0) | zspages} for size, zspages in rows]


def device(**changes: object) -> Sample:
    """A device of 1 GiB that stores 256 MiB in 80 MiB, of 160 MiB that it may take, and 4 MiB of tables."""
    values: dict[str, object] = {
        "disksize": 1024 * MIB,
        "orig_data_size": 256 * MIB,
        "compr_data_size": 60 * MIB,
        "mem_used_total": 80 * MIB,
        "mem_used_max": 120 * MIB,
        "mem_limit": 160 * MIB,
        "total_bytes": 84 * MIB,
        "frag_ratio": 75.0,
        "occupancy": 80.0,
        "pages_stored": 65536,
        "failed_reads": 0,
        "failed_writes": 0,
        **changes,
    }
    rows = [(32 * place, {"100%": place, "10%": 1}) for place in range(1, 121)]
    return sample(**values)._replace(classes=classes(*rows))


def watched(*taken: Sample) -> Watch:
    """A watch that has seen these samples, one second apart."""
    watch = Watch()
    for second, one in enumerate(taken):
        one.stats["uptime"] = 3600.0 + second
        watch.add(one)
    return watch


def frame(*taken: Sample, **changes: Any) -> Frame:
    """What `top` hands to the view."""
    return Frame("zram0", watched(*taken or (device(),)), 1.0)._replace(**changes)


def text(lines: list[cells.Line]) -> list[str]:
    return [cells.plain(line) for line in lines]


def line(lines: list[cells.Line], word: str) -> str:
    """The text of the line that begins with a word."""
    (found,) = [words for words in text(lines) if words.startswith(word)]
    return found


def styled(line: cells.Line, style: str) -> str:
    """What a line shows in a style."""
    return "".join(words for words, name in line if name == style)


def tiered(**changes: object) -> Sample:
    """A device with a cold tier."""
    return device(tiers={**TIERS, **changes})


def backed(**changes: object) -> Sample:
    """A device with a backing device too."""
    return device(tiers=dict(TIERS), writeback={**WRITEBACK, **changes})


SIZES = [(80, 24), (60, 16), (61, 17), (79, 23), (100, 30), (132, 43), (250, 60), (400, 100)]


@pytest.fixture(scope="module")
def long_watch() -> Watch:
    """A device that has been watched for longer than most screens are wide."""
    return watched(*(device(reads=1000 * n, frag_ratio=n % 101) for n in range(200)))


class TestScreen:
    @pytest.mark.parametrize("glyphs", [COLOUR, MONO, ASCII])
    @pytest.mark.parametrize(("width", "height"), [*SIZES, (40, 10), (1, 1)])
    @pytest.mark.parametrize(
        "changes", [{}, {"help": True}, {"lost": "it has ended"}, {"message": "m" * 500}]
    )
    def test_fits_exactly(
        self, long_watch: Watch, glyphs: Glyphs, width: int, height: int, changes: dict[str, object]
    ) -> None:
        for drawn in (
            long_watch,
            Watch(),
            watched(tiered()),
            watched(tiered(hot_data_size=0, cold_data_size=0)),
            watched(backed()),
            watched(backed(out_data_size=0, backing_size=0, backing_free=0, bd_read_errors=1 << 50)),
        ):
            lines = text(view.screen(frame(watch=drawn, **changes), width, height, glyphs))
            assert [len(words) for words in lines] == [width] * (height - 1) + [width - 1]

    @pytest.mark.parametrize(("width", "height"), SIZES)
    def test_everything_is_there(self, width: int, height: int) -> None:
        lines = text(view.screen(frame(), width, height, MONO))
        firsts = [words.split()[0] for words in lines if words.strip()]
        wanted = [
            "zram0",
            "stored",
            "spent",
            "frag",
            "read",
            "write",
            "trim",
            "compact",
            "zspages",
            "size",
            "q",
        ]
        assert [word for word in firsts if word in wanted] == wanted

    @pytest.mark.parametrize(("width", "height"), SIZES)
    def test_tiers_are_there_and_drive_nothing_out(self, width: int, height: int) -> None:
        with_them, without = (
            [
                words.split()[0]
                for words in text(view.screen(frame(one), width, height, MONO))
                if words[:1].isalpha()
            ]
            for one in (tiered(), device())
        )
        assert "tiers" in with_them
        assert [word for word in with_them if word != "tiers"] == [
            word for word in without if word in with_them
        ]
        assert set(without) - set(with_them) <= {"in"}, "only the second line of frag may go, to make room"

    @pytest.mark.parametrize(("width", "height"), SIZES)
    def test_a_backing_device_is_there_and_drives_nothing_out(self, width: int, height: int) -> None:
        with_it, without = (
            [
                words.split()[0]
                for words in text(view.screen(frame(one), width, height, MONO))
                if words[:1].isalpha()
            ]
            for one in (backed(), device())
        )
        assert "tiers" in with_it
        assert ("disk" in with_it) == (height > view.MIN_HEIGHT), "the smallest screen has no line for it"
        assert [word for word in with_it if word not in ("tiers", "disk")] == [
            word for word in without if word in with_it
        ]
        assert set(without) - set(with_it) <= {"in"}

    def test_ascii_is_ascii(self) -> None:
        for changes in ({}, {"help": True}, {"watch": watched(backed())}):
            assert "".join(text(view.screen(frame(**changes), 80, 24, ASCII))).isascii()

    def test_too_small_says_so(self) -> None:
        assert text(view.screen(frame(), 59, 24, MONO))[0].startswith("59x24 is too small: 60x16 is needed")

    def test_80x24_holds_all_groups_and_is_not_cut(self) -> None:
        lines = text(view.screen(frame(device(mem_limit=1000 * MIB, mem_used_total=999 * MIB)), 80, 24, MONO))
        assert [words[:5].strip() for words in lines[11:22]] == list(reversed(GROUPS))
        for words in (lines[1], lines[2], lines[3], lines[9], lines[23]):
            assert words.endswith("  ") or words is lines[23], f"no room was left: {words}"
        assert "? help" in " ".join(lines[23].split())

    def test_help_is_not_cut(self) -> None:
        lines = text(view.help_lines(80))
        assert max(map(len, lines)) <= 80
        assert len(lines) <= 23
        assert all(any(words.split()[:1] == key.split()[:1] for words in lines) for key, _, _ in view.KEYS)

    def test_lost_server(self) -> None:
        lines = view.screen(frame(lost="the server of zram0 has ended"), 80, 24, COLOUR)
        assert "the server of zram0 has ended" in styled(lines[-1], "alert")
        assert "256M" in styled(lines[1], "dim"), "old numbers are not shown as if they were new"
        assert {name for drawn in lines[1:-1] for _, name in drawn} <= {"dim", ""}

    def test_message_stands_where_the_keys_were(self) -> None:
        assert "5 pages freed" in text(view.screen(frame(message="5 pages freed"), 80, 24, MONO))[-1]

    def test_taller_shows_more(self) -> None:
        assert not any(words.startswith("blocks") for words in text(view.screen(frame(), 80, 24, MONO)))
        lines = view.screen(frame(device(same_pages=32768, huge_pages=6554)), 80, 40, MONO)
        words = "blocks  65.5k stored   32.8k (50%) same-filled: no memory   6.6k (10%) stored raw"
        assert line(lines, "blocks") == words[:80]
        assert line(lines, "100%: no gaps")


class TestHeader:
    def test_words(self) -> None:
        one = device()._replace(clients=2, uses={"/dev/nbd0": ["[SWAP]"]})
        shown = cells.plain(view.header(frame(one, paused=True), one, 120))
        words = "zram0  1G lz4  pid 7  up 1:00:00  2 clients  /dev/nbd0: the kernel swaps to it"
        assert shown.strip().startswith(words)
        assert shown.endswith(" PAUSED  every 1s")

    def test_front(self) -> None:
        one = device()._replace(clients=1, front="ublk", uses={"/dev/ublkb0": ["[SWAP]"]})
        shown = cells.plain(view.header(frame(one), one, 120))
        assert "up 1:00:00  front ublk  /dev/ublkb0: the kernel swaps to it" in shown

    @pytest.mark.parametrize(
        ("uses", "words"),
        [
            ({}, "not attached here"),
            ({"/dev/nbd3": []}, "/dev/nbd3: not in use"),
            ({"/dev/nbd3": ["/mnt"]}, "/dev/nbd3: /mnt"),
        ],
    )
    def test_use_by_the_kernel(self, uses: dict[str, list[str]], words: str) -> None:
        one = device()._replace(uses=uses)
        assert words in cells.plain(view.header(frame(one), one, 120))

    def test_what_matters_most_stays_when_it_is_narrow(self) -> None:
        shown = cells.plain(view.header(frame(device(), paused=True), device(), 60))
        assert shown.startswith(" zram0 ")
        assert shown.endswith("PAUSED  every 1s")


class TestMemory:
    def test_bars_are_on_one_scale(self) -> None:
        stored, spent, legend = view.memory(device(), 98, ASCII)  # 64 cells for 256 MiB: 4 MiB each
        assert len(styled(stored, "stored")) == 64
        assert len(styled(spent, "payload")) == 15
        assert len(styled(spent, "gaps")) == 5
        assert len(styled(spent, "tables")) == 1
        bar = cells.plain(spent)[8 : 8 + 64]
        assert bar == "#" * 15 + "=" * 5 + "-" + " " * 9 + ":" + " " * 9 + "|" + " " * 23
        assert "256M  25% of 1G" in cells.plain(stored)
        assert "84M  3.05 : 1" in cells.plain(spent)
        words = "# payload 60M  = gaps 20M  - tables 4M  | limit 160M: 50%"
        assert cells.plain(legend).strip().startswith(words)
        assert cells.plain(legend).endswith(": peak 120M")

    @pytest.mark.parametrize(("used", "style"), [(143, ""), (144, "bad"), (160, "bad")])
    def test_limit_that_is_near_is_marked(self, used: int, style: str) -> None:
        (*_, legend) = view.memory(device(mem_used_total=used * MIB), 80, COLOUR)
        assert [name for words, name in legend if words.startswith(" limit")] == [style]

    def test_limit_that_is_reached_is_still_marked(self) -> None:
        one = device(mem_used_total=160 * MIB, mem_used_max=160 * MIB, total_bytes=256 * MIB)
        _, spent, _ = view.memory(one, 98, ASCII)
        assert cells.plain(spent)[8 + 40] == "|"

    def test_no_limit(self) -> None:
        _, spent, legend = view.memory(device(mem_limit=0), 80, COLOUR)
        assert COLOUR.limit not in cells.plain(spent)
        assert "no limit" in cells.plain(legend)

    def test_empty_device(self) -> None:
        names = ("orig_data_size", "compr_data_size", "mem_used_total", "mem_used_max", "total_bytes")
        stored, spent, _ = view.memory(device(**dict.fromkeys(names, 0)), 80, ASCII)
        assert "#" not in cells.plain(stored) + cells.plain(spent)
        assert "0%" in cells.plain(stored)

    @pytest.mark.parametrize(
        ("disksize", "sizes", "scale"),
        [
            (1 << 40, (0,), MIB),
            (1 << 40, (MIB, 5), MIB),
            (1 << 40, (MIB + 1, 5), 2 * MIB),
            (100 * MIB, (65 * MIB,), 100 * MIB),
            (100 * MIB, (101 * MIB,), 128 * MIB),
        ],
    )
    def test_scale(self, disksize: int, sizes: tuple[int, ...], scale: int) -> None:
        assert cells.scale_of(disksize, *sizes) == scale

    @pytest.mark.parametrize("width", range(1, 40))
    def test_bar_is_as_wide_as_asked_for(self, width: int) -> None:
        for size in (0, 1, 499, 500, 999, 1000):
            drawn = cells.bar([(size, "#", "a"), (1000 - size, "=", "b")], 1000, width, MONO)
            assert len(drawn) == width
            assert all(len(glyph) == 1 for glyph, _ in drawn)

    def test_bar_ends_in_eighths(self) -> None:
        drawn = ["".join(glyph for glyph, _ in cells.bar([(n, "█", "")], 16, 2, MONO)) for n in range(17)]
        steps = "▏▎▍▌▋▊▉█"
        assert drawn == ["  ", *(step + " " for step in steps), *("█" + step for step in steps)]


class TestGraph:
    def test_rows(self) -> None:
        drawn = cells.graph([0, 25, 50, 75, 100, None, 100], 0, 100, 10, 2, MONO)
        assert drawn == ["      ▄█ █", "   ▁▄███ █"]

    def test_newest_are_kept(self) -> None:
        assert cells.graph([0, 0, 0, 8, 4], 0, 8, 2, 1, MONO) == ["█▄"]
        assert cells.graph([], 0, 1, 3, 2, MONO) == ["   ", "   "]

    def test_frag_ratio(self) -> None:
        taken = [device(frag_ratio=ratio) for ratio in (100, 95, 80, 62)]
        upper, lower = view.frag(watched(*taken), 80, 2, COLOUR)
        assert cells.plain(upper).split()[:2] == ["frag", "62.00%"]
        assert cells.plain(upper).endswith("100%")
        assert cells.plain(lower).endswith("60%"), "the scale begins at the tens below the least"
        assert styled(lower, "good")[-2:] == "██"
        assert len(styled(lower, "fair")) == 1
        assert styled(lower, "bad") == "▁"

    def test_empty_pool_has_no_ratio(self) -> None:
        upper, lower = view.frag(watched(device(mem_used_total=0)), 80, 2, MONO)
        assert cells.plain(upper).split() == ["frag", "-", "100%"]
        assert cells.plain(lower).split() == ["in", "use", "-", "90%"]


class TestRequests:
    def test_rates(self) -> None:
        new = device(reads=12_337, read_bytes=53 + 48 * MIB, writes=41, trims=45, zeroes=50, notify_free=275)
        read, write, trim = map(cells.plain, view.requests(watched(device(), new), 80, MONO))
        assert read.split()[:3] == ["read", "12.3k/s", "48M/s"]
        assert write.split()[:3] == ["write", "0/s", "0B/s"]
        assert trim.split()[:3] == ["trim", "5/s", "1M/s"], "zeroing counts as a trim; blocks have 4096 bytes"
        assert read.split()[-2:] == ["█", "12.3k"]

    def test_latencies(self) -> None:
        bounds = (1e-6, 2e-6, 4e-3, float("inf"))
        old = device()._replace(latencies={"read": Histogram(bounds, (900, 900, 900, 900))})
        new = device()._replace(
            latencies={
                "read": Histogram(bounds, (900, 1000, 1000, 1000)),
                "trim": Histogram(bounds, (0, 0, 0, 0)),
                "zero": Histogram(bounds, (0, 0, 50, 50)),
            }
        )
        read, write, trim = map(cells.plain, view.requests(watched(old, new), 80, MONO))
        assert read.split()[3:7] == ["p50", "1.5µs", "p99", "2.0µs"], "of the requests between the two alone"
        assert write.split()[3:7] == ["p50", "-", "p99", "-"]
        assert trim.split()[3:5] == ["p50", "2.0ms"], "zeroing counts"

    def test_server_without_latencies(self) -> None:
        assert "p50" not in "".join(text(view.requests(watched(device()), 80, MONO)))

    def test_failures(self) -> None:
        read, write, _ = view.requests(watched(device(failed_writes=17)), 80, COLOUR)
        assert styled(write, "bad") == "  17 failed"
        assert styled(read, "bad") == ""


class TestCompaction:
    def test_words(self) -> None:
        old, new = device(), device(objects_migrated=1023, pages_compacted=205, compact_ns=1_620_000_000)
        watch = watched(old, new)
        assert watch.rates is not None
        shown = view.compaction(new, watch.rates, 80)
        words = "compact 1.0k moved/s 200 freed/s 12% busy 2 freeable 205 in all"
        assert " ".join(cells.plain(shown).split()) == words
        assert "moved/s" in styled(shown, "good")

    def test_wide_says_of_what(self) -> None:
        most = 999_000_000
        watch = watched(
            device(),
            device(objects_migrated=most, pages_compacted=most, compact_ns=most, freeable_pages=most),
        )
        assert watch.sample is not None
        assert watch.rates is not None
        for width in (80, 90, 91, 200):
            shown = cells.plain(view.compaction(watch.sample, watch.rates, width))
            assert ("objects moved/s" in shown) is ("pages freed/s" in shown) is (width > 90)
            assert len(shown) <= width

    def test_rest(self) -> None:
        watch = watched(device(), device())
        assert watch.rates is not None
        assert "0 moved/s" in styled(view.compaction(device(), watch.rates, 80), "dim")


class TestHeatMap:
    @pytest.mark.parametrize(
        ("zspages", "level"),
        [(0, 0), (1, 1), (3, 1), (4, 2), (15, 2), (16, 3), (4**7 - 1, 7), (4**7, 8), (10**9, 8)],
    )
    def test_levels(self, zspages: int, level: int) -> None:
        assert view.heat(zspages) == level

    def map(
        self, *taken: Sample, width: int = 80, height: int = 13, glyphs: Glyphs = ASCII
    ) -> list[cells.Line]:
        watch = watched(*taken)
        assert watch.sample is not None
        assert watch.rates is not None
        return view.heat_map(watch.sample, watch.rates, width, height, glyphs)

    def test_whole(self) -> None:
        old = classes((32, {"100%": 2}), (64, {"10%": 70}), (4096, {"99%": 1}))
        new = classes((32, {"100%": 20}), (64, {"10%": 3, "100%": 1}), (4096, {"99%": 1}))
        one, two = device()._replace(classes=old), device()._replace(classes=new)
        lines = text(self.map(one, two, width=42))
        assert lines == [
            "zspages :1 -4 =16 +64 *256  zspages    +/-",
            "100% =======:::::::.......       21    +19",
            " 99% ..............:::::::        1       ",
            " 90% .....................        0       ",
            " 80% .....................        0       ",
            " 70% .....................        0       ",
            " 60% .....................        0       ",
            " 50% .....................        0       ",
            " 40% .....................        0       ",
            " 30% .....................        0       ",
            " 20% .....................        0       ",
            " 10% .......:::::::.......        3    -67",
            "size 32     64        4096",
        ]

    def test_colours(self) -> None:
        one = device()._replace(classes=classes((32, {"100%": 4**7}), (64, {"100%": 1})))
        (_, full, *_) = self.map(one, glyphs=COLOUR)
        assert styled(full, "heat8") == "█" * 30
        assert styled(full, "heat1") == "█" * 30

    @pytest.mark.parametrize("glyphs", [COLOUR, MONO, ASCII])
    def test_heading_says_what_is_where(self, glyphs: Glyphs) -> None:
        words = f"{glyphs.up} fuller {glyphs.right} larger"
        for width in (60, 70, 80, 100):
            heading = text(self.map(device(), width=width, glyphs=glyphs))[0]
            assert heading.endswith("zspages    +/-")
            assert words in heading or ("fuller" not in heading and width < 80), "whole, or not at all"

    def test_neighbours_share_a_column(self) -> None:
        one = device()._replace(
            classes=classes(*((32 + n, {"50%": 2 if n in (6, 7) else 0}) for n in range(120)))
        )
        (row,) = [words for words in text(self.map(one)) if words.startswith(" 50%")]
        assert row[5:65] == "..." + "-" + "." * 56

    def test_few_rows_share_groups(self) -> None:
        one = device()._replace(classes=classes((32, {"10%": 1, "20%": 2, "100%": 4})))
        lines = text(self.map(one, height=5))
        assert [words.split()[0] for words in lines] == ["zspages", "100%", "70%", "30%", "size"]
        assert [words.split()[2] for words in lines[1:4]] == ["4", "0", "3"]

    @pytest.mark.parametrize("count", [1, 2, 59, 60, 61, 119, 120, 256])
    @pytest.mark.parametrize("room", [1, 40, 60, 200])
    def test_columns_show_each_class_once(self, count: int, room: int) -> None:
        placed = view.columns(count, room)
        assert len(placed) <= room
        shown = [index for first, last in dict.fromkeys(placed) for index in range(first, last)]
        assert shown == list(range(count))
        assert view.columns(0, room) == []

    @pytest.mark.parametrize("rows", range(1, 14))
    def test_rows_show_each_group_once(self, rows: int) -> None:
        folded = view.fold(GROUPS, rows)
        assert len(folded) == min(rows, len(GROUPS))
        assert [group for groups in reversed(folded) for group in groups] == list(GROUPS)

    @pytest.mark.parametrize("width", range(60, 300, 7))
    def test_axis_names_the_class_above_it(self, width: int) -> None:
        one = device()
        axis = text(self.map(one, width=width))[-1]
        placed = view.columns(len(one.classes), width - 20)
        assert axis.split()[-1] == "3840"
        for size in axis.split()[1:-1]:
            first, last = placed[axis.index(f" {size} ") + 1 - 5]
            assert size == str(one.classes[last - 1]["size"])
            assert first < last


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((0, "0"), (0.04, "0.0"), (0.5, "0.5"), (7, "7"), (9.96, "10"), (999.4, "999"), (999.6, "1.0k")),
        *((12_345, "12.3k"), (99_949, "99.9k"), (99_951, "100k"), (999_500, "1.0M"), (4_500_000, "4.5M")),
        *((2e9, "2.0G"), (3e12, "3.0T"), (4e15, "4000T")),
    ],
)
def test_number(value: float, words: str) -> None:
    assert cells.number(value) == words
    assert len(words) <= 5


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0ns"), (2.5e-7, "250ns"), (8.1e-6, "8.1µs"), (41e-6, "41µs"), (0.0012, "1.2ms"), (2.1, "2.1s")],
)
def test_duration(seconds: float, words: str) -> None:
    assert cells.duration(seconds, MONO) == words
    assert cells.duration(seconds, ASCII) == words.replace("µ", "u")


@pytest.mark.parametrize(
    ("seconds", "words"), [(7, "0:07"), (3599.9, "59:59"), (3723, "1:02:03"), (4 * 86400 + 18360, "4d 05:06")]
)
def test_clock(seconds: float, words: str) -> None:
    assert cells.clock(seconds) == words


@pytest.mark.parametrize(
    ("dead", "words", "style"),
    [(None, "", ""), (0, "", ""), (655, "1%", ""), (16384, "25%", "fair")],
)
def test_dead_blocks_where_this_machine_swaps(dead: int | None, words: str, style: str) -> None:
    line = view.blocks(device(dead_blocks=dead))
    assert [
        (shown.endswith(f"({words}) dead"), looks) for shown, looks in line if shown.endswith("dead")
    ] == [(True, style)] * bool(words)


class TestTiers:
    @pytest.mark.parametrize("width", [60, 79, 80, 100, 400])
    @pytest.mark.parametrize("glyphs", [COLOUR, MONO, ASCII])
    def test_the_bar_is_whole_and_its_parts_are_as_they_are_in_the_pool(
        self, width: int, glyphs: Glyphs
    ) -> None:
        drawn = view.tiers(
            tiered(hot_data_size=60 * MIB, cold_data_size=30 * MIB, raw_pages=2560), width, glyphs
        )
        room = len(cells.plain(drawn).rstrip())
        assert room <= width
        lengths = [len(words) for words, style in drawn if style in ("hot", "cold", "raw")][:3]
        assert sum(lengths) >= 10
        assert lengths[0] == pytest.approx(0.6 * sum(lengths), abs=1)
        assert lengths[1] == pytest.approx(0.3 * sum(lengths), abs=1)

    def test_words(self) -> None:
        assert "hot 88M 64%" in cells.plain(view.tiers(tiered(), 80, MONO))
        assert "cold 44M 32%" in cells.plain(view.tiers(tiered(), 80, MONO))
        assert "230 cold/min  12 hot/min  calm" in cells.plain(view.tiers(tiered(), 120, MONO))

    def test_an_empty_pool_has_an_empty_bar(self) -> None:
        empty = tiered(hot_data_size=0, cold_data_size=0, raw_pages=0)
        assert cells.plain(view.tiers(empty, 80, ASCII)).split()[:4] == ["tiers", "#", "hot", "0B"]

    def test_they_are_shown_where_they_are_on_or_hold_something(self) -> None:
        assert view.has_tiers(tiered())
        assert view.has_tiers(tiered(mode="off"))
        assert not view.has_tiers(tiered(mode="off", cold_pages=0))
        assert not view.has_tiers(device()), "a server of an older version has none"

    @pytest.mark.parametrize("width", [60, 79, 80, 100, 120, 400])
    @pytest.mark.parametrize("glyphs", [COLOUR, MONO, ASCII])
    def test_what_is_out_has_its_part_of_the_bar(self, width: int, glyphs: Glyphs) -> None:
        sizes = {"hot_data_size": 60 * MIB, "cold_data_size": 30 * MIB, "raw_pages": 2560}
        one = tiered(**sizes)
        one.stats["writeback"] = WRITEBACK | {"out_data_size": 100 * MIB}
        drawn = view.tiers(one, width, glyphs)
        assert len(cells.plain(drawn)) <= width
        bar = [(words, style) for words, style in drawn if style in ("hot", "cold", "raw", "out")]
        lengths = [len(words) for words, _ in bar[: len(bar) - 4]]
        assert bar[-1] == (f"  {glyphs.swatch or glyphs.out}", "out")
        assert lengths[-1] == pytest.approx(0.5 * sum(lengths), abs=1)

    def test_words_of_what_is_out(self) -> None:
        assert "raw 4.7M 0%" in cells.plain(view.tiers(backed(), 100, MONO))
        assert "out 1.2G 90%" in cells.plain(view.tiers(backed(), 100, MONO))
        assert cells.plain(view.tiers(backed(), 120, MONO)).endswith("12 hot/min  calm")
        off = backed()
        off.stats["tiers"] = TIERS | {"mode": "off", "cold_pages": 0}
        assert view.has_tiers(off), "what is out may have been hot"


class TestBacking:
    @pytest.mark.parametrize("width", [60, 79, 80, 100, 400])
    @pytest.mark.parametrize("glyphs", [COLOUR, MONO, ASCII])
    def test_the_bar_shows_what_is_in_use_and_what_of_it_lives(self, width: int, glyphs: Glyphs) -> None:
        size = 1024 * MIB
        one = backed(
            backing_size=size, backing_free=size // 4, backing_bad=size // 4, out_live_bytes=size // 4
        )
        drawn = view.backing(one, width, glyphs)
        assert len(cells.plain(drawn).rstrip()) <= width
        live, dead = (sum(len(words) for words, name in drawn if name == style) for style in ("out", "gaps"))
        assert live == pytest.approx(dead, abs=2), "cells are cut off at eighths"
        assert live >= 1

    def test_words(self) -> None:
        shown = cells.plain(view.backing(backed(), 100, MONO))
        assert shown.startswith("disk    ▚")
        assert shown.endswith("2G of 8G  63% live  4.5k out/min  7 back/min  700M left  calm")
        assert "errors" not in shown
        assert cells.plain(view.backing(backed(), 60, MONO)).endswith("2G of 8G")
        endless = view.backing(backed(limit_left=None, writeback_limit=0, mode="paused"), 100, MONO)
        assert cells.plain(endless).endswith("no limit  paused")
        used_up = view.backing(backed(limit_left=(64 << 10) - 1, mode="paused"), 100, MONO)
        assert cells.plain(used_up).endswith("  0B left  paused")

    def test_a_device_that_is_left_alone_is_seen(self) -> None:
        assert styled(view.backing(backed(mode="paused"), 100, MONO), "fair") == "  paused"

    def test_errors_are_seen_at_any_width(self) -> None:
        for width in (60, 80, 200):
            drawn = view.backing(backed(bd_read_errors=2, bd_write_errors=1), width, MONO)
            assert styled(drawn, "bad") == "  3 errors"
