"""What this machine's swap on a device uses, and what refreshes of it gave back: for statistics."""

import json
import os

from zramd.errors import AttachError
from zramd.guest import files
from zramd.kernel import attached, swap

BLOCK = 4096
_NOTES_BYTES = 64 << 10  # of an area there are some 100


def numbers(name: str, disksize: int) -> dict[str, int | None]:
    """Return the SWAP numbers of zramd.stats.numbers for zramd `name`: None for what there is not.

    For a server, which asks now and then: whatever fails, it is as if there were no swap.
    """
    found: dict[str, int | None] = {"swap_used": None, "refreshed_blocks": None, "refresh_last_blocks": None}
    try:
        areas = [area for area in swap.swaps() if area.path.startswith(("/dev/nbd", "/dev/ublkb"))]
        devices = {swap.device_of(area.path) for area in areas}
        ours = {device for device in devices if attached.is_of(device, name, disksize)}
        if not ours:
            return found
        used = sum(area.used for area in areas if swap.device_of(area.path) in ours) // BLOCK
        return {"swap_used": used, **_refreshed(ours)}
    except (OSError, AttachError):
        return found


def _refreshed(devices: set[str]) -> dict[str, int | None]:
    """Return what zramd.guest has noted of its refreshes, of one device at least."""
    total = last = None
    for device in devices:
        try:
            with open(f"{files.RUN}/{os.path.basename(device)}.json", encoding="utf-8") as file:
                notes = json.loads(file.read(_NOTES_BYTES))
            freed = int(notes["counts"].get("freed", 0)), int(notes["last"].get("freed", 0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # nobody has noted anything
        total, last = (total or 0) + freed[0], (last or 0) + freed[1]
    return {"refreshed_blocks": total, "refresh_last_blocks": last}
