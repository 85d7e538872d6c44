"""What a server knows of this machine's swap on its device."""

import json
from pathlib import Path

import pytest

from zramd.guest import files
from zramd.kernel import attached, swap, swapuse

NONE = {"swap_used": None, "refreshed_blocks": None, "refresh_last_blocks": None}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/dev/nbd0 of 1 MiB in two areas and /dev/nbd1 as a whole are swapped to; nbd2 is of the same size."""
    for name, backend in (("nbd0", "zramd/a"), ("nbd1", ""), ("nbd2", "zramd/c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text("2048\n")
        (tmp_path / name / "backend").write_text(f"{backend}\n")
    (tmp_path / "swaps").write_text(
        "Filename\tType\tSize\tUsed\tPriority\n/dev/nbd0p1 partition 508 40 100\n"
        "/dev/nbd0p2 partition 508 8 99\n/dev/nbd1 partition 1020 400 7\n/dev/vda2 partition 99 80 -2\n"
    )
    monkeypatch.setattr(attached, "SYS_BLOCK", str(tmp_path))
    monkeypatch.setattr(swap, "SWAPS", str(tmp_path / "swaps"))
    monkeypatch.setattr(files, "RUN", str(tmp_path))
    return tmp_path


def test_all_areas_count(machine: Path) -> None:
    assert swapuse.numbers("a", 2 << 20)["swap_used"] == 12  # its size does not matter: the kernel says whose
    assert swapuse.numbers("b", 1 << 20)["swap_used"] == 100  # of a kernel that does not, the size decides
    assert swapuse.numbers("b", 2 << 20) == NONE
    assert swapuse.numbers("c", 1 << 20)["swap_used"] == 100  # nbd1 may be its


def test_what_refreshes_gave_back(machine: Path) -> None:
    (machine / "nbd0.json").write_text(
        json.dumps({"areas": {}, "counts": {"freed": 500, "emptied": 3}, "last": {"freed": 70, "time": 1}})
    )
    (machine / "swaps").write_text("head\n/dev/nbd0p2 partition 508 8 99\n")
    assert swapuse.numbers("a", 1 << 20) == {
        "swap_used": 2,
        "refreshed_blocks": 500,
        "refresh_last_blocks": 70,
    }


@pytest.mark.parametrize("text", ["", "{", "[]", '{"counts": {}, "last": 1}', '{"counts": {"freed": "x"}}'])
def test_notes_that_are_none(machine: Path, text: str) -> None:
    (machine / "swaps").write_text("head\n/dev/nbd0p2 partition 508 8 99\n")
    (machine / "nbd0.json").write_text(text)
    assert swapuse.numbers("a", 1 << 20) == {**NONE, "swap_used": 2}


def test_whatever_fails_there_is_no_swap(machine: Path) -> None:
    (machine / "swaps").write_text("head\n/dev/nbd0p2 what\n")
    assert swapuse.numbers("a", 1 << 20) == NONE
    (machine / "swaps").unlink()
    assert swapuse.numbers("a", 1 << 20) == NONE
