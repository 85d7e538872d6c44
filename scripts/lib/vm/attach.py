"""The ways in which a guest gets its zramd device, or the kernel's own zram, and how each is asked."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from vm import here, libvirt
from vm.errors import VmError
from vm.guest import Beat, Guest
from zramd.contract import rundir

NAME = "zram0"
NODE = "zram0"  # what qemu calls the disk
READY_TIMEOUT = 60.0  # seconds; under TCG Python takes a few to start
RUNDIR = f"/run/zramd/{NAME}"  # in the guest
ZRAMD = "/usr/bin/python3 -m zramd"  # there, too
# Seconds for which qemu lets requests wait when the server is away, before it fails them.
RECONNECT_DELAY = 30
GIL = "/run/gil"  # in the guest: what holds the interpreter lock, while there is a file `hold`
# A server's Python reads it before all else. The lock is kept by whoever calls C by a PyDLL.
_HOLDER = """
import ctypes, os, sys, threading, time
def hold():
    usleep = ctypes.PyDLL(None).usleep
    while True:
        if os.path.exists("/run/gil/hold"):
            usleep(50_000)
        else:
            time.sleep(0.1)
def start():
    threading.Thread(target=hold, daemon=True).start()
if "zramd.server" in sys.orig_argv:
    os.register_at_fork(after_in_child=start)
    start()
"""
HANDLE_BYTES = 8  # that the kernel's zram needs for each object, beside its slots and its pool


class Attachment(ABC):
    """A device that compresses, and the way from a guest to it."""

    name: str
    device: str  # in the guest
    next_disk = "/dev/vdb"  # of the guest, where neither the device nor its backing is one of qemu's

    def __init__(self, size: int) -> None:
        """`size` is the device's, in bytes."""
        self.size = size

    def qemu_options(self) -> list[str]:
        """Return what qemu is to be told before the guest boots; the host's server runs from here on."""
        return []

    @abstractmethod
    def attach(self, guest: Guest) -> None:
        """Make the device appear in the guest."""

    def detach(self, guest: Guest) -> None:  # noqa: B027  a disk of qemu's stays
        """Undo `attach`; the device is no longer in use."""

    def stop(self) -> None:  # noqa: B027  where nothing runs on the host
        """End what runs on the host."""

    def memory_free(self, guest: Guest) -> int:
        """Return the free bytes of the machine whose memory holds the pool: the guest, if no other."""
        line = guest.run("grep MemFree /proc/meminfo")
        return int(line.split()[1]) * 1024

    @abstractmethod
    def peek(self, beat: Beat) -> dict[str, Any] | None:
        """Return the latest numbers without asking for them; `beat` is the guest's last heartbeat."""

    def sample(self, beat: Beat) -> dict[str, Any] | None:
        """Return what the device held at a heartbeat that was looked at, by zramd's names."""
        numbers: dict[str, Any] | None = beat.get("zramd")
        return numbers

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Return the numbers now, by zramd's names."""

    @abstractmethod
    def compact(self) -> int:
        """Compact now and return the pages freed."""


class Zramd(Attachment):
    """A zramd server, and the way from a guest to it."""

    def __init__(self, size: int, settings: dict[str, str]) -> None:
        """`size` is the device's, in bytes; `settings` are zramd's."""
        super().__init__(size)
        self.settings = settings

    @abstractmethod
    def request(self, method: str, path: str, body: str = "") -> str:
        """Ask the server's control socket and return the body of its answer; raises VmError."""

    def stats(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.request("GET", "/stats"))
        return values

    def compact(self) -> int:
        return int(json.loads(self.request("POST", "/compact"))["pages_freed"])


class _HostServer(Zramd):
    """zramd runs on the host, its files in `folder`."""

    def __init__(self, size: int, settings: dict[str, str], folder: Path) -> None:
        super().__init__(size, settings)
        self.rundir = folder / "zramd"
        self._log = folder / "zramd.log"
        self._start()
        end = time.monotonic() + READY_TIMEOUT
        try:
            while not self._answers():
                if self._ended() or time.monotonic() > end:
                    words = " ".join(self._log.read_text(errors="replace").split())
                    raise VmError(f"zramd does not serve: {words or 'no reason given'}")
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        command = here.command("serve", "--name", NAME, "--size", str(self.size), *self._pairs())
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--", "--exit-with-parent"],
                env=here.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _pairs(self) -> list[str]:
        return here.pairs({**self.settings, "rundir": str(self.rundir)})

    def _ended(self) -> bool:
        return self._process.poll() is not None

    def _answers(self) -> bool:
        try:
            return "status" in self.request("GET", "/health")
        except VmError:
            return False

    def request(self, method: str, path: str, body: str = "") -> str:
        return here.ask(self.rundir, method, path, body)

    def peek(self, beat: Beat) -> dict[str, Any] | None:
        try:
            values: dict[str, Any] = json.loads((self.rundir / "stats.json").read_text())
        except (OSError, ValueError):
            return None
        return values

    def memory_free(self, guest: Guest) -> int:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemFree:"):
                return int(line.split()[1]) * 1024
        raise VmError("/proc/meminfo does not tell MemFree")

    def stall(self, seconds: float) -> None:
        """Let the server stand still for a while."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def disk_words(socket: Path, name: str) -> list[str]:
    """Return qemu's words for the disk `name` at `socket`: those of docs/guests.md."""
    return [
        "-blockdev",
        f"driver=nbd,node-name={NODE},server.type=unix,server.path={socket},export={name},"
        f"discard=unmap,reconnect-delay={RECONNECT_DELAY}",
        "-device",
        f"virtio-blk-pci,drive={NODE},serial=zramd-{name}",
    ]


class Qemu(_HostServer):
    """qemu is the NBD client; the guest sees a virtio disk."""

    name = "qemu"
    device = "/dev/vdb"
    next_disk = "/dev/vdc"

    def __init__(self, size: int, settings: dict[str, str], folder: Path, werror: str = "report") -> None:
        """`werror` is what qemu does when a write fails: report, or enospc (then it pauses the guest)."""
        super().__init__(size, settings, folder)
        self._werror = werror

    def qemu_options(self) -> list[str]:
        *words, device = disk_words(self.rundir / "nbd.sock", NAME)
        return [*words, f"{device},werror={self._werror},rerror=report"]

    def attach(self, guest: Guest) -> None:
        # A virtio disk says that it rotates. To such a disk the kernel sends no discards of what is freed.
        guest.run(f"echo 0 >/sys/block/{Path(self.device).name}/queue/rotational")


class Libvirt(Qemu):
    """The same with what libvirt makes of a description of the disk; qemu pauses the guest at a full pool."""

    name = "libvirt"

    def qemu_options(self) -> list[str]:
        return libvirt.disk_words(self.rundir / "nbd.sock", NAME)


class QemuWithState(Qemu):
    """The same with a server in the background, whose data outlives it."""

    def __init__(self, size: int, settings: dict[str, str], folder: Path, state: Path) -> None:
        self._state = state
        super().__init__(size, {**settings, "state": str(state)}, folder)

    def _start(self) -> None:
        here.zramd("start", NAME, "--size", str(self.size), *self._pairs())

    def kill(self) -> float:
        """Kill the server, start another one, and return the seconds that nobody served."""
        since = time.monotonic()
        if not here.kill(self.rundir):
            raise VmError("the server has died by itself")
        self._start()
        return time.monotonic() - since

    def restart(self) -> float:
        """Let a new server take over, and return the seconds that the command tells."""
        words = here.zramd("restart", "--rundir", str(self.rundir)).split()
        return float(words[words.index("ms") - 1]) / 1000

    def stop(self) -> None:
        if pid := rundir.holder(str(self.rundir)):
            os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + 10
            while rundir.holder(str(self.rundir)) == pid:
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
        self._state.unlink(missing_ok=True)

    def _ended(self) -> bool:
        return rundir.holder(str(self.rundir)) is None


class GuestNbd(_HostServer):
    """The guest's kernel is the client, over TCP to the host."""

    name = "guest"
    device = "/dev/nbd0"

    def __init__(self, size: int, settings: dict[str, str], folder: Path, nbd_options: str) -> None:
        """`nbd_options` are further options of nbd-client."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        super().__init__(size, {**settings, "listen": f"127.0.0.1:{self._port}"}, folder)
        self._nbd_options = nbd_options

    def qemu_options(self) -> list[str]:
        return ["-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="]

    def attach(self, guest: Guest) -> None:
        for path in guest.machine.images.later_modules:
            guest.run(f"insmod {path}")
        guest.run("ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up")
        _nbd_client(guest, f"10.0.2.2 {self._port} {self.device} {self._nbd_options}")

    def detach(self, guest: Guest) -> None:
        guest.run(f"/usr/sbin/nbd-client -d {self.device}")


class Local(Zramd):
    """zramd runs in the guest and serves the guest's own kernel, whose client is nbd."""

    name = "local"
    device = "/dev/nbd0"
    words = ""  # of `zramd serve`, beside the settings

    def __init__(self, size: int, settings: dict[str, str], nbd_options: str = "", of: str = NAME) -> None:
        """`nbd_options` are further options of nbd-client, which then attaches instead of zramd itself.

        `of` is the device's name, for a guest with two.
        """
        super().__init__(size, settings)
        self._nbd_options = nbd_options
        self._guest: Guest | None = None
        self._of = of
        self.rundir = str(Path(RUNDIR).with_name(of))

    def attach(self, guest: Guest) -> None:
        self._guest = guest
        if "state" in self.settings:
            place = Path(self.settings["state"]).parent
            guest.run(f"mkdir -p {place} && mount -t tmpfs -o noswap none {place}")
        self._start(guest)
        for path in self._modules(guest):
            guest.run(f"grep -q ^{Path(path).stem.replace('-', '_')} /proc/modules || insmod {path}")
        if self._nbd_options:
            _nbd_client(guest, f"-unix {self.rundir}/nbd.sock {self.device} {self._nbd_options}")
        else:
            guest.run(f"{ZRAMD} attach {self._of} --device {self.device} {self._attach_words()}", 60)

    def _start(self, guest: Guest) -> None:
        """Have the server serve."""
        status = f"/run/{self._of}.status"
        guest.run(f"{{ setsid {self._serve()} >{self._log()} 2>&1; echo $? >{status}; }} &")
        end = time.monotonic() + READY_TIMEOUT * guest.machine.patience
        while guest.try_run(f"/bin/guest_tool control {self.rundir}/control.sock GET /health")[0]:
            if time.monotonic() > end or not guest.try_run(f"[ -e {status} ]")[0]:
                raise VmError(f"zramd does not serve in the guest: {self.log()}")
            time.sleep(0.2)

    def _attach_words(self) -> str:
        """Return further options of `zramd attach`."""
        return ""

    def detach(self, guest: Guest) -> None:
        if self._nbd_options:
            guest.run(f"/usr/sbin/nbd-client -d {self.device}")
        else:
            guest.run(f"{ZRAMD} detach {self._of}", 60)

    def peek(self, beat: Beat) -> dict[str, Any] | None:
        return beat.get("zramd")

    def request(self, method: str, path: str, body: str = "") -> str:
        words = shlex.join([f"{self.rundir}/control.sock", method, path, body])
        return self._there().run(f"/bin/guest_tool control {words}", here.ASK_TIMEOUT)

    def log(self) -> str:
        """Return what the server has said."""
        return self._guest.run(f"cat {self._log()}") if self._guest else ""

    def pid(self) -> int:
        """Return the number of the server's process; raises VmError if it does not run."""
        return int(self._there().run(f"cat {self.rundir}/pid"))

    def _serve(self) -> str:
        pairs = shlex.join(here.pairs(self.settings))
        return f"{ZRAMD} serve --name {self._of} --size {self.size} {self.words} {pairs}"

    def _log(self) -> str:
        return f"/run/{self._of}.log"

    def _modules(self, guest: Guest) -> list[str]:
        return guest.machine.images.later_modules[-1:]

    def _there(self) -> Guest:
        if self._guest is None:
            raise VmError("zramd does not run in the guest yet")
        return self._guest


class Ublk(Local):
    """The same, but the guest's kernel has the device from zramd itself: no NBD, no socket."""

    name = "ublk"
    device = "/dev/ublkb0"
    words = "--ublk"

    def __init__(
        self,
        size: int,
        settings: dict[str, str],
        of: str = NAME,
        *,
        hold_gil: bool = False,
        standby: bool = False,
        restarts: bool = False,
    ) -> None:
        """`hold_gil`: from the end of `attach` on, a thread of the server holds Python's interpreter lock.

        `standby`: another server is always ready to take over. `restarts`: `zramd restart` will be asked for,
        which wants a server of `zramd start`.
        """
        super().__init__(size, settings, of=of)
        self._hold_gil = hold_gil
        self._standby = standby
        self._starts = standby or restarts
        self.standby_bytes = 0  # that the last one took while it waited

    def attach(self, guest: Guest) -> None:
        if self._hold_gil:
            guest.run(f"mkdir -p {GIL}")
            guest.put(f"{GIL}/sitecustomize.py", _HOLDER.encode())
        super().attach(guest)
        if self._hold_gil:
            guest.run(f"touch {GIL}/hold")

    def detach(self, guest: Guest) -> None:
        guest.run(f"rm -f {GIL}/hold")
        super().detach(guest)

    def kill(self) -> float:
        """Kill the server, start another one, and return the seconds until the device could be read again.

        A program that is locked in memory does it: until the new server is there, nothing can be swapped in.
        """
        guest = self._there()
        if self._standby:  # which has to come first; then nobody need be started
            wait = (
                f"for i in $(seq 300); do [ -e {self.rundir}/standby ] && exit 0; usleep 100000; done; exit 1"
            )
            guest.run(f"({wait})", 60)
            line = guest.run(f"grep VmRSS /proc/$(cat {self.rundir}/standby)/status")
            self.standby_bytes = int(line.split()[1]) * 1024
        words = f"{self._log()} " + ("" if self._standby else self._serve())
        answer = guest.run(f"/bin/guest_tool revive {self.pid()} {self.device} {words}")
        return float(json.loads(answer)["seconds"])

    def _start(self, guest: Guest) -> None:
        if not self._starts:
            super()._start(guest)
            return
        pairs = shlex.join(here.pairs(self.settings))
        guest.run(f"{ZRAMD} start {self._of} --size {self.size} front=ublk {pairs}", 60)

    def _attach_words(self) -> str:
        return "--standby" if self._standby else "--no-standby"

    def restart(self) -> float:
        """Let a new server take over, and return the seconds that the command tells."""
        words = self._there().run(f"{ZRAMD} restart {self._of}").split()
        return float(words[words.index("ms") - 1]) / 1000

    def _serve(self) -> str:
        path = f"/bin/busybox env PYTHONPATH={GIL}:/zramd " if self._hold_gil else ""
        return path + super()._serve()

    def _modules(self, guest: Guest) -> list[str]:
        modules = guest.machine.images.ublk_modules
        if not modules:
            raise VmError(f"the kernel {guest.machine.kernel.release} has no ublk: use --suite trixie")
        return modules


class KernelZram(Attachment):
    """No zramd at all: the zram of the guest's kernel, with lz4 or another compressor of its own."""

    name = "zram"
    device = "/dev/zram0"

    def __init__(self, size: int, settings: dict[str, str] | None = None) -> None:
        """`settings` are those of zramd's that this has, too: comp_algorithm, mem_limit, backing."""
        super().__init__(size)
        self._settings = settings or {}
        self._guest: Guest | None = None
        self._table = 0  # its bytes, once the device has its size

    def attach(self, guest: Guest) -> None:
        self._guest = guest
        for path in guest.machine.images.zram_modules:
            guest.run(f"insmod {path}")
        self._write("comp_algorithm", self._settings.get("comp_algorithm", "lz4"))
        if "backing" in self._settings:
            self._write("backing_dev", self._settings["backing"])
        self._write("disksize", str(self.size))
        if "mem_limit" in self._settings:
            self._write("mem_limit", self._settings["mem_limit"])

    def detach(self, guest: Guest) -> None:
        self._write("reset", "1")

    def peek(self, beat: Beat) -> dict[str, Any] | None:
        return None

    def sample(self, beat: Beat) -> dict[str, Any] | None:
        if "mm_stat" not in beat:
            return None
        if not self._table:
            self._table = self._table_bytes()
        return self._numbers(beat["mm_stat"], beat["io_stat"], beat.get("bd_stat", []))

    def stats(self) -> dict[str, Any]:
        self._table = self._table_bytes()
        backing = self._read("bd_stat") if "backing" in self._settings else []
        return self._numbers(self._read("mm_stat"), self._read("io_stat"), backing)

    def write_back_by_timer(self, seconds: float) -> None:
        """Write back as users do, by a script with pauses of so many seconds: what was idle since."""
        zram = "/sys/block/zram0"
        work = f"echo idle >{zram}/writeback; echo all >{zram}/idle"
        words = "read began rest </proc/uptime; {work}; read ended rest </proc/uptime; echo $began $ended"
        self._run(f"while sleep {seconds:g}; do {words.format(work=work)}; done >/run/timer.log 2>&1 &")

    def rounds(self) -> list[str]:
        """Return what that script has said: when each of its rounds began and ended."""
        return self._run("cat /run/timer.log").splitlines()

    def _numbers(self, memory: list[int], requests: list[int], backing: list[int]) -> dict[str, Any]:
        stored, used, total = memory[:3]
        numbers = {
            "pages_stored": stored // 4096,
            "same_pages": memory[5],
            "orig_data_size": stored,
            "compr_data_size": used,
            "mem_used_total": total,
            "frag_ratio": round(100 * used / total, 2) if total else 100.0,
            "total_bytes": total + self._table + HANDLE_BYTES * stored // 4096,
            "pages_compacted": memory[6],
            "notify_free": requests[3],
            "failed_writes": requests[1],
        }
        if backing:
            out, reads, writes = backing  # blocks
            section = {"out_pages": out, "bd_reads": reads * 4096, "bd_writes": writes * 4096}
            numbers["writeback"] = {**section, "written_out": writes}
        return numbers

    def compact(self) -> int:
        before = self.stats()["pages_compacted"]
        self._write("compact", "1")
        return int(self.stats()["pages_compacted"] - before)

    def _table_bytes(self) -> int:
        """The slots' table: how long one is depends on how the kernel was built."""
        lines = self._run("grep -F '[zram]' /proc/vmallocinfo || true").splitlines()
        return sum(int(line.split()[1]) - 4096 for line in lines)  # each has a page that guards its end

    def _read(self, name: str) -> list[int]:
        return [int(word) for word in self._run(f"cat /sys/block/zram0/{name}").split()]

    def _write(self, name: str, value: str) -> None:
        self._run(f"echo {value} >/sys/block/zram0/{name}", here.ASK_TIMEOUT)

    def _run(self, command: str, timeout: float = 30.0) -> str:
        if self._guest is None:
            raise VmError("the guest has no zram yet")
        return self._guest.run(command, timeout)


def _nbd_client(guest: Guest, words: str) -> None:
    # Blocks of 4096: the kernel then never asks for a part of a page.
    guest.run(f"/usr/sbin/nbd-client -N {NAME} -b 4096 {words}", 60)
