"""Whether a service manager is about to start a server again that has crashed.

systemd then restarts what is part of the service as well, the attachment among it. But a device whose data
outlives the server waits for the next one, and to take it away first would wait for a server that comes only
after that.
"""

import subprocess

from zramd.errors import ConfigError
from zramd.kernel import ublk
from zramd.kernel.attached import LOST, Attached
from zramd.settings import devices


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
    if not _systemctl("show", "-P", "SubState", unit).startswith("auto-restart"):
        return False
    # A stop that comes in this moment is one all the same.
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
