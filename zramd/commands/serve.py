"""`zramd serve`, `zramd start` and `zramd stop`; zramd.launch.lifecycle does the work."""

import argparse

from zramd.commands import Commands, Parser, add_device
from zramd.contract import rundir
from zramd.errors import say
from zramd.launch import lifecycle
from zramd.launch.lifecycle import DEFAULT_SIZE
from zramd.launch.uris import uri
from zramd.launch.watcher import attach_command
from zramd.settings import config


def serve(arguments: argparse.Namespace) -> int:
    """Become the server."""
    words = _with_front(arguments)
    lifecycle.serve(arguments.name, arguments.size, words, arguments.nbdkit_options, arguments.config)
    return 0


def _with_front(arguments: argparse.Namespace) -> list[str]:
    """Return the settings that were given, --ublk among them."""
    return [*arguments.settings, *(["front=ublk"] if arguments.ublk else [])]


def start(arguments: argparse.Namespace) -> int:
    """Start a server in the background, and say where it is."""
    settings, options, pid = lifecycle.start(
        arguments.new_name, arguments.size, _with_front(arguments), arguments.nbdkit_options
    )
    lines = [("name", settings.name), ("pid", str(pid)), ("stats folder", settings.rundir)]
    if settings.front == "ublk":
        lines.append(("front", "ublk: this machine's kernel, once it is attached"))
        lines.append(("attach", attach_command(settings)))
    else:
        if not options.other_transport and not settings.listen:
            lines.append(("socket", f"{settings.rundir}/{rundir.NBD_SOCKET}"))
        lines.append(("NBD URI", uri(settings, options) or "as nbdkit was told"))
    print("".join(f"{what:<13} {value}\n" for what, value in lines), end="")
    if settings.backing and not settings.state:  # a server in the foreground says so itself
        say(f"what goes to backing '{settings.backing}' is lost when this server ends: it has no state")
    return 0


def stop(arguments: argparse.Namespace) -> int:
    """Stop a server."""
    lifecycle.stop(arguments.name, arguments.rundir, force=arguments.force)
    return 0


def _settings_help() -> str:
    return (
        f"\nsettings [default]:\n{config.help_text()}\n"
        "Sizes take K, M, G, T, P or E. What follows -- goes to nbdkit: a TCP port, TLS, filters.\n"
        "Without it nothing listens on the network.\n\n"
        "examples:\n"
        "  zramd serve\n"
        "  zramd serve --name swap0 --size 8G mem_limit=2G\n"
        "  zramd serve --config zram0 mem_limit=2G\n"
        "  zramd serve listen=:10809 tls=psk:/etc/zramd/zram0.psk\n"
        "  zramd start swap0 --size 8G mem_limit=2G\n"
        "  zramd start swap0 --size 8G --ublk swap=local\n"
        "  zramd start zram0\n"
    )


def _add_ublk(parser: Parser) -> None:
    parser.add_argument(
        "--ublk",
        action="store_true",
        help="as front=ublk: without nbdkit, for this machine's kernel alone, which is faster",
    )


def add(commands: Commands) -> None:
    """Add the verbs."""
    parser = commands.add_parser(
        "start",
        usage="zramd start [NAME] [--size SIZE] [--ublk] [key=value ...] [-- NBDKIT-OPTIONS]",
        description="Serve a compressed device in the background; wait until it answers, print where it is. "
        "What it has to say goes to the file 'log' in its run folder. Without --size, a NAME that "
        "/etc/zramd.conf has is started as configured there; key=value overrides.",
        more=_settings_help,
        settings=True,
        nbdkit_options=True,
    )
    parser.add_argument("new_name", metavar="NAME", nargs="?", help="name of the device [zram0]")
    parser.add_argument("--size", help=f"size of the device before compression [{DEFAULT_SIZE}]")
    _add_ublk(parser)
    parser.set_defaults(run=start)

    parser = commands.add_parser(
        "stop",
        description="Stop a server and wait for its end. Without a state its data is lost: then it refuses "
        "while clients are connected. With one it is kept. "
        "Refuses while this machine's kernel swaps to the device or has it mounted.",
    )
    add_device(parser)
    parser.add_argument(
        "--force", action="store_true", help="stop it even if clients are connected that lose their data"
    )
    parser.set_defaults(run=stop)

    parser = commands.add_parser(
        "serve",
        usage="zramd serve [--config NAME | --name NAME] [--size SIZE] [--ublk] [key=value ...]\n"
        "                   [-- NBDKIT-OPTIONS]",
        description="Serve a compressed device in the foreground: on a unix socket in the run folder, "
        "or, with --ublk, to this machine's kernel alone.",
        more=_settings_help,
        settings=True,
        nbdkit_options=True,
    )
    parser.add_argument(
        "--config", metavar="NAME", help="serve the device that /etc/zramd.conf has under this name"
    )
    parser.add_argument("--name", help="name of the device and of the NBD export [zram0]")
    parser.add_argument("--size", help=f"size of the device before compression [{DEFAULT_SIZE}]")
    _add_ublk(parser)
    parser.set_defaults(run=serve)
