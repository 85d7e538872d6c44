"""The kernel's NBD client as the way to a server: by netlink with a keeper, or by the program nbd-client.

A keeper process connects the kernel and stays (zramd.kernel.keeper), or nbd-client does where the kernel's
NBD cannot be spoken to by netlink.
"""

import os
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress

from zramd.contract import rundir
from zramd.control import servers
from zramd.errors import AttachError, say
from zramd.kernel import attached, netlink, swap
from zramd.kernel.attached import Attached
from zramd.kernel.keeper import Job
from zramd.launch import keepers
from zramd.launch.remote import Remote
from zramd.launch.wishes import APPEARS, DEAD_CONN_TIMEOUT, Wanted
from zramd.process import pidfd

KEEPER = "zramd.kernel.keeper"
TIMEOUT = 1.0  # seconds; see zramd.kernel.keeper on why it is no danger with one connection
TIMEOUT_OF_SEVERAL = 30.0
_DEVICE = re.compile(r"(?:/dev/)?nbd(\d{1,4})")


def connect(served: servers.Served | Remote, wanted: Wanted, undo: Callable[[int], None]) -> tuple[str, int]:
    """Connect the kernel to a server; return the device's name, and its keeper's process number, else 0.

    `undo` is called with that number if it does not get so far. Raises AttachError.
    """
    if wanted.device and index_of(wanted.device) is None:
        raise AttachError(
            f"{served.name} is served by NBD, and '{wanted.device}' is not an NBD device: "
            "give one such as /dev/nbd0, or serve it with front=ublk"
        )
    if wanted.nbd_client or not _has_netlink():
        if isinstance(served, Remote):
            raise AttachError("this kernel's NBD is older than Linux 4.12: it has no way to another machine")
        return _by_nbd_client(served, wanted), 0
    index, keeper = keepers.start(KEEPER, served.name, _job(served, wanted).words(), undo)
    return f"/dev/nbd{index}", keeper


def keep(served: servers.Served | Remote, wanted: Wanted, there: Attached) -> None:
    """Start another keeper for a device that has lost its own. Raises AttachError."""
    keepers.start(KEEPER, served.name, _job(served, wanted, there).words(), lambda pid: None)


def disconnect(there: Attached) -> Callable[[], bool]:
    """End a device, and tell its keeper to end; return what says whether both have gone."""
    connection = attached.connection(there.device)
    keeper = keepers.find(there)
    try:
        kernel = netlink.Kernel()
        kernel.disconnect(_index(there.device))
        kernel.close()
    except netlink.NoFamilyError:
        swap.run("nbd-client", "-d", there.device)
    keepers.end(keeper)

    def gone() -> bool:
        # The next attach may be given the same device at once.
        if connection and attached.connection(there.device) == connection:
            return False
        if keeper >= 0:
            pidfd.has_ended(keeper, APPEARS)  # it removes its record; one that is late does so later
        return True

    return gone


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


def _job(served: servers.Served | Remote, wanted: Wanted, there: Attached | None = None) -> Job:
    """Return what a keeper is to do: connect a device, or look after one that is `there`.

    Raises AttachError.
    """
    timeout, connections = wanted.timeout, wanted.connections or 1
    if timeout is None:
        timeout = TIMEOUT if connections == 1 else TIMEOUT_OF_SEVERAL
    return Job(
        name=served.name,
        export=served.export if isinstance(served, Remote) else served.name,
        address=served.address() if isinstance(served, Remote) else served.file(rundir.NBD_SOCKET),
        folder=served.path,
        device=_index(there.device) if there else _index(wanted.device) if wanted.device else -1,
        adopt=int(there is not None),
        data=there.data if there else "",
        connections=connections,
        timeout=timeout,
        dead_conn_timeout=DEAD_CONN_TIMEOUT if wanted.dead_conn_timeout is None else wanted.dead_conn_timeout,
    )


def _by_nbd_client(served: servers.Served, wanted: Wanted) -> str:
    """Attach by the program nbd-client and return the device's name. Raises AttachError."""
    name, address = served.name, served.file(rundir.NBD_SOCKET)
    say(f"attaching by nbd-client: {name} has no keeper, and when its server ends, requests fail")
    device = f"/dev/nbd{_index(wanted.device)}" if wanted.device else _free_device()
    words = ["-unix", address, device, "-b", "4096", "-N", name, "-C", str(wanted.connections or 1)]
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


def index_of(device: str) -> int | None:
    """Return the N of /dev/nbdN or nbdN, None for what is no NBD device."""
    match = _DEVICE.fullmatch(device)
    return int(match[1]) if match else None


def _index(device: str) -> int:
    index = index_of(device)
    if index is None:
        raise AttachError(f"'{device}' is not an NBD device")
    return index
