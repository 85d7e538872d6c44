"""zramd on emulated arm64, by kernels with pages of 4 and of 16 KiB: the core's tests, and swap."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from bench import page_sizes
from vm import arm64_image, kernel
from vm.guest import Guest, Machine

ROOT = Path(__file__).resolve().parents[2]
VM_SWAP = ROOT / "scripts" / "vm-swap"
HOUR = 3600
MIB = 1 << 20
PAGES = tuple(kernel.ARM64)
CORE = ("tests/unit/core", "tests/property", "tests/stress")
# Of the time that tests with threads and kills take elsewhere.
SCALE = "0.25"

pytestmark = pytest.mark.timeout(2 * HOUR)


@pytest.fixture(scope="module", params=PAGES)
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest with the tests in it."""
    folder = ROOT / "build" / "vm"
    booted = kernel.prepare(folder, "", kernel.ARM64[request.param])
    machine = Machine(booted, arm64_image.prepare(folder, booted), 2048 * MIB, 2, "tcg")
    with Guest(machine, tmp_path_factory.mktemp("guest")) as running:
        running.wait_for_boot()
        running.run("mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm && mount -t tmpfs tmp /tmp")
        yield running


def python(guest: Guest, *words: str, status: int = 0) -> str:
    """Run Python in the guest with the tests' wheels, and return what it prints."""
    folders = f"/zramd:/{arm64_image.SITE}:/{arm64_image.TESTS}/scripts/lib"
    environment = f"PYTHONPATH={folders} ZRAMD_BUILD=release ZRAMD_STRESS={SCALE}"
    environment += f" ZRAMD_PATIENCE={guest.machine.patience} HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis"
    command = f"cd /{arm64_image.TESTS} && {environment} python3 {' '.join(words)}"
    found, printed = guest.try_run(command, HOUR / guest.machine.patience)
    print(printed)
    assert found == status, "\n".join(guest.kernel_log()[-20:])
    return printed


def test_the_machine_is_what_it_is_taken_for(guest: Guest) -> None:
    page = guest.machine.kernel.flavour.page
    assert guest.run("uname -m; getconf PAGESIZE").split() == ["aarch64", str(page)]


@pytest.mark.parametrize("folder", CORE)
def test_core(guest: Guest, folder: str) -> None:
    printed = python(guest, "-m pytest -q --color=no -p no:cacheprovider --timeout 1800", folder)
    passed = re.search(r"(\d+) passed", printed)
    assert passed, printed
    assert int(passed[1]) > 10
    assert not guest.alarms()


def test_memory_is_what_the_preload_says(guest: Guest) -> None:
    """The figures of docs/density.md for larger pages were made here, with a preload that plays them."""
    page = guest.machine.kernel.flavour.page
    found = json.loads(python(guest, "-m bench.page_sizes --here").splitlines()[-1])
    assert payload_and_pool(found) == payload_and_pool(page_sizes.played(page))


def payload_and_pool(found: page_sizes.Steps) -> list[tuple[int, int]]:
    """Return what must not differ by a byte; the metadata has what a thread needs, which differs a little."""
    return [(payload, used) for steps in found.values() for payload, used, _ in steps.values()]


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("way", ["qemu", "local"])
def test_swap(pages: str, way: str, tmp_path: Path) -> None:
    """qemu: zramd serves here, an arm64 kernel swaps to it; local: all of it is in the guest."""
    result = vm_swap(tmp_path, "--arm64", pages, "--attach", way)
    assert result["pages_bad"] == 0
    assert result["pages_verified"] > 10_000
    assert result["swap_outs"] > 3_000
    assert result["swap_ins"] > 500
    assert result["swapoff"]["bad"] == 0


def vm_swap(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run the script at its shortest; what it found."""
    found = tmp_path / "found.json"
    ran = subprocess.run(
        [VM_SWAP, *arguments, "--short", "--json", found],
        env=dict(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    print(ran.stdout.decode())
    (result,) = json.loads(found.read_text())
    failed = [each for each in result["expectations"] if not each["met"]]
    assert (result["error"], failed, ran.returncode) == ("", [], 0)
    return dict(result)
