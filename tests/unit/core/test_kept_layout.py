"""What states and saved devices of earlier versions hold: numbers that must never change by themselves."""

import zlib

import pytest
from support.pages import PAGE

from zramd.core.device.device import MAX_DISKSIZE, state_layout
from zramd.core.pool.size_classes import CLASSES, layout_sum, size_classes
from zramd.settings import values


def test_the_size_classes_are_those_of_every_state() -> None:
    """A state is refused where this sum differs: also where only the text of the same classes does."""
    assert layout_sum(1) == 409590948
    assert zlib.crc32(repr(size_classes(1)).encode()) == 409590948
    assert {type(row) for row in CLASSES} == {tuple}


@pytest.mark.parametrize(("unit", "expected"), [(4, 1761746685), (16, 3487131264)])
def test_kernels_with_larger_pages_have_classes_of_their_own(unit: int, expected: int) -> None:
    assert layout_sum(unit) == expected


def test_a_state_is_laid_out_as_ever() -> None:
    layout = state_layout(1 << 30)
    del layout["size_classes"]  # (they depend on this kernel's pages)
    assert layout == {
        "disksize": 1 << 30,
        "slots": 262144,
        "cells": 393217,
        "spans": 393216,
        "span_size": 65536,
        # Each table has whole pages.
        "bytes": {4096: 25775509504, 16384: 25775521792, 65536: 25775570944}[PAGE],
    }


def test_settings_and_core_agree_on_the_largest_device() -> None:
    """The settings are read where the core is not loaded: both have the number."""
    assert values.MAX_DISKSIZE == MAX_DISKSIZE
