"""A disk is divided and swapped to, swapped to again, and given back."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from . import files
from .areas import areas, default_count, disk_of, divide, join, size_of, swap_off, swap_on
from .files import MIB, PAGE, GuestError, NotForSwap, read, read_or
from .memory import memory
from .notes import Note, Notes, notes_path, read_notes, write_notes

PRIORITY = 100  # of the first area; before any other swap
LOOK = 0.1  # seconds between two looks at an area that another program swaps off
_NOTHING, _AMBIVALENT = 2, 8  # blkid's status: no signature, several that exclude each other


def setup(disk: str, count: int | None, priority: int = PRIORITY) -> list[str]:
    """Divide a disk, swap to its areas, and return their paths; those that are on stay. Raises GuestError."""
    there = areas(disk)
    notes = read_notes(disk)
    if there:
        resume(disk, notes)
        return [area.path for area in areas(disk)]
    _refuse_in_use(disk)
    _refuse_filled(disk)
    _tune(disk)
    count = count or default_count(size_of(disk))
    if priority < count - 1:
        raise GuestError(
            f"{count} areas need a priority of at least {count - 1}: the first one has the highest"
        )
    join(disk)
    paths = divide(disk, count)
    notes = Notes({path: Note(priority - number) for number, path in enumerate(paths)}, notes.counts)
    for path, note in notes.areas.items():
        note.reset(path, 0)
    write_notes(disk, notes)  # who is killed now is gone on with
    with _unobserved(disk):
        for path in paths:
            _make(path)
            _begin(path, notes.areas[path])
    return paths


def _make(path: str) -> None:
    _run("mkswap", "-L", f"zramd-{os.path.basename(path)}"[:15], path)


def _begin(path: str, note: Note) -> None:
    try:
        swap_on(path, note.priority, note.flags)
    except OSError as error:
        raise GuestError(f"'{path}' cannot be swapped to: {error.strerror}") from None
    note.reset(path, 0)


def resume(disk: str, notes: Notes) -> list[str]:
    """Swap on again what a setup or a refresh that was killed has left off; return the areas' paths.

    Raises GuestError: NotForSwap, too, if something else is there by now.
    """
    on = {area.path for area in areas(disk)}
    left = [path for path in notes.areas if path not in on and os.path.exists(path)]
    for path in left:
        if not _is_swap(path):
            _refuse_filled(path)
            _make(path)
        _begin(path, notes.areas[path])
        notes.count("resumed")
    if left:
        write_notes(disk, notes)
    return left


def _is_swap(path: str) -> bool:
    """Say whether mkswap has been here: its mark is at the end of the first page."""
    with open(path, "rb") as file:
        return file.read(PAGE)[-10:] == b"SWAPSPACE2"


def take_off(disk: str) -> None:
    """Swap off all areas of a disk, the least used first, and undo its division. Raises GuestError.

    It is refused before anything is done where what is out fits neither into memory nor into other swap.
    """
    on = sorted(areas(disk), key=lambda area: area.used)
    if not on and not os.path.exists(notes_path(disk)):
        return  # never swapped to: what it is divided into is not ours
    out = sum(area.used for area in on) * PAGE
    elsewhere = sum(area.free for area in areas() if disk_of(area.path) != disk) * PAGE
    room = memory().available + elsewhere
    if out > room:
        raise GuestError(
            f"{out // MIB} MiB are swapped out to {disk} and only {room // MIB} MiB of memory "
            f"{'and other swap ' if elsewhere else ''}are available: end programs first"
        )
    for area in on:
        _swap_off(area.path)
    join(disk)
    with suppress(OSError):
        os.unlink(notes_path(disk))


def _swap_off(path: str) -> None:
    """Swap off an area, or wait until who else is at it has done so, as systemd is at shutdown."""
    while any(area.path == path for area in areas()):
        try:
            swap_off(path)
        except OSError as error:
            if error.errno != errno.EINVAL:  # not on, or no longer
                raise GuestError(f"swapoff {path} failed: {error.strerror}") from None
            time.sleep(LOOK)


def _refuse_in_use(disk: str) -> None:
    name = os.path.basename(disk)
    for line in read(f"{files.PROC}/mounts").splitlines():
        if disk_of(line.split()[0]) == disk:
            raise NotForSwap(f"{disk} is mounted on '{line.split()[1]}': it is not for swap")
    holders = os.listdir(f"{files.SYS}/block/{name}/holders")
    if holders:
        raise NotForSwap(f"{disk} is in use by {holders[0]}: it is not for swap")


def _refuse_filled(disk: str) -> None:
    """Raise NotForSwap if a disk holds something that is not swap, which mkswap would destroy; GuestError."""
    words = ("--probe", "--output", "value", "--match-tag", "TYPE", "--match-tag", "PTTYPE", disk)
    done = _run("blkid", *words, expected=(0, _NOTHING, _AMBIVALENT))
    held = "several things" if done.returncode == _AMBIVALENT else " ".join(done.stdout.split())
    if held not in ("", "swap"):
        raise NotForSwap(
            f"{disk} holds something ({held}) and is not for swap: 'wipefs --all {disk}' if nobody needs it"
        )


def _tune(disk: str) -> None:
    """Tell the kernel what it does not know of the disk: it does not rotate, and neighbours cost as much."""
    queue = f"{files.SYS}/block/{os.path.basename(disk)}/queue"
    if read_or(f"{queue}/discard_max_bytes", "0") == "0":
        raise GuestError(f"{disk} takes no discards: give the disk discard=unmap on the host")
    for path, value in ((f"{queue}/rotational", "0"), (f"{files.PROC}/sys/vm/page-cluster", "0")):
        if read_or(path) != value:
            with open(path, "w", encoding="utf-8") as file:
                file.write(value)


@contextmanager
def _unobserved(disk: str) -> Iterator[None]:
    """Keep udev from reading a table of partitions meanwhile, which is not there (it honours the lock)."""
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _run(*words: str, expected: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a program. Raises GuestError if it ends with a status that is not expected."""
    environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise GuestError(f"{words[0]} cannot be run: {error.strerror}") from None
    if done.returncode not in expected:
        raise GuestError(
            f"{words[0]} {words[-1]} failed: {' '.join(done.stderr.split()) or 'no reason given'}"
        )
    return done
