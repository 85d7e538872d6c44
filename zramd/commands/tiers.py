"""Verbs of the tiers: tiers, zram's recompress, idle and writeback, and bring-back."""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from zramd.commands import Commands, add_device, add_rundirs
from zramd.control import servers
from zramd.control.human import human
from zramd.errors import DeviceError, UsageError, printable, say
from zramd.stats.tiers import ages
from zramd.stats.writeback import allowed, used
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
    """Print what is hot, cold and out; devices whose server has died are named on standard error."""
    glyphs = MONO if "utf" in (sys.stdout.encoding or "").lower() else ASCII
    found: list[dict[str, Any]] = []
    status = 0
    for served in servers.those(arguments.names, arguments.rundir):
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
        told = {"name": stats["name"], "comp_algorithm": stats["comp_algorithm"], **stats["tiers"]}
        out = {"writeback": stats["writeback"]} if "writeback" in stats else {}
        found.append(told | out)
    if arguments.json:
        print(json.dumps({"devices": found}, indent=2))
    return status


def report(stats: dict[str, Any], glyphs: Glyphs) -> str:
    """Return what is where, for how long nobody asked for it, and what the background makes of it."""
    section, out = stats["tiers"], stats.get("writeback")
    lines = [*_heading(stats), "", *_places(section, out, glyphs), "", *_ages(section, glyphs), ""]
    lines += _work(section, out)
    if out is not None:
        lines += ["", *_backing(out)]
    return "\n".join([*lines, *_reasons(section, out)]) + "\n"


def _heading(stats: dict[str, Any]) -> Iterator[str]:
    section, out = stats["tiers"], stats.get("writeback")
    cold = f"cold {section['recompression']} after {duration(section['cold_age'])}: {_mode(section)}"
    off = "recompression is off"
    yield f"{stats['name']}: hot {stats['comp_algorithm']}, {off if section['mode'] == 'off' else cold}"
    if out is not None:
        when = "" if out["mode"] == "off" else f" after {duration(out['writeback_age'])}"
        yield f"{'':<{len(stats['name'])}}  out to {printable(out['backing'])}{when}: {_mode(out)}"


def _mode(section: dict[str, Any]) -> str:
    mode: str = section["mode"]
    return _MODES.get(mode, mode)


def _places(section: dict[str, Any], out: dict[str, Any] | None, glyphs: Glyphs) -> Iterator[str]:
    """Yield a table of the tiers: what they hold, and what that takes, in memory or out."""
    rows = [
        ("hot", section["hot_pages"], section["hot_data_size"]),
        ("cold", section["cold_pages"], section["cold_data_size"]),
        ("raw", section["raw_pages"], section["raw_pages"] * 4096),
        ("same", section["same_pages"], 0),
    ]
    if out is not None:
        rows.append(("out", out["out_pages"], out["out_data_size"]))
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


def _work(section: dict[str, Any], out: dict[str, Any] | None) -> Iterator[str]:
    """Yield what was done."""
    saved, vain = human(max(section["saved_bytes"], 0)), section["recompress_useless"]
    yield f"{'':<{_LABEL}}{'a minute':>10} {'since start':>12}"
    yield _done("made cold", section, "recompressed", f"{saved} saved, {vain} tried in vain")
    yield _done("made hot", section, "promoted", "read again and again")
    if out is not None:
        moved = f", {human(out['reclaimed_bytes'])} of it moved" if out["reclaimed_bytes"] else ""
        yield _done("sent out", out, "written_out", f"{human(out['bd_writes'])} written{moved}")
        yield _done("came back", out, "brought_back", "read again and again, or asked for")
    yield f"{'processor':<{_LABEL}}{'':>10} {section['cpu_seconds']:>10.2f} s"


def _done(label: str, section: dict[str, Any], name: str, words: str) -> str:
    return f"{label:<{_LABEL}}{section[f'{name}_minute']:>10} {section[name]:>12}  {words}"


def _backing(out: dict[str, Any]) -> Iterator[str]:
    """Yield how full the backing device is, what may be written to it, and what has failed."""
    taken, bad = used(out), out["backing_bad"]
    live = f", {_share(out['out_live_bytes'], taken)} of that live" if taken else ""
    given_up = f", {human(bad)} given up" if bad else ""
    yield f"{'backing':<{_LABEL}}{human(out['backing_size']):>10}  {human(taken)} in use{live}{given_up}"
    if (size := allowed(out)) is not None:
        left = f"{human(size) if size else 'nothing'} may be written now"
        yield f"{'a day':<{_LABEL}}{human(out['writeback_limit']):>10}  {left}"
    else:
        yield f"{'a day':<{_LABEL}}{'no limit':>10}"
    reads, writes = out["bd_read_errors"], out["bd_write_errors"]
    if reads or writes:
        yield f"{'errors':<{_LABEL}}{reads + writes:>10}  {reads} reads and {writes} writes of it failed"


def _reasons(section: dict[str, Any], out: dict[str, Any] | None) -> Iterator[str]:
    """Yield why it is not more."""
    reasons = [("Not more now", section["reason"])]
    if out is not None:
        reasons = [("No more cold now", section["reason"]), ("No more out now", out["reason"])]
    for place, (label, reason) in enumerate(each for each in reasons if each[1]):
        if place == 0:
            yield ""
        yield from textwrap.wrap(f"{label}: {reason}.", WIDTH)


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


def writeback(arguments: argparse.Namespace) -> int:
    """Have the server write blocks out, and do not wait for it."""
    served = _find(arguments)
    served.request("POST", "/writeback", " ".join(arguments.settings))
    print("blocks are written out in the background: 'zramd tiers' shows how far that is")
    return 0


def bring_back(arguments: argparse.Namespace) -> int:
    """Have the server bring back all that is out, and do not wait for it."""
    served = _find(arguments)
    served.request("POST", "/bring_back")
    print("blocks are brought back in the background: 'zramd tiers' shows how far that is")
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
_WRITE_PAIRS = (
    *("type=idle", "type=huge", "type=huge_idle", "type=incompressible"),
    *("page_index=", "page_indexes="),
)
_WRITE_WORDS = """
words, as zram's file writeback takes them:
  type=idle            blocks that are marked idle (zramd idle)
  type=huge            blocks that are stored raw
  type=huge_idle       blocks that are both
  type=incompressible  blocks that recompression did not shrink
or, as often as you like:
  page_index=N         this block, however young it is
  page_indexes=N-M     these, the last one included

What is written counts against writeback_limit; once that is used up, this is
refused. If a word is wrong, nothing is done.
"""


def add(commands: Commands) -> None:
    """Add the verbs."""
    parser = commands.add_parser(
        "tiers",
        description="Show which blocks are hot, cold, raw, of one word or out on a backing device, how long "
        "ago somebody asked for them, and what the background does. Without a name: of every device.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these devices")
    add_rundirs(parser)
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
    parser = commands.add_parser(
        "writeback",
        usage="zramd writeback [--rundir FOLDER] NAME word=value ...",
        description="Have blocks written out to the backing device now that would go there by and by. The "
        "command does not wait for it.",
        more=lambda: _WRITE_WORDS,
        pairs=_WRITE_PAIRS,
    )
    add_device(parser)
    parser.set_defaults(run=writeback)
    parser = commands.add_parser(
        "bring-back",
        description="Have everything brought back into memory that is out on the backing device, so that the "
        "device can be taken away. The command does not wait for it.",
    )
    add_device(parser)
    parser.set_defaults(run=bring_back)
