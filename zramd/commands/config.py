"""`zramd config show`, `check` and `import`: what is configured, what is wrong, and taking over others'."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from zramd.commands import Commands
from zramd.control.human import spelled
from zramd.errors import ConfigError, printable, say
from zramd.settings import conffiles, devices, foreign
from zramd.settings.config import SETTINGS, written
from zramd.settings.devices import Configuration, ConfiguredDevice
from zramd.settings.foreign import Translation
from zramd.settings.keys import TWINS

_WRITE_ONE = "write /etc/zramd.conf, as docs/zramd.conf shows"
_ABOUT_GENERATOR = "read zram-generator's configuration, else zramswap's, instead of zramd's"


def _must_be_a_file(file: str | None) -> None:
    if file == "":  # most likely a variable of a shell that is not set
        raise ConfigError("'' is not a file's name: give a FILE, or none for what this machine has")


def _translation(file: str | None) -> Translation:
    """Return another program's configuration: `file`, else its own. Raises ConfigError for none."""
    root = conffiles.root_folder()
    paths = [Path(file)] if file is not None else foreign.find(root)
    if not paths:
        raise ConfigError(f"nothing is configured for zram-generator or zramswap below {root}: give a FILE")
    return foreign.read(paths)


def _load(file: str | None, generator: bool) -> Configuration:
    if not generator:
        return devices.load(file=file)
    translation = _translation(file)
    ram = devices.total_ram(conffiles.root_folder())
    built = devices.build(translation.sections, ram, translation.problems)
    return replace(built, notes=(*translation.notes, *built.notes), files=tuple(translation.files))


def _values(device: ConfiguredDevice) -> dict[str, Any]:
    """Return every value that has an effect on the device, by its key."""
    values: dict[str, Any] = {"attach": device.attach}
    if device.swaps:
        values |= {
            "swap-priority": device.swap_priority,
            "swap-areas": device.swap_areas or "auto",
            "options": device.options,
        }
    if device.attached:
        values |= {
            "timeout": "auto" if device.timeout is None else device.timeout,
            "dead-conn-timeout": device.dead_conn_timeout,
            "connections": device.connections,
        }
    return values | device.settings()._asdict()


def _origin(device: ConfiguredDevice, key: str) -> str:
    """Return FILE:LINE of what gave `key` its value, '' for a default."""
    if key == "name":
        return device.where[""]
    written = [key, *(twin for twin, setting in TWINS.items() if setting == key)]
    where = next((device.where[word] for word in written if word in device.where), "")
    return where or ("attach = swap" if key == "swap" and device.swaps else "")


def _table(device: ConfiguredDevice) -> str:
    sizes = {setting.name for setting in SETTINGS if setting.is_size}
    rows = []
    for key, value in _values(device).items():
        shown = written(key, value)
        size = spelled(value) if value and key in sizes else ""
        rows.append((key, shown or "-", size, _origin(device, key) or "default"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows
    )
    what = {
        "swap": f"this machine swaps to it with priority {device.swap_priority}",
        "device": "this machine attaches it",
        "no": "for others to attach",
    }[device.attach]
    head = f"{device.name}: {spelled(device.disksize)}, {what}"
    return "\n".join([head, *(f"  {line.rstrip()}" for line in lines)])


def _as_json(device: ConfiguredDevice) -> dict[str, Any]:
    values = _values(device)
    return {
        "name": device.name,
        "disksize": device.disksize,
        "attach": device.attach,
        "values": values,
        "from": {key: _origin(device, key) or None for key in values},
        "serve": device.words(),
    }


def _complain(configuration: Configuration) -> None:
    for problem in configuration.problems:
        say(str(problem))


def show(arguments: argparse.Namespace) -> int:
    """Print what would be started, with which values."""
    configuration = _load(None, arguments.generator)
    chosen, skipped = list(configuration.devices), configuration.skipped
    if arguments.name is None:
        _complain(configuration)
    elif arguments.name in skipped:
        chosen, skipped = [], {arguments.name: skipped[arguments.name]}
    else:
        chosen, skipped = [configuration.find(arguments.name)], {}
    if arguments.json:
        found = {
            "devices": [_as_json(device) for device in chosen],
            "skipped": skipped,
            "notes": configuration.notes,
            "files": configuration.files,
        }
        print(json.dumps(found, indent=2))
    else:
        parts = [_table(device) for device in chosen]
        if not (chosen or skipped or configuration.problems):
            parts = [f"no device is configured: {_WRITE_ONE}"]
        parts += ["\n".join(f"{name}: {why}" for name, why in skipped.items())] if skipped else []
        parts += (
            ["\n".join(f"note: {printable(note)}" for note in configuration.notes)]
            if configuration.notes
            else []
        )
        if parts:
            print("\n\n".join(parts))
    return ConfigError.exit_code if configuration.problems else 0


def check(arguments: argparse.Namespace) -> int:
    """Print everything that is wrong; return 1 if anything is."""
    _must_be_a_file(arguments.file)
    configuration = _load(arguments.file, arguments.generator)
    _complain(configuration)
    for note in configuration.notes:
        print(f"note: {printable(note)}")
    for name, why in configuration.skipped.items():
        print(f"{name}: {why}")
    if configuration.problems:
        return 1
    if not configuration.files:
        print(f"nothing is configured: {_WRITE_ONE}")
        return 0
    names = ", ".join(device.name for device in configuration.devices) or "no device"
    print(f"no errors in {', '.join(configuration.files)}: {names}")
    return 0


def import_(arguments: argparse.Namespace) -> int:
    """Print a zramd.conf made from another program's configuration; return 1 if it has errors to mend."""
    _must_be_a_file(arguments.file)
    translation = _translation(arguments.file)
    ram = devices.total_ram(conffiles.root_folder())
    configuration = devices.build(translation.sections, ram, translation.problems)
    sys.stdout.write(foreign.text(translation, configuration.problems))
    _complain(configuration)
    return 1 if configuration.problems else 0


def add(commands: Commands) -> None:
    """Add the verbs."""
    parser = commands.add_parser(
        "config",
        description=("Show and check /etc/zramd.conf and its drop-ins, or make one from another program's."),
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    one = verbs.add_parser(
        "show",
        help="print what would be started, with every value and where it comes from",
        description="Print what would be started. Status 2: what is configured has errors.",
    )
    one.add_argument("name", nargs="?", metavar="NAME", help="only this device")
    one.add_argument("-J", "--json", action="store_true", help="print JSON; sizes in bytes, times in seconds")
    one.add_argument("--generator", action="store_true", help=_ABOUT_GENERATOR)
    one.set_defaults(run=show)
    one = verbs.add_parser(
        "check",
        help="print every error",
        description="Print every error; exit status 1 if there is one.",
    )
    one.add_argument("file", nargs="?", metavar="FILE", help="only this file [zramd.conf and its drop-ins]")
    one.add_argument("--generator", action="store_true", help=_ABOUT_GENERATOR)
    one.set_defaults(run=check)
    one = verbs.add_parser(
        "import",
        help="print a zramd.conf made from zram-generator's or zramswap's configuration",
        description=(
            "Print a zramd.conf that means the same; what zramd cannot do is named in comments at its head. "
            "Nothing is changed: to use it, zramd config import > /etc/zramd.conf"
        ),
    )
    one.add_argument(
        "file", nargs="?", metavar="FILE", help="zram-generator.conf or default/zramswap [the machine's]"
    )
    one.set_defaults(run=import_)
