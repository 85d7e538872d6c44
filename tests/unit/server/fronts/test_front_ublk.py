"""The front for this machine's kernel: which device it serves, and when it lets go of it."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.run import run_in_fake_kernel

from zramd.contract.rundir import Rundir
from zramd.core.device.device import Device
from zramd.errors import DeviceError, UblkError
from zramd.kernel import protection, swap
from zramd.server.fronts import ublk as module
from zramd.server.fronts.ublk import Ublk
from zramd.server.service import Service
from zramd.server.trouble import Troubles
from zramd.settings import config
from zramd.stats.numbers import UBLK


class FakeQueues:
    """Queues that serve what they are given, until the test has the kernel stop it."""

    made: list["FakeQueues"]

    def __init__(
        self, device: Device, queues: int, depth: int, max_io_bytes: int, urgent: int = 0, pool_full: int = 0
    ) -> None:
        self.device = device
        self.geometry = queues, depth, max_io_bytes
        self.urgent = urgent
        self.pool_full = pool_full
        self.serving = self.closed = False
        self.refusal: Exception | None = None
        self.made.append(self)

    def use(self, device: Device) -> None:
        self.device = device

    def serve(self, fd: int) -> None:
        if self.refusal:
            raise self.refusal
        self.serving = True

    def join(self, timeout: float | None = None) -> bool:
        return not self.serving

    def close(self) -> None:
        self.closed = True

    def stats(self) -> dict[str, int]:
        return dict.fromkeys((*UBLK, "one more"), 7)


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeQueues]:
    FakeQueues.made = []
    monkeypatch.setattr(module, "Queues", FakeQueues)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    return FakeQueues.made


def front(folder: Path, **settings: str) -> Ublk:
    """The front of an empty device."""
    pairs = {"size": "1M", "rundir": str(folder / "run"), "front": "ublk", **settings}
    parsed = config.parse(pairs.items())
    device = Device(parsed.disksize)
    found = Ublk(lambda: None)
    found.take(parsed, device)
    found.begin(Service(parsed, device, Rundir(parsed.rundir), Troubles(), found))
    return found


def wanted(number: int = 3, queues: int = 2, **rest: Any) -> dict[str, Any]:
    return {
        "number": number,
        "queues": queues,
        "depth": 128,
        "max_io_bytes": 65536,
        "recovers": False,
        **rest,
    }


def test_a_device_is_a_client_until_it_is_detached(tmp_path: Path, made: list[FakeQueues]) -> None:
    one = front(tmp_path, state="/dev/shm/none")
    assert one.health()["ublk"] == wanted(recovers=False) | {"number": None, "serving": False}
    one.attach(7, wanted(recovers=True))
    shown = one._service.health()
    assert shown["ublk"] == wanted(recovers=True) | {"serving": True}
    assert (shown["front"], shown["clients"], len(made)) == ("ublk", 1, 1)
    assert not one._service.reset()
    with pytest.raises(DeviceError, match="/dev/ublkb3 is attached already: detach it first"):
        one.attach(8, wanted(4))
    with pytest.raises(DeviceError, match="/dev/ublkb4 is not attached: it is /dev/ublkb3"):
        one.detach(4)
    with pytest.raises(DeviceError, match="the kernel has not stopped /dev/ublkb3: 'zramd detach'"):
        one.detach(3)
    made[0].serving = False
    one.detach(3)
    one.detach(3)
    assert one._service.clients == 0
    assert one.health()["ublk"]["number"] is None
    assert one._service.reset()


def test_a_device_that_the_kernel_has_ended_is_let_go(
    tmp_path: Path, made: list[FakeQueues], capfd: pytest.CaptureFixture[str]
) -> None:
    one = front(tmp_path)
    (watch,) = one.chores()
    one.attach(7, wanted())
    watch.work()
    assert one._service.clients == 1
    made[0].serving = False
    watch.work()
    watch.work()
    assert one._service.clients == 0
    assert capfd.readouterr().err == "zramd: the kernel has ended /dev/ublkb3\n"
    one.attach(7, wanted(5))
    assert one.health()["ublk"]["number"] == 5


def test_another_one_may_come_when_the_first_has_ended_unseen(tmp_path: Path, made: list[FakeQueues]) -> None:
    one = front(tmp_path)
    one.attach(7, wanted())
    made[0].serving = False
    one.attach(7, wanted(5))
    assert (one._service.clients, one.health()["ublk"]["number"]) == (1, 5)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            UblkError("the descriptor is not /dev/ublkcN's", errno.ENODEV),
            "the descriptor is not /dev/ublkcN's",
        ),
        (MemoryError(), "no memory: .*"),
        (ValueError("requests of 5 bytes"), "requests of 5 bytes"),
    ],
)
def test_one_that_is_refused_is_no_client(
    tmp_path: Path, made: list[FakeQueues], error: Exception, why: str
) -> None:
    one = front(tmp_path)
    made[0].refusal = error
    with pytest.raises(DeviceError, match=f"^/dev/ublkb3 is not served: {why}$"):
        one.attach(7, wanted())
    assert one._service.clients == 0
    made[0].refusal = None
    one.attach(7, wanted())
    assert one._service.clients == 1


def test_only_a_state_lets_a_device_wait_for_another_server(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="without state= no other has its data"):
        front(tmp_path).attach(7, wanted(recovers=True))


def test_none_comes_while_the_device_is_loaded(tmp_path: Path, made: list[FakeQueues]) -> None:
    one = front(tmp_path)
    one._service._loading = True
    with pytest.raises(DeviceError, match="is being loaded"):
        one.attach(7, wanted())
    assert not made[0].serving


def test_queues_are_made_as_the_device_has_them(tmp_path: Path, made: list[FakeQueues]) -> None:
    one = front(tmp_path, swap="local", pool_full="eio")
    one.attach(7, wanted(queues=1))
    assert [queues.geometry for queues in made] == [(2, 128, 65536), (1, 128, 65536)]
    assert made[0].closed
    assert {(each.urgent, each.pool_full) for each in made} == {(protection.SERVE, errno.EIO)}
    assert (FakeQueues.made[1].device, one.health()["ublk"]["queues"]) == (one._service.device, 1)


def test_one_that_takes_over_has_all_it_takes_before(tmp_path: Path, made: list[FakeQueues]) -> None:
    parsed = config.parse({"size": "1M", "rundir": str(tmp_path / "run"), "front": "ublk"}.items())
    one, device = Ublk(lambda: None), Device(1 << 20)
    one.prepare(parsed)
    assert [queues.geometry for queues in made] == [(2, 128, 65536)]
    one.take(parsed, device)
    assert [(queues.device, queues.closed) for queues in made] == [(device, False)]


def test_swap_on_its_device_keeps_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = front(tmp_path)
    monkeypatch.setattr(swap, "swaps", lambda: [swap.Swap("/dev/ublkb3", 1 << 20, 0, 5)])
    assert one.swap_devices() == []
    one.attach(7, wanted())
    assert one.swap_devices() == ["/dev/ublkb3"]


def test_its_numbers_are_shown(tmp_path: Path) -> None:
    values = front(tmp_path)._service.snapshot().values
    assert {name: values[name] for name in UBLK} == dict.fromkeys(UBLK, 7)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_a_kernel_is_served_by_it(tmp_path: Path, ublk_shim: Path) -> None:
    """With the core's queues, and a kernel inside of the process."""
    assert run_in_fake_kernel(ublk_shim, "ublkfront.py", tmp_path, timeout=60) == ""
