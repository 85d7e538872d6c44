"""How a client of another machine knows its data again: by the export's description, or by its name.

On the server's own machine its run folder says that too (rundir.DATA_ID).
"""

import re

_DATA = re.compile(r"zramd \S+: .*, data ([0-9a-f]{32})")


def description(version: str, algorithm: str, data_id: str) -> str:
    """Return what NBD calls the description of an export."""
    return f"zramd {version}: compressed memory ({algorithm}), data {data_id}"


def data_of(description: str) -> str:
    """Return the data_id in such a description, '' if no zramd has said that, or one that names no data."""
    found = _DATA.fullmatch(description)
    return found[1] if found else ""


def refusal(wanted: str, name: str, data_id: str) -> str:
    """Return why a client does not get the export that it wants, '' if it does.

    A device is the export of its name, and of none. As NAME@DATA_ID it is one only while it holds that data:
    qemu connects again without looking at anything else.
    """
    if wanted in ("", name, f"{name}@{data_id}"):
        return ""
    if wanted.startswith(f"{name}@"):
        return f"export '{wanted}' is no more: '{name}' holds other data now, '{name}@{data_id}'"
    return f"export '{wanted}' does not exist: use '{name}'"
