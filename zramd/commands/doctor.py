"""`zramd doctor`: is this machine ready? Each finding is ok, a note, or a problem, with its remedy.

A problem keeps devices from being served. A note concerns only some uses: most of them this machine's own
kernel as the client (swap=local).
"""

import argparse
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress

from zramd import __version__, meminfo
from zramd.commands import Commands
from zramd.contract import rundir
from zramd.errors import BackingError, ConfigError, ZramdError
from zramd.kernel import attached, backingdevice, statefs, ublk
from zramd.kernel.swap import MIN_FREE, parse_swaps
from zramd.launch import installed, tlsfiles, ublkway
from zramd.launch.nbdkit import plugin_path
from zramd.process.buffers import SEND_BUFFER
from zramd.settings import config, devices

OLDEST_NBDKIT = (1, 28)  # calls `cleanup`
THREADS_NBDKIT = (1, 34)  # survives a client that vanishes while several threads serve it
LOCAL_KERNEL = (5, 18)  # swap=local
SWAPPINESS = 60  # Linux' own default
# Capabilities that swap=local needs, by their bits.
CAPABILITIES = {14: "CAP_IPC_LOCK", 23: "CAP_SYS_NICE", 24: "CAP_SYS_RESOURCE"}

OK, NOTE, PROBLEM = "ok", "note", "problem"


class Finding:
    """What was looked at, what was found, and what to do about it."""

    __slots__ = ("level", "name", "remedy", "text")

    def __init__(self, level: str, name: str, text: str, remedy: str = "") -> None:
        self.level = level
        self.name = name
        self.text = text
        self.remedy = remedy

    def as_dict(self) -> dict[str, str]:
        """Return the finding for JSON."""
        return {"name": self.name, "level": self.level, "text": self.text, "remedy": self.remedy}


def _run(*words: str) -> tuple[int, str, str]:
    """Run a program and return its status and what it printed, on both ways."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, done.stderr


def _version(text: str) -> tuple[int, ...]:
    """Return the first version number in a text, such as (1, 32, 5)."""
    match = re.search(r"[0-9]+(?:\.[0-9]+)+", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def nbdkit(root: str = "") -> Iterator[Finding]:
    """nbdkit, its Python plugin, and whether that can load the core."""
    version = installed.nbdkit_version()
    if not version:
        yield Finding(PROBLEM, "nbdkit", "is not installed", installed.how_to_install(root))
        return
    numbers = _version(version)
    if numbers < OLDEST_NBDKIT:
        yield Finding(PROBLEM, "nbdkit", f"{version} is too old", "install 1.28 or later")
    elif numbers < THREADS_NBDKIT:
        yield Finding(OK, "nbdkit", f"{version}, which is not safe with thread_model=parallel: 1.34 is")
    else:
        yield Finding(OK, "nbdkit", version)
    status, out, _ = _run("nbdkit", "python", "--dump-plugin")
    if status:
        yield Finding(PROBLEM, "nbdkit's python plugin", "is not installed", installed.how_to_install(root))
        return
    python = _fields(out).get("python_version", "")
    yield Finding(OK, "nbdkit's python plugin", f"made for Python {python}")
    status, out, err = _run("nbdkit", "python", plugin_path(), "--dump-plugin")
    found = _fields(out)
    minor = ".".join(python.split(".")[:2])
    if status:
        lines = err.strip().splitlines() or ["no reason given"]
        yield Finding(
            PROBLEM,
            "zramd's core",
            f"nbdkit cannot load it: {lines[-1].removeprefix('nbdkit: error: ')}",
            f"install zramd for Python {minor}, or run 'scripts/serve' in a checkout",
        )
    elif found.get("zramd_version") != __version__:
        yield Finding(
            PROBLEM,
            "zramd's core",
            f"nbdkit loads version {found.get('zramd_version', 'unknown')}, this is {__version__}",
            "remove one of the two installations",
        )
    else:
        codecs = f"lz4 {found.get('zramd_lz4')} and zstd {found.get('zramd_zstd')}"
        text = f"{__version__} with {codecs}, in nbdkit's Python {found.get('zramd_python')}"
        yield Finding(OK, "zramd's core", text)


def _fields(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def kernel_nbd(root: str = "") -> Iterator[Finding]:
    """The kernel's NBD client."""
    release = _read(f"{root}/proc/sys/kernel/osrelease")
    modules = f"{root}/lib/modules/{release}"
    if os.path.isdir(f"{root}/sys/module/nbd"):
        yield Finding(OK, "kernel's nbd", "is there")
    elif "/nbd.ko" in _read(f"{modules}/modules.dep"):
        yield Finding(NOTE, "kernel's nbd", "is not loaded", "run 'modprobe nbd' as root to attach here")
    elif "/nbd.ko" in _read(f"{modules}/modules.builtin"):
        yield Finding(OK, "kernel's nbd", "is built in")
    else:
        yield Finding(
            NOTE,
            "kernel's nbd",
            f"Linux {release} does not have it",
            "use a kernel that has it to attach here; virtual machines need none",
        )


def kernel_ublk(root: str = "") -> Iterator[Finding]:
    """The kernel's ublk driver, and io_uring, by which it is spoken to: both for front=ublk."""
    name, release = "kernel's ublk", _read(f"{root}/proc/sys/kernel/osrelease")
    disabled = _read(f"{root}/proc/sys/kernel/io_uring_disabled")
    if ublk.broken(release):
        yield Finding(
            NOTE,
            name,
            f"Linux {release} hangs when it is asked for a device",
            "use front=nbd, or another kernel",
        )
    elif not (why := ublk.absent(root)):
        yield Finding(OK, name, "is there")
    elif ublk.can_be_loaded(release, root):
        yield Finding(NOTE, name, "is not loaded", f"run 'modprobe {ublk.MODULE}' as root for front=ublk")
    else:
        yield Finding(NOTE, name, f"Linux {release} does not have it", why.partition(": ")[2])
    if disabled == "2":
        yield Finding(
            NOTE,
            "kernel.io_uring_disabled",
            "2: nobody may use io_uring",
            "run 'sysctl kernel.io_uring_disabled=1' for front=ublk: that lets root",
        )
    elif disabled:
        yield Finding(OK, "kernel.io_uring_disabled", disabled)


def front() -> Iterator[Finding]:
    """By which door front=auto lets this machine's kernel in, and why."""
    if os.geteuid():
        yield Finding(OK, "front=auto", "takes nbd: only root's servers can take ublk")
    elif ublk.absent():
        loads = ublk.can_be_loaded(os.uname().release)
        why = f"'modprobe {ublk.MODULE}' gives it ublk" if loads else "this kernel has no ublk"
        yield Finding(NOTE if loads else OK, "front=auto", f"takes nbd: {why}")
    elif why := ublkway.unavailable():
        text, _, remedy = why.partition(": ")
        yield Finding(NOTE, "front=auto", f"takes nbd, because {text}", remedy)
    else:
        yield Finding(OK, "front=auto", "takes ublk, which can be used here")


def trial() -> Iterator[Finding]:
    """Whether the kernel makes a ublk device and deletes it again."""
    if os.geteuid() or (why := ublkway.unavailable()):
        why = why if not os.geteuid() else "only root may: use sudo"
        yield Finding(NOTE, "ublk device", "is not tried", why)
    elif wrong := ublkway.try_device():
        text, _, remedy = wrong.partition(": ")
        yield Finding(PROBLEM, "ublk device", text, remedy)
    else:
        yield Finding(OK, "ublk device", "was made and deleted")


def attached_devices() -> Iterator[Finding]:
    """Attached ublk devices that wait for a server."""
    for name in attached.names():
        with suppress(OSError, ZramdError):
            there = attached.find(name)
            if there is None or there.number is None:
                continue
            if there.stage == attached.LOST:
                yield Finding(
                    PROBLEM,
                    there.device,
                    f"no server can take it over any more: what {name} holds cannot be read by it",
                    f"run 'zramd detach --swapoff --force {name}', which gives up what is swapped out to it",
                )
            elif rundir.holder(there.folder) is None:
                yield Finding(
                    PROBLEM,
                    there.device,
                    f"the server of {name} is gone, and whoever reads it waits",
                    f"start it again with its state, or give it up: 'zramd detach --swapoff --force {name}'",
                )
            elif not there.keeper:
                yield Finding(
                    NOTE,
                    there.device,
                    "has lost its keeper, and will not outlive its server",
                    f"run 'zramd attach {name}': it starts another",
                )


def local_swap(root: str = "") -> Iterator[Finding]:
    """What swap=local needs: the kernel's version, rights, and a limit on locked memory."""
    release = _read(f"{root}/proc/sys/kernel/osrelease")
    if _version(release)[:2] < LOCAL_KERNEL:
        yield Finding(NOTE, "Linux", f"{release} cannot lock as swap=local needs", "use 5.18 or later for it")
    else:
        yield Finding(OK, "Linux", release)
    effective = 0
    for line in _read(f"{root}/proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
    missing = [name for bit, name in CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        remedy = "run it as root, or as a service"
        if os.geteuid() == 0:  # a container, most likely
            options = " ".join(f"--cap-add={name.removeprefix('CAP_')}" for name in missing)
            remedy = f"root lacks them here: start the container with {options}, or see the unit's limits"
        yield Finding(NOTE, "rights", f"{', '.join(missing)} missing for swap=local", remedy)
    else:
        yield Finding(OK, "rights", "enough for swap=local")
    limit = "unlimited"
    for line in _read(f"{root}/proc/self/limits").splitlines():
        if line.startswith("Max locked memory"):
            limit = line.split()[3]
    if limit != "unlimited" and "CAP_IPC_LOCK" in missing:
        yield Finding(
            NOTE,
            "memlock limit",
            f"{limit} bytes are not enough for swap=local",
            "set LimitMEMLOCK=infinity in the unit, or 'ulimit -l unlimited'",
        )
    else:
        yield Finding(
            OK, "memlock limit", limit if limit == "unlimited" else f"{limit} bytes, which bind others only"
        )


def swap_settings(root: str = "") -> Iterator[Finding]:
    """The kernel's settings for swapping, and what else compresses."""

    def setting(name: str) -> int | None:
        text = _read(f"{root}/proc/sys/vm/{name}")
        return int(text) if text.isdigit() else None

    cluster = setting("page-cluster")
    if cluster:
        yield Finding(
            NOTE,
            "vm.page-cluster",
            f"{cluster}: the kernel reads {1 << cluster} pages for each that it needs, which gains nothing",
            "run 'sysctl vm.page-cluster=0' where the swap is used",
        )
    elif cluster is not None:
        yield Finding(OK, "vm.page-cluster", "0")
    swappiness = setting("swappiness")
    if swappiness is not None and swappiness < SWAPPINESS:
        yield Finding(
            NOTE,
            "vm.swappiness",
            f"{swappiness}: the kernel hardly swaps, although this swap is fast",
            "run 'sysctl vm.swappiness=100' where the swap is used",
        )
    elif swappiness is not None:
        yield Finding(OK, "vm.swappiness", str(swappiness))
    reserve, memory = setting("min_free_kbytes"), _memory(root) >> 10
    if reserve is not None and reserve < MIN_FREE * memory:
        yield Finding(
            NOTE,
            "vm.min_free_kbytes",
            f"{reserve}: a server with swap=local has little to fall back on",
            f"run 'sysctl vm.min_free_kbytes={round(MIN_FREE * memory)}' for swap=local",
        )
    elif reserve is not None:
        yield Finding(OK, "vm.min_free_kbytes", str(reserve))
    if _read(f"{root}/sys/module/zswap/parameters/enabled") == "Y":
        yield Finding(
            NOTE,
            "zswap",
            "is on: pages are compressed twice",
            "run 'echo N > /sys/module/zswap/parameters/enabled'",
        )
    else:
        yield Finding(OK, "zswap", "is off")
    others = parse_swaps(os.fsencode(_read(f"{root}/proc/swaps")))
    zram = [swap.path for swap in others if os.path.basename(swap.path).startswith("zram")]
    if zram:
        yield Finding(
            NOTE,
            "other swap",
            f"{' '.join(zram)} is the kernel's own compressed swap",
            f"use one of the two: 'swapoff {' '.join(zram)}', or give zramd's the higher priority",
        )
    else:
        yield Finding(OK, "other swap", "none that compresses")


def socket_buffers(root: str = "") -> Iterator[Finding]:
    """What unix sockets may hold of large requests: zramd sets its own ends as far as it may."""
    for name, enough, what in (
        ("wmem_default", 2 * SEND_BUFFER, "clients that leave their sockets as they are"),
        ("wmem_max", SEND_BUFFER, "servers that run as services"),  # Linux doubles what is asked for
    ):
        text = _read(f"{root}/proc/sys/net/core/{name}")
        if not text.isdigit():  # in a container: it is the host's
            continue
        if int(text) < enough:
            yield Finding(
                NOTE,
                f"net.core.{name}",
                f"{text}: {what} wait in the middle of large requests",
                f"run 'sysctl net.core.{name}={enough}' if requests are of 64 KiB and more",
            )
        else:
            yield Finding(OK, f"net.core.{name}", text)


def backings() -> Iterator[Finding]:
    """What the configuration has blocks written to."""
    with suppress(ZramdError):  # 'zramd config check' says what is wrong with it
        for device in devices.load().devices:
            if path := device.settings().backing:
                yield _backing(f"backing of {device.name}", path, swaps=device.swaps)


def _backing(name: str, path: str, *, swaps: bool) -> Finding:
    try:
        opened = backingdevice.open_to_look(path)
        try:
            if swaps:
                backingdevice.refuse_for_swap(opened)
            found = backingdevice.look(opened)
        finally:
            os.close(opened.fd)
    except BackingError as error:
        text, _, remedy = str(error).removeprefix(f"backing '{path}' ").rpartition(": ")
        return Finding(PROBLEM, name, f"{path} {text}", remedy)
    holds = f"holds blocks of {found.name}" if found and found.is_needed() else "is free"
    return Finding(OK, name, f"{path} {holds}")


def states() -> Iterator[Finding]:
    """Where the states lie of the devices that the configuration has this machine swap to."""
    with suppress(ZramdError):
        for device in devices.load().devices:
            if not device.swaps or not (path := device.settings().state):
                continue
            name = f"state of {device.name}"
            if statefs.is_swappable(path):
                yield Finding(
                    NOTE,
                    name,
                    f"{path} may be swapped out itself after a crash; the next server would wait for ever",
                    "use a state on a tmpfs that is mounted with '-o noswap' (Linux 6.4)",
                )
            else:
                yield Finding(OK, name, f"{path} is not swapped out")


def networks() -> Iterator[Finding]:
    """What devices for other machines need: an nbdkit with TLS, and their keys or certificates."""
    with suppress(ZramdError):
        for device in devices.load().devices:
            settings = device.settings()
            if settings.tls in ("", "off"):
                continue
            name = f"network of {device.name}"
            if _fields(_run("nbdkit", "--dump-config")[1]).get("tls") == "no":
                yield Finding(
                    PROBLEM, name, "this nbdkit has no TLS", "install one with GnuTLS, or use tls = off"
                )
            elif "%d" in settings.tls:
                yield Finding(OK, name, f"{settings.tls} is looked at when the service starts")
            else:
                yield _network(name, settings)


def _network(name: str, settings: config.Config) -> Finding:
    try:
        tlsfiles.options(settings)
    except ConfigError as error:
        text, _, remedy = str(error).rpartition(": ")
        return Finding(PROBLEM, name, text, remedy)
    return Finding(OK, name, f"{settings.tls} can be used")


def _memory(root: str) -> int:
    try:
        return meminfo.read("MemTotal", f"{root}{meminfo.PATH}") or 0
    except OSError:
        return 0


def run_folder() -> Iterator[Finding]:
    """Where servers put their sockets."""
    folder = rundir.base()
    if not folder:
        yield Finding(PROBLEM, "run folder", "XDG_RUNTIME_DIR is not set", "set it, or give rundir=FOLDER")
        return
    there = folder
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK):
        yield Finding(OK, "run folder", f"{folder} can be written")
    else:
        yield Finding(
            PROBLEM,
            "run folder",
            f"{folder} cannot be written",
            f"make '{there}' a folder that you may write, or give rundir=FOLDER",
        )


def _read(path: str) -> str:
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    nbdkit,
    run_folder,
    kernel_nbd,
    kernel_ublk,
    front,
    attached_devices,
    local_swap,
    swap_settings,
    socket_buffers,
    backings,
    states,
    networks,
)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 1 if one of them is a problem."""
    looks = (*CHECKS, trial) if arguments.try_ublk else CHECKS
    findings = [finding for look in looks for finding in look()]
    ready = all(finding.level != PROBLEM for finding in findings)
    if arguments.json:
        print(json.dumps({"ready": ready, "findings": [each.as_dict() for each in findings]}, indent=2))
        return 0 if ready else 1
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.level:<7}  {finding.name:<{width}}  {finding.text}")
        if finding.remedy:
            print(f"{'':<{width + 9}}  {finding.remedy}")
    return 0 if ready else 1


def add(commands: Commands) -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "doctor",
        description="See whether this machine is ready to serve devices, and to swap to them. Each finding "
        "is ok, a note (it concerns some uses only) or a problem, with its remedy. "
        "Exit status 1 if there is a problem.",
    )
    parser.add_argument("-J", "--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--try-ublk", action="store_true", help="also make a ublk device, as root, and delete it again"
    )
    parser.set_defaults(run=run)
