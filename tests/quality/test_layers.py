"""The architecture: which room of zramd/ may import which. docs and README draw the same picture."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "zramd"

# From the ground up: each room, what it is, and the rooms that it may import. What is not here, it may not.
# errors, lockfile, meminfo, resident and trusted are modules for all; core.types has words and constants.
GROUND = {"errors", "lockfile", "meminfo", "resident", "trusted"}
MAY_IMPORT = {
    "errors": set(),
    "lockfile": set(),
    "meminfo": set(),
    "resident": set(),
    "trusted": {"errors"},
    # The core: compiled, without the GIL. From Python it takes the exceptions only.
    "core": set(),
    "core.system": {"errors"},
    "core.memory": {"errors", "core", "core.system"},
    "core.pool": {"errors", "core", "core.system", "core.memory"},
    "core.device": {"errors", "core", "core.system", "core.memory", "core.pool"},
    "core.ublk": {"errors", "core", "core.system", "core.memory", "core.device"},
    # What runs in guests too, where there is no zramd.
    "guest": set(),
    # What every process of zramd may need, and what processes say to each other.
    "process": GROUND,
    "contract": GROUND,
    # What server and command line both know.
    "settings": {*GROUND, "contract"},
    "stats": {"errors"},
    "kernel": {*GROUND, "contract", "process", "guest", "core.system", "core.device", "core.ublk"},
    # The server, inside nbdkit or by itself. Nothing in zramd imports it: nbdkit_plugin.py does.
    "server": {
        *GROUND,
        *("zramd", "contract", "process", "settings", "stats", "kernel"),
        *("core.system", "core.memory", "core.pool", "core.device", "core.ublk"),
    },
    # The command line. It talks to servers, and never loads what they are made of.
    "control": {*GROUND, "contract", "process", "settings", "stats", "kernel"},
    "launch": {
        *GROUND,
        *("zramd", "contract", "process", "settings", "guest", "kernel", "control"),
        "core.ublk",  # which front front=auto is
    },
    "top": {*GROUND, "control", "stats"},
    "commands": {
        *GROUND,
        *("zramd", "contract", "process", "settings", "stats", "kernel", "control", "launch", "top"),
        "core.device",  # `zramd save` checks a stream with the code that writes one
    },
    # zramd/__init__.py and __main__.py: the public names, and `python -m zramd`.
    "zramd": {"errors", "core.pool", "core.device", "commands"},
}


def module_of(path: Path) -> str:
    """The module that a file is: zramd/core/pool/zsmalloc.pyx is zramd.core.pool.zsmalloc."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    path: module_of(path)
    for path in sorted(PACKAGE.rglob("*"))
    if path.suffix in (".py", ".pyi", ".pyx", ".pxd")
}
MODULES = set(SOURCES.values())
FILES = {module for path, module in SOURCES.items() if path.stem != "__init__"}


def room_of(module: str) -> str:
    """The room in which a module lies: its folder, or the module itself if it lies in zramd/."""
    names = module.split(".")
    if len(names) == 1 or module == "zramd.__main__":
        return "zramd"
    if names[1] == "core":
        return ".".join(names[1:3]) if len(names) > 3 or module not in FILES else "core"
    return names[1]


def imports(path: Path) -> Iterator[str]:
    """The modules of zramd that a source imports, anywhere in it, also those that only type checkers see."""
    text = path.read_text()
    if path.suffix in (".py", ".pyi"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names if name.name.split(".")[0] == "zramd")
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "zramd":
                for name in node.names:
                    module = f"{node.module}.{name.name}"
                    yield module if module in MODULES else node.module
    else:
        for module, names in re.findall(
            r"^\s*from (zramd[\w.]*) c?import (\([^)]*\)|[^\n#]*)", text, re.MULTILINE
        ):
            words = [f"{module}.{name}" for name in re.findall(r"\w+", names)]
            yield from [word for word in words if word in MODULES] or [module]
        yield from re.findall(r"^\s*c?import (zramd[\w.]*)", text, re.MULTILINE)


def arrows() -> dict[tuple[str, str], list[str]]:
    """From which room to which other the imports lead, and whose they are."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, module in SOURCES.items():
        for imported in imports(path):
            if room_of(module) != room_of(imported):
                found.setdefault((room_of(module), room_of(imported)), []).append(
                    f"{path.relative_to(ROOT)} imports {imported}"
                )
    return found


ARROWS = arrows()


def test_each_module_has_a_room() -> None:
    homeless = sorted(
        str(path.relative_to(ROOT)) for path in SOURCES if room_of(SOURCES[path]) not in MAY_IMPORT
    )
    assert not homeless, f"{', '.join(homeless)}: no room of MAY_IMPORT"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    wrong = [
        f"{who}, but {room} may not import {into}: move what is needed down, or what needs it up"
        for (start, into), those in ARROWS.items()
        if start == room and into not in MAY_IMPORT[room]
        for who in those
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_allowed_is_used() -> None:
    """A right that nobody uses lets in what nobody has thought about; those to the ground are for all."""
    unused = [
        f"{room} never imports {into}"
        for room, rooms in MAY_IMPORT.items()
        for into in rooms - GROUND
        if (room, into) not in ARROWS
    ]
    assert not unused, "\n".join(unused)


def test_there_is_no_circle() -> None:
    left = {room: set(rooms) - {"zramd"} for room, rooms in MAY_IMPORT.items()}
    while ground := [room for room, rooms in left.items() if not rooms]:
        left = {room: rooms - set(ground) for room, rooms in left.items() if room not in ground}
    assert not left, f"these import each other: {', '.join(left)}"


def test_no_room_does_anything_when_it_is_entered() -> None:
    """Importing one module must not bring others: `zramd list` starts fast, and the keeper stays small."""
    full = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.name == "__init__.py"
        and path.parent not in (PACKAGE, PACKAGE / "commands")
        and path.read_text()
    ]
    assert not full, f"{', '.join(full)}: must be empty"


def test_no_verb_imports_another() -> None:
    """What two verbs need lies in control or launch. Each may import what all share, the package itself."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path, module in SOURCES.items()
        if module.startswith("zramd.commands.")
        for imported in imports(path)
        if imported.startswith("zramd.commands.")
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_are_found(tmp_path: Path) -> None:
    assert "zramd.core.system.locks" in imports(PACKAGE / "core/memory/arena.pyx")
    assert {"core.system", "core"} <= {into for start, into in ARROWS if start == "core.memory"}
    python, cython = tmp_path / "a.py", tmp_path / "a.pyx"
    python.write_text(
        "from zramd.settings import config, keys as k\nfrom zramd.errors import ZramdError\n"
        "def f():\n    import zramd.server.server\nif TYPE_CHECKING:\n    from zramd.top.view import Frame\n"
    )
    assert set(imports(python)) == {
        *("zramd.settings.config", "zramd.settings.keys", "zramd.errors"),
        *("zramd.server.server", "zramd.top.view"),
    }
    cython.write_text(
        "from zramd.core.system.locks cimport (\n    counter_add,\n)\nfrom zramd.core.pool import zsmalloc\n"
        "from zramd.errors import error_from\ncimport zramd.core.types\n"
    )
    assert set(imports(cython)) == {
        *("zramd.core.system.locks", "zramd.core.pool.zsmalloc"),
        *("zramd.errors", "zramd.core.types"),
    }
    assert [
        room_of(module) for module in ("zramd.core.types", "zramd.core.pool.zsmalloc", "zramd.trusted")
    ] == [*("core", "core.pool", "trusted")]
