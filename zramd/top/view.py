"""What `zramd top` shows, as lines of cells: nothing here knows a terminal.

A line is a list of (text, style) pieces, exactly as wide as asked for. Styles are names; what they look like
is zramd.top.terminal's to say.
"""

from collections.abc import Sequence
from typing import NamedTuple

from zramd.control.human import human
from zramd.control.samples import Rates, Sample, Watch
from zramd.stats.writeback import allowed, used
from zramd.top.cells import (
    Glyphs,
    Line,
    bar,
    between,
    clock,
    duration,
    fit,
    graph,
    number,
    plain,
    runs,
    scale_of,
)

DEAD = 15  # percent of the blocks that a refresh should not leave dead
HEAT_LEVELS = 8  # level n: at least 4 ** (n - 1) zspages
MIN_WIDTH, MIN_HEIGHT = 60, 16
_LABEL = 8  # width of what each row begins with
_MAP_LABEL = 5
_MAP_MARGIN = 15  # beside the map: a group's zspages and how many it gained
_BAR_MARGIN = 26  # beside a bar: what it shows, in numbers
_GRAPH_MARGIN = 6  # beside a graph: what its top and bottom stand for


class Frame(NamedTuple):
    """What is to be shown beside the numbers."""

    name: str
    watch: Watch
    interval: float  # seconds
    paused: bool = False
    help: bool = False
    message: str = ""  # stands where the keys are named
    lost: str = ""  # why there are no numbers, or only old ones
    keys: bool = True  # whether somebody can press one
    devices: tuple[int, int] = (1, 1)  # which device this is, and of how many


# ------------------------------------------------------------------------------------------------------------
# parts of the screen


def header(frame: Frame, sample: Sample, width: int) -> Line:
    """Return the first line: which device, who serves it, and who uses it."""
    stats = sample.stats
    left: Line = [
        (f" {frame.name} ", "title"),
        (f" {human(stats['disksize'])} {stats['comp_algorithm']}  ", ""),
        (f"pid {stats['pid']}  up {clock(stats['uptime'])}  ", "dim"),
        (f"{_clients(sample)}  ", "" if sample.clients else "dim"),
    ]
    for device, uses in sample.uses.items():
        swap = "[SWAP]" in uses
        what = "the kernel swaps to it" if swap else ", ".join(uses) or "not in use"
        left.append((f"{device}: {what}  ", "good" if swap else ""))
    if not sample.uses:
        left.append(("not attached here", "dim"))
    right: Line = [(" PAUSED ", "alert")] if frame.paused else []
    if frame.keys:
        right.append((f" every {frame.interval:g}s", "dim"))
    return between(left, right, width)


def _clients(sample: Sample) -> str:
    """Return who is connected; by ublk only this machine's kernel can be."""
    if sample.front == "ublk":
        return "front ublk"
    return f"{sample.clients} client{'' if sample.clients == 1 else 's'}"


def memory(sample: Sample, width: int, glyphs: Glyphs) -> list[Line]:
    """Return the bars: memory stored, memory spent for it, and what the parts are."""
    stats = sample.stats
    stored, pool, limit, peak = (
        stats[name] for name in ("orig_data_size", "mem_used_total", "mem_limit", "mem_used_max")
    )
    payload, spent, disksize = stats["compr_data_size"], stats["total_bytes"], stats["disksize"]
    scale = scale_of(disksize, stored, spent, limit, peak)
    room = max(width - _LABEL - _BAR_MARGIN, 8)
    lines: list[Line] = []

    filled = bar([(stored, glyphs.payload, "stored")], scale, room, glyphs)
    words = f" {human(stored):>7}  {100 * stored / disksize:.0f}% of {human(disksize)}"
    lines.append([("stored".ljust(_LABEL), "bold"), *runs(filled), (words, "")])

    parts = [
        (payload, glyphs.payload, "payload"),
        (pool - payload, glyphs.gaps, "gaps"),
        (spent - pool, glyphs.tables, "tables"),
    ]
    filled = bar(parts, scale, room, glyphs)
    for size, glyph, style in ((peak, glyphs.peak, "dim"), (limit, glyphs.limit, "limit")):
        place = size * room // scale
        # A mark stands for the end of its size, in the first cell that is beyond.
        if size and (style == "limit" or filled[min(place, room - 1)][0] == glyphs.rest):
            filled[min(place, room - 1)] = (glyph, style)
    ratio = f"  {stored / spent:.2f} : 1" if spent and stored else ""  # of nothing there is none
    lines.append([("spent".ljust(_LABEL), "bold"), *runs(filled), (f" {human(spent):>7}{ratio}", "")])

    near = limit and pool >= 0.9 * limit
    legend: Line = [
        (" " * _LABEL, ""),
        *((glyphs.swatch or glyphs.payload, "payload"), (f" payload {human(payload)}  ", "")),
        *((glyphs.swatch or glyphs.gaps, "gaps"), (f" gaps {human(max(pool - payload, 0))}  ", "")),
        *((glyphs.swatch or glyphs.tables, "tables"), (f" tables {human(max(spent - pool, 0))}  ", "")),
    ]
    if limit:
        words = f" limit {human(limit)}: {100 * pool / limit:.0f}%"
        legend += [(glyphs.limit, "limit"), (words, "bad" if near else "")]
    else:
        legend.append(("no limit", "dim"))
    right: Line = [(f"{glyphs.peak} peak {human(peak)}", "dim")]
    return [*lines, between(legend, right, width) if width > 90 else legend]


def has_tiers(sample: Sample) -> bool:
    """Say whether something is cold or out, or may become so."""
    section = sample.stats.get("tiers")
    if section is None:  # a server of an older version has none
        return False
    return bool(section["mode"] != "off" or section["cold_pages"] or "writeback" in sample.stats)


def tiers(sample: Sample, width: int, glyphs: Glyphs) -> Line:
    """Return a bar of the payloads: what is hot, cold, raw and out, and what changes."""
    section, out = sample.stats["tiers"], sample.stats.get("writeback")
    parts = [
        (section["hot_data_size"], glyphs.payload, "hot"),
        (section["cold_data_size"], glyphs.gaps, "cold"),
        (section["raw_pages"] * 4096, glyphs.tables, "raw"),
    ]
    if out is not None:
        parts.append((out["out_data_size"], glyphs.out, "out"))
    need = 20 * len(parts)  # columns for names and sizes with their shares
    whole = sum(size for size, _, _ in parts)
    words: Line = []
    for size, glyph, name in parts:
        share = f" {100 * size / whole:.0f}%" if whole and width >= need + 20 else ""
        words += [(f"  {glyphs.swatch or glyph}", name), (f" {name} {human(size)}{share}", "")]
    if width >= need + 40:
        cooled, warmed = section["recompressed_minute"], section["promoted_minute"]
        changes = f"   {number(cooled)} cold/min  {number(warmed)} hot/min  {section['mode']}"
        words.append((changes, "good" if cooled else "dim"))
    room = width - _LABEL - len(plain(words))
    filled = bar(parts, whole or 1, max(room, 1), glyphs)
    return [("tiers".ljust(_LABEL), "bold"), *runs(filled), *words]


def backing(sample: Sample, width: int, glyphs: Glyphs) -> Line:
    """Return how full the backing device is, and what happens to it. There is one."""
    out = sample.stats["writeback"]
    size, taken = out["backing_size"], used(out)
    live = min(out["out_live_bytes"], taken)
    words: Line = [(f"  {human(taken)} of {human(size)}", "")]
    errors, left = out["bd_read_errors"] + out["bd_write_errors"], allowed(out)
    if errors:
        words.append((f"  {number(errors)} errors", "bad"))
    if width >= 80:
        words.append((f"  {100 * live / taken if taken else 100:.0f}% live", ""))
        written, back = out["written_out_minute"], out["brought_back_minute"]
        changes = f"  {number(written)} out/min  {number(back)} back/min"
        words.append((changes, "good" if written else "dim"))
    if width >= 100:
        words.append(("  no limit" if left is None else f"  {human(left)} left", "dim"))
        words.append((f"  {out['mode']}", "fair" if out["mode"] == "paused" else "dim"))
    room = width - _LABEL - len(plain(words))
    parts = [(live, glyphs.out, "out"), (taken - live, glyphs.gaps, "gaps")]
    filled = bar(parts, max(size, 1), max(room, 1), glyphs)
    return [("disk".ljust(_LABEL), "bold"), *runs(filled), *words]


def blocks(sample: Sample) -> Line:
    """Return what the stored blocks are."""
    stats = sample.stats
    stored = stats["pages_stored"]
    line: Line = [("blocks".ljust(_LABEL), "bold"), (f"{number(stored)} stored", "")]
    for name, words in (("same_pages", "same-filled: no memory"), ("huge_pages", "stored raw")):
        share = 100 * stats[name] / stored if stored else 0
        line.append((f"   {number(stats[name])} ({share:.0f}%) {words}", ""))
    dead = stats.get("dead_blocks")  # None where this machine does not swap to it
    if dead:
        share = 100 * dead / stored if stored else 0
        line.append((f"   {number(dead)} ({share:.0f}%) dead", "fair" if share >= DEAD else ""))
    return line


def frag(watch: Watch, width: int, height: int, glyphs: Glyphs) -> list[Line]:
    """Return the frag ratio, the occupancy, and how the first has gone: the newest at the right."""
    assert watch.sample is not None
    stats = watch.sample.stats
    room = max(width - 2 * _LABEL - _GRAPH_MARGIN, 8)
    shown = list(watch.frag)[-room:]
    known = [value for value in shown if value is not None]
    # Tens, so that the scale stays where it is for a while.
    low = min(int(min(known, default=100) // 10) * 10, 90)
    rows = graph(shown, low, 100, room, height, glyphs)
    styles = ["" if value is None else _quality(value) for value in shown]
    styles = [""] * (room - len(styles)) + styles
    ratio = watch.frag[-1]
    values = [
        [("frag".ljust(_LABEL), "bold"), (_percent(ratio), "" if ratio is None else _quality(ratio))],
        [("in use".ljust(_LABEL), "dim"), (_percent(None if ratio is None else stats["occupancy"]), "dim")],
        [("100%: no gaps", "dim")],  # only where there is room: "frag" may sound as if less were better
    ]
    lines: list[Line] = []
    for place, row in enumerate(rows):
        left = values[place] if place < len(values) else []
        edge = {0: "100%", height - 1: f"{low}%"}.get(place, "")
        cells = runs(zip(row, styles, strict=True))
        lines.append([*fit(left, 2 * _LABEL), *cells, (f" {edge:>5}", "dim")])
    return lines


def _percent(value: float | None) -> str:
    return "      -" if value is None else f"{value:6.2f}%"


def _quality(percent: float) -> str:
    return "good" if percent >= 90 else "fair" if percent >= 75 else "bad"


def requests(watch: Watch, width: int, glyphs: Glyphs) -> list[Line]:
    """Return a line each for reads, writes, and trims with zeroing: rates, latencies, failures, history."""
    assert watch.sample is not None
    assert watch.rates is not None
    stats, per_second = watch.sample.stats, watch.rates.per_second
    freed = per_second["notify_free"] * 4096
    rows = (
        ("read", per_second["reads"], per_second["read_bytes"], "failed_reads"),
        ("write", per_second["writes"], per_second["written_bytes"], "failed_writes"),
        ("trim", per_second["trims"] + per_second["zeroes"], freed, ""),
    )
    lines: list[Line] = []
    for name, rate, size, failed in rows:
        line: Line = [(name.ljust(_LABEL), "bold"), (f"{number(rate):>5}/s", name if rate else "dim")]
        line.append((f" {human(int(size)):>7}/s", "" if rate else "dim"))
        for share in (0.5, 0.99):
            if watch.rates.latencies:
                found = _quantile(watch.rates, name, share)
                words = duration(found, glyphs) if found is not None else "-"
                line += [(f"  p{100 * share:.0f}", "dim"), (f"{words:>6}", "")]
        if failed and stats[failed]:
            line.append((f"  {number(stats[failed])} failed", "bad"))
        room = width - sum(len(text) for text, _ in line) - 2 - _GRAPH_MARGIN
        series = _added(watch, name)
        most = max((value or 0 for value in series[-room:]), default=0) if room > 0 else 0
        (row,) = graph([value or None for value in series], 0, most, room, 1, glyphs)
        lines.append([*line, ("  ", ""), (row, name), (f" {number(most) if most else '':>5}", "dim")])
    return lines


def _added(watch: Watch, name: str) -> list[float | None]:
    """Return what a row's requests per second were; zeroing counts with trims, as it frees memory too."""
    series = list(watch.requests[name])
    if name != "trim":
        return series
    return [None if a is None else a + (b or 0) for a, b in zip(series, watch.requests["zero"], strict=True)]


def _quantile(rates: Rates, operation: str, share: float) -> float | None:
    found = rates.latencies.get(operation)
    if found and operation == "trim":
        found = found.plus(rates.latencies.get("zero"))
    return found.quantile(share) if found else None


def compaction(sample: Sample, rates: Rates, width: int) -> Line:
    """Return what compaction does, could do, and has done."""
    objects, pages = (" objects", " pages") if width > 90 else ("", "")
    stats, per_second = sample.stats, rates.per_second
    moved, freed = per_second["objects_migrated"], per_second["pages_compacted"]
    active = "good" if moved else "dim"
    busy = min(per_second["compact_ns"] / 1e7, 100)
    freeable = stats["freeable_pages"]
    return [
        ("compact".ljust(_LABEL), "bold"),
        (
            f"{number(moved):>5}{objects} moved/s  {number(freed):>5}{pages} freed/s  {busy:3.0f}% busy",
            active,
        ),
        (f"  {number(freeable):>5} freeable", "" if freeable else "dim"),
        (f"  {number(stats['pages_compacted']):>5} in all", "dim"),
    ]


def columns(count: int, room: int) -> list[tuple[int, int]]:
    """Return the classes of each column of the map, at most `room`: the first and one past the last."""
    if not count or room <= 0:
        return []
    if count <= room:
        return [(place, place + 1) for place in range(count) for _ in range(room // count)]
    return [(place * count // room, (place + 1) * count // room) for place in range(room)]


def fold(groups: Sequence[str], rows: int) -> list[list[str]]:
    """Return the fullness groups of each of at most `rows` rows, the fullest first."""
    rows = min(rows, len(groups))
    upward = [
        list(groups[row * len(groups) // rows : (row + 1) * len(groups) // rows]) for row in range(rows)
    ]
    return upward[::-1]


def heat(zspages: int) -> int:
    """Return the level of a cell of the map, 0 for no zspages."""
    return min((zspages.bit_length() + 1) // 2, HEAT_LEVELS)


def heat_map(sample: Sample, rates: Rates, width: int, height: int, glyphs: Glyphs) -> list[Line]:
    """Return the size classes by fullness: a heading, rows from full to empty, and the axis of sizes.

    `height` counts them all. Each column is a class, or some neighbours where there are more than columns.
    """
    totals = sample.groups()
    room = width - _MAP_LABEL - _MAP_MARGIN
    placed = columns(len(sample.classes), room)
    heading: Line = [("zspages ", "bold")]
    for level in range(1, HEAT_LEVELS + 1):
        glyph = glyphs.heat[level - 1]
        if glyphs.swatch or glyph not in glyphs.heat[: level - 1]:
            least = human(4 ** (level - 1)).removesuffix("B") + "+" * (level == HEAT_LEVELS)
            heading += [(glyphs.swatch or glyph, f"heat{level}"), (f"{least} ", "dim")]
    right: Line = [(f"{'zspages':>8} {'+/-':>6}", "dim")]
    axes = f"  {glyphs.up} fuller {glyphs.right} larger"
    if len(plain(heading) + axes + plain(right)) < width:
        heading.append((axes, "dim"))
    lines = [between(heading, right, width)]
    for groups in fold(list(totals), height - 2):
        line: Line = [(f"{groups[-1]:>{_MAP_LABEL - 1}} ", "dim")]
        cells = []
        for first, last in placed:
            level = heat(sum(row["zspages"][group] for row in sample.classes[first:last] for group in groups))
            cells.append((glyphs.heat[level - 1], f"heat{level}") if level else (glyphs.none, "empty"))
        line += fit(runs(cells), room)
        count = sum(totals[group] for group in groups)
        gained = sum(rates.groups.get(group, 0) for group in groups)
        line.append(
            (f" {count:>7}" if count < 10_000_000 else f" {number(count):>7}", "" if count else "dim")
        )
        shown = (
            f"{gained:+d}" if abs(gained) < 100_000 else f"{'+' if gained > 0 else '-'}{number(abs(gained))}"
        )
        line.append((f" {shown:>6}", "gain" if gained > 0 else "loss") if gained else (" " * 7, ""))
        lines.append(line)
    return [*lines, _axis(sample, placed)]


def _axis(sample: Sample, placed: list[tuple[int, int]]) -> Line:
    """Return the sizes of the classes below their columns, as many as have room."""
    text = ""
    for place, (_, last) in enumerate(placed):
        size = str(sample.classes[last - 1]["size"])
        end = place + 1 == len(placed)
        start = place if not end else max(place + 1 - len(size), 0)
        if end and start < len(text) + 1:
            text = text[: text.rstrip().rfind(" ") + 1]  # the last size is worth more than the one before it
        begins = place == 0 or placed[place - 1] != placed[place]
        if end or (begins and start >= len(text) + (5 if text else 0)):
            text = text.ljust(start) + size
    return [("size ".rjust(_MAP_LABEL), "dim"), (text, "dim")]


# ------------------------------------------------------------------------------------------------------------
# the whole screen

KEYS = (
    ("q", "quit", "quit; Ctrl-C does too"),
    ("c", "compact", "compact now, until nothing more can be freed"),
    ("space", "pause", "pause, and continue"),
    ("tab", "device", "the next device; arrows: next and previous"),
    ("+ -", "interval", "slower, and faster"),
    ("?", "help", "this help, and back"),
)
_MEANINGS = (
    ("stored", "data before compression, and how much of the device that is"),
    ("spent", "memory for it: payloads, gaps between them, tables beside the pool"),
    ("tiers", "payloads: hot, cold (recompressed as nobody asked for them), raw, out"),
    ("disk", "extents in use of the backing device, and how much of them lives"),
    ("frag", "percent of the pool that payload fills, over time: more is better"),
    ("in use", "percent of the pool's places for objects that hold one"),
    ("trim", "trims and zeroing, and the data that they freed"),
    ("p50 p99", "half, and 99 of 100, of the requests took no longer, in the server"),
    ("compact", "objects moved and pages freed a second; share of the time;"),
    ("", "pages it would free now, and has freed since the server's start"),
    ("zspages", "how many there are: each column a size class, small at the left;"),
    ("", "each row as full as it says. Compaction moves them up and out."),
)


def status(frame: Frame, width: int) -> Line:
    """Return the last line: what has just happened, or which keys there are."""
    if frame.lost:
        return fit([(f" {frame.lost}", "alert")], width, "alert")
    if frame.message:
        return fit([(f" {frame.message}", "message")], width)
    line: Line = []
    for key, word, _ in KEYS:
        words = f"{word} {frame.devices[0]}/{frame.devices[1]}" if key == "tab" else word
        line += [(f" {key} ", "key"), (f" {words} ", "")]
    return fit(line, width)


def help_lines(width: int) -> list[Line]:
    """Return what the keys do and the words mean."""
    lines: list[Line] = [[("zramd top: one device, live", "bold")], []]
    lines += [[(f"  {key:<8}", "bold"), (meaning, "")] for key, _, meaning in KEYS]
    lines.append([])
    lines += [[(f"  {word:<8}", "bold"), (meaning, "")] for word, meaning in _MEANINGS]
    return lines


def body(frame: Frame, width: int, height: int, glyphs: Glyphs) -> list[Line]:
    """Return at most `height` lines of numbers: where there is room, with space between their groups."""
    sample, rates = frame.watch.sample, frame.watch.rates
    if sample is None or rates is None:
        return []
    spare = height - 23  # beyond a terminal of 24 rows
    shown = has_tiers(sample)
    # The smallest screens have no line to spare for them: there the frag ratio gives one up.
    disk = "writeback" in sample.stats and height >= MIN_HEIGHT
    tall = 2 + min(max(spare - 5, 0), 10) - (shown and height < MIN_HEIGHT + disk)
    gap: list[Line] = [[]]
    groups = [
        [header(frame, sample, width)],
        [
            *memory(sample, width, glyphs),
            *([tiers(sample, width, glyphs)] if shown else []),
            *([backing(sample, width, glyphs)] if disk else []),
            *([blocks(sample)] if spare >= 5 else []),
        ],
        frag(frame.watch, width, tall, glyphs),
        [*requests(frame.watch, width, glyphs), compaction(sample, rates, width)],
    ]
    lines: list[Line] = []
    for place, group in enumerate(groups):
        lines += group + gap * (spare > place)
    left = height - len(lines)
    if left >= 5:
        lines += heat_map(sample, rates, width, min(left, 13), glyphs)
    return lines


def screen(frame: Frame, width: int, height: int, glyphs: Glyphs) -> list[Line]:
    """Return `height` lines of `width` cells, the last one shorter: the corner may make a terminal scroll."""
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        lines: list[Line] = [[(f"{width}x{height} is too small: {MIN_WIDTH}x{MIN_HEIGHT} is needed", "bold")]]
        lines = [*lines, *[[]] * height][: height - 1]
        return [fit(line, width) for line in lines] + [fit([], width - 1)]
    lines = help_lines(width) if frame.help else body(frame, width, height - 1, glyphs)
    if frame.lost and not frame.help:
        lines = [*lines[:1], *([("".join(text for text, _ in line), "dim")] for line in lines[1:])]
    lines = [*lines[: height - 1], *[[]] * (height - 1 - len(lines))]
    return [fit(line, width) for line in lines] + [status(frame, width - 1)]
