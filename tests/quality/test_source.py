"""Rules of the source that no linter knows."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "zramd" / "core"
MODULES = sorted(CORE.rglob("*.pyx"))
CYTHON = sorted([*CORE.rglob("*.pyx"), *CORE.rglob("*.pxd")])

# A function, to the colon or the end of its declaration: `cdef int f(int a) noexcept nogil`.
FUNCTION = re.compile(r"^[ \t]*cp?def\s[^\n(=]*\((?:[^()]|\([^()]*\))*\)(?P<tail>[^\n:]*)", re.MULTILINE)

assert MODULES, "the core's modules are elsewhere"


def by_name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("module", MODULES, ids=by_name)
def test_module_has_its_faces(module):
    assert module.with_suffix(".pyi").exists(), "no stub: the types of a compiled module come from it alone"
    if re.search(r"^cdef class", module.read_text(), re.MULTILINE):
        assert module.with_suffix(".pxd").exists(), "no .pxd: the fields of its classes are explained there"


@pytest.mark.parametrize("path", CYTHON, ids=by_name)
def test_nogil_functions_are_noexcept(path):
    """Without noexcept, each call of a nogil function takes the GIL to look for an exception."""
    text = path.read_text()
    careless = [
        f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0].strip()}"
        for match in FUNCTION.finditer(text)
        if "nogil" in match["tail"] and "noexcept" not in match["tail"]
    ]
    assert not careless, "\n".join(careless)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cdef int f(int a) nogil:", True),
        ("    cdef int f(self, int (*g)(int) noexcept nogil) except -1 nogil:", True),
        ("cdef inline int f(int a,\n                  int b) nogil:", True),
        ("cdef int f(int a) noexcept nogil:", False),
        ("cdef int f(int a):", False),
        ('cdef extern from "lz4.h" nogil:', False),
        ("cdef int n = size(nogil)", False),
    ],
)
def test_the_search_for_nogil_functions(line, found):
    match = FUNCTION.search(line)
    assert bool(match and "nogil" in match["tail"] and "noexcept" not in match["tail"]) is found


def test_public_names():
    import zramd

    promised = {
        "ConfigError",
        "CorruptionError",
        "Device",
        "PoolFullError",
        "ZramdError",
        "Zsmalloc",
        "__version__",
    }
    assert promised <= set(zramd.__all__)
    assert len(set(zramd.__all__)) == len(zramd.__all__)
    for name in zramd.__all__:
        assert getattr(zramd, name) is not None
        if name != "__version__":
            assert getattr(zramd, name).__doc__, f"zramd.{name} has no docstring"


def test_core_is_the_build_under_test():
    """The source folder must not shadow the build: the tests would pass on something else."""
    import zramd

    assert not Path(zramd.__file__).is_relative_to(ROOT / "zramd"), "run the tests through scripts/test"


def tracked_files() -> list[Path]:
    git = ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others"]
    try:
        names = subprocess.run(
            [*git, "--exclude-standard"], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in names.split("\0") if (path := ROOT / name).is_file()]


def test_no_machine_paths_and_no_leftovers():
    # Written so that this file does not match itself.
    wrong = re.compile(r"/(?:home|root|work)/|/tmp/(?:venv|scratch)|\b(?:TOD[O]|FIXM[E]|XX[X]|HAC[K])\b")
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
            for n, line in enumerate(lines, 1)
            if wrong.search(line)
        ]
    assert not found, "\n".join(found)


def test_only_these_at_the_top():
    expected = {
        *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "nbdkit_plugin.py"),
        *("zramd", "tests", "scripts", "systemd", "docs"),
    }
    top = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in top if not name.startswith(".")} <= expected


def test_plain_unit_name_is_left_to_others():
    """Another project is called zramd: only template units are ours."""
    units = sorted(path.name for path in (ROOT / "systemd").glob("*.service"))
    assert units
    assert all(
        name.startswith(("zramd@", "zramd-net@", "zramd-attach@", "zramd-refresh.", "zramd-guest"))
        for name in units
    )
