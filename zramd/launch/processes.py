"""What the kernel tells of a server's process: how it was started, for which service, and what it may.

A server that was on standby for a service's is not that service's process, and serves only until the service
manager has started the next one: it *stands in* for it.
"""

import os
from contextlib import suppress
from typing import NamedTuple

from zramd.contract import handover, rundir
from zramd.control import peer, servers
from zramd.errors import DeviceError, RundirError, is_shortage, reason
from zramd.process import inherited


def told(served: servers.Served, process: peer.Process, name: str) -> list[str]:
    """Return the words that the kernel tells of a process. Raises DeviceError, also if it has just ended."""
    path = f"/proc/{process.pid}/{name}"
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise kept_back(served, process, path, error) from None
    if process.ended(0):  # it was of a process without memory, or of another one
        raise ended(served)
    return os.fsdecode(data).split("\0")


def kept_back(served: servers.Served, process: peer.Process, path: str, error: OSError) -> DeviceError:
    """Return the error for what the kernel does not tell of a process. Raises RundirError."""
    if process.ended(0):
        return ended(served)
    return DeviceError(f"'{path}' cannot be read: {reason(error)}: run this as its owner")


def ended(served: servers.Served) -> DeviceError:
    """Return the error that says what became of a device whose server has ended. Raises RundirError."""
    try:
        served.look_again()
    except DeviceError as error:
        return error
    return DeviceError(f"{served.name} is served by another process now: {served.pid}")


def is_in_background(served: servers.Served, process: peer.Process) -> bool:
    """Say whether a server was started in the background, by zramd. Raises DeviceError."""
    return _variable(told(served, process, "environ"), rundir.BACKGROUND) is not None


def stands_in(served: servers.Served, process: peer.Process) -> str:
    """Return the unit for whose server a server stands in, '' if it does for none. Raises DeviceError."""
    return _variable(told(served, process, "environ"), handover.UNIT) or ""


def unit_of(served: servers.Served, process: peer.Process) -> str:
    """Return the unit that a server serves for, '' if it is no service's. Raises DeviceError."""
    environment = told(served, process, "environ")
    if unit := _variable(environment, handover.UNIT):
        return unit
    if _variable(environment, rundir.BACKGROUND) is not None:
        return ""
    unit = told(served, process, "cgroup")[0].strip().rpartition("/")[2]
    managed = _variable(environment, "NOTIFY_SOCKET") is not None
    return unit if managed and unit.endswith(".service") else ""


def memory_file(served: servers.Served, process: peer.Process) -> int:
    """Open the memory file that a server of state=systemd has; return the descriptor. Raises DeviceError.

    No nbdkit takes it for a socket.
    """
    number = _variable(told(served, process, "environ"), handover.KEPT_FD)
    path = f"/proc/{process.pid}/fd/{number}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if is_shortage(error):
            raise
        raise kept_back(served, process, path, error) from None
    try:
        return inherited.high(fd)
    finally:
        os.close(fd)


class Service(NamedTuple):
    """What one on standby for a service's server has of it."""

    unit: str
    capabilities: int  # a bit for each; more it does not keep
    memory: int  # the descriptor of the memory file that state=systemd means, -1 with another state


def service_of(served: servers.Served, process: peer.Process, state: str) -> Service | None:
    """Return that for a server with this `state`, None if it is no service's. Raises DeviceError."""
    unit = unit_of(served, process)
    if not unit:
        return None
    lines = dict(line.partition(":\t")[::2] for line in told(served, process, "status")[0].splitlines())
    memory = memory_file(served, process) if state == handover.SYSTEMD else -1
    return Service(unit, int(lines["CapPrm"], 16), memory)


def find_stand_in(name: str, folder: str) -> tuple[peer.Process, str] | None:
    """Return the process that serves a run folder, and the unit for which it stands in; None if it does not.

    The process is the caller's to close. Raises nothing: where it cannot be seen, there is nothing to find.
    """
    with suppress(DeviceError, RundirError, OSError):
        pid = rundir.holder(folder)
        if pid:
            served = servers.Served(name, folder, pid)
            process = served.process()
            unit = ""
            try:
                unit = stands_in(served, process)
            finally:
                if not unit:
                    process.close()
            if unit:
                return process, unit
    return None


def _variable(environment: list[str], name: str) -> str | None:
    """Return the value of a variable, None if it is not there."""
    return next((word[len(name) + 1 :] for word in environment if word.startswith(f"{name}=")), None)
