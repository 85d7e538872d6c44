"""What a server does for its users, without nbdkit: what it says of its data, whom it lets in, what fails."""

import errno
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from zramd.contract import rundir
from zramd.contract.rundir import DATA_ID, Rundir
from zramd.core.device.device import Device
from zramd.errors import ConfigError, RundirError, SaveError, ZramdError
from zramd.server.fronts.front import Front
from zramd.server.service import Service
from zramd.server.trouble import Troubles
from zramd.settings import config


def service(folder: Path, **settings: str) -> Service:
    """The service of an empty device; nothing runs beside it."""
    made = config.parse({"size": "1M", "rundir": str(folder / "run"), **settings}.items())
    device = Device(made.disksize, mem_limit=made.mem_limit)
    return Service(made, device, Rundir(made.rundir), Troubles(), Front())


def test_change(tmp_path: Path) -> None:
    changed = service(tmp_path, mem_limit="1M")
    assert changed.change("mem_limit", "10000") == 12288
    assert changed.device.mem_limit == changed.config.mem_limit == 12288
    assert changed.change("compaction_threshold", "10%") == 10
    assert changed.settings()["compaction_threshold"] == 10
    with pytest.raises(ConfigError, match="compaction: 'x' is neither on nor off: use one of them"):
        changed.change("compaction", "x")
    with pytest.raises(ConfigError, match="disksize cannot be changed while the device is served: clients"):
        changed.change("disksize", "2M")
    assert changed.config.disksize == 1 << 20


class TestDataId:
    """Who connects again goes by it: it never names other data than the device holds."""

    @pytest.fixture
    def served(self, tmp_path: Path) -> Service:
        made = service(tmp_path)
        made.publish_data_id()
        made.device.write(b"data", 0)
        return made

    def published(self, served: Service) -> str | None:
        try:
            return Path(served.config.rundir, DATA_ID).read_text().strip()
        except FileNotFoundError:
            return None

    @pytest.fixture
    def full(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Nothing can be written to a run folder while this list holds an error number."""
        errors: list[int] = []
        replace_file = rundir.replace_file

        def refuse(*arguments: Any) -> None:
            if errors:
                raise OSError(errors[0], os.strerror(errors[0]))
            replace_file(*arguments)

        monkeypatch.setattr(rundir, "replace_file", refuse)
        return errors

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EIO, errno.EROFS, errno.EACCES])
    def test_reset_without_room(self, served: Service, full: list[int], number: int) -> None:
        full.append(number)
        assert served.reset()
        assert self.published(served) is None
        assert served.health()["status"] == "degraded"
        assert served.health()["causes"][0].startswith("data_id is not written: ")
        served.undone.do()
        assert self.published(served) is None
        full.clear()
        served.undone.do()
        assert self.published(served) == served.device.data_id
        assert served.health()["status"] == "ok"

    def test_nothing_is_dropped_under_an_old_name(
        self, served: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(name: str) -> None:
            raise RundirError(f"'{name}' cannot be removed")

        monkeypatch.setattr(served._rundir, "withdraw", refuse)
        with pytest.raises(RundirError):
            served.reset()
        assert self.published(served) == served.device.data_id
        assert served.device.counters()["pages_stored"] == 1

    @pytest.mark.parametrize("sound", [True, False])
    def test_load_without_room(self, served: Service, full: list[int], sound: bool) -> None:
        """Clients are served again after it, and the name comes when there is room."""
        with tempfile.TemporaryFile() as file:
            served.save(file.fileno(), live=False)
            assert served.reset()
            stream = file.seek(0) or file.read()
        full.append(errno.ENOSPC)
        reader, writer = os.pipe()
        os.write(writer, stream if sound else stream[:-1])
        os.close(writer)
        if sound:
            assert served.load(reader, b"", -1)["blocks"] == 1
        else:
            with pytest.raises(SaveError):
                served.load(reader, b"", -1)
        os.close(reader)
        assert self.published(served) is None
        served.client_opened()
        served.client_closed()
        full.clear()
        served.undone.do()
        assert self.published(served) == served.device.data_id

    def test_clients_come_until_a_load_has_begun(self, served: Service) -> None:
        assert served.reset()
        reader, writer = os.pipe()
        failures: list[ZramdError] = []

        def load() -> None:
            try:
                served.load(reader, b"", -1)
            except ZramdError as error:
                failures.append(error)

        loading = threading.Thread(target=load, daemon=True)
        loading.start()
        loading.join(0.1)
        served.client_opened()
        os.close(writer)
        loading.join(30)
        os.close(reader)
        assert str(failures[0]) == "the device is in use: disconnect every client before a load"
