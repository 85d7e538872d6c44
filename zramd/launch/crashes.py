"""Whether a service manager is about to start a server again that has crashed.

systemd then restarts what is part of the service as well, the attachment among it. But a device whose data
outlives the server waits for the next one, and to take it away first would wait for a server that comes only
after that.
"""

import os
import signal
import subprocess
from contextlib import suppress

from zramd.errors import ConfigError
from zramd.kernel import ublk
from zramd.kernel.attached import LOST, Attached
from zramd.launch import processes
from zramd.settings import devices

ENDS = 10.0  # seconds in which a server that is told to stop must have ended


def waits(there: Attached) -> bool:
    """Say whether an attached device waits for the server that its service starts again after a crash."""
    if there.number is None or not there.keeper or there.stage == LOST or not ublk.has_disk(there.number):
        return False
    try:
        if not devices.find(there.name).settings().state:
            return False
    except ConfigError:  # it was started by another configuration than there is now
        return False
    unit = f"zramd@{there.name}.service"
    return _is_restarted(unit, _state(unit))


def end_stand_in(name: str, folder: str) -> None:
    """End a server that stands in for a service's, once its device is gone: nobody else would.

    Unless the service is about to start the next one, which takes over from it.
    """
    found = processes.find_stand_in(name, folder)
    if found is None:
        return
    process, unit = found
    try:
        if not _comes_again(unit):
            process.signal(signal.SIGTERM)
            if process.ended(ENDS):
                with suppress(OSError):  # systemd has removed it, or something is left in it
                    os.rmdir(folder)
    finally:
        process.close()


def _comes_again(unit: str) -> bool:
    """Say whether a service is about to start a server, or starts one now."""
    state = _state(unit)
    return state.startswith("start") or _is_restarted(unit, state)


def _state(unit: str) -> str:
    return _systemctl("show", "-P", "SubState", unit)


def _is_restarted(unit: str, state: str) -> bool:
    """Say whether a unit in this state is started again. A stop in this moment is one all the same."""
    if not state.startswith("auto-restart"):
        return False
    jobs = _systemctl("list-jobs", "--plain", "--no-legend", unit)
    return "stop" not in jobs.replace(unit, "").split()


def _systemctl(*words: str) -> str:
    """Return what systemctl prints, '' where there is none."""
    try:
        done = subprocess.run(
            ["systemctl", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
    except OSError:
        return ""
    return done.stdout
