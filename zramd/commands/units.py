"""`zramd install-units` and `zramd remove-units`; zramd.launch.units does the work."""

import argparse

from zramd.commands import Commands
from zramd.launch import units

PREFIX = "/usr/local"  # of what an administrator installs; distributions use /usr


def install(arguments: argparse.Namespace) -> int:
    """Write the units, an example configuration if there is none, and let systemd read them."""
    return units.install(arguments)


def remove(arguments: argparse.Namespace) -> int:
    """Remove what `install` has written."""
    return units.remove(arguments)


def add(commands: Commands) -> None:
    """Add the verbs."""
    for name, run, text, more in (
        (
            "install-units",
            install,
            "write the systemd units of this installation",
            ", and an example of\n/etc/zramd.conf where there is none. Run it again after an update; "
            "'systemctl edit' keeps changes apart.",
        ),
        (
            "remove-units",
            remove,
            "remove the systemd units again",
            ", and the example\nof /etc/zramd.conf if it was never changed.",
        ),
    ):
        parser = commands.add_parser(
            name,
            description=f"{text.capitalize()}: zramd@.service, zramd-attach@.service, "
            f"zramd-refresh.service, zramd-refresh.timer, zramd-net@.service, zramd.slice{more}",
        )
        parser.add_argument(
            "--root", metavar="FOLDER", help="the folder that stands for /, to prepare another system [/]"
        )
        parser.add_argument(
            "--prefix",
            metavar="FOLDER",
            default=PREFIX,
            help=f"units go to lib/systemd/system in it [{PREFIX}]",
        )
        parser.set_defaults(run=run)
