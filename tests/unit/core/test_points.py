"""Named points: the list is that of the source, and each is a probe where <sys/sdt.h> was there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import zramd

CORE = Path(__file__).resolve().parents[3] / "zramd" / "core"
LIST = (CORE / "system" / "points.pxd").read_text()
NAMES = re.findall(r"^        (\w+)\b", LIST.split("enum point:")[1], re.MULTILINE)
# A note of the section .note.stapsdt: its owner, then addresses, then provider and name.
PROBE = re.compile(rb"stapsdt\0.{24,40}?zramd\0(\w+)\0", re.DOTALL)


def probes(file: Path) -> set[str]:
    return {name.decode() for name in PROBE.findall(file.read_bytes())}


def test_the_list_is_that_of_the_source() -> None:
    assert len(set(NAMES)) == len(NAMES) > 20
    sources = [path.read_text() for path in CORE.rglob("*.p[yx][xd]")]
    used = {name for text in sources for name in re.findall(r"zr_point\(points\.(\w+)\)", text)}
    assert used == set(NAMES)


def test_a_build_has_all_probes_or_none() -> None:
    modules = list(Path(zramd.__file__).parent.joinpath("core").rglob("*.so"))
    assert modules
    found = set().union(*map(probes, modules))
    assert found in (set(), set(NAMES))


@pytest.mark.parametrize("checked", [False, True])
def test_points_as_the_compiler_sees_them(checked: bool, tmp_path: Path) -> None:
    """Probes, but in a debug build, which looks at its points itself."""
    if shutil.which("cc") is None:
        pytest.skip("needs cc")
    header = subprocess.run(
        ["cc", "-E", "-x", "c", "-"], input=b"#include <sys/sdt.h>", capture_output=True, check=False
    )
    source, compiled = tmp_path / "points.c", tmp_path / "points.o"
    calls = "".join(f"    zr_point({name});\n" for name in NAMES)
    source.write_text(LIST.split('"""')[3] + "void points(void)\n{\n" + calls + "}\n")
    level = f"-DZRAMD_CHECK={3 if checked else 0}"
    subprocess.run(["cc", "-c", "-O2", "-Wall", "-Werror", level, "-o", compiled, source], check=True)
    wanted = set(NAMES) if header.returncode == 0 and not checked else set()
    assert probes(compiled) == wanted
