"""`zramd restart`; zramd.launch.takeover does the work, zramd.launch.upgrading for all servers."""

import argparse

from zramd.commands import Commands, add_device
from zramd.errors import UsageError
from zramd.launch import takeover, upgrading


def restart(arguments: argparse.Namespace) -> int:
    """Put a new server into the place of a running one; say how long nobody answered. Raises UsageError."""
    if arguments.all:
        if arguments.name or arguments.rundir or arguments.settings:
            raise UsageError("--all means every device, as it is: leave out NAME, --rundir and key=value")
        return 0 if upgrading.restart_all() else 1
    name, pid, away = takeover.restart(arguments.name, arguments.rundir, arguments.settings)
    print(f"{'name':<13} {name}\n{'pid':<13} {pid}\n{'away for':<13} {away * 1000:.0f} ms")
    return 0


def add(commands: Commands) -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "restart",
        usage="zramd restart NAME [key=value ...] [--rundir FOLDER]\n       zramd restart --all",
        description="Start a new server, of this version of zramd, in the place of a running one that has a "
        "state; key=value changes settings. Clients connect again by themselves, if they can (qemu's "
        "reconnect-delay, zramd attach), and no data is lost. "
        "If the new server cannot start, the old one goes on.",
        settings=True,
    )
    add_device(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        help="restart every server that has a state, as after an upgrade; the others go on as they are",
    )
    parser.set_defaults(run=restart)
