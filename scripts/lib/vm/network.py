"""Hosts that lend their memory to a guest, over a network that is slow, loses packets, is cut, or is silent.

    with Network(folder) as network:
        hosts = [HostHere(network, folder, name, size) for name in "ab"]
        for host in hosts:
            host.switch_on()
        machine = network.machine(base, memory, [word for host in hosts for word in host.disk_words(30)])
        with Guest(machine, …) as guest: …

On each host a zramd serves by TCP whom its settings name: the guest, with its key. The guest is a virtual
machine, and qemu, below it, is the client. It runs in a network namespace with a cable to each host. A host
is another namespace; where the network is to be slow, for which not every kernel has what it takes, a virtual
machine.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from vm import here, image
from vm.errors import VmError
from vm.guest import Guest, Machine

PORT = 10809
NAME = "zram0"  # of each host's device
ZRAMD = "/usr/bin/python3 -m zramd"  # in a virtual machine
STATE = "/run/state"  # there: a tmpfs
KEYS = "/run/keys.psk"  # there, too
HOST_MEMORY = 384 << 20
USER = "guest"
OTHER = "neighbour"  # who has a key, too, and may come to no host here
# A host that dies says nothing. Linux sends 15 times more, for a quarter of an hour, before it gives a
# connection up, and the guest waits as long. So docs/network.md has users set this where qemu runs.
SYSCTLS = ("net.ipv4.tcp_retries2=5", "net.ipv4.tcp_syn_retries=2")


@dataclass(frozen=True)
class Placed(Machine):
    """A machine whose qemu runs in a network namespace."""

    namespace: str = ""

    def command(self, console: Path, channels: list[int]) -> list[str]:
        """Return qemu's command line, as Machine.command."""
        return ["ip", "netns", "exec", self.namespace, *super().command(console, channels)]


class Network:
    """A network namespace of this machine, with a cable for each host; its end takes it away. Needs root."""

    def __init__(self, folder: Path) -> None:
        """`folder` gets the guest's key."""
        self.name = f"zramd-vm-{os.getpid()}"
        self.keys = folder / "keys.psk"
        self._cables = 0

    def __enter__(self) -> Self:
        for user in (USER, OTHER):  # psktool appends: a user's key stays what it is
            image.output("psktool", "-u", user, "-p", str(self.keys))
        image.output("ip", "netns", "add", self.name)
        try:
            self.run("ip", "link", "set", "lo", "up")
            self.run("sysctl", "-q", "-w", *SYSCTLS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(VmError):
            image.output("ip", "netns", "del", self.name)

    def run(self, *words: str) -> str:
        """Run a program in the namespace and return what it prints; raises VmError."""
        return image.output("ip", "netns", "exec", self.name, *words)

    def link(self) -> tuple[str, str]:
        """Return what follows in the addresses of another cable, and the name of its device: 10.7.N."""
        self._cables += 1
        return f"10.7.{self._cables}.", f"cable{self._cables}"

    def machine(self, base: Machine, memory: int, devices: list[str]) -> Machine:
        """Return a machine in the namespace with so many bytes of memory and these devices of qemu."""
        fields = {**vars(base), "memory": memory, "devices": [*base.devices, *devices]}
        return Placed(**fields, namespace=self.name)


class MemoryHost(ABC):
    """A host that lends its memory; off, until `switch_on`. `name` is one of its own in the network."""

    def __init__(self, network: Network, folder: Path, name: str, size: int) -> None:
        """`folder` gets what it leaves behind; `size` is its device's in bytes."""
        self.name = name
        self.size = size
        self.network = network
        self.folder = folder
        net, self.cable = network.link()
        self.near, self.address = f"{net}1", f"{net}2"

    @abstractmethod
    def switch_on(self) -> None:
        """Have it serve an empty device."""

    @abstractmethod
    def switch_off(self) -> None:
        """Take its power away: its memory is lost, and its cable is silent."""

    @abstractmethod
    def kill_server(self) -> None:
        """Kill the server, and start another with the same data."""

    @abstractmethod
    def restart(self) -> None:
        """Let a new server take over, as an administrator does who has changed keys."""

    @abstractmethod
    def cut(self, seconds: float) -> None:
        """Cut the network for a while: nothing gets through, and nobody is told."""

    @abstractmethod
    def stored(self) -> int:
        """Return how many pages its device holds."""

    @abstractmethod
    def data_id(self) -> str:
        """Return the name of the data that its device holds."""

    @abstractmethod
    def log(self) -> str:
        """Return what its server has said."""

    def settings(self, keys: str, state: str) -> dict[str, str]:
        """Return what its server is told: who may come, and where its files are."""
        return {
            "state": state,
            "listen": f"{self.address}:{PORT}",
            "tls": f"psk:{keys}",
            "clients": USER,
        }

    def disk_words(self, reconnect_delay: int, pinned: bool) -> list[str]:
        """Return qemu's words for a guest's disk of this host's memory, with TLS.

        One that is `pinned` takes no other data than the host, which is on, has now.
        """
        node, keys = f"disk-{self.name}", self.network.keys.parent
        export = f"{NAME}@{self.data_id()}" if pinned else NAME
        return [
            "-object",
            f"tls-creds-psk,id=tls-{self.name},dir={keys},endpoint=client,username={USER}",
            "-blockdev",
            f"driver=nbd,node-name={node},server.type=inet,server.host={self.address},server.port={PORT},"
            f"export={export},tls-creds=tls-{self.name},discard=unmap,reconnect-delay={reconnect_delay}",
            "-device",
            f"virtio-blk-pci,drive={node},serial={self.name}",
        ]


class HostHere(MemoryHost):
    """A namespace of this machine: as fast as it is."""

    def __init__(self, network: Network, folder: Path, name: str, size: int, rate: str = "") -> None:
        """`rate` is what its cable carries each way, as tc has it (`100mbit`); empty: all there is."""
        super().__init__(network, folder, name, size)
        self._rate = rate
        self._namespace = f"{network.name}-{name}"
        self._rundir = folder / f"run-{name}"
        self._state = Path("/dev/shm") / f"{network.name}-{name}.state"

    def switch_on(self) -> None:
        # What it had under way with the guest is gone, as with any machine that boots.
        with suppress(VmError):
            self.network.run("ip", "link", "del", self.cable)  # a namespace takes its own away later
            image.output("ip", "netns", "del", self._namespace)
        image.output("ip", "netns", "add", self._namespace)
        peer = ("peer", "name", "eth0", "netns", self._namespace)
        self.network.run("ip", "link", "add", self.cable, "type", "veth", *peer)
        self.network.run("ip", "addr", "add", f"{self.near}/24", "dev", self.cable)
        self.network.run("ip", "link", "set", self.cable, "up")
        self._address("add")
        image.output("ip", "-n", self._namespace, "link", "set", "eth0", "up")
        if self._rate:
            shaped = ("root", "tbf", "rate", self._rate, "burst", "128kb", "limit", "4mb")
            self.network.run("tc", "qdisc", "add", "dev", self.cable, *shaped)
            image.output("tc", "-n", self._namespace, "qdisc", "add", "dev", "eth0", *shaped)
        self._serve()

    def switch_off(self) -> None:
        with suppress(VmError):  # first of all: it must not say good-bye
            self._address("del")
        here.kill(self._rundir)
        self._state.unlink(missing_ok=True)

    def close(self) -> None:
        """Take it away."""
        self.switch_off()
        with suppress(VmError):
            image.output("ip", "netns", "del", self._namespace)

    def kill_server(self) -> None:
        here.kill(self._rundir)
        self._serve()

    def cut(self, seconds: float) -> None:
        self._address("del")
        time.sleep(seconds)
        self._address("add")

    def stored(self) -> int:
        return int(here.ask(self._rundir, "GET", "/mm_stat").split()[0]) // 4096

    def data_id(self) -> str:
        return (self._rundir / "data_id").read_text().strip()

    def log(self) -> str:
        logs = [path.read_text(errors="replace") for path in sorted(self._rundir.glob("log*"), reverse=True)]
        return "".join(logs)

    def _address(self, verb: str) -> None:
        """Give it its address, or take it away: as nobody else has it, what is sent there is lost."""
        image.output("ip", "-n", self._namespace, "addr", verb, f"{self.address}/24", "dev", "eth0")

    def _serve(self) -> None:
        settings = {"rundir": str(self._rundir), **self.settings(str(self.network.keys), str(self._state))}
        self._zramd("start", NAME, "--size", str(self.size), *here.pairs(settings))

    def restart(self) -> None:
        self._zramd("restart", "--rundir", str(self._rundir))

    def _zramd(self, *words: str) -> None:
        try:
            here.zramd(*words, namespace=self._namespace)
        except VmError as error:
            raise VmError(f"host {self.name}: {error}") from None


class HostMachine(MemoryHost):
    """A virtual machine, whose kernel has netem."""

    guest: Guest

    def __init__(
        self, network: Network, folder: Path, name: str, size: int, base: Machine, netem: str
    ) -> None:
        """`netem` says what tc does to all that it sends."""
        super().__init__(network, folder, name, size)
        network.run("ip", "tuntap", "add", self.cable, "mode", "tap")
        network.run("ip", "addr", "add", f"{self.near}/24", "dev", self.cable)
        network.run("ip", "link", "set", self.cable, "up")
        words = ["-netdev", f"tap,id=net0,ifname={self.cable},script=no,downscript=no"]
        words += ["-device", "virtio-net-pci,netdev=net0,romfile="]
        self._machine = network.machine(replace(base, cpus=1), HOST_MEMORY, words)
        self._netem = netem
        self._boots = 0

    def switch_on(self) -> None:
        folder = self.folder / f"{self.name}{self._boots}"
        folder.mkdir()
        self._boots += 1
        self.guest = Guest(self._machine, folder)
        self.guest.wait_for_boot()
        images = self._machine.images
        for path in (*images.later_modules, *images.network_modules):
            self.guest.run(f"grep -q ^{Path(path).stem.replace('-', '_')} /proc/modules || insmod {path}")
        self.guest.run(f"ip addr add {self.address}/24 dev eth0 && ip link set eth0 up")
        self.guest.run(f"/usr/sbin/tc qdisc add dev eth0 root netem {self._netem}")
        self.guest.put(KEYS, self.network.keys.read_bytes())
        self.guest.run(f"chmod 600 {KEYS}")
        self.guest.run(f"mkdir {STATE} && mount -t tmpfs -o noswap none {STATE}")
        self._serve()

    def switch_off(self) -> None:
        self.guest.stop()

    def kill_server(self) -> None:
        self.guest.run("kill -9 $(cat /run/zramd/zram0/pid)")
        self._serve()

    def restart(self) -> None:
        self.guest.run(f"{ZRAMD} restart {NAME}", 60)

    def cut(self, seconds: float) -> None:
        self.guest.run(f"ip link set eth0 down; sleep {seconds:g}; ip link set eth0 up", seconds + 60)

    def stored(self) -> int:
        return int(self.guest.run(f"cat /run/zramd/{NAME}/mm_stat").split()[0]) // 4096

    def data_id(self) -> str:
        return self.guest.run(f"cat /run/zramd/{NAME}/data_id").strip()

    def log(self) -> str:
        with suppress(VmError):
            return self.guest.run(f"cat /run/zramd/{NAME}/log")
        return ""

    def _serve(self) -> None:
        settings = " ".join(here.pairs(self.settings(KEYS, f"{STATE}/{NAME}")))
        self.guest.run(f"{ZRAMD} start {NAME} --size {self.size} {settings}", 120)


def has_root() -> bool:
    """Whether this user may make network namespaces and cables here."""
    return os.geteuid() == 0 and os.path.exists("/dev/net/tun")
