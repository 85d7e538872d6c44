"""Runs the scenarios of scripts/vm-swap and reports; see its --help."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import zramd
from vm import (
    arm64_image,
    churn,
    dead,
    image,
    kernel,
    kills,
    pressure,
    rates,
    report,
    rest,
    scenario,
    writeback,
)
from vm.errors import VmError
from vm.guest import Machine, choose_accel
from vm.plan import DISCARDS, KERNEL_ZRAM, LIBVIRT, MODES, ORDERS, UBLK, Plan, default_memory
from vm.session import Boot, as_json
from zramd.errors import ConfigError
from zramd.settings.amounts import parse_size

ROOT = Path(__file__).parents[3]
UBLK_SUITE = "trixie"  # the first whose kernel has it
MOST_AREAS = 24  # the kernel has not many more in all


def arguments(words: list[str]) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts/vm-swap", add_help=False, allow_abbrev=False)
    parser.add_argument("--attach", choices=[*MODES, UBLK, LIBVIRT, KERNEL_ZRAM, "all"], default="all")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--mem-limit", type=parse_size, default=0)
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("--pause", action="store_true")
    parser.add_argument("--stall", type=float, default=0)
    parser.add_argument("--kill", type=float, default=0)
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--standby", action="store_true")
    parser.add_argument("--hold-gil", action="store_true")
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--nbd-options", default="")
    parser.add_argument("--suite", default="")
    parser.add_argument("--arm64", choices=kernel.ARM64)
    parser.add_argument("--memory", type=parse_size, default=0)
    parser.add_argument("--cpus", type=int, default=Plan.cpus)
    parser.add_argument("--size", type=parse_size, default=0)
    parser.add_argument("--workload", type=parse_size, default=0)
    parser.add_argument("--pageout", action="store_true")
    parser.add_argument("--churn", type=float, default=0)
    parser.add_argument("--breaks", action="store_true")
    parser.add_argument("--refresh", type=float, default=0)
    parser.add_argument("--areas", type=int, default=Plan.areas)
    parser.add_argument("--order", choices=ORDERS, default=Plan.order)
    parser.add_argument("--discard", choices=DISCARDS, default=Plan.discard)
    parser.add_argument("--page-cluster", type=int, default=Plan.page_cluster)
    parser.add_argument("--sysctl", action="append", default=[])
    parser.add_argument("--idle", type=float, default=0)
    parser.add_argument("--parameters", default="")
    parser.add_argument("--rest", type=float, default=0)
    parser.add_argument("--backing", type=parse_size, default=0)
    parser.add_argument("--iops", type=int, default=0)
    parser.add_argument("--writeback", action="store_true")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--timer", type=float, default=Plan.timer)
    parser.add_argument("--pace", type=int, default=0)
    parser.add_argument("--pages", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--draw", type=Path)
    parser.add_argument("runs", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(words)


def plan(asked: argparse.Namespace, mode: str) -> Plan:
    """Return the plan for one mode."""
    return Plan(
        mode,
        asked.memory or default_memory(mode, asked.short, asked.churn > 0, asked.standby),
        asked.cpus,
        short=asked.short,
        seed=asked.seed,
        hog_seconds=int(asked.minutes * 60),
        mem_limit=asked.mem_limit,
        limit=asked.limit,
        pause=asked.pause,
        stall=asked.stall,
        kill=asked.kill,
        restart=asked.restart,
        standby=asked.standby,
        hold_gil=asked.hold_gil,
        rates=asked.rates,
        nbd_options=asked.nbd_options,
        workload_bytes=asked.workload,
        pageout=asked.pageout,
        churn_seconds=int(asked.churn * 60),
        breaks=asked.breaks,
        refresh=asked.refresh,
        areas=asked.areas,
        order=asked.order,
        discard=asked.discard,
        page_cluster=asked.page_cluster,
        sysctls=tuple(asked.sysctl),
        idle=asked.idle,
        parameters=asked.parameters,
        rest=asked.rest,
        pages=str(asked.pages.absolute()) if asked.pages else "",
        settings=tuple(asked.set),
        size=asked.size,
        backing=asked.backing,
        iops=asked.iops,
        writeback=asked.writeback,
        timer=asked.timer,
        pace=asked.pace,
    )


def run(this: Plan, machine: Machine, live: report.Live) -> report.Result:
    """Do one mode's scenarios and return what they found; never raises VmError."""
    result = report.Result(this.mode)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zramd-vm-") as folder:
        boot = Boot(machine, Path(folder), live)
        try:
            if this.churn_seconds:
                churn.churn(this, boot, result)
            elif this.rates:
                rates.rates(this, boot, result)
            elif this.pause:
                pressure.pause(this, boot, result)
            elif this.limit:
                pressure.full_pool(this, boot, result)
            elif this.writeback:
                writeback.write_back(this, boot, result)
            elif this.rest:
                rest.rest(this, boot, result)
            elif this.kill:
                kills.kills(this, boot, result)
            elif this.hog_seconds:
                pressure.hog(this, boot, result)
            else:
                scenario.fall_and_rise(this, boot, result)
        except VmError as error:
            result.error = str(error)
    result.expect(
        "every page verified is as it was written", result.pages_bad == 0, f"{result.pages_bad} bad"
    )
    result.expect("the kernel complains of nothing", not result.alarms, "; ".join(result.alarms[:3]))
    result.seconds = round(time.monotonic() - started, 1)
    return result


def _asked() -> str:
    """Return the command line's words, but for where its results go."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word not in ("--json", "--markdown"):
            words.append(word)
        skip = word in ("--json", "--markdown")
    return " ".join(words)


def refuse(asked: argparse.Namespace) -> None:
    """Raise VmError if what is asked for does not go together."""
    if asked.runs:
        raise VmError(f"'{asked.runs[0]}' is for --draw: give --draw FILE.svg, too")
    if asked.pause and asked.attach != "qemu":
        raise VmError("--pause is qemu's: use it with --attach qemu")
    if (asked.kill or asked.restart) and asked.attach not in ("qemu", UBLK):
        raise VmError("--kill is of servers that another one follows: use it with --attach qemu or ublk")
    if asked.rates and asked.attach != UBLK:
        raise VmError("--rates has all devices in one guest: use it with --attach ublk")
    if asked.hold_gil and asked.attach != UBLK:
        raise VmError("--hold-gil is for a server whose requests do without: use it with --attach ublk")
    if asked.standby and (asked.attach != UBLK or not asked.kill or asked.restart or asked.hold_gil):
        raise VmError("--standby is for a server that is killed: use it with --attach ublk and --kill alone")
    if asked.attach == UBLK and asked.nbd_options:
        raise VmError("--nbd-options is of nbd-client: leave it out with --attach ublk")
    if asked.restart and not asked.kill:
        raise VmError("--restart wants the seconds between two: give --kill SECONDS, too")
    if asked.idle and any((asked.rest, asked.pause, asked.kill, asked.minutes, asked.limit, asked.churn)):
        raise VmError("--idle is of the run that writes, frees and compacts: leave the others out")
    others = (asked.minutes, asked.limit, asked.stall, asked.mem_limit, asked.nbd_options, asked.idle)
    if asked.attach == KERNEL_ZRAM and any(others) and not asked.writeback:
        raise VmError("with --attach zram there is only the comparison: memory written, freed and compacted")
    if (asked.breaks or asked.refresh) and not asked.churn:
        raise VmError("--breaks and --refresh are of --churn: give --churn MINUTES, too")
    if asked.refresh and (asked.discard, asked.order) != (Plan.discard, Plan.order):
        raise VmError(
            "--refresh divides the disk by the guest's tool, which has its own --order and --discard"
        )
    if asked.refresh and asked.attach in (KERNEL_ZRAM, "all"):
        raise VmError("--refresh is zramd's: use it with --attach qemu, guest or local")
    refuse_backing(asked)
    for setting in (*asked.set, *asked.sysctl):
        if "=" not in setting:
            raise VmError(f"'{setting}' is not NAME=VALUE")
    if asked.pages and not os.access(asked.pages, os.R_OK):
        raise VmError(f"'{asked.pages}' cannot be read")
    if not 1 <= asked.areas <= MOST_AREAS:
        raise VmError(f"--areas {asked.areas} is not a number from 1 to {MOST_AREAS}")
    if asked.areas > 1 and asked.attach in (KERNEL_ZRAM, "all"):
        raise VmError(
            "--areas divides a disk, and the kernel's zram takes no partitions: use another --attach"
        )


def refuse_backing(asked: argparse.Namespace) -> None:
    """Raise VmError if what is asked for of a disk for what leaves memory does not go together."""
    if asked.iops and (not asked.backing or asked.attach not in ("local", KERNEL_ZRAM)):
        raise VmError("--iops is of the guest's own disk: use it with --backing, and --attach local or zram")
    if asked.attach == KERNEL_ZRAM and asked.backing and not asked.writeback:
        raise VmError("the kernel's zram writes nothing out by itself: give --writeback, too")
    if asked.writeback and not asked.backing:
        raise VmError("--writeback wants a disk: give --backing SIZE, too")
    if asked.writeback and any(
        (asked.rest, asked.pause, asked.kill, asked.minutes, asked.limit, asked.churn)
    ):
        raise VmError("--writeback is a run of its own: leave the others out")
    if asked.compare and (not asked.writeback or asked.attach != "local"):
        raise VmError(
            "--compare is of --writeback with --attach local: the kernel's zram is in the guest, too"
        )
    if asked.timer <= 0:
        raise VmError(f"--timer {asked.timer:g} is not a number of seconds above 0")


def main() -> int:
    """Run what the command line asks for."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = arguments(sys.argv[1:])
    if asked.draw:
        from vm import curves  # it needs matplotlib, which nothing else here does

        curves.draw(asked.draw, dead.read(asked.runs))
        return 0
    refuse(asked)
    live = report.Live()
    folder = ROOT / "build/vm"
    if asked.arm64:
        cloud = kernel.prepare(folder, "", kernel.ARM64[asked.arm64])
        images = arm64_image.prepare(folder, cloud)
    else:
        cloud = kernel.prepare(folder, asked.suite or (UBLK_SUITE if asked.attach == UBLK else ""))
        images = image.prepare(folder, cloud, Path(zramd.__file__).parent.parent)
    machine = Machine(cloud, images, 256 << 20, 2, "tcg")
    with tempfile.TemporaryDirectory(prefix="zramd-vm-") as name:
        accel = choose_accel(machine, Path(name))
    machine = Machine(cloud, images, machine.memory, machine.cpus, accel)
    results = []
    modes = [KERNEL_ZRAM, "local"] if asked.compare else MODES if asked.attach == "all" else [asked.attach]
    for mode in modes:
        result = run(plan(asked, mode), machine, live)
        result.settings = {
            "kernel": cloud.release,
            "accel": accel,
            "command": _asked(),
            "hold_gil": asked.hold_gil,
        }
        print(report.text(result), flush=True)
        results.append(result)
    if asked.compare and all(result.writeback for result in results):
        print(report.comparison(writeback.comparison(*results)))
    if asked.json:
        asked.json.write_text(as_json([result.as_dict() for result in results]))
    if asked.markdown:
        for result in results:
            report.write_markdown(asked.markdown, result)
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (VmError, ConfigError, OSError) as error:
        print(f"vm-swap: {error}", file=sys.stderr)
        sys.exit(1)
