"""A kernel block device for a server, and swap on it if asked; and away again.

A keeper process connects the kernel and stays (zramd.kernel.keeper), or nbd-client does where the kernel's
NBD cannot be spoken to by netlink. zramd.kernel.attached has the records of what is attached.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from glob import glob
from typing import NamedTuple

import zramd
from zramd import trusted
from zramd.contract import rundir
from zramd.control import life, servers
from zramd.errors import AttachError, ConfigError, DeviceError, UsageError, say
from zramd.kernel import attached, netlink, swap, swapareas, swapunit
from zramd.kernel.attached import Attached
from zramd.kernel.keeper import Job
from zramd.launch.sudo import sudo
from zramd.process import interrupts, pidfd, steps
from zramd.process.steps import step
from zramd.settings import config, devices
from zramd.settings.devices import ConfiguredDevice

PRIORITY = 100  # before any other swap, as zram-generator has it
DEAD_CONN_TIMEOUT = 120  # seconds
TIMEOUT = 1.0  # seconds; see zramd.kernel.keeper on why it is no danger with one connection
TIMEOUT_OF_SEVERAL = 30.0
APPEARS = 5.0  # seconds in which a device must have come or gone
_STATS_BYTES = 64 << 10  # stats.json has a few thousand
_DEVICE = re.compile(r"(?:/dev/)?nbd(\d{1,4})")


class Wanted(NamedTuple):
    """What `zramd attach` is asked for."""

    device: int = -1  # the N of /dev/nbdN; -1: a free one
    connections: int = 1
    timeout: float | None = None  # seconds; None: by the number of connections
    dead_conn_timeout: int = DEAD_CONN_TIMEOUT  # seconds
    swap: bool = False
    priority: int = PRIORITY
    areas: int = 0  # 0: as many as suit the device
    swapon_options: str = "discard"
    nbd_client: bool = False
    configured: bool = False  # as zramd.conf says: what is attached already stays so


def attach(name: str | None, folder: str | None, wanted: Wanted) -> str:
    """Attach a device, swap to it if asked, and return the block device's name.

    Returns '' for one that zramd.conf leaves to others, which was said. Raises UsageError, ConfigError,
    AttachError, DeviceError.
    """
    if name is not None:
        name = servers.name_of(name)
    elif not folder:
        raise UsageError("which device? Give its name, as 'zramd list' shows it, or --rundir FOLDER")
    elif wanted.configured:
        raise UsageError("--config takes what zramd.conf has under a NAME: give that")
    if name is not None and wanted.configured:
        device = _configured(name)
        if device is None:
            return ""
        folder = folder or device.rundir
        wanted = _as_configured(device)
    if wanted.swap and wanted.priority < swapareas.least_priority(wanted.areas):
        raise UsageError(
            f"{wanted.areas} areas need a priority of at least {swapareas.least_priority(wanted.areas)}, "
            f"because the first one has the highest: use --priority {PRIORITY}"
        )
    _must_be_root(
        "attach",
        name,
        _own_folder(name) if not folder and not wanted.configured else folder,
        {"--swap": wanted.swap, "--config": wanted.configured},
    )
    interrupts.interruptible()
    served = servers.look(name, folder)
    # Until it is attached, the server must neither leave nor be replaced: it is known by its data.
    with interrupts.told(lambda: stands(served.name)), life.turn(served.path, served.name) as turn:
        served.look_again()
        if name is None:
            served.name = _own_name(served)
        if wanted.swap:
            _refuse_others(served)
        step("attach.turn")
        return _attach(served, wanted, turn)


def _attach(served: servers.Served, wanted: Wanted, turn: life.Turn) -> str:
    """Attach a device and swap to it if asked; return its name. The server's turn is given back meanwhile."""
    there = attached.find(served.name)
    if there and (whose := _leftover_from(there, served, wanted)):
        _drop(there, whose)
        there = None
    device, keeper = _connect(served, there, wanted)
    try:
        step("attach.attached")
        with attached.turn(served.name):
            now = attached.find(served.name)
            if now is None or now.device != device:
                raise AttachError(f"{served.name} was detached again before it could be used")
            if not now.keeper and now.data:
                raise AttachError(f"the keeper of {served.name} has died: it is not attached")
            # From here on swapon may wait for a server that has died: whoever starts the next one must get
            # past us. A stop still does not: it looks whether an attach is under way (zramd.control.busy).
            turn.done()
            _use(served.name, device, wanted)
    except BaseException:
        if not there and swap.find(device) is None:  # half an attachment would be nobody's
            _undo(served.name, keeper)
        raise
    return device


def _leftover_from(there: Attached, served: servers.Served, wanted: Wanted) -> str:
    """Return what has left an attached device that is of no use any more, '' for one that is."""
    if wanted.configured and there.data and there.data != attached.data_of(served.path):
        return "a server that has ended"
    return "an attach that was killed" if there.is_half else ""


def _connect(served: servers.Served, there: Attached | None, wanted: Wanted) -> tuple[str, int]:
    """Connect the kernel to a server, unless that is so already.

    Return the device's name, and the process number of the keeper if a new device has one, else 0.
    """
    if there is None:
        if wanted.nbd_client or not _has_netlink():
            return _by_nbd_client(served, wanted), 0
        index, keeper = _start_keeper(_job(served, wanted))
        return f"/dev/nbd{index}", keeper
    if there.data and not there.keeper:
        say(f"{there.device} has lost its keeper: starting another")
        _start_keeper(_job(served, wanted, there))
    elif not wanted.configured:
        raise AttachError(
            f"{served.name} is attached as {there.device} already: 'zramd detach {served.name}' first"
        )
    return there.device, 0


def _undo(name: str, keeper: int) -> None:
    """Take away what an attach by `keeper` has left. What went wrong first is what counts."""
    with suppress(AttachError, OSError):
        there = attached.find(name)
        if there and there.keeper in (0, keeper):
            _take_away(there)
        attached.remove(name)


def stands(name: str) -> str:
    """Return the state of a device, for a user who interrupts a command."""
    there = attached.find(name)
    if there is None:
        return f"{name} is not attached"
    swapped = swap.find(there.device)
    out = f", and swapped to: {swapped.used >> 20} MiB are out" if swapped else ""
    return f"{name} is attached as {there.device}{out}"


def _use(name: str, device: str, wanted: Wanted) -> None:
    """Wait for a device that was attached, and swap to it if asked."""
    _wait(lambda: os.path.exists(device), f"{device} does not appear: is /dev a devtmpfs, or udev running?")
    if wanted.swap:
        if wanted.configured and (changed := swap.set_memory_aside()):
            say(changed)
        swapareas.on(
            device,
            wanted.priority,
            options=wanted.swapon_options,
            count=wanted.areas,
            order=lambda area: swapunit.order(area, name) if wanted.configured else None,
        )
    step("attach.used")


def _refuse_others(served: servers.Served) -> None:
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
    use = ["swap"] if swap.find(there.device) else swap.mounts(there.device)
    if use:
        raise AttachError(
            f"{there.device} is in use as '{use[0]}', but left over from {whom}: "
            f"'zramd detach --swapoff {there.name}' first"
        )
    say(f"{there.device} is left over from {whom}: detaching it")
    _take_away(there)


def _configured(name: str) -> ConfiguredDevice | None:
    """Return what zramd.conf says of a device; None, with a word, if it is not for us to attach.

    Raises ConfigError.
    """
    try:
        device = devices.find(name)
    except devices.SkippedError as skipped:
        say(str(skipped))
        return None
    if not device.attached:
        say(f"{device.name} is for others to attach, because it has attach = no")
        return None
    return device


def _as_configured(device: ConfiguredDevice) -> Wanted:
    return Wanted(
        connections=device.connections,
        timeout=device.timeout,
        dead_conn_timeout=device.dead_conn_timeout,
        swap=device.swaps,
        priority=device.swap_priority,
        areas=device.swap_areas or 0,
        swapon_options=device.options,
        configured=True,
    )


def _for_others(name: str) -> bool:
    """Say whether zramd.conf leaves it to others to attach a device. Who attached it, detaches it."""
    try:
        return not devices.find(name).attached
    except ConfigError:
        return False


def detach(
    name: str | None,
    folder: str | None,
    *,
    swapoff: bool = False,
    force: bool = False,
    if_attached: bool = False,
    configured: bool = False,
) -> None:
    """Detach a device, swapping off first if asked: see `zramd detach --help`. Raises AttachError."""
    if name is not None:
        name = servers.name_of(name)
        servers.must_be_a_name(name)
    else:
        name = _own_name(servers.look(None, folder))
    _must_be_root("detach", name, folder, {"--swapoff": swapoff, "--config": configured})
    interrupts.interruptible()
    with interrupts.told(lambda: stands(name)), attached.turn(name):
        there = attached.find(name)
        if there is None:
            if not if_attached:
                raise AttachError(f"{name} is not attached")
            return
        step("detach.begun")
        swapped = swap.find(there.device) is not None
        if configured and not swapped and _for_others(there.name):
            return
        if swapped and not swapoff:
            raise AttachError(
                f"{there.device} is in use as swap: 'zramd detach --swapoff {there.name}' swaps off first"
            )
        _detach(there, swapped, force)


def _detach(there: Attached, swapped: bool, force: bool) -> None:
    """Take a device away, and swap off before if it is swapped to."""
    device = there.device
    # Only a swap is a writer that udev waits for; and without one the server may be dead.
    with attached.unobserved(device) if swapped else nullcontext(lambda: None) as disconnected:
        if swapped:
            swapareas.off(device, force=force, progress=_progress(device))
        _must_be_free(device)
        swapareas.join(device)
        step("detach.free")
        interrupts.finish()
        gone = _disconnect(device, there)
        disconnected()
    step("detach.disconnected")
    _forget(there.name, device, gone)


def _must_be_root(verb: str, name: str | None, folder: str | None, options: dict[str, bool]) -> None:
    """Raise AttachError, which says to another user what root has to run: root looks in another place."""
    if os.geteuid() == 0:
        return
    words = [verb, *([name] if name else [])]
    if folder:
        words += ["--rundir", shlex.quote(os.path.abspath(folder))]
    words += [option for option, given in options.items() if given]
    raise AttachError(f"only root may {verb} kernel devices: run '{sudo(' '.join(words))}'")


def _own_folder(name: str | None) -> str | None:
    """Return the run folder of this user's device of a name, None if there is none."""
    own = f"{rundir.base()}/{name}"
    return own if os.path.exists(f"{own}/{rundir.PID}") else None


def _own_name(served: servers.Served) -> str:
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
    mounts = swap.mounts(device)
    if mounts:
        raise AttachError(f"{device} is mounted on '{mounts[0]}': run 'umount {mounts[0]}' first")
    name = os.path.basename(device)
    holders = [*glob(f"/sys/block/{name}/holders/*"), *glob(f"/sys/block/{name}/{name}p*/holders/*")]
    holders += [area.path for area in swap.swaps() if area.path.startswith(f"{device}p")]
    if holders:
        raise AttachError(f"{device} is in use by {os.path.basename(holders[0])}: end that first")


# ---- By netlink, with a keeper --------------------------------------------------------------------------


def _has_netlink() -> bool:
    """Load the kernel's NBD client; say whether it can be spoken to by netlink. Raises AttachError."""
    with suppress(netlink.NoFamilyError):  # asking alone makes many kernels load it
        netlink.Kernel().close()
        return True
    reason = "modprobe is not installed"
    modprobe = swap.find_program("modprobe", swap.PATH)
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


def _job(served: servers.Served, wanted: Wanted, there: Attached | None = None) -> Job:
    """Return what a keeper is to do: connect a device, or look after one that is `there`."""
    timeout = wanted.timeout
    if timeout is None:
        timeout = TIMEOUT if wanted.connections == 1 else TIMEOUT_OF_SEVERAL
    return Job(
        name=served.name,
        address=served.file(rundir.NBD_SOCKET),
        folder=served.path,
        device=_index(there.device) if there else wanted.device,
        adopt=int(there is not None),
        data=there.data if there else "",
        connections=wanted.connections,
        timeout=timeout,
        dead_conn_timeout=wanted.dead_conn_timeout,
    )


def _start_keeper(job: Job) -> tuple[int, int]:
    """Start the process that attaches and stays; return the device's index and its own number.

    Raises AttachError.
    """
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
    return int(words.removeprefix("ok ")), keeper.pid


# ---- By nbd-client --------------------------------------------------------------------------------------


def _by_nbd_client(served: servers.Served, wanted: Wanted) -> str:
    """Attach by the program nbd-client and return the device's name. Raises AttachError."""
    name, address = served.name, served.file(rundir.NBD_SOCKET)
    say(f"attaching by nbd-client: {name} has no keeper, and when its server ends, requests fail")
    device = _free_device() if wanted.device < 0 else f"/dev/nbd{wanted.device}"
    words = ["-unix", address, device, "-b", "4096", "-N", name, "-C", str(wanted.connections)]
    if wanted.timeout is not None:
        words += ["-timeout", f"{wanted.timeout:.0f}"]
    record = attached.Record(name)
    try:
        swap.run("nbd-client", *words)
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


# ---- Both -----------------------------------------------------------------------------------------------


def _take_away(there: Attached) -> None:
    """End a device that nobody uses, and forget it. Raises AttachError."""
    swapareas.join(there.device)
    _forget(there.name, there.device, _disconnect(there.device, there))


def _disconnect(device: str, there: Attached | None) -> Callable[[], bool]:
    """End a device, and tell its keeper to end; return what says whether both have gone."""
    connection = attached.connection(device)
    keeper = -1
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
        swap.run("nbd-client", "-d", device)
    if keeper >= 0:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(keeper, signal.SIGTERM)

    def gone() -> bool:
        # The next attach may be given the same device at once.
        if connection and attached.connection(device) == connection:
            return False
        if keeper >= 0:
            pidfd.has_ended(keeper, APPEARS)  # it removes its record; one that is late does so later
        return True

    return gone


def _forget(name: str, device: str, gone: Callable[[], bool]) -> None:
    """Wait until the kernel has given the device up and its keeper has ended; remove what was noted of it."""
    _wait(gone, f"{device} is disconnected, but somebody has it open")
    attached.remove(name)
    swapunit.forget(device)


def index_of(device: str) -> int | None:
    """Return the N of /dev/nbdN or nbdN, None for what is no NBD device."""
    match = _DEVICE.fullmatch(device)
    return int(match[1]) if match else None


def _index(device: str) -> int:
    index = index_of(device)
    if index is None:
        raise AttachError(f"'{device}' is not an NBD device")
    return index


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
