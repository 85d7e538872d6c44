"""Verbs of the tiers: tiers, and zram's recompress and idle."""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from zramd.commands import Commands, add_device, folder
from zramd.control import servers
from zramd.control.human import human
from zramd.errors import DeviceError, UsageError, say
from zramd.stats.tiers import ages
from zramd.top.cells import ASCII, MONO, Glyphs, bar

WIDTH = 80
TIMEOUT = 2.0  # seconds for each server, as for `zramd list`
_LABEL = 11  # width of what each row begins with
_MODES = {
    "calm": "calm",
    "wanted": "memory is wanted",
    "full": "the pool is full",
    "paused": "paused",
}
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def tiers(arguments: argparse.Namespace) -> int:
    """Print what is hot and what is cold; devices whose server has died are named on standard error."""
    if arguments.rundir or arguments.names:
        wanted = [servers.find(name) for name in arguments.names]
        wanted += [servers.find(None, folder) for folder in arguments.rundir]
    else:
        wanted = servers.every()
    glyphs = MONO if "utf" in (sys.stdout.encoding or "").lower() else ASCII
    found: list[dict[str, Any]] = []
    status = 0
    for served in wanted:
        try:
            if served.pid is None:
                raise served.died()
            stats = served.ask_json("GET", "/stats", timeout=TIMEOUT)
            if "tiers" not in stats:
                raise DeviceError(f"{served.name} runs a version of zramd that has no tiers: restart it")
        except DeviceError as error:
            sys.stdout.flush()
            say(str(error))
            status = 1
            continue
        if not arguments.json:
            sys.stdout.write("\n" * bool(found) + report(stats, glyphs))
        found.append({"name": stats["name"], "comp_algorithm": stats["comp_algorithm"], **stats["tiers"]})
    if arguments.json:
        print(json.dumps({"devices": found}, indent=2))
    return status


def report(stats: dict[str, Any], glyphs: Glyphs) -> str:
    """Return what is where, for how long nobody asked for it, and what the background makes of it."""
    section = stats["tiers"]
    lines = [*_heading(stats), "", *_places(section, glyphs), "", *_ages(section, glyphs), ""]
    return "\n".join([*lines, *_work(section)]) + "\n"


def _heading(stats: dict[str, Any]) -> Iterator[str]:
    section = stats["tiers"]
    mode = section["mode"]
    cold = f"cold {section['recompression']} after {duration(section['cold_age'])}: {_MODES.get(mode, mode)}"
    off = "recompression is off"
    yield f"{stats['name']}: hot {stats['comp_algorithm']}, {off if mode == 'off' else cold}"


def _places(section: dict[str, Any], glyphs: Glyphs) -> Iterator[str]:
    """Yield a table of the tiers: what they hold, and what that takes."""
    rows = [
        ("hot", section["hot_pages"], section["hot_data_size"]),
        ("cold", section["cold_pages"], section["cold_data_size"]),
        ("raw", section["raw_pages"], section["raw_pages"] * 4096),
        ("same", section["same_pages"], 0),
    ]
    blocks, payload = sum(row[1] for row in rows), sum(row[2] for row in rows)
    yield f"{'':<{_LABEL}}{'blocks':>10} {'share':>6} {'data':>8} {'payload':>8} {'ratio':>6}"
    for name, count, size in [*rows, ("all", blocks, payload)]:
        ratio = f"{count * 4096 / size:.2f}" if size else "-"
        line = f"{name:<{_LABEL}}{count:>10} {_share(count, blocks):>6} {human(count * 4096):>8}"
        line += f" {human(size):>8} {ratio:>6}"
        yield (line if name == "all" else _with_bar(line, count, blocks, glyphs)).rstrip()


def _ages(section: dict[str, Any], glyphs: Glyphs) -> Iterator[str]:
    """Yield a histogram of the stored blocks by how long ago somebody asked for them."""
    rows = list(ages(section))
    total = sum(row.blocks for row in rows)
    yield "last asked for within, as counted every 10 s"
    for row in rows:
        name = {"more": "longer ago", "idle": "marked idle"}.get(row.bound)
        label = name or f"{duration(int(row.bound)):>8}"
        line = f"{label:<{_LABEL}}{row.blocks:>10} {_share(row.blocks, total):>6}"
        yield _with_bar(line, row.blocks, total, glyphs).rstrip()


def _work(section: dict[str, Any]) -> Iterator[str]:
    """Yield what was done, and why it is not more."""
    saved, vain = human(max(section["saved_bytes"], 0)), section["recompress_useless"]
    yield f"{'':<{_LABEL}}{'a minute':>10} {'since start':>12}"
    yield (
        f"{'made cold':<{_LABEL}}{section['recompressed_minute']:>10} {section['recompressed']:>12}  "
        f"{saved} saved, {vain} tried in vain"
    )
    hot = f"{section['promoted_minute']:>10} {section['promoted']:>12}"
    yield f"{'made hot':<{_LABEL}}{hot}  read again and again"
    yield f"{'processor':<{_LABEL}}{'':>10} {section['cpu_seconds']:>10.2f} s"
    if section["reason"]:
        yield ""
        yield from textwrap.wrap(f"Not more now: {section['reason']}.", WIDTH)


def _share(count: int, whole: int) -> str:
    """Return a percentage in whole numbers, by which something is never shown as nothing."""
    if not whole:
        return "-"
    percent = 100 * count / whole
    return "<1 %" if 0 < percent < 0.5 else f"{percent:.0f} %"


def _with_bar(line: str, count: int, whole: int, glyphs: Glyphs) -> str:
    """Return a line with a bar at its end: `whole` reaches to the right edge."""
    room = WIDTH - len(line) - 2
    cells = bar([(count, glyphs.payload, "")], max(whole, 1), room, glyphs)
    return f"{line}  {''.join(text for text, _ in cells)}"


def duration(seconds: int) -> str:
    """Return a time with the largest unit in which it is a whole number: 30 s, 5 min, 6 h."""
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds and seconds % size == 0), (1, "s"))
    return f"{seconds // size:g} {unit}"


def _find(arguments: argparse.Namespace) -> servers.Served:
    """Return the device. Raises UsageError where both name one: then NAME may be a word that lacks its key.

    'huge' for 'type=huge' is not to mean that all blocks are recompressed.
    """
    if arguments.name and arguments.rundir:
        raise UsageError(f"'{arguments.name}' is too much: --rundir names the device already")
    return servers.find(arguments.name, arguments.rundir)


def recompress(arguments: argparse.Namespace) -> int:
    """Have the server recompress blocks, and do not wait for it."""
    served = _find(arguments)
    served.request("PUT", "/recompress", " ".join(arguments.settings))
    print("blocks are recompressed in the background: 'zramd tiers' shows how far that is")
    return 0


def idle(arguments: argparse.Namespace) -> int:
    """Mark blocks idle."""
    served = _find(arguments)
    served.request("PUT", "/idle", arguments.age)
    return 0


_PAIRS = ("type=idle", "type=huge", "type=huge_idle", "threshold=", "max_pages=", "algo=zstd", "priority=1")
_WORDS = """
words, as zram's file recompress takes them, in any order:
  type=idle            blocks that are marked idle (zramd idle)
  type=huge            blocks that are stored raw
  type=huge_idle       blocks that are both
  threshold=BYTES      only payloads of so many bytes or more
  max_pages=N          at most so many blocks are tried
  algo=NAME            the algorithm: zstd
  priority=N           its number: 1

Without type= all blocks are meant, however young they are. A block that
recompression did not shrink is tried again once it has been written again.
If a word is wrong, nothing is done.
"""


def add(commands: Commands) -> None:
    """Add the verbs."""
    parser = commands.add_parser(
        "tiers",
        description="Show which blocks are hot, cold, raw or of one word, how long ago somebody asked for "
        "them, and what recompression does. Without a name: of every device.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these devices")
    parser.add_argument(
        "--rundir",
        metavar="FOLDER",
        type=folder,
        action="append",
        default=[],
        help="show the device in this run folder",
    )
    parser.add_argument("-J", "--json", action="store_true", help="print JSON")
    parser.set_defaults(run=tiers)
    parser = commands.add_parser(
        "recompress",
        usage="zramd recompress [--rundir FOLDER] NAME [word=value ...]",
        description="Have blocks recompressed now that would become cold by and by. The command does not "
        "wait for it.",
        more=lambda: _WORDS,
        pairs=_PAIRS,
    )
    add_device(parser)
    parser.set_defaults(run=recompress)
    parser = commands.add_parser(
        "idle",
        usage="zramd idle [--rundir FOLDER] NAME AGE",
        description="Mark blocks as idle until somebody asks for them, as zram's file idle does. Idle blocks "
        "count as cold, however young they are.",
    )
    add_device(parser)
    parser.add_argument(
        "age",
        metavar="AGE",
        help="all, or a time in which nobody has asked for a block, such as 300, 5min or 1h",
    )
    parser.set_defaults(run=idle)
