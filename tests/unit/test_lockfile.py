"""Locks on files and folders."""

import os
from pathlib import Path

from zramd import lockfile


def test_a_folder_is_taken_while_another_has_its_lock(tmp_path: Path) -> None:
    """Who looks leaves it as it is."""
    folder = tmp_path / "run"
    folder.mkdir()
    assert not lockfile.folder_is_taken(str(folder))
    fd = os.open(folder, os.O_RDONLY)
    try:
        assert lockfile.take(fd)
        assert lockfile.folder_is_taken(str(folder))
        assert lockfile.folder_is_taken(str(folder))
    finally:
        os.close(fd)
    assert not lockfile.folder_is_taken(str(folder))


def test_what_is_no_folder_is_not_taken(tmp_path: Path) -> None:
    assert not lockfile.folder_is_taken(str(tmp_path / "gone"))
    file = tmp_path / "file"
    with file.open("w") as held:
        assert lockfile.take(held.fileno())
        assert not lockfile.folder_is_taken(str(file))
