"""A server's part of its host's budget: the slot, from its start to its end, and what the dead have left.

See zramd.contract.budget for the file, zramd.core.memory.budget for what is done there while requests wait.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from zramd import lockfile, resident, trusted
from zramd.contract import budget as file
from zramd.contract import handover
from zramd.contract.budget import Owner, Slot, State
from zramd.core.device.device import Device
from zramd.core.memory.budget import Budget
from zramd.errors import BudgetError, ConfigError, UntrustedError, reason
from zramd.server.log import say
from zramd.settings.config import Config

INTERVAL = 1.0  # seconds between two looks at what is not needed
SWEEP = 10.0  # seconds between two looks at what the dead have left
LOCK_TIMEOUT = 10.0  # seconds; who looks for a slot holds the lock for milliseconds
_OFTEN = 0.005  # seconds between two tries
_held: list[resident.Held] = []  # by one on standby, so that it need not wait for swap when it joins


def look(config: Config) -> None:
    """Raise BudgetError unless a server with these settings can have its part, as far as can be told now."""
    shown = file.path(config.rundir)
    try:
        fd = os.open(shown, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # it is made then
    try:
        if file.check(fd, shown):
            own = _slot_of(fd, _state_of(config))
            counting = file.slots(fd)
            file.check_slots(counting, shown)
            others = [slot for slot in counting if slot.number != own]
            budget = config.budget
            if handover.is_standby():
                budget = file.limit(fd)
                _held.append(resident.hold(fd, file.needed(counting)))
            _check_floors(others, config.budget_floor, budget)
    finally:
        os.close(fd)


def leave_out(config: Config) -> None:
    """Free the part that the servers before had of a budget that is there: this one has none. Never raises.

    Otherwise what is in the state would count for ever as left behind by a server that does not run.
    """
    shown = file.path(config.rundir)
    with suppress(BudgetError, OSError, UntrustedError, MemoryError):
        with trusted.place(shown) as place:
            fd = place.open(os.O_RDWR)
        try:
            with _alone(fd, shown, timeout=0.1):  # clients may be waiting
                number = _slot_of(fd, _state_of(config)) if file.check(fd, shown) else None
                if number is not None and lockfile.ofd_take(fd, file.lock_of(number)):
                    Budget(fd, 0).free(number)
        finally:
            os.close(fd)


class Member:
    """One device's part of the budget."""

    def __init__(self, config: Config) -> None:
        """Take a slot, and have what is kept for the device kept.

        Raises BudgetError: the file cannot be had or is none, all slots are in use, the floors are too high.
        """
        self._shown = file.path(config.rundir)
        self._config = config
        self._namespace = file.namespace()
        self._swept = 0.0
        self._fd = _open(self._shown)
        try:
            with _alone(self._fd, self._shown):
                self._begin(config)
        except OSError as error:
            os.close(self._fd)
            raise BudgetError(
                f"budget '{self._shown}' cannot be made: {reason(error)}: make room there, or use no budget"
            ) from None
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self, config: Config) -> None:
        fd = self._fd
        if not file.check(fd, self._shown):
            _create(fd)
        self._sweep(Budget(fd, 0), -1)
        state = _state_of(config)
        before = _slot_of(fd, state)
        counting = file.slots(fd)
        file.check_slots(counting, self._shown)
        now = file.limit(fd)
        others = [slot for slot in counting if slot.number != before]
        # One on standby was told long ago what the budget was.
        keeps = bool(now) and handover.is_standby()
        size = now if keeps else config.budget
        _check_floors(others, config.budget_floor, size)
        used = {slot.number for slot in counting}
        free = [number for number in range(file.SLOTS) if number not in used]
        if before is not None:
            free.insert(0, before)
        # (A slot without memory may be held all the same: of a device that is empty.)
        number = next((number for number in free if lockfile.ofd_take(fd, file.lock_of(number))), None)
        if number is None:
            raise BudgetError(f"all {file.SLOTS} slots of budget '{self._shown}' are in use: stop a device")
        try:
            self._write_owner(number, state)
            self.core = core = Budget(fd, number)
            core.begin(config.budget_floor, 0 if number == before else _bytes_of(config))
        except MemoryError as error:
            raise BudgetError(f"budget '{self._shown}' cannot be used: {error}") from None
        if others and now not in (0, size):
            say(f"the budget of this host is {size} bytes now, it was {now}")
        core.budget = size

    def join(self, device: Device) -> None:
        """Have the device take its memory from the budget; what it has already counts."""
        state = _state_of(self._config)  # which there may not have been before
        with suppress(OSError):
            self._write_owner(self.core.slot, state)
        device.join(self.core)

    def set(self, size: int) -> None:
        """Change the budget, for all. Raises ConfigError when it does not reach for all floors."""
        if not size:
            raise ConfigError("budget=0 would leave the others without one: restart the device without it")
        try:
            with _alone(self._fd, self._shown):
                _check_floors(file.slots(self._fd), 0, size)
                self.core.budget = size
        except (BudgetError, OSError) as error:
            raise ConfigError(f"budget: {error}") from None

    def tidy(self, device: Device) -> None:
        """Give back what the device does not need, now and then what the dead have left.

        Raises OSError, also when somebody has removed the file: servers that start have another one then.
        """
        device.tidy_budget()
        if not os.fstat(self._fd).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "its file was removed: restart the devices that share it")
        now = time.monotonic()
        if now >= self._swept + SWEEP and lockfile.ofd_take(self._fd, 0):
            self._swept = now
            try:
                self._sweep(self.core, self.core.slot)
            finally:
                lockfile.ofd_give(self._fd, 0)

    def leave(self, device: Device) -> None:
        """Leave the budget, in the process that serves; what is in a state file still counts."""
        left = device.leave_budget()
        kept = self._config.state not in ("", handover.SYSTEMD)
        self.core.end(left if kept else 0)

    def _write_owner(self, number: int, state: State | None) -> None:
        file.write_owner(self._fd, number, Owner(self._config.name, state, self._namespace))

    def _sweep(self, core: Budget, own: int) -> None:
        """Free the slots of dead servers whose memory is free. Nobody else looks for a slot meanwhile."""
        for slot in file.slots(self._fd):
            if slot.number == own or not lockfile.ofd_take(self._fd, file.lock_of(slot.number)):
                continue
            try:
                who = file.owner(self._fd, slot.number)
                if not file.is_there(who) or self._replaces(who):
                    core.free(slot.number)
            finally:
                lockfile.ofd_give(self._fd, file.lock_of(slot.number))

    def _replaces(self, who: Owner) -> bool:
        """Say whether the service manager has dropped what a server has left: it keeps one for each."""
        ours, config = _state_of(self._config), self._config
        if ours is None or who.state is None or config.state != handover.SYSTEMD:
            return False
        return (
            who.state.path == handover.SYSTEMD and who.name == config.name and not ours.is_that_of(who.state)
        )


def _open(shown: str) -> int:
    try:
        with trusted.place(shown, make=True) as place:
            if os.path.islink(shown):  # what 'zramd list' opens would be another file one day
                raise BudgetError(f"budget '{shown}' is a link: remove it, or use no budget")
            return place.open_or_create()
    except UntrustedError as error:
        raise BudgetError(
            f"budget '{shown}' is not used: {error}: {_mend(shown)}, or use no budget"
        ) from None
    except OSError as error:
        what = {
            errno.EROFS: "let the service write there (ReadWritePaths=)",
            errno.ENOSPC: "make room there",
            errno.EISDIR: "remove it",
        }
        remedy = what.get(error.errno or 0, "run zramd as the user who owns it")
        raise BudgetError(f"budget '{shown}' cannot be opened: {reason(error)}: {remedy}") from None


def _mend(shown: str) -> str:
    """Return what to do about a file that is not trusted.

    Others may have a part in it: were it removed, they would not be bounded by what is made in its place.
    """
    with suppress(OSError):
        status = os.lstat(shown)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return f"run \"chown {os.geteuid()} '{shown}'; chmod 600 '{shown}'\""
    return "remove it"


@contextmanager
def _alone(fd: int, shown: str, timeout: float | None = None) -> Iterator[None]:
    """Keep others from looking for a slot; `timeout` in seconds. Raises BudgetError."""
    end = time.monotonic() + (LOCK_TIMEOUT if timeout is None else timeout)
    while not lockfile.ofd_take(fd, 0):
        if time.monotonic() > end:
            raise BudgetError(
                f"budget '{shown}' is held by a process that does not go on: 'fuser {shown}' shows it"
            )
        time.sleep(_OFTEN)
    try:
        yield
    finally:
        lockfile.ofd_give(fd, 0)


def _create(fd: int) -> None:
    """Lay out a new file, with its head last: without that it is new the next time. Raises OSError."""
    os.ftruncate(fd, file.BYTES)
    # What is mapped must be there: a full tmpfs would end the process that touches it.
    os.posix_fallocate(fd, file.TABLE_AT, file.TABLE_BYTES)
    os.pwrite(fd, file.head(), 0)


def _check_floors(others: list[Slot], floor: int, budget: int) -> None:
    kept = sum(slot.floor for slot in others)
    if kept + floor > budget:
        raise BudgetError(
            f"the budget of {budget} bytes is less than all floors together, {kept + floor} bytes: lower a "
            "budget_floor, or raise the budget"
        )


def _state_of(config: Config) -> State | None:
    """Return the state's file, None if there is none (yet)."""
    if not config.state:
        return None
    path = config.state
    if path == handover.SYSTEMD:
        path = f"/proc/self/fd/{os.environ.get(handover.KEPT_FD, '')}"
    elif len(os.fsencode(path)) > file.MOST_PATH:
        raise BudgetError(
            f"state '{path}' has too long a path to be noted in a budget: use one of at most {file.MOST_PATH}"
        )
    try:
        status = os.stat(path)
    except OSError:
        return None
    return State(config.state, status.st_dev, status.st_ino)


def _bytes_of(config: Config) -> int:
    """Return the memory that a state takes, at most, of which no slot knows."""
    if not config.state or config.state == handover.SYSTEMD:
        return 0
    try:
        return os.stat(config.state).st_blocks * 512
    except OSError:
        return 0


def _slot_of(fd: int, state: State | None) -> int | None:
    """Return the slot that a dead server with this state has left, or a live one has."""
    if state is None:
        return None
    for slot in file.slots(fd):
        if state.is_that_of(file.owner(fd, slot.number).state):
            return slot.number
    return None
