"""The command zramd-guest: swap on zramd's disks, laid out so that what swap has freed comes back to memory.

A kernel tells a block device of swap that it has freed only where a whole cluster (512 pages) is free, so
most of what programs leave behind when they end stays stored: dead blocks. Two things help, and this does
both:

- Areas: the disk is divided, and the kernel swaps to the parts in a fixed order (descending priorities). It
  then uses freed places of the first areas again before it goes on to the next.
- Refresh: when memory is at ease, an area in which little lives is *emptied*: swapoff brings that back,
  swapon discards all of it. Where much lives, its free places are *wiped*: a program takes them all with
  pages of one repeated word, which a zramd stores in no memory, and gives them back. What is free, only the
  kernel says.

This runs in guests too, where there is no zramd: it needs Python's standard library (3.9 or newer) and
nothing else, and is packed into one file, zramd-guest. On the machine that serves, `zramd refresh` uses it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial

from . import files
from .areas import disks, size_of
from .files import MIB, PAGE, GuestError, NotForSwap
from .layout import PRIORITY, setup, take_off
from .memory import zswap_is_on
from .notes import read_notes, turn
from .refresh import refresh, view


def _status(disk: str) -> None:
    notes = read_notes(disk)
    rows = view(disk, notes)
    print(
        f"{disk}: {size_of(disk) // MIB} MiB in {len(rows)} swap areas" if rows else f"{disk}: not swapped to"
    )
    for area, stored, _ in rows:
        dead = max(0, stored - area.used)
        print(
            f"  {area.path:<12} priority {area.priority:>3}  {area.pages * PAGE // MIB:6} MiB, "
            f"{area.used * PAGE / MIB:8.1f} used, {dead * PAGE / MIB:8.1f} dead"
        )
    if notes.last:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(notes.last["time"]))
        freed, back, seconds = (notes.last[key] for key in ("freed", "read_back", "seconds"))
        print(f"  last refresh: {when}, up to {freed} pages became free, {back} read back, {seconds} s")


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,6}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {least} to {most}")
        return int(text)

    return parse


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="zramd-guest",
        description="Swap on zramd's disks, laid out so that what swap has freed comes back to memory.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = {}
    for name, words_of in (
        ("setup", "divide the disks into areas, mkswap and swap to them; what is on already stays"),
        ("refresh", "give back what swap has freed, where it is worth it and memory is at ease"),
        ("status", "show the areas: what is used, what is dead (stored, but no longer used; at most)"),
        ("off", "swap off all areas; refused if memory cannot hold what comes back"),
    ):
        add[name] = verbs.add_parser(name, help=words_of, description=f"{words_of[0].upper()}{words_of[1:]}.")
        add[name].add_argument(
            "--disk",
            action="append",
            help="such as /dev/vdb; may be given again [all whose serial number begins with 'zramd']",
        )
    add["setup"].add_argument(
        "--areas", type=_whole(1, 24), help="how many [one for each 64 MiB, at most 8]", metavar="N"
    )
    add["setup"].add_argument(
        "--priority", type=_whole(0, 32767), default=PRIORITY, help="of the first one [100]", metavar="P"
    )
    add["refresh"].add_argument("--dry-run", action="store_true", help="only say what would be done")
    add["refresh"].add_argument("--quiet", action="store_true", help="only say what was done or went wrong")
    for name in ("setup", "refresh", "off"):
        add[name].add_argument(
            "--if-any", action="store_true", help="do nothing if no disk of a zramd is here: for services"
        )
    return parser.parse_args(words)


def _do(arguments: argparse.Namespace) -> int:
    """Do it for each disk, whatever became of the one before; return the exit status. Raises GuestError."""
    found = arguments.disk or disks()
    if not found and getattr(arguments, "if_any", False):
        return 0
    if not found:
        raise GuestError(
            "no disk of a zramd is here: give it a serial number that begins with 'zramd' "
            "(qemu: -device virtio-blk-pci,serial=zramd-NAME), or name it with --disk"
        )
    if arguments.verb in ("setup", "status") and zswap_is_on():
        print(
            "zswap is on: areas in which much lives cannot be refreshed; "
            f"'echo N >{files.SYS}/module/zswap/parameters/enabled' turns it off"
        )
    status = 0
    for disk in found:
        try:
            _do_one(disk, arguments)
        except GuestError as error:
            _say(error)
            status = 1
    return status


def _do_one(disk: str, arguments: argparse.Namespace) -> None:
    if not os.path.exists(f"{files.SYS}/block/{os.path.basename(disk)}"):
        raise GuestError(f"there is no disk '{disk}'")
    if arguments.verb == "setup":
        _setup(disk, arguments)
    elif arguments.verb == "off":
        take_off(disk)
    elif arguments.verb == "status":
        _status(disk)
    else:
        say = partial(print, flush=True)
        todo = refresh(disk, say, dry_run=arguments.dry_run, quiet=arguments.quiet)
        if not todo.dead and not arguments.quiet:
            print(f"{disk}: nothing is worth it")


def _setup(disk: str, arguments: argparse.Namespace) -> None:
    """Swap to a disk. One that nobody has named and that is used for something else is left alone."""
    try:
        print("\n".join(setup(disk, arguments.areas, arguments.priority)))
    except NotForSwap as error:
        if arguments.disk:
            raise
        print(f"left alone: {error}")


def _say(words: object) -> None:
    print(f"zramd-guest: {words}", file=sys.stderr)


def main(words: list[str] | None = None) -> int:
    """Do what the command line says; return 0, or 1 when it went wrong."""
    arguments = _arguments(words)
    try:
        if arguments.verb == "status" or getattr(arguments, "dry_run", False):
            return _do(arguments)
        if os.geteuid():
            raise GuestError(f"only root may do this: run 'sudo zramd-guest {arguments.verb}'")
        with turn():
            return _do(arguments)
    except GuestError as error:
        _say(error)
    except OSError as error:
        _say((f"{error.filename}: " if error.filename else "") + str(error.strerror))
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
