"""`zramd restart`; zramd.launch.takeover does the work."""

import argparse

from zramd.commands import Commands, add_device
from zramd.launch import takeover


def restart(arguments: argparse.Namespace) -> int:
    """Put a new server into the place of a running one, and say how long nobody answered."""
    name, pid, away = takeover.restart(arguments.name, arguments.rundir, arguments.settings)
    print(f"{'name':<13} {name}\n{'pid':<13} {pid}\n{'away for':<13} {away * 1000:.0f} ms")
    return 0


def add(commands: Commands) -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "restart",
        usage="zramd restart NAME [key=value ...] [--rundir FOLDER]",
        description="Start a new server, of this version of zramd, in the place of a running one that has a "
        "state; key=value changes settings. Clients connect again by themselves, if they can (qemu's "
        "reconnect-delay, zramd attach), and no data is lost. "
        "If the new server cannot start, the old one goes on.",
        settings=True,
    )
    add_device(parser)
    parser.set_defaults(run=restart)
