"""`zramd attach` and `zramd detach`; zramd.launch.attaching does the work."""

import argparse
from collections.abc import Callable

from zramd.commands import Commands, add_device
from zramd.kernel import ublk
from zramd.launch import attaching, nbdway
from zramd.launch.nbdway import TIMEOUT, TIMEOUT_OF_SEVERAL
from zramd.launch.wishes import DEAD_CONN_TIMEOUT, PRIORITY, Wanted
from zramd.settings import amounts, keys

MAX_SECONDS = 999_999  # more than eleven days


def attach(arguments: argparse.Namespace) -> int:
    """Attach a device, swap to it if asked, and print its name."""
    wanted = Wanted(
        device=arguments.device or "",
        connections=arguments.connections,
        timeout=arguments.timeout,
        dead_conn_timeout=arguments.dead_conn_timeout,
        swap=arguments.swap,
        priority=arguments.priority,
        areas=arguments.areas,
        swapon_options=arguments.swapon_options,
        nbd_client=arguments.nbd_client,
        standby=arguments.standby,
        configured=arguments.config,
    )
    device = attaching.attach(arguments.name, arguments.rundir, wanted)
    if device:
        print(device)
    return 0


def detach(arguments: argparse.Namespace) -> int:
    """Detach a device, swapping off first if asked."""
    attaching.detach(
        arguments.name,
        arguments.rundir,
        swapoff=arguments.swapoff,
        force=arguments.force,
        if_attached=arguments.if_attached,
        configured=arguments.config,
    )
    return 0


def _device(text: str) -> str:
    if nbdway.index_of(text) is None and ublk.number_of(text) is None:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not an NBD device, such as /dev/nbd0, or a ublk device, such as /dev/ublkb0"
        )
    return text if text.startswith("/dev/") else f"/dev/{text}"


def _whole(least: int, most: int, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = amounts.whole(text, least, most)
        if number is None:
            raise argparse.ArgumentTypeError(f"'{text}' is not {what} from {least} to {most}")
        return number

    return parse


def _seconds(text: str) -> float:
    seconds = amounts.number(text, 0, MAX_SECONDS)
    if seconds is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds, such as 0.5 or 30")
    return seconds


def add(commands: Commands) -> None:
    """Add the verbs."""
    parser = commands.add_parser(
        "attach",
        description=(
            "Attach a running device to this machine's kernel and print the block device's name: by NBD, or\n"
            "by ublk where the server has front=ublk. A small process stays and connects the kernel again\n"
            "after the server was restarted with the same data. It reports to the kernel's log.\n"
            "\n"
            "A device of another machine is named by its URI, nbd://HOST[:PORT]/NAME. Nothing on that way\n"
            "is encrypted but by what is below it, such as WireGuard: the kernel's NBD has no TLS."
        ),
        more=lambda: (
            "\nWhile the server is away, requests wait. By NBD new ones fail after --dead-conn-timeout:\n"
            "programs whose memory was swapped out get SIGBUS. By ublk they wait until a server comes, or\n"
            "the device is detached; the device of a server without state= ends with it. A server with\n"
            "other data is never used. Of NBD only: --connections, --timeout, --dead-conn-timeout,\n"
            "--nbd-client. Of this machine's servers only: --rundir, --config, --standby, --nbd-client.\n"
        ),
    )
    add_device(parser)
    parser.add_argument(
        "--config",
        action="store_true",
        help="attach it as /etc/zramd.conf says, and swap to it or not: the other options have no effect; "
        "what is attached already stays so",
    )
    parser.add_argument(
        "--device",
        type=_device,
        metavar="/dev/NAME",
        help="use this one, nbdN or ublkbN [a free one]",
    )
    parser.add_argument(
        "--connections",
        type=_whole(1, 16, "a number of connections"),
        metavar="N",
        help="number of connections, up to 16 [1]",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help=(
            f"seconds after which a request of a lost connection is sent again [{TIMEOUT:g}]; with several "
            f"connections a server that is slower is cut off [{TIMEOUT_OF_SEVERAL:g}]"
        ),
    )
    parser.add_argument(
        "--dead-conn-timeout",
        type=_whole(0, 1_000_000, "a number of seconds"),
        metavar="S",
        help=f"seconds that requests wait for a new server before they fail [{DEAD_CONN_TIMEOUT}]",
    )
    parser.add_argument("--swap", action="store_true", help="mkswap and swapon; what the device held is lost")
    parser.add_argument(
        "--priority",
        type=_whole(-1, 32767, "a priority"),
        default=PRIORITY,
        metavar="P",
        help=f"of the swap, -1 to 32767: the highest is used first; of several areas the first has it, "
        f"and each one after it one less [{PRIORITY}]",
    )
    parser.add_argument(
        "--areas",
        type=_whole(1, keys.MOST_AREAS, "a number of areas"),
        default=0,
        metavar="N",
        help=(
            f"divide the device into so many areas, up to {keys.MOST_AREAS}, and swap to one after the "
            "other: then 'zramd refresh' gives back what swap has freed [one for each 64 MiB, at most 8]"
        ),
    )
    parser.add_argument(
        "--no-discard",
        dest="swapon_options",
        action="store_const",
        const="",
        default="discard",
        help="never trim what swap has freed: its memory stays in use",
    )
    parser.add_argument(
        "--standby",
        action=argparse.BooleanOptionalAction,
        help="by ublk: have another server ready, in memory, for when this one crashes: it takes over at "
        "once, however short memory is [with --swap and state=, unless it runs in the foreground]",
    )
    parser.add_argument(
        "--nbd-client", action="store_true", help="use that program, which cannot survive a restart"
    )
    parser.set_defaults(run=attach)

    parser = commands.add_parser(
        "detach",
        description="Detach a device from this machine's kernel. Refused while it is mounted or swapped\n"
        "to. One of another machine is named by its URI, or as 'zramd list' shows it.",
    )
    add_device(parser)
    parser.add_argument("--swapoff", action="store_true", help="swap off first; Ctrl-C stops it")
    parser.add_argument(
        "--force",
        action="store_true",
        help="swap off even if there is not enough memory for what must come back; and give up what is "
        "swapped out to a ublk device whose server is gone for good",
    )
    parser.add_argument(
        "--if-attached", action="store_true", help="succeed without doing anything if it is not attached"
    )
    parser.add_argument(
        "--config",
        action="store_true",
        help="likewise if /etc/zramd.conf has attach = no for it and no swap is on it: somebody else "
        "attached it",
    )
    parser.set_defaults(run=detach)
