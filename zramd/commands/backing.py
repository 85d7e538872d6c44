"""`zramd backing`: what lies on a backing, a backing made ready, and who may use it."""

import argparse
import json
import os
import time
from typing import Any

from zramd.commands import Commands
from zramd.contract import superblock
from zramd.contract.superblock import EXTENT, Superblock
from zramd.control.human import spelled
from zramd.kernel import backingdevice
from zramd.kernel.backingdevice import Opened
from zramd.launch import backingunit
from zramd.settings import values


def show(arguments: argparse.Namespace) -> int:
    """Print what the superblock says."""
    opened = backingdevice.open_to_look(values.path(arguments.path))
    try:
        found, user = backingdevice.look(opened), backingdevice.used_by(opened)
    finally:
        os.close(opened.fd)
    if arguments.json:
        print(json.dumps(_as_dict(opened, found, bool(user)), indent=2))
        return 0
    rows = _rows(opened, found, user)
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")
    return 0


def _rows(opened: Opened, found: Superblock | None, user: str) -> dict[str, str]:
    rows = {"backing": opened.path, "size": _size(opened, found)}
    if found is None:
        rows["holds"] = "nothing: the first server that uses it makes it its own"
    elif not found.data_id:
        rows["holds"] = "nothing: it was formatted, and no server has used it yet"
    else:
        rows["holds"] = f"blocks of {found.name}, data {found.data_id}"
        rows["needed"] = _needed(found, bool(user))
    if found:
        rows["written"] = f"{_local(found.claimed)}, {_where(found)}"
        rows["granule"] = f"{found.granule} bytes"
    rows["used now"] = f"yes, by {user}" if user else "no"
    return rows


def _size(opened: Opened, found: Superblock | None) -> str:
    size = opened.size
    text = f"{spelled(size)}, {size // EXTENT} extents of {spelled(EXTENT)}"
    if found is None or found.size == size:
        return text
    changed = "has shrunk" if size < found.size else "has grown"
    return f"{text}; it {changed}: it had {spelled(found.size)} when the superblock was written"


def _needed(found: Superblock, used: bool) -> str:
    if used:
        return "yes, now"
    return "perhaps: that data has a state" if found.is_needed() else "no: that data is gone"


def _where(found: Superblock) -> str:
    if not found.machine or found.machine != superblock.machine_id():
        return f"on another machine, {found.machine or 'which has no id'}"
    return "since this machine was booted" if found.boot == superblock.boot_id() else "before the last boot"


def _local(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _as_dict(opened: Opened, found: Superblock | None, used: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"backing": opened.path, "size": opened.size, "used": used}
    if found:
        result |= {"superblock": found._asdict(), "needed": found.is_needed()}
    return result


def make_free(arguments: argparse.Namespace) -> int:
    """Make a backing that any device may use."""
    path = values.path(arguments.path)
    made = backingdevice.make_free(path, force=arguments.force)
    print(f"{path} is ready: {spelled(made.size)}")
    return 0


def allow(arguments: argparse.Namespace) -> int:
    """Let a device's service use its backing."""
    for sentence in backingunit.allow(arguments.name):
        print(sentence)
    return 0


def add(commands: Commands) -> None:
    """Add the verbs."""
    parser = commands.add_parser(
        "backing",
        description="Look at the block device or file to which a device writes what nobody asks for, and "
        "make one ready (docs/backing.md).",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    one = verbs.add_parser(
        "show",
        help="print whose blocks are on a backing",
        description="Print whose blocks are on a backing, and whether a server uses it now. Nothing is "
        "changed. Exit status 1 if it is none.",
    )
    one.add_argument("path", metavar="PATH", help="the block device or file")
    one.add_argument("-J", "--json", action="store_true", help="print JSON; sizes in bytes")
    one.set_defaults(run=show)
    one = verbs.add_parser(
        "format",
        help="make a backing ready for any device",
        description="Make a block device or a preallocated file ready as a backing for any device. Refused "
        "while it is in use; and, without --force, if something else is on it, or blocks that a device may "
        "need.",
    )
    one.add_argument("path", metavar="PATH", help="the block device or file")
    one.add_argument("-f", "--force", action="store_true", help="whatever is on it is lost")
    one.set_defaults(run=make_free)
    one = verbs.add_parser(
        "allow",
        help="let the service of a device use its backing",
        description="Write a drop-in that lets the service zramd@NAME use the backing that zramd.conf gives "
        "the device, and nothing else. Run it again when that changes.",
    )
    one.add_argument("name", metavar="NAME", help="the device, as zramd.conf names it")
    one.set_defaults(run=allow)
