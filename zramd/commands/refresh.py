"""`zramd refresh`; zramd.launch.refreshing does the work."""

import argparse

from zramd.commands import Commands
from zramd.errors import UsageError
from zramd.launch import refreshing


def refresh(arguments: argparse.Namespace) -> int:
    """Refresh the swap on one device, or on all, and print what was done. Raises UsageError."""
    if arguments.all:
        if arguments.name:
            raise UsageError("--all means every device: leave out NAME")
        return 0 if refreshing.every(_tell, dry_run=arguments.dry_run) else 1
    if not arguments.name:
        raise UsageError("which device? Give its name, as 'zramd list' shows it, or --all")
    refreshing.one(arguments.name, _tell, dry_run=arguments.dry_run)
    return 0


def _tell(sentence: str) -> None:
    print(sentence, flush=True)


def add(commands: Commands) -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "refresh",
        usage="zramd refresh NAME [--dry-run]\n       zramd refresh --all [--dry-run]",
        description="Give back the memory of what swap on an attached device has freed, and what Linux has "
        "not told of: areas in which little lives are swapped off, discarded, and swapped to again; free "
        "places of the others are wiped. It does so only where it is worth it and while memory is at ease. "
        "What is under way is given up when memory gets short or another command wants the device.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="the device's name, as 'zramd list' shows it")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every device that this machine swaps to, as zramd-refresh.timer does",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.set_defaults(run=refresh)
