"""A booted guest with its device: what all parts of a run do with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vm import attach, backing, buddy
from vm.guest import Beat, Guest, Machine
from vm.plan import DISCARDS, KERNEL_ZRAM, LIBVIRT, MIB, UBLK, Plan
from vm.report import Live, Moment, Result

PHASE_TIMEOUT = 1200.0  # seconds for one phase of the workload
SWAP_TIMEOUT = 600.0  # for swapoff: it reads everything back
SETTLE_TIMEOUT = 10.0  # seconds in which the trims that follow a free have come
FIRST_PRIORITY = 100  # of swap: before any other
SECTOR = 512

# What is set in the guest, and why.
SYSCTLS = (
    (
        "vm.page-cluster",
        "{page_cluster}",
        "each page is compressed alone: reading neighbours ahead only costs",
    ),
    ("vm.swappiness", "150", "swapping to memory is cheaper than reading files again"),
    ("vm.min_free_kbytes", "{reserve}", "what sends a page out needs memory itself"),
    ("vm.overcommit_memory", "1", "the workload maps more than there is"),
)
# Only with --pageout, which leaves memory free. A guest at its limit may need what its CPUs keep for
# themselves: of the first full-length runs of `local` the one with this was out of memory, and two without it
# were not. That is a hint, no more.
COUNTED = (
    "vm.percpu_pagelist_high_fraction",
    "1000000",
    "what is free is counted, and not hidden by the CPUs",
)


@dataclass(frozen=True)
class Boot:
    """What is needed to boot: the machine without its device, a folder for this run, and where to show it."""

    machine: Machine
    folder: Path
    live: Live


class Session:
    """A guest that swaps to its device."""

    def __init__(
        self, plan: Plan, guest: Guest, attachment: attach.Attachment, result: Result, live: Live
    ) -> None:
        self.plan = plan
        self.guest = guest
        self.attachment = attachment
        self.result = result
        self.live = live
        self.workload_mib = 0

    # ---- Swap

    def swap_on(self) -> None:
        """Attach the device and swap to it as planned, before any other swap."""
        device = self.attachment.device
        self.live.step(f"attaching {device} ({self.attachment.name})")
        self.attachment.attach(self.guest)
        if self.plan.refresh:
            self.guest_tool(f"setup --areas {self.plan.areas}")  # it knows then what it has not discarded
        else:
            self._swap_to_areas()
        reserve = max(self.plan.memory // 32 >> 10, 4096)
        for name, value, why in (*SYSCTLS, COUNTED) if self.plan.pageout else SYSCTLS:
            setting = f"{name}={value.format(reserve=reserve, page_cluster=self.plan.page_cluster)}"
            self.guest.run(f"sysctl -w {setting}")
            self.live.step(f"  {setting}: {why}")
        for setting in self.plan.sysctls:
            self.guest.run(f"sysctl -w {setting}")
            self.live.step(f"  {setting}: asked for")

    def guest_tool(self, words: str, timeout: float = 60.0) -> str:
        """Let the tool of a guest's administrator do something with the device, and return what it says."""
        return self.guest.run(
            f"/usr/bin/python3 -m zramd.guest {words} --disk {self.attachment.device}", timeout
        )

    def _swap_to_areas(self) -> None:
        discard = DISCARDS[self.plan.discard]
        for number, area in enumerate(self._areas()):
            priority = FIRST_PRIORITY - (number if self.plan.order == "descending" else 0)
            # By their paths: busybox's own know no discard and no priority.
            self.guest.run(f"/usr/sbin/mkswap {area}", 60)
            self.guest.run(f"/usr/sbin/swapon {discard} --priority {priority} {area}", 60)

    def swap_off(self) -> float:
        """Swap off and return the seconds that it took."""
        started = time.monotonic()
        for line in self.guest.run("cat /proc/swaps").splitlines()[:0:-1]:
            self.guest.run(f"/usr/sbin/swapoff {line.split()[0]}", SWAP_TIMEOUT)
        return time.monotonic() - started

    def _areas(self) -> list[str]:
        """Divide the device as planned, without a table on it, and return the parts' paths."""
        device = self.attachment.device
        areas = partitions(device, self.plan.device_size, self.plan.areas)
        for number, (start, length) in enumerate(areas.values(), 1):
            if len(areas) > 1:
                self.guest.run(f"/usr/sbin/addpart {device} {number} {start // SECTOR} {length // SECTOR}")
        return list(areas)

    # ---- The workload

    def start_workload(self, mib: int) -> None:
        """Start the workload with so many MiB of memory."""
        self.workload_mib = mib
        self.guest.start_workload(mib, self.plan.seed, self.attachment.next_disk if self.plan.pages else "")

    def phase(self, phase: str, what: str = "") -> dict[str, Any]:
        """Let the workload do one phase, count its pages and return its answer."""
        self.live.step(what or f"workload: {phase}")
        answer = self.guest.phase(phase, PHASE_TIMEOUT)
        self.result.add_phase(answer)
        return answer

    # ---- Numbers

    def moment(self) -> Moment:
        """Return how guest and server stand now."""
        stats = self.attachment.stats()
        beat = self.beat()
        return Moment(
            used=stats["compr_data_size"],
            total=stats["mem_used_total"],
            frag_ratio=100.0 if stats["frag_ratio"] is None else stats["frag_ratio"],
            stored=stats["orig_data_size"],
            freeable_pages=stats.get("freeable_pages"),
            spent=stats["total_bytes"],
            resident=stats.get("resident_bytes"),
            migrated=stats.get("objects_migrated"),
            notify_free=stats["notify_free"],
            mem_free=self.attachment.memory_free(self.guest),
            swapped=beat["SwapTotal"] - beat["SwapFree"] - beat["SwapCached"],
            guest=buddy.free_blocks(self.guest),
        )

    def beat(self) -> Beat:
        """Return a heartbeat that is younger than this call."""
        count = len(self.guest.beats)
        end = time.monotonic() + 5
        while len(self.guest.beats) <= count and time.monotonic() < end:
            time.sleep(0.05)
        return self.guest.beats[-1]

    def settle(self) -> None:
        """Wait until no trims come in any more."""
        before, end = -1, time.monotonic() + SETTLE_TIMEOUT
        while (now := self.attachment.stats()["notify_free"]) != before and time.monotonic() < end:
            before = now
            time.sleep(0.5)

    def available(self) -> int:
        """Return the bytes that the guest's programs can still get."""
        return int(self.beat()["MemAvailable"])

    def swap_used(self) -> int:
        """Return the bytes of swap in use, those that are in memory too included."""
        beat = self.beat()
        return int(beat["SwapTotal"]) - int(beat["SwapFree"])

    def finish(self) -> None:
        """Take what the guest and the server tell at the end into the result."""
        result, guest = self.result, self.guest
        last = guest.beats[-1]
        result.swap_outs += last["pswpout"]
        result.swap_ins += last["pswpin"]
        result.oom_kills += last["oom_kill"]
        result.longest_gap = max(result.longest_gap, guest.longest_gap())
        result.alarms += guest.alarms()
        result.write_errors += sum("Write-error on swap-device" in line for line in guest.kernel_log())
        result.boot_seconds.append(round(guest.booted, 2))
        if "daemon_pid" in last:
            keys = (
                "daemon_pid",
                "daemon_alive",
                "daemon_resident",
                "daemon_locked",
                "daemon_minor",
                "daemon_major",
            )
            result.daemon = {key: last[key] for key in keys}
            pids = {beat["daemon_pid"] for beat in guest.beats if "daemon_pid" in beat}
            result.daemon["pids"] = sorted(pids)


@contextmanager
def booted(plan: Plan, boot: Boot, result: Result, **settings: str) -> Iterator[Session]:
    """Start the server, boot the guest, and end both with the `with`; `settings` are zramd's."""
    machine, folder, live = boot.machine, boot.folder, boot.live
    with ExitStack() as cleanup:
        disk = None
        if plan.backing:
            disk = backing.Disk(machine.images.root.parent, plan.backing, plan.iops)
            cleanup.callback(disk.remove)
            settings.setdefault("backing", backing.IN_GUEST if plan.in_guest else str(disk.path))
        attachment = make_attachment(plan, folder, plan.device_size, {**plan.zramd_settings, **settings})
        cleanup.callback(attachment.stop)
        disks = attachment.qemu_options()
        if disk and plan.in_guest:
            disks += disk.qemu_options()
            attachment.next_disk = "/dev/vdc"
        machine = machine_of(plan, machine, [*disks, *page_disk(plan.pages)])

        def seen(beat: Beat) -> None:
            beat["zramd"] = attachment.peek(beat)  # both of the same moment, for who looks later
            live.beat(beat, beat["zramd"])

        live.step(f"booting a guest with {plan.memory // MIB} MiB and {plan.cpus} CPUs ({machine.accel})")
        with Guest(machine, folder, seen) as guest:
            guest.wait_for_boot()
            live.step(f"booted in {guest.booted:.1f} s")
            session = Session(plan, guest, attachment, result, live)
            try:
                yield session
            finally:
                if guest.beats:
                    session.finish()


def machine_of(plan: Plan, base: Machine, disks: list[str], memory: int = 0) -> Machine:
    """Return the machine that the plan is for, with these disks; `memory` in bytes instead of the plan's."""
    return Machine(
        base.kernel, base.images, memory or plan.memory, plan.cpus, base.accel, disks, plan.parameters
    )


def page_disk(pages: str) -> list[str]:
    """Return what qemu is told of a disk with memory pages, the file `pages`; nothing without one."""
    if not pages:
        return []
    file = f"driver=raw,node-name=pages,read-only=on,file.driver=file,file.filename={pages}"
    return ["-blockdev", file, "-device", "virtio-blk-pci,drive=pages"]


def partitions(device: str, size: int, count: int) -> dict[str, tuple[int, int]]:
    """Return the paths of a device's equal parts, with the start and the length of each in bytes.

    One part is the device itself.
    """
    if count == 1:
        return {device: (0, size)}
    each = size // count // MIB * MIB
    joint = "p" if device[-1].isdigit() else ""
    return {f"{device}{joint}{number + 1}": (number * each, each) for number in range(count)}


def make_attachment(plan: Plan, folder: Path, size: int, settings: dict[str, str]) -> attach.Attachment:
    """Return the mode's attachment, its server started if it runs on the host."""
    if plan.mode == UBLK:
        return attach.Ublk(
            size, settings, hold_gil=plan.hold_gil, standby=plan.standby, restarts=plan.restart
        )
    if plan.kill:
        return attach.QemuWithState(size, settings, folder, Path(f"/dev/shm/{folder.name}.state"))
    if plan.mode == "qemu":
        return attach.Qemu(size, settings, folder, "enospc" if plan.pause else "report")
    if plan.mode == LIBVIRT:
        return attach.Libvirt(size, settings, folder)
    if plan.mode == "guest":
        return attach.GuestNbd(size, settings, folder, plan.nbd_options)
    if plan.mode == KERNEL_ZRAM:
        return attach.KernelZram(size, settings)
    return attach.Local(size, settings, plan.nbd_options)


def as_json(value: object) -> str:
    """Return JSON for people and programs."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
