"""Which nbdkit is installed, and how to install one on this system."""

import re

# What root runs on each family of systems, by a word of ID or ID_LIKE in os-release(5).
_BY_SYSTEM = {
    "debian": "run 'apt-get install --no-install-recommends nbdkit nbdkit-plugin-python' as root",
    "fedora": "run 'dnf install nbdkit nbdkit-python-plugin' as root",
    "suse": "run 'zypper install nbdkit nbdkit-python-plugin' as root",
    "arch": "build the package nbdkit of the AUR, with python installed",
    "alpine": "build nbdkit from its source, with python3-dev installed, because Alpine has no package of it",
}
_OTHERWISE = "install nbdkit and its Python plugin"
_IDS = ("ID", "ID_LIKE")


def nbdkit_version() -> str:
    """Return the version of the nbdkit that is installed, '' if there is none."""
    import subprocess

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


def how_to_install(root: str = "") -> str:
    """Return what to do on this system to have nbdkit and its Python plugin; `root` stands for /."""
    for system in _systems(root):
        if system in _BY_SYSTEM:
            return _BY_SYSTEM[system]
    return _OTHERWISE


def _systems(root: str) -> list[str]:
    """Return what os-release calls this system, and what it is like, the closest first."""
    text = ""
    for path in ("etc/os-release", "usr/lib/os-release"):
        try:
            with open(f"{root}/{path}", errors="replace") as file:
                text = file.read()
            break
        except OSError:
            continue
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return [word for key in _IDS for word in values.get(key, "").strip().strip("\"'").lower().split()]
