"""ublk as the way from this kernel to a server: a keeper makes the device and hands it to the server.

zramd.kernel.ublkkeeper is that process. Here is what goes before it, and how a device is taken away again:
the driver stops a device whatever it is used for, so whoever calls that has looked first.
"""

import os
import select
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

from zramd.control import servers
from zramd.errors import AttachError, UblkError, UsageError
from zramd.kernel import asking, attached, swap, ublk
from zramd.kernel.attached import Attached
from zramd.launch import keepers
from zramd.launch.wishes import APPEARS, Wanted
from zramd.process import pidfd

KEEPER = "zramd.kernel.ublkkeeper"
STANDBY = "zramd.launch.standby"  # the module that the keeper runs
ASK = 10.0  # seconds for the server to let go of a device
STOP = 30.0  # seconds in which a device must have stopped: what is under way is waited for
TRY = 5.0  # seconds for each command that only tries
BEGINS = 1.0  # seconds in which swapoff has begun to read
GIVES_UP = 60.0  # seconds in which swapoff must have seen that nothing can be read


def connect(served: servers.Served, wanted: Wanted, undo: Callable[[int], None]) -> tuple[str, int]:
    """Make a device that a server serves; return its name, and its keeper's process number.

    `undo` is called with that number if it does not get so far. Raises UsageError, AttachError, DeviceError.
    """
    refuse_options(served.name, wanted)
    load_driver()
    number, keeper = keepers.start(KEEPER, served.name, _words(served, wanted.device, wanted), undo)
    return ublk.device_of(number), keeper


def keep(served: servers.Served, wanted: Wanted, there: Attached) -> None:
    """Start another keeper for a device that has lost its own. Raises AttachError, DeviceError."""
    keepers.start(KEEPER, served.name, _words(served, there.device, wanted, there), lambda pid: None)


def refuse_options(name: str, wanted: Wanted) -> None:
    """Raise UsageError for what only the kernel's NBD client has a use for."""
    if wanted.device and ublk.number_of(wanted.device) is None:
        raise UsageError(
            f"{name} is served by ublk, and '{wanted.device}' is not a ublk device: "
            "give one such as /dev/ublkb0"
        )
    if wanted.configured:  # a file says it for both
        return
    given = {
        "--connections": wanted.connections is not None,
        "--timeout": wanted.timeout is not None,
        "--dead-conn-timeout": wanted.dead_conn_timeout is not None,
        "--nbd-client": wanted.nbd_client,
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise UsageError(f"{name} is served by ublk, where {option} means nothing: leave it out")


def unavailable() -> str:
    """Return why ublk cannot be used here now, '' if it can be."""
    from zramd.core.ublk.control import available

    if ublk.broken(os.uname().release):
        return _broken(os.uname().release)
    return ublk.absent() or available()


def never() -> str:
    """Return why no device of ublk's can be attached here, '' if `zramd attach` can do what is missing."""
    from zramd.core.ublk.control import available

    release = os.uname().release
    if ublk.broken(release):
        return _broken(release)
    return "" if ublk.can_be_loaded(release) else ublk.absent() or available(os.devnull)


def _broken(release: str) -> str:
    return f"Linux {release} hangs when it is asked for a ublk device: use another kernel, or front=nbd"


def try_device() -> str:
    """Make a device that nobody serves, and delete it; return what is wrong with that, '' if nothing is.

    A process of its own does it: in some kernels nothing ends it any more. Raises OSError.
    """
    from zramd.core.ublk.control import Control

    answer, tells = os.pipe()
    if os.fork() == 0:
        try:
            why = ""
            try:
                with Control(timeout=TRY) as control:
                    control.delete(control.add(queues=1, depth=1, max_io_bytes=4096).number)
            except UblkError as error:
                why = str(error)
            os.write(tells, (why or "ok").encode())
        finally:
            os._exit(0)
    os.close(tells)
    try:
        if not select.select([answer], [], [], 2 * TRY)[0]:
            return f"the kernel does not answer within {2 * TRY:g} seconds: see 'dmesg' for what it says"
        said = os.read(answer, 4096).decode(errors="replace")
    finally:
        os.close(answer)
    return "" if said == "ok" else said or "the process that tried it has died: see 'dmesg'"


def load_driver() -> None:
    """Load the kernel's ublk driver if need be. Raises AttachError when it cannot be used."""
    if ublk.broken(os.uname().release):
        raise AttachError(_broken(os.uname().release))
    why = "modprobe is not installed"
    modprobe = swap.find_program("modprobe", swap.PATH)
    if modprobe and not os.path.exists(ublk.CONTROL):
        done = subprocess.run(
            [modprobe, ublk.MODULE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        why = " ".join(done.stderr.split()).removeprefix("modprobe: ")
    if not os.path.exists(f"/sys/module/{ublk.MODULE}") and not os.path.exists(ublk.CONTROL):
        raise AttachError(
            f"the kernel's module {ublk.MODULE} cannot be loaded ({why}): install the modules of the running "
            f"kernel, or use front=nbd; in a container, run 'modprobe {ublk.MODULE}' on its host"
        )
    end = time.monotonic() + APPEARS
    while (reason := unavailable()) and not os.path.exists(ublk.CONTROL) and time.monotonic() < end:
        time.sleep(0.02)  # udev may have to make it
    if reason:
        raise AttachError(reason)


def _words(served: servers.Served, device: str, wanted: Wanted, there: Attached | None = None) -> list[str]:
    """Return what a keeper is to do: make a device, or look after one that is `there`."""
    from zramd.kernel.ublkkeeper import Job

    disksize = queues = depth = max_io_bytes = recovers = 0
    if there is None:
        health = served.ask_json("GET", "/health")["ublk"]
        disksize = served.stats()["disksize"]
        queues, depth, max_io_bytes = (health[key] for key in ("queues", "depth", "max_io_bytes"))
        # Where the data ends with the server, requests must fail, and not wait for another.
        recovers = int(bool(served.ask_json("GET", "/settings").get("state")))
        if health["serving"]:
            raise AttachError(
                f"{served.name} serves {ublk.device_of(health['number'])} already, which is not known to be "
                f"attached: 'zramd restart {served.name}', or stop it and start it again"
            )
    number = ublk.number_of(device)
    return Job(
        name=served.name,
        folder=served.path,
        device=-1 if number is None else number,
        stage=there.stage if there else "",
        data=there.data if there else "",
        disksize=disksize,
        queues=queues,
        depth=depth,
        max_io_bytes=max_io_bytes,
        recovers=recovers,
        standby=STANDBY if wanted.standby else "",
    ).words()


def unnoted(name: str) -> Attached | None:
    """Return a device that the kernel has of a keeper that ended before it could note it, None if none is.

    The kernel keeps whose it is for us. Only root learns that: None to others.
    """
    if not ublk.numbers() or not os.access(ublk.CONTROL, os.R_OK | os.W_OK):
        return None
    from zramd.core.ublk.control import Control

    with suppress(UblkError), Control(timeout=STOP) as control:
        for number in ublk.numbers():
            with suppress(UblkError):
                if control.info(number).mark == ublk.mark(name):
                    return Attached(name, ublk.device_of(number), 0, "", attached.ADDED)
    return None


def disconnect(there: Attached) -> Callable[[], bool]:
    """Stop a device and its keeper; return what deletes it, and says whether both have gone.

    Raises AttachError, UblkError.
    """
    from zramd.core.ublk.control import Control

    number = there.number
    assert number is not None
    connection = ublk.connection(number)
    keeper = keepers.find(there)
    with Control(timeout=STOP) as control:
        if control.info(number).mark != ublk.mark(there.name):
            raise AttachError(f"{there.device} is another program's by now: nothing was done to it")
        # First of all: it would take what is to go for a device to be saved.
        keepers.end(keeper)
        if keeper >= 0:
            pidfd.has_ended(keeper, APPEARS)
        control.stop(number)
    if there.folder:
        with suppress(OSError):  # a server that has ended has let go of it
            asking.ask(there.folder, "DELETE", "/ublk", {"number": number}, timeout=ASK)
    deleted = False

    def gone() -> bool:
        nonlocal deleted
        if not deleted:
            with suppress(UblkError), Control(timeout=APPEARS) as control:
                # Somebody may have it open still: that is no reason to wait.
                control.delete(number, wait=False)
                deleted = True
        return ublk.connection(number) != connection

    return gone


def give_up(there: Attached) -> Callable[[], bool]:
    """Swap off a device that nobody serves any more, and end it as `disconnect`. What is out is lost.

    Whoever reads waits for a server, without a limit in time; but once the device is stopped, the kernel
    cannot be told any more what to swap off. So swapoff begins, waits for the first page, and the device is
    stopped then: it, and all others who wait, get errors. Raises AttachError, UblkError.
    """
    running = [
        subprocess.Popen(
            [swap.program("swapoff"), area.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        for area in swap.areas(there.device)
    ]
    end = time.monotonic() + BEGINS
    while time.monotonic() < end and any(process.poll() is None for process in running):
        time.sleep(0.02)
    gone = disconnect(there)
    end = time.monotonic() + GIVES_UP
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(end - time.monotonic(), 0))
    if any(process.poll() is None for process in running):
        gone()
        raise AttachError(
            f"{there.device} is stopped, but the kernel still has it as swap: what is out is lost, "
            "and only a reboot ends it"
        )
    return gone
