"""All servers are put on the version of zramd that is installed now, as far as that loses nothing.

A package does it after an upgrade. A server goes on when its files are replaced, so none has to be restarted.
"""

import subprocess

from zramd.control import servers
from zramd.errors import ConfigError, DeviceError, ZramdError, say
from zramd.launch import processes, takeover
from zramd.settings import devices


def restart_all() -> bool:
    """Restart each server that keeps its data over it, and say what became of each; return if all went well.

    A server that cannot be restarted goes on, and so do the others.
    """
    well = True
    for served in servers.every():
        try:
            done = _restart(served)
            print(f"{served.name:<13} {done}", flush=True)
        except ZramdError as error:
            say(str(error))
            well = False
    return well


def _restart(served: servers.Served) -> str:
    """Restart a server, or let it be; return what was done. Raises DeviceError and other ZramdErrors."""
    if served.pid is None:
        raise served.died()
    settings = served.ask_json("GET", "/settings")
    served.name = settings["name"]
    if not settings.get("state"):
        return "goes on as it is: it has no state, and its data would be lost"
    unit = processes.unit_of(served, served.process())
    if not unit:
        return f"restarted, away for {takeover.restart(None, served.path, []).away * 1000:.0f} ms"
    if _is_used_here(served.name):
        return f"goes on as it is: this machine uses it, and 'systemctl restart {unit}' would take it away"
    done = subprocess.run(
        ["systemctl", "restart", unit],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise DeviceError(f"'systemctl restart {unit}' failed: {' '.join(done.stderr.split())}")
    return f"restarted by 'systemctl restart {unit}'"


def _is_used_here(name: str) -> bool:
    """Say whether a service's device is attached by its service, which takes it away when it is restarted."""
    try:
        return devices.find(name).attached
    except ConfigError:  # it was started by another configuration than there is now
        return True
