"""Names of exports: of a device, and of the data that it holds."""

import pytest

from zramd.contract import exported

DATA, OTHER = "0123456789abcdef" * 2, "f" * 32


@pytest.mark.parametrize("wanted", ["", "zram0", f"zram0@{DATA}"])
def test_what_a_device_is(wanted: str) -> None:
    assert exported.refusal(wanted, "zram0", DATA) == ""


@pytest.mark.parametrize("wanted", [f"zram0@{OTHER}", "zram0@", f"zram0@{DATA} ", f"zram0@{DATA}@{DATA}"])
def test_other_data_is_refused(wanted: str) -> None:
    says = f"export '{wanted}' is no more: 'zram0' holds other data now, 'zram0@{DATA}'"
    assert exported.refusal(wanted, "zram0", DATA) == says


@pytest.mark.parametrize("wanted", ["zram1", f"zram1@{DATA}", f"@{DATA}", DATA, "zram0/", "ZRAM0"])
def test_another_device_is_refused(wanted: str) -> None:
    says = f"export '{wanted}' does not exist: use 'zram0'"
    assert exported.refusal(wanted, "zram0", DATA) == says
