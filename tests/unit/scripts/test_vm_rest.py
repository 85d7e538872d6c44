"""A guest that rests in scripts/vm-swap: what goes together, and where its pages come from."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "lib"))

from vm import __main__ as vm_swap
from vm import plan, session
from vm.errors import VmError

GUEST = Path(__file__).resolve().parents[3] / "scripts/lib/vm/guest"
MIB = 1 << 20


def test_what_is_asked_for_is_planned(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.write_bytes(bytes(4096))
    words = [
        "--attach",
        "local",
        "--rest",
        "20",
        "--pages",
        str(pages),
        "--set",
        "cold_age=10",
        "--mem-limit",
        "9M",
    ]
    asked = vm_swap.arguments(words)
    vm_swap.refuse(asked)
    this = vm_swap.plan(asked, "local")
    assert (this.rest, this.pages) == (20.0, str(pages))
    assert this.zramd_settings == {
        "swap": "local",
        "reserve": "4M",
        "mem_limit": str(9 * MIB),
        "cold_age": "10",
    }
    assert f"file.filename={pages}" in session.page_disk(this.pages)[1]
    assert session.page_disk("") == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--rest 20 --set cold_age", "'cold_age' is not NAME=VALUE"),
        ("--sysctl vm.swappiness", "'vm.swappiness' is not NAME=VALUE"),
        ("--rest 20 --pages /nowhere", "'/nowhere' cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(words: str, why: str) -> None:
    with pytest.raises(VmError, match=why):
        vm_swap.refuse(vm_swap.arguments(words.split()))


def test_pages_are_taken_from_a_file(tmp_path: Path) -> None:
    """Each is one of the file, but for its first word, and the same again for the same numbers."""
    pages = [bytes([number]) * 4096 for number in range(1, 8)]
    (tmp_path / "pages").write_bytes(b"".join(pages) + b"rest")
    subprocess.run(["cc", "-O1", "-Dmain=guest_tool", "-c", *GUEST.glob("*.c")], check=True, cwd=tmp_path)
    (tmp_path / "show.c").write_text(
        '#include "tool.h"\n#include <unistd.h>\n'
        'int main(void) { uint64_t out[512]; page_source("pages");\n'
        "for (int i = 0; i < 200; i++) { page_content(out, 7, i % 100, 1);\n"
        "if (write(1, out, 4096) != 4096) return 1; } }\n"
    )
    subprocess.run(
        ["cc", f"-I{GUEST}", "-o", "show", "show.c", *tmp_path.glob("*.o")], check=True, cwd=tmp_path
    )
    shown = subprocess.run([tmp_path / "show"], capture_output=True, check=True, cwd=tmp_path).stdout
    found = [shown[at : at + 4096] for at in range(0, len(shown), 4096)]
    assert found[:100] == found[100:]
    assert len({page[:8] for page in found[:100]}) == 100
    assert {page[8:] for page in found} == {page[8:] for page in pages}
    (tmp_path / "pages").write_bytes(b"short")
    failed = subprocess.run([tmp_path / "show"], capture_output=True, cwd=tmp_path, check=False)
    assert failed.returncode == 1
    assert b"pages" in failed.stderr


def test_a_disk_more_comes_after_the_device() -> None:
    from vm import attach

    assert attach.Local.next_disk == attach.KernelZram.next_disk == attach.Qemu.device == "/dev/vdb"
    assert attach.Qemu.next_disk == attach.Libvirt.next_disk == "/dev/vdc"
    assert plan.Plan("qemu", 256 * MIB).zramd_settings == {}
