"""A kernel block device for a server, and swap on it if asked; and away again.

A server is reached by the kernel's NBD client or by ublk: zramd.launch.nbdway, ublkway. In both a keeper
process stays. zramd.kernel.attached has the records of what is attached.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from glob import glob
from types import ModuleType
from typing import Any

from zramd import trusted
from zramd.contract import rundir
from zramd.control import life, servers
from zramd.errors import (
    AttachError,
    ConfigError,
    DeviceError,
    RundirError,
    UsageError,
    ZramdError,
    say,
    sentence,
)
from zramd.kernel import attached, statefs, swap, swapareas, swapunit, ublk
from zramd.kernel.attached import Attached
from zramd.launch import crashes, nbdway, remote, standby, takeover, ublkway
from zramd.launch.remote import Remote
from zramd.launch.sudo import sudo
from zramd.launch.wishes import PRIORITY, Wanted, wait
from zramd.process import interrupts
from zramd.process.steps import step
from zramd.settings import config, devices
from zramd.settings.devices import ConfiguredDevice

ASK = 2.0  # seconds for a server to say how it is reached
_STATS_BYTES = 64 << 10  # stats.json has a few thousand


def attach(name: str | None, folder: str | None, wanted: Wanted) -> str:
    """Attach a device, swap to it if asked, and return the block device's name.

    `name` may be the URI of another machine's. Returns '' for one that zramd.conf leaves to others, which was
    said. Raises UsageError, ConfigError, AttachError, DeviceError.
    """
    if name is not None and remote.is_uri(name):
        return _attach_remote(name, folder, wanted)
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
        wanted = _as_configured(device, wanted.standby)
    _refuse_priority(wanted)
    _must_be_root(
        "attach",
        name,
        _own_folder(name) if not folder and not wanted.configured else folder,
        {"--swap": wanted.swap, "--config": wanted.configured},
    )
    interrupts.interruptible()
    served = servers.look(name, folder)
    # Until it is attached, the server must neither leave nor be replaced: it is known by its data.
    patience = life.LONG_PATIENCE if wanted.configured else None
    with (
        interrupts.told(lambda: stands(served.name)),
        life.turn(served.path, served.name, patience=patience) as turn,
    ):
        served.look_again()
        if name is None:
            served.name = _own_name(served)
        if wanted.swap:
            _refuse_others(served)
        step("attach.turn")
        front = _front(served)
        _refuse_network(served)
        wanted = wanted._replace(standby=_stands_by(served, front, wanted))
        if wanted.swap:
            _look_at_state(served)
        block = _attach(served, front, wanted, turn.done)
    if wanted.standby and not wanted.configured:  # there the keeper puts it: what boots does not wait for it
        _stand_by(served)
    return block


def _attach_remote(uri: str, folder: str | None, wanted: Wanted) -> str:
    """Attach a device of another machine: as `attach`, but nothing can be asked of its server."""
    served = remote.parse(uri)
    remote.refuse_options(folder, wanted)
    _refuse_priority(wanted)
    _must_be_root("attach", uri, None, {"--swap": wanted.swap})
    interrupts.interruptible()
    with interrupts.told(lambda: stands(served.name)):
        return _attach(served, "nbd", wanted, lambda: None)


def _refuse_priority(wanted: Wanted) -> None:
    """Raise UsageError for a priority that is too small for the areas."""
    if wanted.swap and wanted.priority < swapareas.least_priority(wanted.areas):
        raise UsageError(
            f"{wanted.areas} areas need a priority of at least {swapareas.least_priority(wanted.areas)}, "
            f"because the first one has the highest: use --priority {PRIORITY}"
        )


def _stands_by(served: servers.Served, front: str, wanted: Wanted) -> bool:
    """Say whether another server is to be on standby. Raises UsageError, DeviceError."""
    if front == "ublk":
        return standby.wanted(served, wanted)
    if wanted.standby:
        raise UsageError(f"{served.name} is served over NBD, where there is no standby: leave --standby out")
    return False


def _look_at_state(served: servers.Served) -> None:
    """Warn of a state that may go where it cannot be read once its server has died."""
    try:
        state = str(served.ask_json("GET", "/settings", timeout=ASK).get("state", ""))
    except DeviceError:  # it has no endpoint
        return
    if state and statefs.is_swappable(state):
        say(
            f"after a crash of {served.name} its state '{state}' may be swapped out itself, and the next "
            "server would wait for ever: use a state on a tmpfs that is mounted with '-o noswap' (Linux 6.4)"
        )


def _stand_by(served: servers.Served) -> None:
    """Put another server on standby. The device is attached without one, too."""
    try:
        standby.start_for(served.name, served.path)
    except (ZramdError, OSError) as error:
        say(f"{served.name} has no server on standby: {sentence(error)}")
    step("attach.standby")


def _attach(served: servers.Served | Remote, front: str, wanted: Wanted, done: Callable[[], None]) -> str:
    """Attach a device and swap to it if asked; return its name. `done` gives the server's turn back."""
    there = _find(served.name)
    if there and _leftover_from(there, served, wanted):
        with attached.turn(served.name):
            there = _find(served.name)  # a detach may have been in the middle of it
            if there and (whose := _leftover_from(there, served, wanted)):
                _drop(there, whose)
                there = None
    device, keeper = _connect(served, front, there, wanted)
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
            done()
            _use(served.name, device, wanted)
    except BaseException:
        if not there and swap.find(device) is None:  # half an attachment would be nobody's
            _undo(served.name, keeper)
        raise
    return device


def _find(name: str) -> Attached | None:
    """Return how a zramd is attached, though nobody has noted it; None if it is not."""
    return attached.find(name) or ublkway.unnoted(name)


def _leftover_from(there: Attached, served: servers.Served | Remote, wanted: Wanted) -> str:
    """Return what has left an attached device that is of no use any more, '' for one that is."""
    if there.number is not None and not ublk.has_disk(there.number) and there.stage != attached.ADDED:
        return "a server or a detach that has ended"
    if wanted.configured and there.data and there.data != attached.data_of(served.path):
        return "a server that has ended"
    return "an attach that was killed" if there.is_half else ""


def _connect(
    served: servers.Served | Remote, front: str, there: Attached | None, wanted: Wanted
) -> tuple[str, int]:
    """Connect the kernel to a server, unless that is so already.

    Return the device's name, and the process number of the keeper if a new device has one, else 0.
    """
    if there is None:
        way = ublkway if front == "ublk" else nbdway
        found: tuple[str, int] = way.connect(served, wanted, lambda keeper: _undo(served.name, keeper))
        return found
    if there.data and not there.keeper:
        say(f"{there.device} has lost its keeper: starting another")
        _way(there).keep(served, wanted, there)
    elif not wanted.configured:
        raise AttachError(
            f"{served.name} is attached as {there.device} already: 'zramd detach {served.name}' first"
        )
    return there.device, 0


def _front(served: servers.Served) -> str:
    """Return how a server is reached: "nbd" or "ublk"."""
    try:
        answer: dict[str, Any] = served.ask_json("GET", "/health", timeout=ASK)
    except DeviceError:  # it has no endpoint
        return "nbd"
    return str(answer.get("front", "nbd"))


def _refuse_network(served: servers.Served) -> None:
    """Raise AttachError for a server that has no socket for this machine's kernel."""
    try:
        health = served.ask_json("GET", "/health", timeout=ASK)
    except DeviceError:  # it has no endpoint: then the socket shows it
        return
    if where := health.get("listen"):
        has_tls = health["tls"] in ("psk", "x509")
        tls = "with TLS, which the kernel does not speak" if has_tls else "for others"
        raise AttachError(
            f"{served.name} serves on listen={where}, {tls}: to attach it here, start it without listen"
        )


def _undo(name: str, keeper: int) -> None:
    """Take away what an attach by `keeper` has left. What went wrong first is what counts."""
    with suppress(ZramdError, OSError):
        there = _find(name)
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
    wait(lambda: os.path.exists(device), f"{device} does not appear: is /dev a devtmpfs, or udev running?")
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
    _must_be_free(there.device)
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


def _as_configured(device: ConfiguredDevice, standby: bool | None) -> Wanted:
    """Return what zramd.conf wants, which says nothing of servers on standby."""
    return Wanted(
        connections=device.connections,
        timeout=device.timeout,
        dead_conn_timeout=device.dead_conn_timeout,
        swap=device.swaps,
        priority=device.swap_priority,
        areas=device.swap_areas or 0,
        swapon_options=device.options,
        standby=standby,
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
        if other := remote.called(name):
            name = other
        else:
            servers.must_be_a_name(name)
    else:
        name = _own_name(servers.look(None, folder))
    _must_be_root("detach", name, folder, {"--swapoff": swapoff, "--config": configured})
    interrupts.interruptible()
    with interrupts.told(lambda: stands(name)), attached.turn(name):
        there = _find(name)
        if there is None:
            if not if_attached:
                raise AttachError(f"{name} is not attached")
            return
        if there.stage == attached.ADDED and there.keeper and not force:
            raise AttachError(f"{name} is being attached by another command: try again when that is done")
        step("detach.begun")
        swapped = swap.find(there.device) is not None
        if configured and not swapped and _for_others(there.name):
            return
        if configured and crashes.waits(there):
            say(f"{there.device} stays, and waits for the server that is started again after a crash")
            return
        if swapped and not swapoff:
            raise AttachError(
                f"{there.device} is in use as swap: 'zramd detach --swapoff {there.name}' swaps off first"
            )
        if swapped and not _is_reachable(there):
            _give_up(there, force)
        else:
            _detach(there, swapped, force)
        if there.folder:
            crashes.end_stand_in(there.name, there.folder)


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
        gone = _way(there).disconnect(there)
        disconnected()
    step("detach.disconnected")
    _forget(there, gone)


def _is_reachable(there: Attached) -> bool:
    """Say whether what is stored can be read. A ublk device without its server makes its readers wait."""
    return there.number is None or (
        there.stage in (attached.ADDED, attached.STARTED) and rundir.holder(there.folder) is not None
    )


def _give_up(there: Attached, force: bool) -> None:
    """Take a device away that is swapped to, and whose server is gone. Raises AttachError unless `force`."""
    if not force:
        raise AttachError(
            f"the server of {there.name} is gone, and what is swapped out to {there.device} cannot be read: "
            f"start it again with the same state, or give up what is out by "
            f"'zramd detach --swapoff --force {there.name}': programs that need it are killed"
        )
    step("detach.free")
    interrupts.finish()
    gone = ublkway.give_up(there)
    swapareas.forget(there.device)
    _forget(there, gone)


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


def _take_away(there: Attached) -> None:
    """End a device that nobody uses, and forget it. Raises AttachError."""
    swapareas.join(there.device)
    _forget(there, _way(there).disconnect(there))


def _way(there: Attached) -> ModuleType:
    """Return the way by which a device was attached."""
    return nbdway if there.number is None else ublkway


def _forget(there: Attached, gone: Callable[[], bool]) -> None:
    """Wait until the kernel has given the device up and its keeper has ended; remove what was noted of it."""
    wait(gone, f"{there.device} is disconnected, but somebody has it open")
    attached.remove(there.name)
    swapunit.forget(there.device)
    if there.folder:
        with suppress(RundirError):
            takeover.end_standby(there.folder)


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
