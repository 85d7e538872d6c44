"""What a server says of its export in words: by that a client of another machine knows its data again.

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
