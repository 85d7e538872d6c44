"""Swap on a device: divided into areas or not, swapped to, and swapped off again.

Areas are partitions in the kernel's memory, of descending priority: zramd.guest says what they are good for,
and refreshes them. What it needs to know of them is in its notes, which go before anything is swapped off: a
refresh that comes after a command was killed must not swap to what was to be taken away.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from zramd.errors import AttachError, reason
from zramd.guest import areas as guest
from zramd.guest.files import GuestError
from zramd.guest.notes import Note, Notes, notes_path, read_notes, write_notes
from zramd.kernel import attached, swap
from zramd.process.steps import step

ALL = 23  # swap areas that every kernel has, for all devices
PROGRESS_INTERVAL = 0.2  # seconds between two looks at how far swapoff is
BUSY = 1.0  # seconds for which udev may have a partition open
APPEARS = 5.0  # seconds in which a partition must have come
MAX_PART = "/sys/module/nbd/parameters/max_part"

_FLAGS = {
    "discard": guest.DISCARD,
    "discard=once": guest.DISCARD | guest.DISCARD_ONCE,
    "discard=pages": guest.DISCARD | guest.DISCARD_PAGES,
}


def least_priority(count: int) -> int:
    """Return the least priority that the first of so many areas can have: the last one has 0 then.

    A single one may leave it to the kernel: -1.
    """
    return count - 1 if count > 1 else -1


def default_count(device: str, priority: int) -> int:
    """Return into how many areas a device is divided unless told, as far as `priority` allows for it."""
    if device.startswith("/dev/nbd"):
        with suppress(OSError, ValueError), open(MAX_PART) as file:
            if int(file.read()) == 0:
                return 1  # the module was loaded without partitions
    room = ALL - len(swap.swaps())
    return max(1, min(guest.default_count(guest.size_of(device)), priority + 1, room))


def on(
    device: str,
    priority: int,
    *,
    options: str = "discard",
    count: int = 0,
    order: Callable[[str], None] = lambda path: None,
) -> None:
    """Make `count` areas of a device (0: as many as suit it) and swap to them. What it held is lost.

    Where some are on already, by a command that was killed, the others follow. The first one gets
    `priority`. `options` are swapon's, as in fstab; discard makes the kernel trim what it has freed.
    `order` is called with each area's path before it is swapped to. Raises AttachError, OSError.
    """
    there = swap.areas(device)
    left = _left_off(device, there)
    if there and not left:
        return
    swap.settle_queue(device)
    with _sentences(), attached.unobserved(device):
        if there:
            _on(device, left, options, order)
            return
        forget(device)
        guest.join(device)
        try:
            paths = guest.divide(device, count or default_count(device, priority))
            _on(device, {path: priority - place for place, path in enumerate(paths)}, options, order)
        except BaseException:
            _undo(device)
            raise


def _left_off(device: str, there: list[swap.Swap]) -> dict[str, int]:
    """Return the partitions that are not swapped to, and their priorities; `there` are those that are."""
    number = {path: place for place, path in parts(device).items()} if there else {}
    known = next((area for area in there if area.path in number), None)
    if known is None:  # the device is swapped to as a whole
        return {}
    on_already = {area.path for area in there}
    first = known.priority + number[known.path]
    return {path: first - place for path, place in number.items() if path not in on_already}


def parts(device: str) -> dict[int, str]:
    """Return the partitions of a device by their number, in its order."""
    name = os.path.basename(device)
    found = {}
    with suppress(OSError):
        for entry in os.listdir(f"{attached.SYS_BLOCK}/{name}"):
            with (
                suppress(OSError, ValueError),
                open(f"{attached.SYS_BLOCK}/{name}/{entry}/partition") as file,
            ):
                found[int(file.read())] = f"/dev/{entry}"
    return dict(sorted(found.items()))


def _on(device: str, priorities: dict[str, int], options: str, order: Callable[[str], None]) -> None:
    notes = read_notes(device)
    flags = next((_FLAGS[word] for word in options.split(",") if word in _FLAGS), 0)
    for path, priority in priorities.items():
        _wait_for(path)
        step("swap.makes")
        swap.run("mkswap", path)
        order(path)
        step("swap.made")
        swap.run("swapon", "-o", f"pri={priority},{options}".rstrip(","), path)
        step("swap.on")
        notes.areas[path] = Note(priority, flags=flags)
        notes.areas[path].reset(path, 0)
        write_notes(device, notes)


def _wait_for(path: str) -> None:
    end = time.monotonic() + APPEARS
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise AttachError(f"{path} does not appear: is /dev a devtmpfs, or udev running?")
        time.sleep(0.02)


def _undo(device: str) -> None:
    """Take away what was begun. What went wrong first is what counts."""
    with suppress(AttachError, GuestError, OSError):
        for area in reversed(swap.areas(device)):
            guest.swap_off(area.path)
        forget(device)
        guest.join(device)


def forget(device: str) -> None:
    """Remove what was noted of a device's areas."""
    with suppress(OSError):
        os.unlink(notes_path(device))


def off(device: str, *, force: bool = False, progress: Callable[[int, int], None] | None = None) -> None:
    """Bring back all that is swapped out to `device`, and swap to it no more. Its areas are there still.

    `progress` is called now and then with the bytes that are still out and those that were. Raises
    AttachError when there is less memory than must come back (unless `force`) and when swapoff fails, and
    KeyboardInterrupt, with swapoff ended: then all areas are in use as before, and the rest is still out.
    """
    there = sorted(swap.areas(device), key=lambda area: area.used)
    used = sum(area.used for area in there)
    memory = swap.available()
    if used > memory and not force:
        raise AttachError(
            f"{used >> 20} MiB are swapped out to {device} and only {memory >> 20} MiB of memory are "
            "available: end programs first, or use --force"
        )
    with _sentences():
        noted = read_notes(device) if os.path.exists(notes_path(device)) else None
        step("swap.off.begun")
        forget(device)
        try:
            for area in there:
                _off(area.path, lambda: progress(_out(device), used) if progress else None)
                step("swap.off")
        except BaseException:
            _back_on(device, there, noted)
            raise
    if progress and there:
        progress(0, used)


def join(device: str) -> None:
    """Undo the division of a device that is not in use, and forget what was noted of it.

    What somebody has open stays for now: it goes when the device is attached anew.
    """
    forget(device)
    end = time.monotonic() + BUSY
    while parts(device):
        with suppress(GuestError):
            guest.join(device)
        if time.monotonic() > end:
            return
        time.sleep(0.02)


def _out(device: str) -> int:
    return sum(area.used for area in swap.areas(device))


def _off(path: str, look: Callable[[], None]) -> None:
    """Run swapoff, and call `look` now and then."""
    process = subprocess.Popen(
        [swap.program("swapoff"), path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for us to pass on
    )
    try:
        while True:
            try:
                _, words = process.communicate(timeout=PROGRESS_INTERVAL)
                break
            except subprocess.TimeoutExpired:
                look()
    except BaseException:
        process.terminate()  # the kernel's swapoff stops within a page, and the area stays
        process.communicate()
        raise
    if process.returncode:
        raise AttachError(f"swapoff {path} failed: {swap.sentence(words)}")


def _back_on(device: str, there: list[swap.Swap], noted: Notes | None) -> None:
    """Swap again to the areas that are off by now, and note again what was noted of them."""
    on_still = {area.path for area in swap.areas(device)}
    notes = noted or Notes({area.path: Note(area.priority) for area in there})
    for area in there:
        if area.path not in on_still:
            with suppress(OSError):
                guest.swap_on(area.path, area.priority, notes.areas[area.path].flags)
                notes.areas[area.path].reset(area.path, 0)
    if noted:
        with suppress(OSError):
            write_notes(device, noted)


@contextmanager
def _sentences() -> Iterator[None]:
    """Have AttachError say what zramd.guest raises."""
    try:
        yield
    except GuestError as error:
        raise AttachError(str(error)) from None
    except OSError as error:
        raise AttachError(f"'{error.filename}' cannot be used: {reason(error)}") from None
