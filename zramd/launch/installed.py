"""Which nbdkit is installed."""

import re
import subprocess


def nbdkit_version() -> str:
    """Return the version of the nbdkit that is installed, '' if there is none."""
    try:
        done = subprocess.run(
            ["nbdkit", "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"[0-9]+(?:\.[0-9]+)+", done.stdout)
    return match[0] if match else ""
