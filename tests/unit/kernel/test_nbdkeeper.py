"""The keeper of a device whose server is another machine's: real servers, and a kernel that is made up."""

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.run import wait_until

from zramd.contract import exported
from zramd.errors import AttachError
from zramd.kernel import attached, keeper, keeping, netlink, protection

NAME = "zram0@memory1:10809"


class Kernel:
    """What stands for the kernel's NBD client: it has the connections that it was given."""

    def __init__(self) -> None:
        self.exports: list[netlink.Export] = []
        self.links: list[socket.socket] = []
        self.offered = 0
        self.backends: set[str] = set()
        self.connected = False

    def _take(self, fds: list[int]) -> None:
        self.links += [socket.socket(fileno=os.dup(fd)) for fd in fds]

    def connect(self, fds: list[int], export: netlink.Export, *, backend: str, **_: object) -> int:
        self._take(fds)
        self.exports.append(export)
        self.backends.add(backend)
        self.connected = True
        return 7

    def reconfigure(self, index: int, fds: list[int], backend: str) -> None:
        assert index == 7
        self.offered += len(fds)
        self.backends.add(backend)
        if not self.links:
            self._take(fds)

    def disconnect(self, index: int) -> None:
        self.connected = False

    def dead_links(self) -> "Kernel":
        return self

    def fileno(self) -> int:
        return self._quiet

    def read(self) -> list[int]:
        return []

    def drop(self) -> None:
        """Lose all connections."""
        for link in self.links:
            link.close()
        self.links.clear()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    found = Kernel()
    found._quiet, other = os.pipe()
    monkeypatch.setattr(netlink, "Kernel", lambda: found)
    monkeypatch.setattr(attached, "FOLDER", str(tmp_path))
    monkeypatch.setattr(attached, "is_connected", lambda device: found.connected and device == "/dev/nbd7")
    monkeypatch.setattr(attached, "read_sys", lambda device, name: "")
    for name in ("prepare", "take_priority"):
        monkeypatch.setattr(protection, name, lambda: None)
    monkeypatch.setattr(protection, "protect_process", lambda heap: None)
    monkeypatch.setattr(keeping, "ready", lambda number: None)
    monkeypatch.setattr(keeping.KernelLog, "say", lambda log, device, sentence: None)
    yield found
    found.drop()
    os.close(other)
    os.close(found._quiet)


def keeper_of(address: object, **changes: object) -> keeper.Keeper:
    """A keeper for what is no server of this machine as far as it knows: it is given no run folder."""
    job = keeper.Job(NAME, "zram0", str(address), "", -1, 0, "", 1, 0, 120)
    return keeper.Keeper(job._replace(**changes))  # type: ignore[arg-type]


def test_the_server_names_its_data(serve: Callable[..., Any], kernel: Kernel) -> None:
    """Nothing is read of a run folder; the record has the data, and a second connection was tried."""
    served = serve()
    keeper_of(served.socket).attach()
    data = (served.rundir / "data_id").read_text().strip()
    assert exported.data_of(kernel.exports[0].description) == data
    there = attached.find(NAME)
    assert there is not None
    assert (there.device, there.data, there.keeper) == ("/dev/nbd7", data, os.getpid())
    assert (len(kernel.links), kernel.offered) == (1, 1)
    assert kernel.backends == {f"zramd/{NAME}"}


def test_silence_ends_a_connection() -> None:
    """A host that is switched off says nothing: the kernel is to notice within half a minute."""
    with socket.create_server(("127.0.0.1", 0)) as listener, netlink.dial(listener.getsockname()) as link:
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, between, probes = (
            link.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + between * probes <= 30
        assert 0 < link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 30_000


def test_a_server_with_the_same_data_is_used_again(
    serve: Callable[..., Any], kernel: Kernel, memory_folder: Path
) -> None:
    served = serve(state=memory_folder / "state")
    kept = keeper_of(served.socket)
    kept.attach()
    kernel.drop()
    served.stop(9)
    kept._dead = 1
    assert not kept._offer()  # nobody is there
    assert kept._dead == 1
    serve(state=memory_folder / "state", rundir=served.rundir)
    assert kept._offer()
    assert len(kernel.links) == 1
    assert kept._dead == 0


def test_a_server_with_other_data_is_never_used(
    serve: Callable[..., Any], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the same name and size, and zeros."""
    served = serve()
    kept = keeper_of(served.socket)
    kept.attach()
    kernel.drop()
    served.stop(9)
    serve(rundir=served.rundir)
    said: list[str] = []
    monkeypatch.setattr(kept, "_say", said.append)
    kept._dead = 1
    for _ in range(3):
        assert not kept._offer()
    assert kernel.links == []
    assert said == [f"{NAME} serves, but cannot be used: it does not hold the data that was there before"]


def test_a_keeper_that_follows_another_has_its_data(serve: Callable[..., Any], kernel: Kernel) -> None:
    served = serve()
    kernel.connected = True
    other = keeper_of(served.socket, device=7, adopt=1, data="0" * 32)
    other.attach()
    assert kernel.links == []
    other._record.remove()
    other._record.close()
    same = (served.rundir / "data_id").read_text().strip()
    keeper_of(served.socket, device=7, adopt=1, data=same).attach()
    assert len(kernel.links) == 1


def test_what_is_no_zramd_is_refused(kernel: Kernel, tmp_path: Path) -> None:
    """Its data has no name: nobody could know it again."""
    path = tmp_path / "other.sock"
    server = subprocess.Popen(["nbdkit", "-f", "-U", str(path), "memory", "8M"])
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            wait_until(lambda: probe.connect_ex(str(path)) == 0)
        with pytest.raises(
            AttachError, match="does not name the data that it holds: it is no zramd, or one of"
        ):
            keeper_of(path).attach()
    finally:
        server.kill()
        server.wait()
    assert not kernel.connected
    assert attached.find(NAME) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_host_where_nobody_serves(kernel: Kernel, host: str) -> None:
    where = f"{host}:{unused_port()}"
    with pytest.raises(AttachError, match=rf"^the server cannot be reached at '{re.escape(where)}': "):
        keeper_of(where).attach()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_a_lost_word_of_the_kernel_s_is_made_up_for(
    serve: Callable[..., Any], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process can be watched there: the keeper offers a connection now and then, whatever it has heard."""
    kept = keeper_of(serve().socket)
    kept.attach()
    kernel.drop()
    monkeypatch.setattr(keeper, "LOOK", 0.01)
    looks = 0

    def connected(device: str) -> bool:
        nonlocal looks
        looks += 1
        return looks < 3

    monkeypatch.setattr(attached, "is_connected", connected)
    kept.keep()
    assert len(kernel.links) == 1


@pytest.mark.parametrize(
    ("description", "data"),
    [
        (exported.description("1.2", "lz4", "0f" * 16), "0f" * 16),
        (exported.description("1.2.dev3+g1", "zstd(level=3), x", "0f" * 16), "0f" * 16),
        ("zramd 1.2: compressed memory (lz4)", ""),
        ("zramd 1.2: compressed memory (lz4), data 0f", ""),
        ("nbd, data " + "0f" * 16, ""),
        ("zramd 1: x, data " + "0f" * 16 + "\n", ""),
        ("", ""),
    ],
)
def test_descriptions(description: str, data: str) -> None:
    assert exported.data_of(description) == data
