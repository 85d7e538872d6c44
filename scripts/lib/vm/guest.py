"""A running guest: qemu, a shell in the guest, workload, and heartbeat. All is bounded in time."""

from __future__ import annotations

import base64
import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from vm.errors import VmError
from vm.image import Images
from vm.kernel import Kernel

MIB = 1 << 20
Beat = dict[str, Any]

PATIENCE = float(os.environ.get("ZRAMD_PATIENCE", "1"))  # how much longer all may take, as in tests/support
BOOT_TIMEOUT = 90.0  # seconds; it takes 3 to 5 under TCG
BOOTS = 3  # that are tried where it is the emulation that fails
COMMAND_TIMEOUT = 120.0  # an attach takes 3; more than 30 on a crowded machine
KVM_TIMEOUT = 15.0  # with KVM it takes one
QUIET_FOR = 60.0  # seconds without a heartbeat, while something else is awaited, that count as a hang
GROUPS = "/run/groups"  # in the guest
LINE = 2000  # characters that are sent at a time: a line of a terminal has 4095 at most
CONSOLE_TAIL = 25  # lines of the kernel's log that are shown with an error
# What the kernel says when something is wrong that no test of ours causes on purpose.
ALARMS = ("blocked for more than", "BUG:", "Oops", "soft lockup", "rcu: INFO", "Kernel panic")


class GuestError(VmError):
    """The guest does not do what it was asked for; the text says what, and the end of its kernel's log."""


@dataclass(frozen=True)
class Machine:
    """What to boot. `devices` are further options of qemu; `memory` is in bytes; `accel` is kvm or tcg."""

    kernel: Kernel
    images: Images
    memory: int
    cpus: int
    accel: str
    devices: list[str] = field(default_factory=list)
    parameters: str = ""  # further ones of the kernel

    def root_disk(self) -> str:
        """Return what qemu is told of the disk that the root is on."""
        return f"driver=raw,node-name=root,read-only=on,file.driver=file,file.filename={self.images.root}"

    @property
    def is_arm64(self) -> bool:
        """Whether it is an arm64, which here is always emulated."""
        return self.kernel.flavour.architecture == "arm64"

    @property
    def patience(self) -> float:
        """How much longer than a machine of this one's kind it takes for all."""
        return PATIENCE * (6 if self.is_arm64 else 1)

    def command(self, console: Path, channels: list[int]) -> list[str]:
        """Return qemu's command line; `channels` are the sockets of ttyS1 to ttyS3 and of QMP."""
        append = "panic=-1 oops=panic random.trust_cpu=on nbd.nbds_max=1 ignore_loglevel"
        append += f" {self.parameters}"
        if self.is_arm64:
            append += " console=ttyAMA0"
            # The processor of a Raspberry Pi 5, one of the machines whose pages have 16 KiB.
            command = ["qemu-system-aarch64", "-M", "virt,gic-version=3", "-cpu", "cortex-a76"]
        else:
            append += " console=ttyS0"
            command = ["qemu-system-x86_64", "-M", f"pc,accel={self.accel}"]
            command += ["-cpu", "max" if self.accel == "tcg" else "host"]
            if self.accel == "tcg":
                append += " tsc=reliable"  # else the clock is the HPET, which qemu emulates: slow
                # A busy host delivers interrupts late, which the kernel takes for a timer that is broken.
                append += " no_timer_check"
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-smp", str(self.cpus), "-m", f"{self.memory // MIB}M"]
        command += [
            "-kernel",
            str(self.kernel.image),
            "-initrd",
            str(self.images.initramfs),
            "-append",
            append,
        ]
        command += ["-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]
        for number, fd in enumerate(channels[:3], 1):
            command += ["-chardev", f"socket,id=tty{number},fd={fd}"]
            if not self.is_arm64:
                command += ["-serial", f"chardev:tty{number}"]
        if self.is_arm64:  # which has one serial port of its own, and no ttyS0
            ports = ",".join(f"chardev{number + 1}=tty{number}" for number in (1, 2, 3))
            command += ["-chardev", "null,id=tty0", "-device", f"pci-serial-4x,chardev1=tty0,{ports}"]
        command += ["-chardev", f"socket,id=qmp,fd={channels[3]}", "-mon", "chardev=qmp,mode=control"]
        command += ["-blockdev", self.root_disk(), "-device", "virtio-blk-pci,drive=root"]
        return command + self.devices


class Channel:
    """Lines to and from one of the guest's ports."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()

    def send(self, text: str) -> None:
        """Send text; raises OSError if qemu is gone or takes nothing for a minute."""
        self._socket.settimeout(60)
        self._socket.sendall(text.encode())

    def line(self, timeout: float) -> str | None:
        """Return the next line, None if there is none within `timeout` seconds; raises EOFError."""
        end = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                return None
            except OSError:
                data = b""
            if not data:
                raise EOFError
            self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line.decode(errors="replace").rstrip("\r")

    def close(self) -> None:
        """Close it; a reader sees the end."""
        self._socket.close()


class Guest:
    """A guest that has booted; use it in a `with`, whose end ends it."""

    def __init__(self, machine: Machine, folder: Path, on_beat: Callable[[Beat], None] | None = None) -> None:
        """`folder` gets console.log; `on_beat` is called with each heartbeat, by a thread of its own."""
        self.machine = machine
        self.console = folder / "console.log"
        self.beats: list[Beat] = []
        self.booted = 0.0  # seconds that it took
        self._on_beat = on_beat
        self._beat_at = time.monotonic()
        self._serial = 0
        self._group = ""  # of processes, for workloads
        self._greeted = False
        self._qemu_log = folder / "qemu.log"
        self._start()

    def _start(self) -> None:
        ours, theirs = zip(*(socket.socketpair() for _ in range(4)), strict=True)
        self._agent, self._monitor, self._workload, self._qmp = map(Channel, ours)
        fds = [sock.fileno() for sock in theirs]
        command = self.machine.command(self.console, fds)
        try:
            # If this process is killed, nothing is left behind.
            with self._qemu_log.open("wb") as log:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *command],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        except OSError as error:
            raise VmError(f"qemu cannot be started: {error.strerror}") from None
        finally:
            for sock in theirs:
                sock.close()
        self._reader = threading.Thread(target=self._read_beats, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def wait_for_boot(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Wait until the guest takes commands; raises GuestError."""
        started = time.monotonic()
        timeout *= self.machine.patience
        boots = 1
        while not self.beats:
            if time.monotonic() - started > timeout:
                raise self._error(f"the guest has not booted within {timeout:.0f} s")
            if self._process.poll() is not None:
                if boots == BOOTS or not self._emulation_failed():
                    self._check_alive("while the guest booted")
                boots += 1
                self.stop()
                self._start()
            time.sleep(0.02)
        self.run("true")
        self.booted = time.monotonic() - started

    def _emulation_failed(self) -> bool:
        """Whether it has ended as qemu let a processor run code that the kernel was about to change.

        For that moment the kernel puts a breakpoint there, and makes the other processors wait. Emulated they
        sometimes do not: "Oops: int3", once in some hundred boots.
        """
        return (
            self.machine.accel == "tcg"
            and self.console.exists()
            and any("Oops: int3" in line for line in self.kernel_log())
        )

    def wait_for_end(self, timeout: float) -> float:
        """Wait until the guest has powered off or wants to boot again, and return the seconds that it took.

        Raises GuestError when it does neither.
        """
        started = time.monotonic()
        timeout *= self.machine.patience
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._error(f"the guest has not ended within {timeout:.0f} s") from None
        return time.monotonic() - started

    def stop(self) -> None:
        """End the guest at once."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(5)
        for channel in (self._agent, self._monitor, self._workload, self._qmp):
            channel.close()

    # ---- What it can be asked

    def run(self, command: str, timeout: float = COMMAND_TIMEOUT) -> str:
        """Run a command line in the guest's shell and return its output; raises GuestError if it fails."""
        status, output = self.try_run(command, timeout)
        if status:
            words = " ".join(output.split()) or "no reason given"
            raise self._error(f"'{command}' failed in the guest with status {status}: {words}")
        return output

    def try_run(self, command: str, timeout: float = COMMAND_TIMEOUT) -> tuple[int, str]:
        """Run a command line in the guest's shell and return its exit status and what it prints."""
        self._serial += 1
        mark = f"@{self._serial}@"
        self._send(
            self._agent,
            f'{{ {command}{"" if command.endswith("&") else ";"} }} </dev/null 2>&1; echo "{mark}$?"\n',
        )
        lines: list[str] = []
        what = f"'{command}' has not ended"
        while mark not in (line := self._line(self._agent, timeout, what)):
            lines.append(line)
        last, _, status = line.partition(mark)  # a command's output need not end with a newline
        return int(status), "\n".join([*lines, *([last] if last else [])])

    def put(self, path: str, content: bytes) -> None:
        """Make a file in the guest."""
        words = base64.b64encode(gzip.compress(content)).decode()
        self.run("rm -f /tmp/words")
        for start in range(0, len(words), LINE):
            self.run(f"printf %s {words[start : start + LINE]} >>/tmp/words")
        self.run(f"base64 -d /tmp/words | gunzip >{path}; rm /tmp/words")

    def start_workload(self, mib: int, seed: int, pages: str = "") -> None:
        """Start the program whose memory is verified; it ends when told so by `phase("quit")`.

        `pages` is a file or disk of the guest from which it takes the content of its pages.
        """
        self.start(f"pattern {mib} {seed} {pages}".rstrip())

    def confine(self, most: int) -> None:
        """Let workloads that are started from now on have so many bytes of memory; the rest is swapped."""
        self._group = f"{GROUPS}/workload"
        self.run(f"mkdir -p {GROUPS} && mount -t cgroup2 none {GROUPS}")
        self.run(f"echo +memory >{GROUPS}/cgroup.subtree_control && mkdir {self._group}")
        self.run(f"echo {most} >{self._group}/memory.max")

    def start(self, workload: str) -> None:
        """Start a workload of the guest's program: its verb and what follows that."""
        tty = "/dev/ttyS3"
        program = f"/bin/guest_tool {workload} <{tty} >{tty} 2>&1"
        if self._group:
            program = f"sh -c 'echo $$ >{self._group}/cgroup.procs; exec {program}'"
        ended = f'echo "{{\\"error\\": \\"the workload has ended with status $?\\"}}" >{tty}'
        self.run(f"{{ {program}; {ended}; }} &")
        self._answer("start", 30.0)

    def phase(self, phase: str, timeout: float) -> dict[str, Any]:
        """Let the workload do one phase and return its answer; raises GuestError if it does not survive."""
        self._send(self._workload, f"{phase}\n")
        return self._answer(phase, timeout)

    def end_workload(self) -> None:
        """End the workload; its memory is free when this returns."""
        self._send(self._workload, "quit\n")
        self._line(self._workload, 60.0, "the workload has not ended")

    def ask_qemu(self, command: str) -> Any:
        """Return qemu's own answer to a command of its protocol, such as query-status."""
        if not self._greeted:
            self._line(self._qmp, 10.0, "qemu has not greeted")
            self._greeted = True
            self.ask_qemu("qmp_capabilities")
        self._send(self._qmp, json.dumps({"execute": command}) + "\n")
        while True:
            answer = json.loads(self._line(self._qmp, 10.0, f"qemu has not answered {command}"))
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise self._error(f"qemu refuses {command}: {answer['error'].get('desc')}")

    def resume(self) -> None:
        """Let the guest go on; it has been paused."""
        self._beat_at = time.monotonic()
        self.ask_qemu("cont")

    def kernel_log(self) -> list[str]:
        """Return the lines of the kernel's log."""
        return self.console.read_text(errors="replace").splitlines()

    def alarms(self) -> list[str]:
        """Return the lines of the kernel's log that tell of hangs and faults."""
        return [line for line in self.kernel_log() if any(alarm in line for alarm in ALARMS)]

    def longest_gap(self) -> float:
        """Return the longest time between two heartbeats, in seconds of the guest's clock."""
        times = [float(beat["time"]) for beat in self.beats]
        return max((late - early for early, late in pairwise(times)), default=0.0)

    # ---- Inside

    def _send(self, channel: Channel, text: str) -> None:
        try:
            channel.send(text)
        except OSError:
            self._check_alive("when it was spoken to")
            raise self._error("the guest takes no more commands") from None

    def _line(self, channel: Channel, timeout: float, what: str) -> str:
        """Return the channel's next line; raises GuestError after `timeout`, or at a hang."""
        quiet_for = QUIET_FOR * self.machine.patience
        timeout *= self.machine.patience
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                line = channel.line(min(1.0, timeout))
            except EOFError:
                self._check_alive(f"and {what}")
                raise self._error(what) from None
            if line is not None:
                return line
            self._check_alive(f"and {what}")
            if time.monotonic() - self._beat_at > quiet_for:
                raise self._error(f"the guest gave no sign of life for {quiet_for:.0f} s, and {what}")
        raise self._error(f"{what} within {timeout:.0f} s")

    def _answer(self, phase: str, timeout: float) -> dict[str, Any]:
        line = self._line(self._workload, timeout, f"the workload has not ended its phase '{phase}'")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise self._error(f"the workload says: {line}") from None
        if "error" in answer:
            raise self._error(f"in the phase '{phase}': {answer['error']}")
        return answer

    def _read_beats(self) -> None:
        while True:
            try:
                line = self._monitor.line(3600)
            except EOFError:
                return
            try:
                beat = json.loads(line or "")
            except ValueError:
                continue
            self._beat_at = time.monotonic()
            self.beats.append(beat)
            if self._on_beat:
                try:
                    self._on_beat(beat)
                except Exception as error:
                    print(f"zramd: the live line failed: {error!r}", file=sys.stderr)
                    self._on_beat = None

    def _check_alive(self, when: str) -> None:
        if self._process.poll() is not None:
            words = " ".join(self._qemu_log.read_text(errors="replace").split())
            status = self._process.returncode
            raise self._error(f"qemu has ended with status {status} {when}: {words or 'no reason given'}")

    def _error(self, sentence: str) -> GuestError:
        tail = self.kernel_log()[-CONSOLE_TAIL:] if self.console.exists() else []
        log = "".join(f"\n    {line}" for line in tail)
        return GuestError(f"{sentence}; the end of the guest's kernel log:{log or ' (nothing)'}")


def choose_accel(machine: Machine, folder: Path) -> str:
    """Return kvm if the machine boots with it, else tcg. A /dev/kvm that is there need not work."""
    if machine.is_arm64 or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    try:
        with Guest(replace(machine, accel="kvm", devices=[]), folder) as guest:
            guest.wait_for_boot(KVM_TIMEOUT)
    except GuestError:
        return "tcg"
    return "kvm"
