"""When blocks become cold, how many, and when not: rules that know no clock."""

import errno
from pathlib import Path

import pytest

from zramd.server import tierpolicy
from zramd.server.tierpolicy import Policy, View
from zramd.settings import config


def settings(**given: str) -> config.Config:
    return config.parse(({"disksize": "64M", "rundir": "/tmp/zramd-test"} | given).items())


class TestMemory:
    @pytest.mark.parametrize(
        ("some", "short"), [("0.00", False), ("9.99", False), ("10.00", True), ("87.20", True)]
    )
    def test_psi(self, tmp_path: Path, some: str, short: bool) -> None:
        psi = tmp_path / "memory"
        psi.write_text(
            f"some avg10={some} avg60=50.00 avg300=50.00 total=1\n"
            "full avg10=50.00 avg60=0.00 avg300=0.00 total=1\n"
        )
        assert tierpolicy.memory_is_short(str(psi)) is short

    @pytest.mark.parametrize(("available", "short"), [(100, False), (99, True)])
    @pytest.mark.parametrize("psi", [None, "", "some total=1\n"])
    def test_without_psi(self, tmp_path: Path, psi: str | None, available: int, short: bool) -> None:
        if psi is not None:
            (tmp_path / "memory").write_text(psi)
        (tmp_path / "meminfo").write_text(f"MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")
        assert tierpolicy.memory_is_short(str(tmp_path / "memory"), str(tmp_path / "meminfo")) is short

    def test_unknown(self, tmp_path: Path) -> None:
        assert not tierpolicy.memory_is_short(str(tmp_path / "none"), str(tmp_path / "none"))


class TestModes:
    def test_near_the_limit(self) -> None:
        """From 80 % of mem_limit on, until it is below 70 %."""
        policy = Policy(settings())
        modes = []
        for used in (799, 800, 750, 700, 699, 750, 799, 800):
            policy.look(0, View(used, 1000, 0, False))
            modes.append(policy.mode)
        assert modes == ["calm", "wanted", "wanted", "wanted", "calm", "calm", "calm", "wanted"]

    def test_no_limit(self) -> None:
        policy = Policy(settings())
        policy.look(0, View(1 << 30, 0, 0, False))
        assert policy.mode == "calm"

    def test_short_of_memory(self) -> None:
        policy = Policy(settings())
        assert policy.look(100, View(0, 0, 0, True))
        assert policy.mode == "wanted"
        policy.look(100 + tierpolicy.HOLD - 1, View(0, 0, 0, False))
        assert policy.mode == "wanted"
        assert policy.look(100 + tierpolicy.HOLD, View(0, 0, 0, False))
        assert policy.mode == "calm"

    def test_refused_writes(self) -> None:
        """Only those that come while it looks: what was refused before it began is long over."""
        policy = Policy(settings())
        policy.look(0, View(0, 1000, 5, False))
        assert policy.mode == "calm"
        policy.look(1, View(1000, 1000, 6, False))
        assert policy.mode == "full"
        policy.look(1 + tierpolicy.HOLD, View(1000, 1000, 6, False))
        assert policy.mode == "wanted"

    def test_what_is_cold(self) -> None:
        policy = Policy(settings(cold_age="1h"))
        assert (policy.cold_age, policy.share) == (3600, 0.05)
        policy.look(0, View(800, 1000, 0, False))
        assert (policy.cold_age, policy.share) == (30, 0.25)
        policy.look(1, View(800, 1000, 1, False))
        assert (policy.cold_age, policy.share, policy.age) == (0, 0.25, 1)
        young = Policy(settings(cold_age="10"))
        young.look(0, View(800, 1000, 0, False))
        assert young.cold_age == 10


class TestPasses:
    @pytest.mark.parametrize(("gained", "backs_off"), [(0, True), (999, True), (1000, False)])
    def test_what_is_worth_it(self, gained: int, backs_off: bool) -> None:
        policy = Policy(settings())
        policy.pass_ended(0, 100_000, gained)
        assert policy.backs_off is backs_off

    def test_one_that_finds_room(self) -> None:
        policy = Policy(settings())
        for _ in range(tierpolicy.REFUSALS - 1):
            policy.stepped(0, 0, errno.ENOSPC)
        policy.stepped(0, 1, 0)
        policy.stepped(0, 0, errno.ENOSPC)
        assert not policy.is_paused(0)

    def test_not_where_it_gains_nothing(self) -> None:
        """What zstd compresses when it is written is as slow to read."""
        made = settings()._replace(comp_algorithm="zstd(level=3)")
        assert not Policy(made).promotes
        assert Policy(settings()).promotes
