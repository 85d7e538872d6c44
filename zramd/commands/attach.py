"""`zramd attach` and `zramd detach`: a kernel block device for a zramd, and swap on it if asked."""

import argparse
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from glob import glob

import zramd
from zramd import trusted
from zramd.commands import Commands, add_device, say
from zramd.commands.serve import sudo
from zramd.contract import rundir
from zramd.control import client, life
from zramd.errors import AttachError, ConfigError, DeviceError, UsageError
from zramd.kernel import attached, kernelswap, netlink, swapunit
from zramd.kernel.attached import Attached
from zramd.kernel.keeper import Job
from zramd.process import interrupts, steps
from zramd.process.steps import step
from zramd.settings import config, devices

PRIORITY = 100  # before any other swap, as zram-generator has it
DEAD_CONN_TIMEOUT = 120  # seconds
TIMEOUT = 1.0  # seconds; see zramd.kernel.keeper on why it is no danger with one connection
TIMEOUT_OF_SEVERAL = 30.0
APPEARS = 5.0  # seconds in which a device must have come or gone
_STATS_BYTES = 64 << 10  # stats.json has a few thousand
_DEVICE = re.compile(r"(?:/dev/)?nbd(\d{1,4})")


def attach(arguments: argparse.Namespace) -> int:
    """Attach a device, swap to it if asked, and print its name."""
    if arguments.name is not None:
        arguments.name = client.name_of(arguments.name)
    elif not arguments.rundir:
        raise UsageError("which device? Give its name, as 'zramd list' shows it, or --rundir FOLDER")
    elif arguments.config:
        raise UsageError("--config takes what zramd.conf has under a NAME: give that")
    if arguments.config and not _configure(arguments):
        return 0
    _must_be_root("attach", arguments)
    interrupts.interruptible()
    served = client.look(arguments.name, arguments.rundir)
    # Until it is attached, the server must neither leave nor be replaced: it is known by its data.
    with interrupts.told(lambda: _stands(served.name)), life.turn(served.path, served.name):
        served.look_again()
        if arguments.name is None:
            served.name = _own_name(served)
        if arguments.swap:
            _refuse_others(served)
        step("attach.turn")
        print(_attach(arguments, served))
    return 0


def _attach(arguments: argparse.Namespace, served: client.Served) -> str:
    """Attach a device and swap to it if asked; return its name."""
    address = served.file(rundir.NBD_SOCKET)
    there = attached.find(served.name)
    if there and arguments.config and there.data and there.data != attached.data_of(served.path):
        _drop(there, "a server that has ended")
        there = None
    elif there and there.is_half:
        _drop(there, "an attach that was killed")
        there = None
    if there and (there.keeper or not there.data):
        if not arguments.config:
            raise AttachError(
                f"{served.name} is attached as {there.device} already: 'zramd detach {served.name}' first"
            )
        device = there.device
    elif there:
        say(f"{there.device} has lost its keeper: starting another")
        device = there.device
        _start_keeper(_job(arguments, served, _index(device), there.data))
    elif arguments.nbd_client or not _has_netlink():
        device = _by_nbd_client(arguments, served.name, address)
    else:
        device = f"/dev/nbd{_start_keeper(_job(arguments, served, arguments.device))}"
    keeper = 0
    try:
        step("attach.attached")
        with attached.turn(served.name):
            now = attached.find(served.name)
            keeper = now.keeper if now else 0
            if now is None or now.device != device:
                raise AttachError(f"{served.name} was detached again before it could be used")
            if not now.keeper and now.data:
                raise AttachError(f"the keeper of {served.name} has died: it is not attached")
            _use(arguments, served.name, device)
    except BaseException:
        if not there and kernelswap.find(device) is None:  # half an attachment would be nobody's
            _undo(served.name, keeper)
        raise
    return device


def _undo(name: str, keeper: int) -> None:
    """Take away what an attach by `keeper` has left. What went wrong first is what counts."""
    with suppress(AttachError, OSError):
        there = attached.find(name)
        if there and there.keeper in (0, keeper):
            _take_away(there)
        attached.remove(name)


def _stands(name: str) -> str:
    """Return how a device stands, for who interrupts a command."""
    there = attached.find(name)
    if there is None:
        return f"{name} is not attached"
    swap = kernelswap.find(there.device)
    out = f", and swapped to: {swap.used >> 20} MiB are out" if swap else ""
    return f"{name} is attached as {there.device}{out}"


def _use(arguments: argparse.Namespace, name: str, device: str) -> None:
    """Wait for a device that was attached, and swap to it if asked."""
    _wait(lambda: os.path.exists(device), f"{device} does not appear: is /dev a devtmpfs, or udev running?")
    if arguments.swap and kernelswap.find(device) is None:
        if arguments.config and (changed := kernelswap.set_memory_aside()):
            say(changed)
        if arguments.config:
            swapunit.order(device, name)
        kernelswap.on(device, arguments.priority, options=arguments.swapon_options)
    step("attach.used")


def _refuse_others(served: client.Served) -> None:
    """Raise AttachError for swap on a server that is not root's: its owner reads what is swapped out."""
    process = served.process()
    process.close()
    if process.uid:
        raise AttachError(
            f"the server of {served.name} belongs to {trusted.user(process.uid)}, who could read and change "
            "what is swapped out: serve it as root, or attach it without --swap"
        )


def _drop(there: Attached, whom: str) -> None:
    """Detach what an ended server or attach has left. Raises AttachError if it is in use."""
    use = ["swap"] if kernelswap.find(there.device) else kernelswap.mounts(there.device)
    if use:
        raise AttachError(
            f"{there.device} is in use as '{use[0]}', but left over from {whom}: "
            f"'zramd detach --swapoff {there.name}' first"
        )
    say(f"{there.device} is left over from {whom}: detaching it")
    _take_away(there)


def _configure(arguments: argparse.Namespace) -> bool:
    """Take what zramd.conf says into `arguments`; return False, with a word, if nothing is to be attached.

    Raises ConfigError.
    """
    try:
        device = devices.find(arguments.name)
    except devices.SkippedError as skipped:
        say(str(skipped))
        return False
    if not device.attached:
        say(f"{device.name} is for others to attach: attach = no")
        return False
    arguments.rundir = arguments.rundir or device.rundir
    arguments.swap = device.swaps
    arguments.priority, arguments.swapon_options = device.swap_priority, device.options
    arguments.timeout, arguments.dead_conn_timeout = device.timeout, device.dead_conn_timeout
    arguments.connections = device.connections
    return True


def _for_others(name: str) -> bool:
    """Say whether zramd.conf leaves it to others to attach a device. Who attached it, detaches it."""
    try:
        return not devices.find(name).attached
    except ConfigError:
        return False


def detach(arguments: argparse.Namespace) -> int:
    """Detach a device, swapping off first if told."""
    if arguments.name is not None:
        arguments.name = client.name_of(arguments.name)
        client.must_be_a_name(arguments.name)
    else:
        arguments.name = _own_name(client.look(None, arguments.rundir))
    _must_be_root("detach", arguments)
    interrupts.interruptible()
    with interrupts.told(lambda: _stands(arguments.name)), attached.turn(arguments.name):
        there = attached.find(arguments.name)
        if there is not None:
            _detach(arguments, there)
        elif not arguments.if_attached:
            raise AttachError(f"{arguments.name} is not attached")
    return 0


def _detach(arguments: argparse.Namespace, there: Attached) -> None:
    """Take a device away, and swap off before if told."""
    device = there.device
    step("detach.begun")
    swapped = kernelswap.find(device) is not None
    if arguments.config and not swapped and _for_others(there.name):
        return
    if swapped and not arguments.swapoff:
        raise AttachError(
            f"{device} is in use as swap: 'zramd detach --swapoff {there.name}' swaps off first"
        )
    # Only a swap is a writer that udev waits for; and without one the server may be dead.
    with attached.unobserved(device) if swapped else nullcontext(lambda: None) as disconnected:
        if swapped:
            kernelswap.off(device, force=arguments.force, progress=_progress(device))
        _must_be_free(device)
        step("detach.free")
        interrupts.finish()
        gone = _disconnect(device, there)
        disconnected()
    step("detach.disconnected")
    _forget(there.name, device, gone)


def _must_be_root(verb: str, arguments: argparse.Namespace) -> None:
    """Raise AttachError, which tells another user what root has to run: root looks in another place."""
    if os.geteuid() == 0:
        return
    words = [verb, *([arguments.name] if arguments.name else [])]
    folder = os.path.abspath(arguments.rundir) if getattr(arguments, "rundir", None) else ""
    own = f"{client.base()}/{arguments.name}"
    if verb == "attach" and not folder and not arguments.config and os.path.exists(f"{own}/{rundir.PID}"):
        folder = own
    if folder:
        words += ["--rundir", shlex.quote(folder)]
    words += [option for option in ("--swap", "--swapoff", "--config") if _is_on(arguments, option)]
    raise AttachError(f"only root may {verb} kernel devices: run '{sudo(' '.join(words))}'")


def _is_on(arguments: argparse.Namespace, option: str) -> bool:
    return getattr(arguments, option.removeprefix("--"), False) is True


def _own_name(served: client.Served) -> str:
    """Return what a server calls its device: its run folder may have any name. Raises ConfigError."""
    try:
        name = str(served.stats()["name"])
    except DeviceError:  # it has no endpoint, or has ended
        try:
            name = str(json.loads(served.published("stats.json", _STATS_BYTES))["name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            name = served.name
    config.find("name").parse(name)  # root is to make a file of this name
    return name


def _must_be_free(device: str) -> None:
    """Refuse a device that is mounted, or part of another one. Raises AttachError.

    It is not opened for that: an open reads from it, and its server may have gone.
    """
    mounts = kernelswap.mounts(device)
    if mounts:
        raise AttachError(f"{device} is mounted on '{mounts[0]}': run 'umount {mounts[0]}' first")
    name = os.path.basename(device)
    holders = [*glob(f"/sys/block/{name}/holders/*"), *glob(f"/sys/block/{name}/{name}p*/holders/*")]
    holders += [swap.path for swap in kernelswap.swaps() if swap.path.startswith(f"{device}p")]
    if holders:
        raise AttachError(f"{device} is in use by {os.path.basename(holders[0])}: end that first")


# ---- By netlink, with a keeper ---------------------------------------------------------------------------


def _has_netlink() -> bool:
    """Load the kernel's NBD client; say whether it can be spoken to by netlink. Raises AttachError."""
    with suppress(netlink.NoFamilyError):  # asking alone makes many kernels load it
        netlink.Kernel().close()
        return True
    reason = "modprobe is not installed"
    modprobe = kernelswap.find_program("modprobe", kernelswap.PATH)
    if modprobe and not os.path.exists("/sys/module/nbd"):
        done = subprocess.run(
            [modprobe, "nbd"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        reason = " ".join(done.stderr.split()).removeprefix("modprobe: ")
    if not os.path.exists("/sys/module/nbd"):
        raise AttachError(
            f"the kernel's module nbd cannot be loaded ({reason}): "
            "install the modules of the running kernel; in a container, run 'modprobe nbd' on its host"
        )
    try:
        netlink.Kernel().close()
    except netlink.NoFamilyError:
        return False
    return True


def _job(arguments: argparse.Namespace, served: client.Served, device: int, data: str = "") -> Job:
    timeout = arguments.timeout
    if timeout is None:
        timeout = TIMEOUT if arguments.connections == 1 else TIMEOUT_OF_SEVERAL
    return Job(
        name=served.name,
        address=served.file(rundir.NBD_SOCKET),
        folder=served.path,
        device=device,
        adopt=int(bool(data)),
        data=data,
        connections=arguments.connections,
        timeout=timeout,
        dead_conn_timeout=arguments.dead_conn_timeout,
    )


def _start_keeper(job: Job) -> int:
    """Start the process that attaches and stays, and return the device's index. Raises AttachError."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(zramd.__file__)))
    environment = {
        "PYTHONPATH": package,
        "PYTHONMALLOC": "malloc",  # Python's own allocator asks the kernel for memory now and then
        "MALLOC_ARENA_MAX": "1",
        "LD_BIND_NOW": "1",
        **steps.inherited(),
    }
    keeper = subprocess.Popen(
        [sys.executable, "-S", "-P", "-m", "zramd.kernel.keeper", *job.words()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env=environment,
        start_new_session=True,
    )
    assert keeper.stdout is not None
    try:
        words = " ".join(keeper.stdout.read().decode(errors="replace").split())
    except BaseException:
        keeper.terminate()  # it takes back what it has done
        with suppress(subprocess.TimeoutExpired):
            keeper.wait(APPEARS)
        if not job.adopt:
            _undo(job.name, keeper.pid)
        raise
    if not words.startswith("ok "):
        if not job.adopt:
            _undo(job.name, keeper.pid)
        raise AttachError(f"{job.name} cannot be attached: {words or 'its keeper has died'}")
    return int(words.removeprefix("ok "))


# ---- By nbd-client ---------------------------------------------------------------------------------------


def _by_nbd_client(arguments: argparse.Namespace, name: str, address: str) -> str:
    """Attach by the program nbd-client and return the device's name. Raises AttachError."""
    say(f"attaching by nbd-client: {name} has no keeper, and when its server ends, requests fail")
    device = _free_device() if arguments.device < 0 else f"/dev/nbd{arguments.device}"
    words = ["-unix", address, device, "-b", "4096", "-N", name, "-C", str(arguments.connections)]
    if arguments.timeout is not None:
        words += ["-timeout", f"{arguments.timeout:.0f}"]
    record = attached.Record(name)
    try:
        kernelswap.run("nbd-client", *words)
        record.write(device, "", keeper=0)
    except BaseException:
        record.remove()
        raise
    finally:
        record.close()
    return device


def _free_device() -> str:
    names = [name for name in os.listdir("/sys/block") if _DEVICE.fullmatch(name)]
    for name in sorted(names, key=_index):
        if not os.path.exists(f"/sys/block/{name}/pid"):
            return f"/dev/{name}"
    raise AttachError("no NBD device is free: load the module with more, 'modprobe nbd nbds_max=32'")


# ---- Both ------------------------------------------------------------------------------------------------


def _take_away(there: Attached) -> None:
    """End a device that nobody uses, and forget it. Raises AttachError."""
    _forget(there.name, there.device, _disconnect(there.device, there))


def _disconnect(device: str, there: Attached | None) -> Callable[[], bool]:
    """End a device, and tell its keeper to end; return what says whether both have gone."""
    connection = attached.connection(device)
    keeper, ended = -1, select.poll()
    if there and there.keeper:
        with suppress(ProcessLookupError):
            keeper = os.pidfd_open(there.keeper)
            if attached.find(there.name) != there:  # it has left its number to another process
                os.close(keeper)
                keeper = -1
    try:
        kernel = netlink.Kernel()
        kernel.disconnect(_index(device))
        kernel.close()
    except netlink.NoFamilyError:
        kernelswap.run("nbd-client", "-d", device)
    if keeper >= 0:
        ended.register(keeper, select.POLLIN)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(keeper, signal.SIGTERM)

    def gone() -> bool:
        # The next attach may be given the same device at once.
        if connection and attached.connection(device) == connection:
            return False
        if keeper >= 0:
            ended.poll(APPEARS * 1000)  # it removes its record; one that is late does so later
        return True

    return gone


def _forget(name: str, device: str, gone: Callable[[], bool]) -> None:
    """Wait until the kernel has given the device up and its keeper has ended; remove what was noted of it."""
    _wait(gone, f"{device} is disconnected, but somebody has it open")
    attached.remove(name)
    swapunit.forget(device)


def _index(device: str) -> int:
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise AttachError(f"'{device}' is not an NBD device")
    return int(match[1])


def _wait(done: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + APPEARS
    while not done():
        if time.monotonic() > end:
            raise AttachError(otherwise)
        time.sleep(0.02)


def _progress(device: str) -> Callable[[int, int], None] | None:
    """Return what shows on a terminal how far swapoff is; None if there is none."""
    if not sys.stderr.isatty():
        return None

    def show(left: int, total: int) -> None:
        done = 100 * (total - left) // total if total else 100
        end = "\n" if not left else ""
        print(
            f"\rswapoff {device}: {done:3} %, {left >> 20} MiB left  ", end=end, file=sys.stderr, flush=True
        )

    return show


# ---- The command line ------------------------------------------------------------------------------------


def _device(text: str) -> int:
    match = _DEVICE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not an NBD device, such as /dev/nbd0")
    return int(match[1])


def _whole(least: int, most: int, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,9}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is not {what} from {least} to {most}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds, such as 0.5 or 30")
    return float(text)


def add(commands: Commands) -> None:
    """Add the verbs."""
    parser = commands.add_parser(
        "attach",
        description=(
            "Attach a running device to this machine's kernel and print the block device's name. A small\n"
            "process stays: it connects the kernel again when the server was restarted with the same data.\n"
            "What it does it writes to the kernel's log."
        ),
        more=lambda: (
            "\nWhile the server is away, requests wait. After --dead-conn-timeout new ones fail: programs\n"
            "whose memory was swapped out get SIGBUS. A server with other data is not used.\n"
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
        "--device", type=_device, default=-1, metavar="/dev/nbdN", help="which one [a free one]"
    )
    parser.add_argument(
        "--connections",
        type=_whole(1, 16, "a number of connections"),
        default=1,
        metavar="N",
        help="how many, up to 16 [1]",
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
        default=DEAD_CONN_TIMEOUT,
        metavar="S",
        help=f"seconds for which requests wait for a new server before they fail [{DEAD_CONN_TIMEOUT}]",
    )
    parser.add_argument("--swap", action="store_true", help="mkswap and swapon; what the device held is lost")
    parser.add_argument(
        "--priority",
        type=_whole(-1, 32767, "a priority"),
        default=PRIORITY,
        metavar="P",
        help=f"of the swap, -1 to 32767: the highest is used first [{PRIORITY}]",
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
        "--nbd-client", action="store_true", help="use that program, which cannot survive a restart"
    )
    parser.set_defaults(run=attach)

    parser = commands.add_parser(
        "detach",
        description="Detach a device from this machine's kernel. Refused while it is mounted or swapped to.",
    )
    add_device(parser)
    parser.add_argument("--swapoff", action="store_true", help="swap off first; Ctrl-C stops that")
    parser.add_argument(
        "--force", action="store_true", help="swap off even if there is less memory than must come back"
    )
    parser.add_argument(
        "--if-attached", action="store_true", help="if it is not attached, do nothing, and that is fine"
    )
    parser.add_argument(
        "--config",
        action="store_true",
        help="nor if /etc/zramd.conf has attach = no for it and no swap is on it: others attached it then",
    )
    parser.set_defaults(run=detach)
