"""What a run is asked to do, and the sizes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
MODES = ("qemu", "guest", "local")
NBD = "nbd"  # no mode, but what local attaches by
UBLK = "ublk"  # as local, without NBD, on a kernel that has ublk
LIBVIRT = "libvirt"  # as qemu, with the disk that libvirt makes of a description of it
KERNEL_ZRAM = "zram"  # a mode too: the same with the kernel's own zram, to compare with

# Of one MiB of the workload's pages, the pool takes about this much when it is compacted (measured).
STORED = 0.47
# What else the guest needs beside the workload: page tables, the shell, caches that it should not lose.
SPARE = 24 * MIB
# For the queues of ublk, which have a buffer for each request, and for a kernel that takes more: Debian 13's.
QUEUES = 64 * MIB
# For a server that waits beside the one that serves.
STANDBY = 64 * MIB
# For programs that come and go: the guest's memory without the pool, the pool's part of it where it is in the
# guest, and the device, with more room than they ever take.
CHURN_MEMORY = 256 * MIB
CHURN_POOL = 160 * MIB
CHURN_DEVICE = 1024 * MIB

# With a disk for what leaves memory: of the guest's memory so much is swapped, and the pool may take so much.
TIMES = 4
POOL = 1 / 2

STATE = "/run/state/zram0"  # of a server in the guest that is killed

DISCARDS = {"both": "--discard", "pages": "--discard=pages", "once": "--discard=once", "none": ""}
ORDERS = ("descending", "equal")


@dataclass(frozen=True)
class Plan:
    """One run in one mode; sizes in bytes, times in seconds, 0 where nothing was asked for."""

    mode: str
    memory: int
    cpus: int = 2
    short: bool = False
    seed: int = 1
    hog_seconds: int = 0  # how long a hog drives the guest to its limit
    mem_limit: int = 0
    limit: bool = False  # only look at what happens when the pool is full
    stall: float = 0.0  # how long the server stands still in the middle of it
    nbd_options: str = ""
    kill: float = 0.0  # between two ends of the server, whose state stays
    rates: bool = False  # only measure requests by ublk beside others
    hold_gil: bool = False  # a thread of the server holds Python's interpreter lock all the time
    standby: bool = False  # another server is ready to take over
    restart: bool = False  # they are by `zramd restart`, not by SIGKILL
    pause: bool = False  # qemu pauses the guest when the pool is full, as it does by default
    churn_seconds: int = 0  # how long programs come and go, each with memory of its own
    breaks: bool = False  # now and then all of them end, and memory is calm
    refresh: float = 0.0  # between two refreshes of the guest's swap by its own tool
    areas: int = 1  # that swap is divided into
    order: str = "descending"  # of their priorities: one fills before the next, or the kernel goes round
    discard: str = "both"  # of DISCARDS: what the kernel tells the device of freed swap
    page_cluster: int = 0  # 2 to the power of it pages are read at a time
    sysctls: tuple[str, ...] = ()  # further ones, as NAME=VALUE
    idle: float = 0.0  # how long nothing is asked for once the workload is written
    parameters: str = ""  # further ones of the guest's kernel
    pageout: bool = False  # swap all of the workload out before it is freed
    workload_bytes: int = 0  # instead of what suits the guest's memory
    rest: float = 0.0  # how long the guest rests once its memory is swapped out
    pages: str = ""  # a file of memory pages, from which the workload takes the content of its own
    settings: tuple[str, ...] = ()  # further ones of the server, as NAME=VALUE
    size: int = 0  # of the device, instead of what suits the guest's memory
    backing: int = 0  # of a disk for what leaves memory
    iops: int = 0  # most requests a second to that disk
    writeback: bool = False  # only look at what is written to it while much more is written than memory holds
    timer: float = 60.0  # between two rounds of the script that tells the kernel's zram to write back
    pace: int = 0  # pages a second of that workload, 0: what suits the pool

    @property
    def in_guest(self) -> bool:
        """Whether the pool is in the guest's own memory."""
        return _in_guest(self.mode)

    @property
    def serves_itself(self) -> bool:
        """Whether zramd runs in the guest, and so on the machine that swaps to it."""
        return self.mode in ("local", UBLK)

    @property
    def pool_limit(self) -> int:
        """The server's mem_limit, 0 for none."""
        return self.mem_limit or (int(POOL * self.memory) if self.writeback else 0)

    @property
    def zramd_settings(self) -> dict[str, str]:
        """The settings of every server of this run."""
        settings = {"swap": "local", "reserve": "4M"} if self.serves_itself else {}
        if self.serves_itself and self.kill:
            settings["state"] = STATE
        if self.pool_limit:
            settings["mem_limit"] = str(self.pool_limit)
        if self.writeback:
            settings |= {"writeback_age": f"{max(10, self.timer):g}", "writeback_limit": "off"}
        return settings | dict(setting.split("=", 1) for setting in self.settings)

    def workload(self, available: int) -> int:
        """Return the MiB of the workload for a guest that has `available` bytes free.

        More than fits, and not more than fits together with what can be swapped out.
        """
        if self.workload_bytes:
            return self.workload_bytes // MIB
        # At its limit, so that a short run swaps enough to be compacted. Only a new server needs the room.
        if self.mode == UBLK and (self.standby or not self.kill):
            available += available // 8
        spare = SPARE // 2 if self.short else SPARE
        if not self.in_guest and not self.mem_limit:
            return 2 * available // MIB
        # A pool of so many bytes, before compaction two thirds full, holds so much of the workload.
        pool = self.mem_limit or int(0.4 * available)
        swapped = int(pool / STORED * (0.66 if not self.mem_limit else 0.8))
        resident = available - spare - (pool if self.in_guest else 0)
        return max(resident + swapped, available // 2) // MIB

    @property
    def pages_a_second(self) -> int:
        """The pace of the workload with --writeback.

        What a script writes out is as old as one or two of its rounds, and until then the pool must have
        room for it: for what the workload touches, and for what makes room for the pool itself.
        """
        room = self.pool_limit / STORED * (1 - STORED)
        return self.pace or int(0.6 * room / 4096 / (2 * self.timer))

    @property
    def device_size(self) -> int:
        """The bytes of the swap device.

        Not much more than is swapped at a time: the kernel prefers places that were never used, so on a large
        device what was overwritten long ago stays stored. For a machine that swaps to itself and is driven to
        its limit half of its memory, as zram's users have it: see docs/swapping.md, "Size".
        """
        if self.size:
            return self.size
        if self.churn_seconds:
            return CHURN_DEVICE
        if (
            self.writeback
        ):  # less than half of it is ever used, so that the kernel keeps places of clean pages
            return 2 * TIMES * self.memory
        if self.in_guest and self.hog_seconds:
            return self.memory // 2
        return 3 * self.memory // 2


def default_memory(mode: str, short: bool, churn: bool = False, standby: bool = False) -> int:
    """Return the guest's memory in bytes."""
    if standby:
        return default_memory(mode, short) + STANDBY
    if churn:
        return CHURN_MEMORY + (CHURN_POOL if _in_guest(mode) else 0)
    if _in_guest(mode):
        return (256 if short else 384) * MIB + (QUEUES if mode == UBLK else 0)
    return (160 if short else 256) * MIB


def _in_guest(mode: str) -> bool:
    return mode in ("local", UBLK, KERNEL_ZRAM)
