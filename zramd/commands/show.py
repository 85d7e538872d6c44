"""Verbs that ask one running server: stats, classes, compact, set, check, reset, dump, debug."""

import argparse
import json
import os
import sys
import time
from typing import Any

import zramd
from zramd.commands import Commands, Parser, add_device
from zramd.contract.exchange import TIMEOUT
from zramd.contract.rundir import COMPACT_TIMEOUT
from zramd.control import servers
from zramd.errors import DeviceError, UsageError, say
from zramd.kernel import attached, swap
from zramd.launch import installed
from zramd.settings import config
from zramd.stats.numbers import NUMBERS

CHECK_TIMEOUT = 600.0  # seconds; it walks about a million blocks a second


def stats(arguments: argparse.Namespace) -> int:
    """Print every number with its unit and meaning."""
    served = servers.find(arguments.name, arguments.rundir)
    text = served.request("GET", "/stats")
    if arguments.json:
        sys.stdout.write(text)
        return 0
    values = json.loads(text)
    told = [number for number in NUMBERS if number.name in values]  # another version may have fewer
    rows = [(number.name, _shown(values[number.name]), number.unit, number.meaning) for number in told]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    print(f"{values['name']}: zramd {values['version']}, {values['comp_algorithm']}, process {values['pid']}")
    for name, value, unit, meaning in rows:
        print(f"{name:<{widths[0]}} {value:>{widths[1]}} {unit:<{widths[2]}} {meaning}")
    print("\nlatency, microseconds    count       mean        p50        p90        p99")
    for op, latency in values["latency"].items():
        times = " ".join(f"{latency[key]:10.1f}" for key in ("mean_us", "p50_us", "p90_us", "p99_us"))
        print(f"{op:<17} {latency['count']:>12} {times}")
    return 0


def _shown(value: int | float | None) -> str:
    """Return a number as it is read; there is no ratio while the pool has no page."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def classes(arguments: argparse.Namespace) -> int:
    """Print zsmalloc's table of size classes."""
    served = servers.find(arguments.name, arguments.rundir)
    sys.stdout.write(served.request("GET", "/classes.json" if arguments.json else "/classes"))
    return 0


def compact(arguments: argparse.Namespace) -> int:
    """Compact until nothing more can be freed, and print what that was."""
    served = servers.find(arguments.name, arguments.rundir)
    before = served.stats()
    started = time.monotonic()
    pages = 0
    while True:
        asked = time.monotonic()
        answer = served.ask_json("POST", "/compact", timeout=COMPACT_TIMEOUT + TIMEOUT)
        pages += answer["pages_freed"]
        if time.monotonic() - asked < COMPACT_TIMEOUT:  # else it goes on
            break
    seconds = time.monotonic() - started
    print(
        f"{pages} pages ({pages * 4096} bytes) freed in {seconds:.2f} s, "
        f"frag ratio {before['frag_ratio']:.2f} -> {answer['frag_ratio']:.2f} %"
    )
    return 0


def change(arguments: argparse.Namespace) -> int:
    """Change settings of a running server: all of them, or none if one is wrong.

    Raises UsageError for one that is fixed, or for none at all, ConfigError, DeviceError.
    """
    if not arguments.settings:
        raise UsageError("nothing to set: write it as in 'zramd set NAME mem_limit=2G'")
    given: dict[str, str] = {}
    for word in arguments.settings:
        key, _, text = word.partition("=")
        setting = config.find_once(key, text, given)
        if setting.fixed:
            raise UsageError(f"{setting.name} cannot be changed while the device is served: {setting.fixed}")
        value = config.value(setting, text)
        if setting.name == "backing":
            given[setting.name] = value  # a relative path is meant from here, not from where the server is
    # First what the server may refuse for what it finds there: then none is set.
    pairs = sorted(given.items(), key=lambda pair: pair[0] != "backing")
    served = servers.find(arguments.name, arguments.rundir)
    for name, text in pairs:
        answer = served.ask_json("PUT", f"/{name}", text)
        print(f"{name}={config.written(name, answer[name])}")
        if name == "mem_limit":
            _say_if_full(served)
    return 0


def _say_if_full(served: servers.Served) -> None:
    stats = served.stats()
    limit, used = stats["mem_limit"], stats["mem_used_total"]
    if 0 < limit < used:
        say(
            f"{used} bytes are in use already: nothing is lost, but writes that need memory fail "
            "until clients have freed some"
        )


def check(arguments: argparse.Namespace) -> int:
    """Have the server walk every structure of the device. Raises DeviceError if it is not sound."""
    served = servers.find(arguments.name, arguments.rundir)
    started = time.monotonic()
    answer = served.ask_json("POST", "/check", timeout=CHECK_TIMEOUT)
    if not answer["sound"]:
        raise DeviceError(
            f"{served.name} is not sound: {answer['fault']}: "
            f"keep the output of 'zramd dump {served.name}' for a bug report"
        )
    print(f"{served.name} is sound (checked in {time.monotonic() - started:.2f} s)")
    return 0


def reset(arguments: argparse.Namespace) -> int:
    """Drop all data of a device that has no clients."""
    served = servers.find(arguments.name, arguments.rundir)
    served.request("POST", "/reset")
    return 0


def dump(arguments: argparse.Namespace) -> int:
    """Print everything about a device as one JSON object. What cannot be had is said in its place."""
    served = servers.find(arguments.name, arguments.rundir)
    state: dict[str, Any] = {
        "zramd": zramd.__version__,
        "nbdkit": installed.nbdkit_version() or "not found",
        "python": sys.version.split()[0],
        "kernel": " ".join(os.uname()[place] for place in (0, 2, 3, 4)),
        "rundir": served.path,
        "pid": served.pid,
    }
    for part, path in (
        ("health", "/health"),
        ("settings", "/settings"),
        ("stats", "/stats"),
        ("classes", "/classes.json"),
    ):
        try:
            state[part] = served.ask_json("GET", path)
        except DeviceError as error:
            state[part] = {"error": str(error)}
    known = state["stats"]
    devices = attached.devices(known.get("name", served.name), known.get("disksize", 0))
    state["attached"] = {device: swap.uses(device) for device in devices}
    print(json.dumps(state, indent=2))
    return 0 if "error" not in known else 1


def block(arguments: argparse.Namespace) -> int:
    """Print what one block holds. Raises UsageError for what is no number, DeviceError."""
    if not (arguments.number.isascii() and arguments.number.isdigit()):
        raise UsageError(f"'{arguments.number}' is not a block's number: use 0 or more")
    served = servers.find(arguments.name, arguments.rundir)
    text = served.request("GET", f"/block/{arguments.number}")
    if arguments.json:
        sys.stdout.write(text)
        return 0
    values = json.loads(text)
    print(
        f"block         {values['block']}, bytes {values['block'] * 4096} to {values['block'] * 4096 + 4095}"
    )
    print(f"kind          {_KINDS[values['kind']]}")
    for name in ("word", "handle", "codec", "payload_bytes"):
        if name in values:
            print(f"{name:<13} {values[name]:#018x}" if name == "word" else f"{name:<13} {values[name]}")
    if "place" in values:
        print(f"place         {values['place']:#x}, bytes into the backing device")
    if "zspage" in values:
        print(f"class         {values['class_index']}, chunks of {values['class_size']} bytes")
        used = f"{values['zspage_inuse']} of {values['zspage_objs']} chunks used"
        print(f"zspage        {values['zspage']}, {used}, this one is number {values['chunk']}")
        print(f"obj           {values['obj']:#x}, bytes into the arena")
    return 0


def block_state(arguments: argparse.Namespace) -> int:
    """Print zram's block_state. Raises DeviceError."""
    served = servers.find(arguments.name, arguments.rundir)
    with served.open_stream("GET", "/block_state") as control:
        while piece := control.recv(65536):
            sys.stdout.write(piece.decode())
    return 0


_KINDS = {
    "hole": "hole: never written, or freed",
    "same": "same: one 64-bit word, repeated",
    "lz4": "lz4: compressed",
    "zstd": "zstd: compressed",
    "raw": "raw: stored as it is",
    "out": "out: on the backing device, and not in memory",
    "lost": "lost: it changed in memory, and reading it is an error until it is written again",
}


def _add(commands: Commands, name: str, run: object, text: str) -> Parser:
    parser = commands.add_parser(name, description=text)
    add_device(parser)
    parser.set_defaults(run=run)
    return parser


def _add_json(parser: Parser) -> None:
    parser.add_argument("-J", "--json", action="store_true", help="print JSON")


def _live_settings() -> str:
    free = "".join(f"  {each.name:<22} {each.help}\n" for each in config.SETTINGS if not each.fixed)
    fixed = "".join(f"  {each.name:<22} {each.fixed}\n" for each in config.SETTINGS if each.fixed)
    return f"\nsettings that can be changed:\n{free}\nand that cannot, and why:\n{fixed}"


def add(commands: Commands) -> None:
    """Add the verbs."""
    _add_json(
        _add(
            commands,
            "stats",
            stats,
            "Print every number that a device counts, with its unit and its meaning.",
        )
    )
    _add_json(
        _add(
            commands,
            "classes",
            classes,
            "Print zsmalloc's table: for each size class the zspages by fullness, objects, pages, "
            "and the pages that compaction would free.",
        )
    )
    _add(
        commands,
        "compact",
        compact,
        "Compact the pool until nothing more can be freed; print what was freed, and the frag ratio "
        "(percent of the pool that payload fills) before and after.",
    )
    parser = commands.add_parser(
        "set",
        usage="zramd set [--rundir FOLDER] NAME key=value ...",
        description="Change settings of a running device, until it stops.",
        more=_live_settings,
        settings=True,
    )
    add_device(parser)
    parser.set_defaults(run=change)
    _add(
        commands,
        "check",
        check,
        "Let the server walk every structure of the device, and say whether it is sound. "
        "Clients wait meanwhile. Exit status 1 if it is not sound.",
    )
    _add(
        commands,
        "reset",
        reset,
        "Drop all data of a device, and set its counters to 0. Refused while a client is connected.",
    )
    _add(
        commands,
        "dump",
        dump,
        "Print the whole state of a device as one JSON object, for a bug report: versions, settings, "
        "numbers, size classes. No data of the device is in it.",
    )
    parser = commands.add_parser(
        "debug",
        description="Look into a device, for developers of zramd.",
    )
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    parser = parts.add_parser(
        "block",
        help="show what one block holds",
        description="Print what stands for a block of 4096 bytes: a repeated word, or where its object is.",
    )
    add_device(parser)
    parser.set_defaults(run=block)
    parser.add_argument("number", metavar="N", help="the block's number, from 0 on")
    _add_json(parser)
    parser = parts.add_parser(
        "block_state",
        help="list the blocks that are stored, as zram's block_state does",
        description="Print a line for each block that is stored, in the format of zram's block_state: its "
        "number; when it was last asked for, in seconds since boot; and what it is: s same-filled, w written "
        "out, h stored raw, i marked idle, r recompressed, n not shrunk by recompression.",
    )
    add_device(parser)
    parser.set_defaults(run=block_state)
