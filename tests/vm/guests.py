"""The small guest in which most of these tests run. Who imports this has the folder of `vm` in sys.path."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vm import image, kernel
from vm.guest import Guest, Machine, choose_accel

import zramd

FOLDER = Path(__file__).resolve().parents[2] / "build/vm"
MIB = 1 << 20


@contextmanager
def small_guest(suite: str, parameters: str = "") -> Iterator[Guest]:
    """A guest that has booted with the kernel of a suite, and has nothing to say against it in the end.

    parameters: further ones of the kernel.
    """
    cloud = kernel.prepare(FOLDER, suite)
    images = image.prepare(FOLDER, cloud, Path(zramd.__file__).parent.parent)
    machine = Machine(cloud, images, 384 * MIB, 2, "tcg")
    with tempfile.TemporaryDirectory(prefix="zramd-vm-") as name:
        machine = replace(machine, accel=choose_accel(machine, Path(name)), parameters=parameters)
        with Guest(machine, Path(name)) as guest:
            guest.wait_for_boot()
            yield guest
            assert guest.alarms() == []
