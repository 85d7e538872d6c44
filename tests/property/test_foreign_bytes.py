"""Whatever comes from outside: it is what was meant, or one sentence says what is wrong. Never a traceback.

Beside bytes at random, right examples are changed a little: that reaches what lies behind the first look.
"""

import contextlib
import io
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from support.run import FEWER, SCALE

from zramd import Device
from zramd.commands import VERBS, main, verb_parser
from zramd.control import servers
from zramd.core.device import saving
from zramd.errors import (
    AttachError,
    ConfigError,
    DeviceError,
    SaveError,
    StateError,
    UsageError,
    ZramdError,
    printable,
)
from zramd.kernel import attached, netlink, swap
from zramd.launch import nbdkit, uris
from zramd.server import endpoint, statefile
from zramd.server.trouble import Troubles
from zramd.settings import config, devices, expression, foreign, keys

DOCS = Path(__file__).parents[2] / "docs"
RAM = 8192


def often(examples: int) -> Any:
    return settings(
        max_examples=max(int(examples * SCALE * FEWER), 1),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@st.composite
def changed(draw: st.DrawFn, *examples: bytes) -> bytes:
    """One of the examples with pieces cut out, repeated, moved, replaced by others' or by bytes at random."""
    data = draw(st.sampled_from(examples))
    tokens = sorted({token for example in examples for token in re.findall(rb"\w+|\W", example)})
    piece = st.one_of(
        st.sampled_from(tokens),
        st.sampled_from(
            [b"\0", b"\xff", b"\n", b"\r\n", b" ", b"", b"\xef\xbb\xbf", b"9" * 25, b"-1", b"\xc2\xb2"]
        ),
        st.binary(max_size=4),
    )
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(start + draw(st.integers(0, 12)), len(data))
        match draw(st.sampled_from(["cut", "replace", "repeat", "splice", "end", "flip"])):
            case "cut":
                data = data[:start] + data[end:]
            case "replace":
                data = data[:start] + draw(piece) + data[end:]
            case "repeat":
                data = data[:end] + data[start:end] * draw(st.integers(1, 3)) + data[end:]
            case "splice":
                other = draw(st.sampled_from(examples))
                data = data[:start] + other[draw(st.integers(0, len(other))) :]
            case "end":
                data = data[:end]
            case "flip":
                if start < len(data):
                    data = (
                        data[:start] + bytes([data[start] ^ 1 << draw(st.integers(0, 7))]) + data[start + 1 :]
                    )
    return data


def foreign_bytes(*examples: bytes) -> "st.SearchStrategy[bytes]":
    return st.one_of(changed(*examples), changed(*examples), changed(*examples), st.binary(max_size=200))


def foreign_text(*examples: str) -> "st.SearchStrategy[str]":
    return foreign_bytes(*(example.encode() for example in examples)).map(os.fsdecode)


def one_sentence(error: BaseException) -> None:
    """Whatever it quotes, it is one line that a terminal can show."""
    text = printable(str(error))
    assert text.strip()
    assert text.isprintable()
    text.encode()


def command(*words: str) -> tuple[int, str]:
    """Run a command in this process and return its status and what it prints, having looked at its errors."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(words))
        except SystemExit as ended:
            status = int(ended.code or 0)
        out.flush()
    for line in err.getvalue().splitlines():
        assert line.startswith("zramd"), err.getvalue()
    assert status in (0, 1, 2)
    assert bool(err.getvalue()) or status == 0
    return status, out.buffer.getvalue().decode(errors="surrogateescape")


# ---- Configuration ---------------------------------------------------------------------------------------

OWN = (
    (DOCS / "zramd.conf").read_bytes().replace(b"\n#", b"\n")[-3000:],
    b"[zram0]\nzram-size = min(ram / 2, 4096)\nzram-resident-limit = 1G\nswap-priority = 7\n"
    b"options = discard\n",
    b"[a]\ndisksize = 1G\nattach = no\nmem_limit=64M\nstate = /dev/shm/a\nrundir=/run/x\n[b]\nverify=on\n",
    b"[c]\nhost-memory-limit = none\ncompression-algorithm = lz4(level=3)\ncompaction_threshold = 2%\n"
    b"connections = 2\ntimeout = auto\nmetrics_file = /x.prom\nattach = device\n",
)
GENERATORS = (
    b"set!two = echo 2\n[zram0]\nzram-size = ram * two\ncompression-algorithm = lzo-rle "
    b"zstd(level=3) (type=idle)\n",
    b"\xef\xbb\xbf[zram0]\nhost-memory-limit: 1024\nzram-fraction = 0.25\nmax-zram-size = none\n[zram7]\n",
    b'[zram1]\nmount-point = /tmp\nfs-type = ext4\noptions = "X-mount.mode=1777"\n[foo]\na = b\n',
    b"[zram0]\nzram-size = 4G\nzram-resident-limit = 512\nwriteback-device = /dev/sda\nswap-priority = -1\n",
)
ZRAMSWAP = (
    b"# Compression algorithm\n# ALGO=lz4\nPERCENT=50\n#SIZE=256\n#PRIORITY=100\n",
    b"ALGO=zstd\nexport SIZE='2048' # MB\nPRIORITY=100\nCORES=$(nproc)\n",
    b'PERCENTAGE="50"\nALLOCATION=100\n. /etc/more\nPERCENT=\n',
    b"SIZE=40M\nPATH_DISK=/var/log\nZL2R=false\n",
    b"zram_enabled=1\nnum_devices=2\nENABLED=true\nroot:x:0:0:root:/root:/bin/sh\n",
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for /, of a machine with 8 GiB and nothing configured."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {RAM << 10} kB\n")
    monkeypatch.setenv("ZRAMD_ROOT", str(tmp_path))
    return tmp_path


@often(100)
@given(data=foreign_bytes(*OWN, *GENERATORS))
def test_configuration(machine: Path, data: bytes) -> None:
    """What `config check` finds right can be started; all else it names."""
    (machine / "etc").mkdir(exist_ok=True)
    file = machine / "etc/zramd.conf"
    file.write_bytes(data)
    status, shown = command("config", "check")
    wrong = status
    status, shown = command("config", "show", "--json")
    assert bool(status) == bool(wrong)
    if shown:
        for device in json.loads(shown)["devices"]:
            pairs = [tuple(word.split("=", 1)) for word in device["serve"]]
            assert config.parse(pairs).disksize == device["disksize"]
    if not wrong:
        command("config", "show")
        assert servers.configured().keys() == devices.load().rundirs.keys()
    for name in ("zram0", "a"):
        with contextlib.suppress(DeviceError):
            servers.look(name)


@often(250)
@given(
    data=foreign_bytes(*GENERATORS, *ZRAMSWAP, OWN[1]),
    name=st.sampled_from(["x", "zramswap", "zram-generator.conf"]),
)
def test_import(machine: Path, data: bytes, name: str) -> None:
    """What is printed is a configuration without errors, that means what the other file does."""
    file = machine / name
    file.write_bytes(data)
    status, printed = command("config", "import", str(file))
    if not printed:
        assert status == 2
        return
    translation = foreign.read([file])
    built = devices.build(translation.sections, RAM, translation.problems)
    assert status == (1 if built.problems else 0)
    (machine / "zramd.conf").write_text(printed)
    loaded = devices.load(str(machine), str(machine / "zramd.conf"))
    assert loaded.problems == ()
    assert loaded.devices == built.devices
    assert all(printable(str(each)) in printed for each in (*translation.notes, *built.problems))


EXPRESSIONS = (
    "min(ram / 2, 4096)",
    "(ram - 256M) * 0.5 ^ 2 % 7 || !ram && -1 <= 2e3",
    "max(round(64, ram), log(2, ram), floor[pi() * e()]; 8GiB)",
    "9^9^9^9",
    "1e308 - .5",
    "8 GB",
    "50%",
)


@often(1000)
@given(text=foreign_text(*EXPRESSIONS))
def test_expressions(text: str) -> None:
    try:
        assert expression.size(text, RAM) >= 0
    except ConfigError as error:
        one_sentence(error)
    with contextlib.suppress(ConfigError):
        expression.units(text)
    expression.is_number(text)


VALUES = (
    "4G",
    "0x10k",
    "017",
    "8 GB",
    "1.5G",
    "50%",
    "lz4(level=4)",
    "on",
    "12.5%",
    "0.5",
    "enospc",
    "/run/x",
    "auto",
)


@often(1000)
@given(text=foreign_text(*VALUES), setting=st.sampled_from([*config.SETTINGS, *keys.table(RAM)]))
def test_values(text: str, setting: config.Setting) -> None:
    try:
        config.value(setting, text)
    except ConfigError as error:
        one_sentence(error)


# ---- The command line ------------------------------------------------------------------------------------

WORDS = (
    "start zram0 --size 4G mem_limit=1G -- -p 10809 --tls require --tls-psk=/x -6 --filter=log",
    "serve --config zram0 rundir=/x size=1G -- -U /tmp/x -i ::1 -e a --run true -D x=1 -- y",
    "set --rundir a=b zram0 compaction=off mem_limit=1",
    "list -b -n -o +PID,NAME --raw -J --rundir /x /dev/zram0 a b",
    "attach --device /dev/nbd0 --connections 2 --timeout 0.5 --swap --rundir /x zram0",
    "debug block --rundir /x zram0 17 -J",
    "save zram0 FILE --live --force",
    "top -1 -i 0.5 zram0",
    "config show --generator zram0",
    "stop /dev/nbd0",
)


PARSERS = {verb: verb_parser(verb) for verb in VERBS}


@often(300)
@given(text=foreign_text(*WORDS))
def test_words(text: str) -> None:
    """Any words are understood or refused; nothing is run here."""
    words = text.replace("\0", "").split(" ")
    quiet = io.StringIO()
    with (
        contextlib.redirect_stderr(quiet),
        contextlib.redirect_stdout(quiet),
        contextlib.suppress(SystemExit),
    ):
        PARSERS.get(words[0], PARSERS["start"]).parse_args(words[1:])
    options = nbdkit.read_options(words)
    found = config.parse([("size", "1G"), ("name", "zram0"), ("rundir", "/run/z")])
    assert nbdkit.command(found, [], options)[0] == "nbdkit"
    uris.uri(found, options)


@often(50)
@given(
    text=foreign_text(
        *(words for words in WORDS if words.split()[0] in ("list", "debug", "set", "config", "stop"))
    )
)
def test_commands(machine: Path, text: str) -> None:
    """Those that find nothing here say so."""
    words = text.replace("\0", "").split(" ")
    if words[0] in ("list", "debug", "set", "config", "stop", "stats", "check"):
        command(*words)


# ---- The endpoint and its client -------------------------------------------------------------------------

REQUESTS = (
    b"GET /stats HTTP/1.1\r\nHost: zramd\r\n\r\n",
    b"PUT /mem_limit HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n2M",
    b"GET /block/17?x=1 HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /compact HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
    b"PUT /load HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
    b"GET /save/live HTTP/1.1\r\n\r\n",
    b"POST /sockets HTTP/1.1\r\nContent-Length: 5\r\n\r\n/x\0/y",
)


class Service:
    """A server that has nothing to tell."""

    @property
    def device(self) -> "Service":
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **more: self._answer(name, arguments)

    @staticmethod
    def _answer(name: str, arguments: tuple[Any, ...]) -> Any:
        match name:
            case "change":
                return config.value(config.find(arguments[0]), arguments[1])
            case "load":
                raise DeviceError("it is not empty")
            case "send_sockets":
                raise FileNotFoundError(2, "no such file")
            case "block" if arguments[0] > 9:
                raise ValueError("it is not there")
            case "save" | "check" | "reset_mem_used_max":
                return None
            case "compact":
                return 0
            case "reset":
                return True
        return {}


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[endpoint.Endpoint]:
    """An endpoint, whose threads' exceptions fail the test."""
    failures: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    monkeypatch.setattr(endpoint, "LINGER", 0.02)
    made = endpoint.Endpoint(str(tmp_path / "control.sock"), Service(), Troubles())  # type: ignore[arg-type]
    made.path = str(tmp_path)  # type: ignore[attr-defined]
    yield made
    made.close()
    assert not failures


@often(300)
@given(data=foreign_bytes(*REQUESTS))
def test_requests(listening: Any, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(f"{listening.path}/control.sock")
        listening.accept()
        with contextlib.suppress(OSError):  # it has seen enough
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    statuses = re.match(rb"(?:HTTP/1.1 100 Continue\r\n\r\n)?HTTP/1.1 ([0-9]{3}) ", answer)
    assert statuses, answer
    # Nothing that is sent is a fault of the server: 500 is what this Service's empty answers to GET are.
    assert statuses[1] != b"500" or data.startswith(b"GET /") or b"/compact" in data, answer


ANSWERS = (
    b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a": [1, {"name": "x"}]}',
    b"HTTP/1.1 409 Conflict\r\n\r\nit is in use\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\n\r\nno such path",
)


@often(300)
@given(data=foreign_bytes(*ANSWERS))
def test_answers(tmp_path: Path, data: bytes) -> None:
    """A server of another version, or none of ours at all."""
    path = tmp_path / "control.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(data)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            servers.Served("a", str(tmp_path), 1).ask_json("GET", "/stats")
        except (DeviceError, UsageError) as error:
            one_sentence(error)
        thread.join()


# ---- NBD and netlink -------------------------------------------------------------------------------------


def reply(kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, 7, kind, len(data)) + data


SIZE = reply(3, struct.pack(">HQH", 0, 1 << 20, 0x1ED))
BLOCKS = reply(3, struct.pack(">HIII", 3, 1, 4096, 1 << 25))
GREETING = b"NBDMAGICIHAVEOPT\0\3"
HANDSHAKES = (
    GREETING + SIZE + BLOCKS + reply(1),
    GREETING + BLOCKS + reply(3, b"\0\1zram0") + SIZE + reply(1),
    GREETING + reply(1 << 31 | 6, b"no such export"),
    GREETING + reply(1 << 31 | 5) + SIZE,
    b"NBDMAGIC\0\0\x42\2\x81\x86\x12\x53" + bytes(140),
)


@often(600)
@given(data=foreign_bytes(*HANDSHAKES))
def test_handshakes(data: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(10)
        there.sendall(data)
        there.shutdown(socket.SHUT_WR)
        try:
            export = netlink.handshake(here, "zram0")
        except (AttachError, OSError) as error:
            one_sentence(error)
        else:
            assert export.size >= netlink.BLOCK_SIZE >= export.minimum_block


def test_a_server_that_never_comes_to_the_point() -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(GREETING + SIZE * 200)
        with pytest.raises(AttachError, match="has no end"):
            netlink.handshake(here, "zram0")


def netlink_answer(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body + bytes(-len(body) % 4)


FAMILY = struct.pack("=BBH", 1, 2, 0) + b"".join(
    [
        netlink.attribute(1, struct.pack("=H", 27)),
        netlink.text(2, "nbd"),
        netlink.nested(7, netlink.nested(1, netlink.u32(2, 5), netlink.text(1, "nbd_mc_group"))),
    ]
)
ITEMS = [
    netlink.nested(1, netlink.u32(1, number), netlink.attribute(2, bytes([number & 1])))
    for number in range(3)
]
STATUS = struct.pack("=BBH", 5, 1, 0) + netlink.nested(9, *ITEMS)
LINK_DEAD = netlink_answer(27, struct.pack("=BBH", 4, 1, 0) + netlink.u32(1, 3))
DONE = netlink_answer(2, struct.pack("=i", 0) + bytes(16))
FAILED = netlink_answer(2, struct.pack("=i", -1) + bytes(16))


class Answering:
    """A netlink socket that has these answers."""

    def __init__(self, *data: bytes) -> None:
        self.data = list(data)

    def send(self, data: bytes) -> None:
        pass

    def recv(self, most: int) -> bytes:
        if not self.data:
            raise OSError(105, "that was all")
        return self.data.pop(0)


@often(600)
@given(
    data=foreign_bytes(
        netlink_answer(16, FAMILY) + DONE, netlink_answer(27, STATUS) + DONE, LINK_DEAD, FAILED
    )
)
def test_netlink(data: bytes) -> None:
    for ask in (
        lambda kernel: kernel._find_family("nbd"),
        lambda kernel: kernel.status(),
        lambda kernel: kernel.connect([0], netlink.Export(4096, 0, 1)),
        lambda kernel: kernel.disconnect(1),
    ):
        kernel = netlink.Kernel.__new__(netlink.Kernel)
        kernel._socket, kernel._sequence, kernel._family = Answering(data, DONE), 0, 27  # type: ignore[assignment]
        with contextlib.suppress(AttachError, OSError):
            ask(kernel)
    links = netlink.DeadLinks.__new__(netlink.DeadLinks)
    links._family = 27
    assert all(index >= 0 for index in links.parse(data))


# ---- Saved devices and states ----------------------------------------------------------------------------

BLOCK = 4096


def saved(*blocks: bytes, size: int = 16 * BLOCK) -> bytes:
    device = Device(size)
    for number, content in enumerate(blocks):
        if content:
            device.write(content.ljust(BLOCK, b"\1"), number * BLOCK)
    fd = os.memfd_create("saved")
    try:
        saving.save(device, fd)
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


STREAMS = (saved(), saved(b"abc", b"", b"\1", b"hello" * 100), saved(*[b"\xa5" * BLOCK] * 16))


@often(300)
@given(data=foreign_bytes(*STREAMS))
def test_save_streams(data: bytes) -> None:
    """A file is refused, and nothing of it stays; or it is one that was saved."""
    fd = os.memfd_create("stream")
    device = Device(16 * BLOCK)
    try:
        os.pwrite(fd, data, 0)
        try:
            told = saving.verify_stream(fd)
        except SaveError as error:
            one_sentence(error)
            told = None
        os.lseek(fd, 0, os.SEEK_SET)
        try:
            assert saving.load(device, fd) == told
        except SaveError as error:
            one_sentence(error)
            assert device.counters()["pages_stored"] == 0
        else:
            assert data in STREAMS
    finally:
        os.close(fd)
    device.check()


@pytest.fixture(scope="module")
def header() -> tuple[int, bytes]:
    """A state in memory, and how it begins."""
    fd = os.memfd_create("state")
    made = statefile.open_state(f"/proc/self/fd/{fd}", 16 * BLOCK, False)
    Device(16 * BLOCK, state=made).write(b"x", 0)
    os.close(made)
    return fd, os.pread(fd, 256, 0)


@often(300)
@given(data=st.data())
def test_state_headers(header: tuple[int, bytes], data: st.DataObject) -> None:
    fd, good = header
    bad = data.draw(foreign_bytes(good, bytes(256), b"ZRAMD"))[:256].ljust(256, b"\0")
    os.pwrite(fd, bad, 0)
    try:
        made = statefile.open_state(f"/proc/self/fd/{fd}", 16 * BLOCK, False)
    except StateError as error:
        one_sentence(error)
    else:
        device = Device(16 * BLOCK, state=made)
        os.close(made)
        device.check()
        assert device.counters()["pages_stored"] == 1
        del device


# ---- What the kernel and others leave in files -----------------------------------------------------------

SWAPS = (
    b"Filename\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/nbd0                               "
    b"partition\t1048572\t\t524288\t\t100\n/swap\\040file\\134                "
    b"            file\t8\t\t0\t\t-2\n",
)
MOUNTS = (
    b"/dev/nbd0p1 /a\\040b ext4 rw,relatime 0 0\n/dev/nbd0 /\xff\xfe\\012 ext4 rw 0 0\n"
    b"proc /proc proc rw 0 0\n",
    b"/dev/nbd1 / ext4 rw 0 0\n",
)


@often(600)
@given(swaps=foreign_bytes(*SWAPS), mounts=foreign_bytes(*MOUNTS))
def test_proc(swaps: bytes, mounts: bytes) -> None:
    try:
        found = swap.parse_swaps(swaps)
    except AttachError as error:
        one_sentence(error)
    else:
        lines = [line for line in swaps.split(b"\n")[1:] if line.strip()]
        assert len(found) == len(lines)
        assert all(os.fsencode(area.path) for area in found)
    for place in swap.parse_mounts(mounts, "/dev/nbd0"):
        os.fsencode(place)


@often(300)
@given(data=foreign_bytes(b"4711 /dev/nbd0 0123456789abcdef\n", b"0 /dev/nbd1 \n"))
def test_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(attached, "FOLDER", str(tmp_path))
    monkeypatch.setattr(attached, "is_connected", lambda device: True)
    (tmp_path / "a.attached").write_bytes(data)
    found = attached.find("a")
    assert found is None or found.name == "a"


@often(300)
@given(text=foreign_text("a sentence", "with 'quoted' \u200b text\u202e", "line\nbreak \x1b[2J"))
def test_sentences(text: str) -> None:
    """What a terminal is sent is what it shows."""
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text
    one_sentence(ZramdError(f"x{text}"))
