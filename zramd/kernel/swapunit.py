"""systemd's units of the swap on an attached device: their place in the order of a shutdown.

systemd makes a unit such as dev-nbd0.swap of each swap that it finds in /proc/swaps. Before=dev-nbd0.swap in
a unit of ours would make it load that name before there is such a swap, and it then never gets its default
dependencies: at shutdown it was switched off first of all, before the programs that had memory there had
ended (systemd 252). So the order is given to it by a drop-in, written when the device's name is known.
"""

import os
import re
from contextlib import suppress

FOLDER = "/run/systemd/system"
DROP_IN = "50-zramd.conf"


def order(area: str, name: str) -> None:
    """Have systemd stop swap on `area`, a device or its partition, before zramd-attach@`name` stops.

    Call it before swapon. Without systemd nothing is done. Raises OSError.
    """
    if not os.path.isdir(FOLDER):
        return
    folder = _folder(area)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    path = f"{folder}/{DROP_IN}"
    with open(path, "w") as file:
        file.write(f"[Unit]\nAfter=zramd-attach@{name}.service\n")
    os.chmod(folder, 0o755)  # whatever the umask is: 'systemctl cat' is for everybody
    os.chmod(path, 0o644)


def forget(device: str) -> None:
    """Remove what `order` has written for a device and its areas, if anything."""
    unit = re.compile(rf"dev-{re.escape(os.path.basename(device))}(p[0-9]+)?\.swap\.d")
    with suppress(OSError):
        for name in filter(unit.fullmatch, os.listdir(FOLDER)):
            with suppress(OSError):
                os.unlink(f"{FOLDER}/{name}/{DROP_IN}")
                os.rmdir(f"{FOLDER}/{name}")


def _folder(area: str) -> str:
    return f"{FOLDER}/dev-{os.path.basename(area)}.swap.d"
