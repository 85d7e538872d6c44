"""`zramd list`: the devices as zramctl shows the kernel's, with its columns, options and sizes."""

import argparse
import os
import sys

from zramd.commands import add_rundirs
from zramd.contract import budget, rundir
from zramd.control import servers
from zramd.control.columns import BY_NAME, COLUMNS, DEFAULT, Column, columns
from zramd.control.human import human
from zramd.errors import BudgetError, DeviceError, say
from zramd.kernel import attached, swap

TYPE_CHECKING = False  # what typing says too, without the time that it takes to import
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from zramd.commands import Commands
    from zramd.control.columns import Cell

    Row: TypeAlias = dict[str, Cell]

TIMEOUT = 2.0  # seconds for each server: one that hangs must not keep the others from being seen


def numbers(served: servers.Served, *, health: bool) -> "dict[str, Any]":
    """Return what the columns show of one device; raises DeviceError when its server does not answer.

    What a server says of its health takes a question more, so it is there only if asked for.
    """
    stats = served.ask_json("GET", "/stats", timeout=TIMEOUT)
    if health:
        told = served.ask_json("GET", "/health", timeout=TIMEOUT)
        stats["clients"] = told["clients"]
        stats["front"] = told.get("front", "nbd")  # of an older server
    devices = attached.devices(stats["name"], stats["disksize"])
    stats["attached"] = ",".join(devices)
    stats["mountpoint"] = ",".join(use for device in devices for use in swap.uses(device))
    return stats


def elsewhere() -> "list[dict[str, Any]]":
    """Return the same of devices that are attached and served by another machine: what this kernel knows.

    Only root sees them.
    """
    found = []
    for name in attached.names():
        there = attached.find(name) if "@" in name else None
        if there:
            size = attached.read_sys(there.device, "size")
            found.append(
                {
                    "name": name,
                    "disksize": int(size) << 9 if size.isdigit() else None,
                    "streams": None,  # of its own machine
                    "front": "nbd",
                    "attached": there.device,
                    "mountpoint": ",".join(swap.uses(there.device)),
                }
            )
    return found


def table(shown: list[Column], rows: list[list[str]], *, headings: bool) -> str:
    """Return rows of cells in columns as wide as they need, numbers to the right."""
    lines = [[column.name for column in shown], *rows] if headings else rows
    widths = [max(len(line[place]) for line in lines) for place in range(len(shown))] if lines else []
    text = ""
    for line in lines:
        cells = [
            cell.ljust(width) if column.kind == "text" else cell.rjust(width)
            for column, cell, width in zip(shown, line, widths, strict=True)
        ]
        text += " ".join(cells).rstrip() + "\n"
    return text


def raw(shown: list[Column], rows: list[list[str]], *, headings: bool) -> str:
    """Return rows of cells for programs: one space between two cells, none empty, none with a space in it."""
    lines = [[column.name for column in shown], *rows] if headings else rows
    cells = [[cell.replace("\\", r"\x5c").replace(" ", r"\x20") or "-" for cell in line] for line in lines]
    return "".join(" ".join(line) + "\n" for line in cells)


def budgets(arguments: argparse.Namespace) -> "list[budget.Shown]":
    """Return the budgets of the folders that are looked at, but of single devices none."""
    if arguments.names or arguments.rundir or not rundir.base():
        return []
    try:
        found = budget.look(budget.path(f"{rundir.base()}/any"))
    except BudgetError as error:
        say(str(error))
        return []
    return [] if found is None else [found]


def budget_line(found: "budget.Shown", in_bytes: bool) -> str:
    """Return what is below the table: how much of the budget is taken."""

    def size(number: int) -> str:
        return str(number) if in_bytes else human(number)

    devices = "1 device" if found.devices == 1 else f"{found.devices} devices"
    line = f"budget {size(found.budget)}: {size(found.used)} taken by {devices}"
    if found.left_behind:
        line += f", {size(found.left_behind)} of it by what servers have left that do not run"
    return line + f", {size(max(0, found.budget - found.used))} left\n"


def as_json(
    shown: list[Column], rows: "list[Row]", *, in_bytes: bool, shared: "list[budget.Shown] | None" = None
) -> str:
    """Return the rows as JSON: sizes as numbers with `in_bytes`, else as text such as 64M."""
    import json

    def size(number: int) -> "str | int":
        return number if in_bytes else human(number)

    def value(column: Column, cell: "Cell") -> "Cell":
        if cell is None or cell == "":
            return None
        if isinstance(cell, float):
            return round(cell, 4)
        return human(int(cell)) if column.kind == "size" and not in_bytes else cell

    devices = [{column.name.lower(): value(column, row[column.name]) for column in shown} for row in rows]
    found: dict[str, Any] = {"devices": devices}
    for one in shared or []:
        found["budget"] = {
            "budget": size(one.budget),
            "used": size(one.used),
            "left_behind": size(one.left_behind),
            "devices": one.devices,
        }
    return json.dumps(found, indent=2) + "\n"


def run(arguments: argparse.Namespace) -> int:
    """Print the table; devices whose server has died are named on standard error."""
    shown = columns(arguments.output, arguments.output_all)
    rows: list[Row] = []
    status = 0
    for served in servers.those(arguments.names, arguments.rundir):
        try:
            if served.pid is None:
                raise served.died()
            values = numbers(served, health=any(BY_NAME[name] in shown for name in ("CLIENTS", "FRONT")))
        except DeviceError as error:
            sys.stdout.flush()
            say(str(error))
            status = 1
            continue
        rows.append({column.name: column.get(values) for column in shown})
    if not (arguments.rundir or arguments.names):
        rows += [{column.name: column.get(values) for column in shown} for values in elsewhere()]
    if arguments.json:
        shared = budgets(arguments)
        sys.stdout.write(as_json(shown, rows, in_bytes=arguments.bytes, shared=shared))
        return status
    lines = [[column.show(row[column.name], arguments.bytes) for column in shown] for row in rows]
    if rows:  # as zramctl: nothing at all when there is no device
        write = raw if arguments.raw else table
        sys.stdout.write(write(shown, lines, headings=not arguments.noheadings))
    if arguments.raw or arguments.noheadings:
        return status
    if not (rows or status):
        say(_what_next())
    for one in budgets(arguments):
        line = budget_line(one, arguments.bytes)
        if rows:
            sys.stdout.write(line)
        elif one.used:  # by states: nothing else tells why a server that starts gets no memory
            say(line.rstrip())
    return status


def _what_next() -> str:
    """Return the hint for a user without devices: on standard error, because scripts read the table."""
    if not rundir.base():
        return "no place to look for devices: set XDG_RUNTIME_DIR or give --rundir FOLDER"
    configured = sorted(servers.configured())
    start = f"zramd start {configured[0]}" if configured else "zramd start zram0 --size 1G"
    roots = os.geteuid() != 0 and bool(servers.names_in(rundir.ROOTS))
    more = "; root has some: 'sudo zramd' shows them" if roots else ""
    return f"no device is served: '{start}' starts one, 'zramd doctor' looks whether all is ready{more}"


def _help() -> str:
    width = max(len(name) for name in BY_NAME)
    lines = "".join(f"  {column.name:<{width}}  {column.meaning}\n" for column in COLUMNS)
    return f"""
columns:
{lines}
Without -o these are shown: {", ".join(DEFAULT)}.

Where devices share a budget, a line below the table says how much of it is taken: what each device may take
or what is kept for it, also by a state whose server has ended.

DATA is not what 'swapon' shows as used. It is more when the kernel was not told to discard what it frees
(swapon --discard), for a freed page stays until it is written over; and less when pages of zeros never
reach the device, which Linux keeps to itself since 6.12.
"""


def add(commands: "Commands") -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "list",
        description="Show the devices of this machine that are served, as zramctl shows the kernel's; and\n"
        "those of other machines that are attached, of which only the size is known.",
        more=_help,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these devices")
    parser.add_argument("-b", "--bytes", action="store_true", help="print sizes in bytes")
    parser.add_argument("-n", "--noheadings", action="store_true", help="print no headings")
    parser.add_argument("-o", "--output", metavar="LIST", help="columns to show; +LIST: more columns")
    parser.add_argument("--output-all", action="store_true", help="show all columns")
    parser.add_argument(
        "--raw", action="store_true", help="separate columns by one space, and print - for an empty one"
    )
    parser.add_argument("-J", "--json", action="store_true", help="print JSON")
    add_rundirs(parser)
    parser.set_defaults(run=run)
