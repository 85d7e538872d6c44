"""`zramd guest-tool`; zramd.launch.guesttool does the work."""

import argparse

from zramd.commands import Commands, folder
from zramd.launch import guesttool


def write(arguments: argparse.Namespace) -> int:
    """Write zramd-guest and its units into a new folder."""
    for path in guesttool.write(arguments.folder):
        print(path)
    return 0


def add(commands: Commands) -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "guest-tool",
        description="Make a folder with zramd-guest, one file that needs Python 3.9 and nothing else, and\n"
        "its systemd units: for a guest that swaps to a zramd disk, without a package (docs/guests.md).",
    )
    parser.add_argument("folder", metavar="FOLDER", type=folder, help="the folder, which is made")
    parser.set_defaults(run=write)
