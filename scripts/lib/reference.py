"""docs/reference.md, as far as it is made from the tables in the code. What people wrote there stays.

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`. What the code cannot say, the meaning of a
file or a path, stands here. A thing without its meaning is an error, so nothing new stays undocumented.
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from zramd import commands, errors
from zramd.contract import rundir
from zramd.server import routes
from zramd.settings import config
from zramd.stats import texts
from zramd.stats.numbers import NUMBERS, Number
from zramd.stats.tiers import AGES_MEANING, TIERS
from zramd.stats.writeback import WRITEBACK

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference.md"

FILES = {
    "pid": "the server's process number; the server holds a lock on the file as long as it lives",
    "nbd.sock": "where clients connect (NBD), without `listen=`",
    "control.sock": "where you ask (HTTP), see [below](#the-control-socket)",
    "standby": "which process waits to take over when the server ends, and holds the lock of this file",
    **dict.fromkeys(rundir.KEYS, "with `clients=`: the keys of those who may come, one file for each server"),
    "sockets.sock": "there for a moment during `zramd restart`",
    "log": "what a server started by `zramd start` has to say, at most 1 MiB",
    "log.1": "what the server before it said, if that one crashed or was restarted",
    "state_path": "where the state file is; empty without `state=`",
    "data_id": "names the data: a new name when the device starts empty, is reset or loaded; "
    "the export `NAME@DATA_ID` is that data alone",
    "disksize": "size of the device in bytes",
    "comp_algorithm": "zram's list of algorithms, with the one that compresses in brackets",
    "recomp_algorithm": "the same of those that recompress, after `#1:`; empty when that is off",
    "backing_dev": "zram's: the backing device's path, or `none`",
    "bd_stat": "zram's three columns",
    "mm_stat": "zram's nine columns, see [below](#zrams-own-files)",
    "io_stat": "zram's four columns",
    "frag_ratio": "percent of the pool's pages that payload fills; higher is better",
    "stats.json": "every number, as `zramd stats NAME --json` prints them",
    "classes": "zsmalloc's table of size classes",
    "metrics.prom": "the numbers for Prometheus, see [monitoring](monitoring/README.md)",
}

PATHS = {
    "GET /": "every path, one a line",
    "GET /stats": "every number, as JSON",
    "GET /mm_stat": "zram's line of nine numbers",
    "GET /io_stat": "zram's line of four numbers",
    "GET /classes": "zsmalloc's table of size classes",
    "GET /classes.json": "the same, as JSON",
    "GET /metrics": "the numbers for Prometheus",
    "GET /health": "`status` (`ok` or `degraded`), its `causes`, the compactor, clients, streams under way, "
    "for how many seconds the backing is silent, and with NBD `listen`, the way of `tls`, "
    "and handshakes under way",
    "GET /settings": "every setting as it is now, as JSON",
    "GET /block/N": "what block N of 4096 bytes holds: where its object is, how large, of which class",
    "GET /comp_algorithm": "zram's list of algorithms, with the one that compresses in brackets",
    "GET /recomp_algorithm": "the same of those that recompress; nothing when recompression is off",
    "PUT /recomp_algorithm": "`algo=zstd priority=1`, or the setting `recompression`",
    "POST /recomp_algorithm": "the same",
    "PUT /recompress": "zram's: recompresses in the background, see [below](#zrams-words)",
    "POST /recompress": "the same",
    "PUT /idle": "zram's: `all`, or a time in which nobody has asked for a block",
    "POST /idle": "the same",
    "GET /backing_dev": "zram's: the backing device's path, or `none`",
    "GET /bd_stat": "zram's line of three numbers, see [below](#zrams-words)",
    "PUT /writeback": "zram's: writes blocks out in the background, see [below](#zrams-words)",
    "POST /writeback": "the same",
    "GET /writeback_limit": "zram's: what may be written now, in units of 4096 bytes",
    "POST /writeback_limit": "sets that; `PUT` is the setting of that name: bytes a day",
    "GET /writeback_limit_enable": "zram's: `1` while there is a limit, else `0`",
    "PUT /writeback_limit_enable": "`0`: no limit (`writeback_limit=off`); `1`: the one before, or 1G",
    "POST /writeback_limit_enable": "the same",
    "PUT /bring_back": "brings everything back into memory, in the background, that is out",
    "POST /bring_back": "the same",
    "GET /block_state": "zram's: a line for each block that is stored, as a stream",
    "GET /save": "the device as a stream ([format](save-format.md)); fails if a client changes it meanwhile",
    "GET /save/live": "the same while clients write: blocks are from different moments",
    "PUT /load": "such a stream into an empty device without clients",
    "POST /compact": "compacts until nothing more can be freed; answers with the pages freed",
    "POST /check": "walks every structure: `sound`, or the fault",
    "POST /reset": "drops all data; refused (409) while a client is connected",
    "POST /mem_used_max": "forgets the peak",
    "PUT /ublk": "with `front=ublk`: serves the kernel's device whose descriptor comes along (SCM_RIGHTS)",
    "DELETE /ublk": "lets go of that device, once the kernel has stopped it",
    "POST /sockets": "sends the listening sockets to the unix socket named in the body, for `zramd restart`",
}

USERS = {
    "ZRAMD_ROOT": "a folder that stands for `/` when the configuration and `proc/meminfo` are read",
    "XDG_RUNTIME_DIR": "where a normal user's run folders are: `$XDG_RUNTIME_DIR/zramd/NAME`",
    "NO_COLOR": "no colours in `zramd top`",
    "NOTIFY_SOCKET": "set by systemd: the service manager to report to (`zramd serve` only)",
    "LISTEN_FDS, LISTEN_PID": "set by systemd: listening sockets to use instead of making one",
}
OWN = {
    "ZRAMD_BACKGROUND": "this server was started by `zramd start`: it has a log and no terminal",
    "ZRAMD_TAKES_OVER": "this server replaces another one: its link to the command, and the old process",
    "ZRAMD_RUNDIR_MADE": "zramd made the run folder, so it may remove it",
    "ZRAMD_TURN": "the descriptor that keeps other commands off until this server serves",
    "ZRAMD_STATE_FD": "the memory file that the service manager keeps (`state=systemd`)",
    "ZRAMD_UNIT": "this server is, or was, on standby for that of this service",
    "ZRAMD_STEPS": "tests: stop at named moments in a server's life",
    "ZRAMD_CRASH": "tests: die the Nth time at a named point (debug builds only)",
}

STATUS = {
    0: "done",
    1: "it failed, or what you asked about is not well; one sentence on standard error says why",
    2: "the command line, or a setting in it, is wrong",
}


def table(*head: str, rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    every = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in every)


def verbs() -> str:
    """Return the commands with what each is for, as `zramd --help` has them."""
    return table("command", "what it does", rows=_verbs())


def _verbs() -> Iterable[tuple[str, str]]:
    for verb, (_, text) in commands.VERBS.items():
        parts = [
            (f"`zramd {verb} {choice.dest}`", f"{choice.help}")
            for action in commands.verb_parser(verb)._actions
            for choice in getattr(action, "_choices_actions", ())
        ]
        yield from parts or [(f"`zramd {verb}`", text)]


def settings() -> str:
    """Return the settings with their defaults."""
    rows = []
    for setting in config.SETTINGS:
        names = ", ".join(f"`{name}`" for name in (setting.name, *setting.aliases))
        shown = setting.shown_default or f"`{setting.default}`"
        rows.append((names, shown, f"`{setting.name}={setting.example}`", setting.help))
    return table("setting", "default", "example", "meaning", rows=rows)


def fixed() -> str:
    """Return the settings that cannot be changed while the device is served, and why."""
    rows = [(f"`{setting.name}`", setting.fixed) for setting in config.SETTINGS if setting.fixed]
    return table("setting", "why it stays as it is until the next start or `zramd restart`", rows=rows)


def numbers() -> str:
    """Return every number of stats.json, in its order."""
    return _numbers(NUMBERS)


def tiers() -> str:
    """Return every number of the section `tiers` of stats.json, in its order."""
    return _numbers(TIERS, ("`ages`", "blocks", AGES_MEANING, "`zramd_age_pages`"))


def writeback() -> str:
    """Return every number of the section `writeback` of stats.json, in its order."""
    return _numbers(WRITEBACK)


def _numbers(found: Iterable[Number], *more: tuple[str, ...]) -> str:
    rows = [
        (f"`{number.name}`", number.unit, number.meaning, f"`zramd_{number.metric}`" if number.metric else "")
        for number in found
    ]
    return table("number", "unit", "meaning", "in Prometheus", rows=[*rows, *more])


def columns() -> str:
    """Return which numbers the lines of mm_stat, io_stat and bd_stat are."""
    files = (("mm_stat", texts.MM_STAT), ("io_stat", texts.IO_STAT))
    rows = [(f"`{name}`", " ".join(f"`{one}`" for one in found)) for name, found in files]
    rows.append(
        ("`bd_stat`", "extents in use, `bd_reads`, `bd_writes` of `writeback`, in units of 4096 bytes")
    )
    return table("file", "its numbers, in zram's order", rows=rows)


def files() -> str:
    """Return the files of the run folder."""
    names = [name for name in rundir.NAMES if not name.endswith(".new")]
    _agree("files of the run folder", names, FILES)
    return table("file", "what it is", rows=((f"`{name}`", FILES[name]) for name in FILES))


def paths() -> str:
    """Return what the control socket answers to, as it says itself (GET /)."""
    listed = routes.Routes(cast(Any, None)).answer("GET", "/", b"").body.splitlines()
    changed = [f"PUT /{setting.name}" for setting in config.SETTINGS if not setting.fixed]
    rest = [path for path in listed if path not in changed]
    _agree("paths of the control socket", rest, PATHS)
    rows = [(f"`{path}`", meaning) for path, meaning in PATHS.items()]
    shown = " ".join(f"`/{path.partition('/')[2]}`" for path in changed)
    return table("path", "answer", rows=[*rows, ("`PUT /SETTING`", f"changes one: {shown}")])


def statuses() -> str:
    """Return the exit statuses, and which exceptions of Python's side end with each."""
    kinds = sorted(_subclasses(errors.ZramdError), key=lambda kind: kind.__name__)
    rows = []
    for status, meaning in STATUS.items():
        names = [f"`{kind.__name__}`" for kind in kinds if status and kind.exit_code == status]
        rows.append((str(status), meaning, " ".join(names)))
    _agree("exit statuses", {str(kind.exit_code) for kind in kinds} | {"0"}, {str(one) for one in STATUS})
    return table("status", "meaning", "exceptions", rows=rows)


def _subclasses(kind: type[errors.ZramdError]) -> set[type[errors.ZramdError]]:
    found = {one for one in kind.__subclasses__() if one.__module__ == errors.__name__}
    return found | {deeper for one in found for deeper in _subclasses(one)}


def environment() -> str:
    """Return the environment variables that mean something to zramd."""
    sources = [path for ending in ("py", "pxd", "pyx") for path in (ROOT / "zramd").rglob(f"*.{ending}")]
    quoted = re.compile(r"[\"'](ZRAMD_[A-Z_]*[A-Z])[\"']")
    read = {name for path in sources for name in quoted.findall(path.read_text())}
    _agree("variables", read, {name for name in (*USERS, *OWN) if name.startswith("ZRAMD_")})
    own = table("between its processes", "meaning", rows=((f"`{name}`", OWN[name]) for name in OWN))
    return table("variable", "meaning", rows=((f"`{name}`", USERS[name]) for name in USERS)) + "\n" + own


def _agree(what: str, found: Iterable[str], described: Iterable[str]) -> None:
    """Raise SystemExit when something is not described, or something that is described is not there."""
    found, described = set(found), set(described)
    if found != described:
        raise SystemExit(
            f"{what}: not described here: {', '.join(sorted(found - described)) or 'none'}; "
            f"described, but not there: {', '.join(sorted(described - found)) or 'none'}"
        )


PARTS: dict[str, Callable[[], str]] = {
    "commands": verbs,
    "settings": settings,
    "fixed": fixed,
    "numbers": numbers,
    "tiers": tiers,
    "writeback": writeback,
    "columns": columns,
    "files": files,
    "paths": paths,
    "statuses": statuses,
    "environment": environment,
}


def made(text: str) -> str:
    """Return the page with every table as the code has it now. Raises SystemExit where one has no place."""
    for name, make in PARTS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"{PAGE.name} needs a place for '{name}': {start.strip()} … {end}")
        before, _, rest = text.partition(start)
        text = f"{before}{start}{make()}{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    """Write the page again."""
    before = PAGE.read_text()
    after = made(before)
    PAGE.write_text(after)
    print(f"{PAGE.relative_to(ROOT)}: {'written' if before != after else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
