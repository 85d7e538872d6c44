"""State files that are refused, and stay as they are: foreign, damaged, planted, contradicting themselves."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from support.content import compressible, noise
from support.pages import whole_pages
from support.run import SCALE
from test_state import BLOCK, SIZE, fill, open_device, read

from zramd import Device
from zramd.core.device.device import state_layout
from zramd.errors import CorruptionError, CorruptObjectError, StateError
from zramd.server import statefile


def header(path: Path) -> bytearray:
    return (
        bytearray(path.read_bytes()[: statefile._HEADER.size])
        if path.stat().st_size < 1 << 20
        else _head(path)
    )


def _head(path: Path) -> bytearray:
    with path.open("rb") as file:
        return bytearray(file.read(statefile._HEADER.size))


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def with_field(path: Path, name: str, value: int) -> None:
    """Change a field of the header, checksum and all."""
    head = _head(path)
    at = 24 + 8 * statefile._FIELDS.index(name) if name != "version" else 16
    head[at : at + 8] = struct.pack("<Q", value)
    head[-8:] = struct.pack("<Q", zlib.crc32(head[:-8]))
    patch(path, 0, head)


def fingerprint(path: Path) -> tuple[int, int, int]:
    """Of all that is in the file, holes skipped."""
    fd = os.open(path, os.O_RDONLY)
    crc = at = 0
    try:
        while True:
            at = os.lseek(fd, at, os.SEEK_DATA)
            stop = os.lseek(fd, at, os.SEEK_HOLE)
            crc = zlib.crc32(os.pread(fd, stop - at, at), zlib.crc32(b"%d" % at, crc))
            at = stop
    except OSError:
        pass
    os.close(fd)
    return path.stat().st_size, path.stat().st_blocks, crc


@pytest.fixture
def old(memory_folder: Path) -> Path:
    """A state that a server left behind."""
    path = memory_folder / "state"
    fill(open_device(path))
    return path


def refused(path: Path, match: str, size: int = SIZE, verify: bool = False) -> None:
    before = fingerprint(path)
    with pytest.raises((StateError, CorruptionError), match=match) as caught:
        open_device(path, size, verify=verify)
    assert "\n" not in str(caught.value)
    assert fingerprint(path) == before


def test_refuses_another_size(old: Path) -> None:
    refused(old, r"of a device of 8388608 bytes, not 16777216: use disksize=8388608, or remove", 16 << 20)


def test_refuses_another_verify(old: Path) -> None:
    refused(old, r"made with verify=off: use verify=off", verify=True)


def test_refuses_another_version(old: Path) -> None:
    with_field(old, "version", 4)
    refused(old, r"has format 4, this zramd knows 1 to 3: use the zramd that made it")


@pytest.mark.parametrize("name", ["slots", "cells", "spans", "span_size", "size_classes", "bytes"])
def test_refuses_another_layout(old: Path, name: str) -> None:
    with_field(old, name, 12345)
    refused(old, rf"has another layout \({name} is 12345")


def test_refuses_a_damaged_header(old: Path) -> None:
    patch(old, 30, b"\xff")
    refused(old, "damaged header")


@pytest.mark.parametrize("change", [-BLOCK, BLOCK, -1])
def test_refuses_another_length(old: Path, change: int) -> None:
    os.truncate(old, old.stat().st_size + change)
    refused(old, "was cut off: it has" if change < 0 else "was added to: it has")


def test_refuses_what_is_no_state(memory_folder: Path) -> None:
    path = memory_folder / "notes"
    path.write_text("precious")
    refused(path, "is not a state of zramd")
    assert path.read_text() == "precious"
    path.write_bytes(statefile.MAGIC)
    refused(path, "cut off in its header")


def test_refuses_a_second_server(memory_folder: Path) -> None:
    path = memory_folder / "state"
    device = open_device(path)
    with pytest.raises(StateError, match="in use by a running server: stop that first"):
        open_device(path)
    device.write(b"x", 0)
    del device
    open_device(path)


def test_the_lock_goes_with_the_server_and_stays_over_a_fork(memory_folder: Path) -> None:
    path = memory_folder / "state"
    code = (
        "import os, sys, time; from zramd import Device; from zramd.server import statefile\n"
        f"fd = statefile.open_state({str(path)!r}, {SIZE}, False)\n"
        f"device = Device({SIZE}, state=fd)\n"
        "if os.fork(): os._exit(0)\n"  # as nbdkit does when it becomes a daemon
        "device.write(b'by the child', 0)\n"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.wait()
        with pytest.raises(StateError, match="in use"):
            open_device(path)
        os.kill(pid, 9)
        process.stdout.read()  # ends when it is gone
    device = open_device(path)
    assert read(device, 0, 12) == b"by the child"


def test_refuses_what_is_not_on_a_tmpfs() -> None:
    with pytest.raises(StateError, match=r"not on a tmpfs: use a path such as /dev/shm/NAME"):
        open_device(Path("/proc/self/oom_score_adj"))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_refuses_what_another_user_has_made(memory_folder: Path, mode: int) -> None:
    """He would read all data, or cut the file off below us."""
    path = memory_folder / "state"
    path.touch()
    path.chmod(mode)
    os.chown(path, 65534, 65534)
    before = path.stat()
    for call in (statefile.open_state, statefile.look):
        with pytest.raises(StateError, match=f"'{path}' belongs to user .*: use another path"):
            call(str(path), SIZE, False)
    assert path.stat() == before


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_refuses_what_other_users_may_write_to(old: Path, mode: int) -> None:
    os.chown(old, -1, 65534) if os.geteuid() == 0 else None
    old.chmod(mode)
    refused(old, f"other users may write to '{old}'")
    old.chmod(0o644)  # a copy that was put back
    open_device(old)
    assert old.stat().st_mode & 0o777 == 0o600
    os.link(old, old.with_name("second"))
    refused(old, "another name elsewhere, a hard link")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("there", [True, False])
def test_refuses_a_planted_link(memory_folder: Path, there: bool) -> None:
    path, target = memory_folder / "state", memory_folder / "target"
    path.symlink_to(target)
    os.chown(path, 65534, 65534, follow_symlinks=False)
    if there:
        fill(open_device(target))
    with pytest.raises(StateError, match=f"'{path}' is a link that user .* has made"):
        open_device(path)
    assert target.exists() is there


def test_refuses_what_cannot_be_opened(memory_folder: Path) -> None:
    with pytest.raises(StateError, match="no such file or directory: make its folder"):
        open_device(memory_folder / "a" / "b")
    with pytest.raises(StateError, match="is a directory"):
        open_device(memory_folder)


def test_refuses_without_permission(memory_folder: Path) -> None:
    if os.geteuid() == 0:
        code = (
            "import os, sys; from zramd.server import statefile\n"
            "os.setgid(65534); os.setuid(65534)\n"
            "try: statefile.open_state(sys.argv[1], 8 << 20, False)\n"
            "except Exception as error: print(error)"
        )
        memory_folder.chmod(0o755)
        path = memory_folder / "state"
        open_device(path)
        shown = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True).stdout
    else:
        path = memory_folder / "state"
        path.touch(0o000)
        with pytest.raises(StateError) as caught:
            open_device(path)
        shown = str(caught.value)
    assert "permission denied: run zramd as the user who owns it" in shown


def test_an_empty_file_is_a_new_state(memory_folder: Path) -> None:
    path = memory_folder / "state"
    path.touch()
    device = open_device(path)
    device.write(b"x", 0)
    del device
    assert read(open_device(path), 0, 1) == b"x"


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=int(100 * max(SCALE, 1)),
    deadline=None,
)
@given(data=st.data())
def test_no_header_but_the_right_one_is_accepted(old: Path, data: st.DataObject) -> None:
    good = bytes(_head(old))
    kind = data.draw(st.sampled_from(["random", "flips", "cut"]))
    if kind == "random":
        bad = data.draw(st.binary(min_size=1, max_size=200))
    elif kind == "flips":
        changed = bytearray(good)
        for bit in data.draw(st.sets(st.integers(0, len(good) * 8 - 1), min_size=1, max_size=8)):
            changed[bit // 8] ^= 1 << bit % 8
        bad = bytes(changed)
    else:
        bad = good[: data.draw(st.integers(0, len(good) - 1))] + bytes(8)
    patch(old, 0, bad)
    same = bytes(_head(old)) == good
    try:
        fd = statefile.open_state(str(old), SIZE, False)
    except StateError:
        assert not same
    else:
        os.close(fd)
        assert same
    patch(old, 0, good + bytes(200))


# Contradictions in the rest.


def offsets(size: int = SIZE) -> dict[str, int]:
    """Where the regions of a state begin."""
    layout = state_layout(size)
    at = {"slots": 1 << 16}
    at["classes"] = at["slots"] + whole_pages(8 * layout["slots"])
    at["cells"] = at["classes"] + whole_pages(layout["spans"])
    at["arena"] = at["cells"] + whole_pages(8 * layout["cells"])
    assert at["arena"] + layout["spans"] * layout["span_size"] == layout["bytes"]
    return at


def word(path: Path, at: int, value: int | None = None) -> int:
    with path.open("r+b") as file:
        file.seek(at)
        (found,) = struct.unpack("<Q", file.read(8))
        if value is not None:
            file.seek(at)
            file.write(struct.pack("<Q", value))
    return int(found)


@pytest.fixture
def two(memory_folder: Path) -> tuple[Path, int, int]:
    """A state whose blocks 0 and 1 are objects, and their handles."""
    path = memory_folder / "state"
    device = open_device(path)
    device.write(compressible(1) + compressible(2) + noise(3), 0)
    del device
    slots = offsets()["slots"]
    return path, word(path, slots) >> 16, word(path, slots + 8) >> 16


def test_refuses_contradictions(two: tuple[Path, int, int]) -> None:
    path, first, second = two
    at = offsets()
    slot, other = word(path, at["slots"]), word(path, at["slots"] + 8)
    cell = word(path, at["cells"] + 8 * first)
    span = cell >> 15

    def wrong(where: int, value: int, match: str) -> None:
        kept = word(path, where, value)
        refused(path, match)
        word(path, where, kept)

    wrong(at["slots"], 1 << 46 | 700, "block 0: its slot holds no handle")
    wrong(at["slots"], 700, "block 0: its slot holds no handle")
    wrong(at["slots"], other, "block 1: its slot holds the handle of another block")
    wrong(at["slots"], slot & ~0xFFFF, "block 0: its object is larger")
    wrong(at["slots"], slot & ~0xFFFF | 4000, "block 0: its object is larger")
    wrong(at["cells"] + 8 * first, cell & ~2, "block 0: its cell leads to no object")
    wrong(at["cells"] + 8 * first, cell | 1 << 40, "block 0: its cell leads to no object")
    wrong(at["cells"] + 8 * first, cell + 8, "block 0: its object is not where")
    wrong(
        at["cells"] + 8 * first,
        word(path, at["cells"] + 8 * second),
        "block 1: its object is that of another",
    )
    classes = word(path, at["classes"] + span // 8 * 8)
    wrong(
        at["classes"] + span // 8 * 8,
        0,
        "block 0: its cell leads to no object|block 0: .* without a size class",
    )
    wrong(
        at["classes"] + span // 8 * 8,
        classes | 0xFF << span % 8 * 8,
        "block .*without a size class|larger|not where",
    )
    assert read(open_device(path), 0, 3 * BLOCK) == compressible(1) + compressible(2) + noise(3)


def test_flips_of_every_bit_of_a_header_are_mended_with_verify(memory_folder: Path) -> None:
    path = memory_folder / "state"
    open_device(path, verify=True).write(compressible(1), 0)
    at = offsets()
    handle = word(path, at["slots"]) >> 16 & 0xFFFFFFFF
    where = at["arena"] + (word(path, at["cells"] + 8 * handle) & 0xFFFFFFFFFFF8)
    for bit in range(32):
        word(path, where, word(path, where) ^ 1 << bit)
        device = open_device(path, verify=True)
        device.check()
        assert read(device, 0, BLOCK) == compressible(1)
        del device


@pytest.mark.parametrize("kind", ["object", "raw", "word", "zero"])
def test_a_flip_of_any_bit_is_found(memory_folder: Path, kind: str) -> None:
    """Of the slot, the cell and what they lead to, in a device in use: an error that names the block."""
    path = memory_folder / "state"
    device = open_device(path, verify=True)
    data = {
        "object": compressible(7, 100),
        "raw": noise(7),
        "word": b"\x01\x02\x03\x04\x05\x06\x07\x08" * 512,
        "zero": bytes(BLOCK),
    }[kind]
    device.write(data, 5 * BLOCK)
    at = offsets()
    slot = word(path, at["slots"] + 40)
    handle = slot >> 16 & 0xFFFFFFFF
    places = [at["slots"] + 40]
    if kind != "zero":
        places.append(at["cells"] + 8 * handle)
    if kind in ("object", "raw"):
        start = at["arena"] + (word(path, at["cells"] + 8 * handle) & 0xFFFFFFFFFFF8)
        places += (
            range(start, start + (slot & 0x1FFF) - 8, 8)
            if kind == "object"
            else range(start, start + BLOCK, 128)
        )
    errors = 0
    for place in places:
        for bit in range(64):
            if place == places[-1] == at["cells"] + 8 * handle and kind in ("object", "raw") and bit == 0:
                continue
            if kind in ("object", "raw") and place == at["cells"] + 8 * handle and bit == 0:
                continue  # the pin: readers would wait for its holder
            kept = word(path, place)
            word(path, place, kept ^ 1 << bit)
            buf = bytearray(BLOCK)
            error = None
            try:
                device.read(buf, 5 * BLOCK)
            except CorruptObjectError as caught:
                error = str(caught)
            if error is None:
                assert buf == data
            else:
                errors += 1
                assert "block 5" in error
                assert device.corrupt_block == 5
            word(path, place, kept)
    assert errors > 60 * len(places) // 2
    assert device.counters()["checksum_errors"] == errors
    assert read(device, 5 * BLOCK, BLOCK) == data
    device.check()


@pytest.mark.parametrize("change", [-BLOCK, BLOCK])
def test_a_file_of_another_size_is_no_state(change: int) -> None:
    fd = os.memfd_create("zramd")
    os.ftruncate(fd, state_layout(SIZE)["bytes"] + change)
    with pytest.raises(ValueError, match="is not one of"):
        Device(SIZE, state=fd)
    os.close(fd)


def test_a_header_is_written_whole_however_little_is_taken_at_a_time(
    memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(len(data) // 2, 1)], at))
    path = memory_folder / "state"
    open_device(path).write(compressible(1), 0)
    assert read(open_device(path), 0, BLOCK) == compressible(1)
