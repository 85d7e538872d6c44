"""The command zramd-guest."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable

from . import files
from .areas import disks, size_of
from .files import MIB, PAGE, GuestError
from .layout import PRIORITY, setup, take_off
from .notes import read_notes, turn
from .refresh import refresh, view


def _status(disk: str) -> None:
    notes = read_notes(disk)
    rows = view(disk, notes)
    print(
        f"{disk}: {size_of(disk) // MIB} MiB in {len(rows)} swap areas" if rows else f"{disk}: not swapped to"
    )
    for area, stored in rows:
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
        "--areas", type=_whole(1, 24), help="how many [one for each 64 MiB, at most 16]", metavar="N"
    )
    add["setup"].add_argument(
        "--priority", type=_whole(0, 32767), default=PRIORITY, help="of the first one [100]", metavar="P"
    )
    add["refresh"].add_argument("--dry-run", action="store_true", help="only say what would be done")
    return parser.parse_args(words)


def _do(arguments: argparse.Namespace) -> None:
    found = arguments.disk or disks()
    if not found:
        raise GuestError(
            "no disk of a zramd is here: give it a serial number that begins with 'zramd' "
            "(qemu: -device virtio-blk-pci,serial=zramd-NAME), or name it with --disk"
        )
    for disk in found:
        if not os.path.exists(f"{files.SYS}/block/{os.path.basename(disk)}"):
            raise GuestError(f"there is no disk '{disk}'")
        if arguments.verb == "setup":
            print("\n".join(setup(disk, arguments.areas, arguments.priority)))
        elif arguments.verb == "off":
            take_off(disk)
        elif arguments.verb == "status":
            _status(disk)
        else:
            todo = refresh(disk, lambda words: print(words, flush=True), dry_run=arguments.dry_run)
            if not todo.dead:
                print(f"{disk}: nothing is worth it")


def main(words: list[str] | None = None) -> int:
    """Do what the command line says; return 0, or 1 when it went wrong."""
    arguments = _arguments(words)
    try:
        if arguments.verb == "status" or getattr(arguments, "dry_run", False):
            _do(arguments)
        else:
            if os.geteuid():
                raise GuestError(f"only root may do this: run 'sudo zramd-guest {arguments.verb}'")
            with turn():
                _do(arguments)
    except GuestError as error:
        print(f"zramd-guest: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"zramd-guest: {name}{error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
