"""The metrics for others: readable whatever the umask, replaced whole, never over somebody else's."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.numbers import FakeDevice

from zramd.errors import RundirError
from zramd.server.metricsfile import MetricsFile
from zramd.stats import prometheus, snapshots


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def text_of(name: str) -> str:
    snapshot = snapshots.take(FakeDevice(), name=name, comp_algorithm="lz4", version="0", started=0.0)
    return prometheus.exposition(snapshot, [])


def test_life(tmp_path: Path) -> None:
    path = tmp_path / "zram0.prom"
    file = MetricsFile(str(path), "zram0")
    file.make()
    assert path.read_text() == ""
    text = text_of("zram0")
    file.publish(text)
    with path.open() as old:
        file.publish("new\n")
        assert old.read() == text  # a reader keeps what it has opened
    assert path.read_text() == "new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["zram0.prom"]
    file.remove()
    file.remove()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "zram0.prom"
    path.write_text(text_of("zram0"))
    (tmp_path / "zram0.prom.new").write_text("half")
    MetricsFile(str(path), "zram0").make()
    assert path.read_text() == ""
    assert os.listdir(tmp_path) == ["zram0.prom"]


def test_looking_writes_nothing(tmp_path: Path) -> None:
    """A server that may take over looks while the old one still writes."""
    path = tmp_path / "zram0.prom"
    MetricsFile(str(path), "zram0")
    assert os.listdir(tmp_path) == []
    path.write_text(before := text_of("zram0"))
    MetricsFile(str(path), "zram0")
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["zram0.prom"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("node_x 1\n", "it holds something else: give a file of its own"),
        (text_of("zram1"), "it holds another device's metrics: give each device a file of its own"),
        (text_of("zram00"), "it holds another device's metrics: give each device a file of its own"),
    ],
)
def test_what_is_not_ours_stays(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "zram0.prom"
    path.write_text(content)
    with pytest.raises(RundirError) as caught:
        MetricsFile(str(path), "zram0")
    assert str(caught.value) == f"metrics_file '{path}' cannot be written: {why}"
    assert path.read_text() == content


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("keep")
    (tmp_path / "zram0.prom.new").symlink_to(tmp_path / "target")
    MetricsFile(str(tmp_path / "zram0.prom"), "zram0").publish("x\n")
    assert (tmp_path / "target").read_text() == "keep"


def test_what_is_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "zram0.prom")
    MetricsFile(str(tmp_path / "zram0.prom"), "zram0").publish("x\n")
    assert (tmp_path / "zram0.prom").read_text() == "x\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_of_the_collectors(tmp_path: Path) -> None:
    """It may belong to whom node_exporter runs as; but he leads us nowhere else."""
    folder = tmp_path / "node-exporter"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    file = MetricsFile(str(folder / "zram0.prom"), "zram0")
    file.publish("x\n")
    assert (folder / "zram0.prom").stat().st_uid == 0
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "secret")
    os.chown(folder, 65534, 65534, follow_symlinks=False)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/zram0.prom").write_text("keep")
    with pytest.raises(RundirError, match=r"is a link that user .* has made: give a path without it"):
        file.publish("y\n")
    file.remove()
    assert (tmp_path / "secret/zram0.prom").read_text() == "keep"


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("missing/x.prom", "no such file or directory"),
        ("", "is a directory"),
        ("file/x.prom", "not a directory"),
    ],
)
def test_places_that_cannot_be(tmp_path: Path, place: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RundirError) as caught:
        MetricsFile(f"{tmp_path}/{place}".rstrip("/"), "zram0")
    remedy = "use a folder that is there and open to this user"
    assert str(caught.value).endswith(f"cannot be written: {why}: {remedy}")
