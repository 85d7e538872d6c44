"""The control socket: right requests, wrong requests, and no requests at all."""

import contextlib
import dataclasses
import errno
import json
import os
import select
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.numbers import TIERS, WRITEBACK, FakeDevice
from support.run import wait_until

from zramd.errors import CorruptionError, DeviceError
from zramd.server import endpoint, routes
from zramd.server.tiers import Pass
from zramd.server.trouble import Troubles
from zramd.server.withoutbacking import Without
from zramd.server.writeback import WritePass
from zramd.settings import config
from zramd.stats import snapshots, texts


class FakeWriteback:
    """What writes to a backing device; `limit` is the setting writeback_limit, 0 for off."""

    def __init__(self) -> None:
        self.passes: list[WritePass] = []
        self.returns = 0
        self.limit = 2 << 30
        self.rest = 5 << 20
        self.full = ""

    def submit(self, wanted: WritePass) -> None:
        if self.full:
            raise DeviceError(self.full)
        self.passes.append(wanted)

    def bring_back(self) -> None:
        self.returns += 1

    def set_left(self, size: int) -> None:
        if not self.limit:
            raise DeviceError("writeback_limit is off")
        self.rest = size

    def numbers(self) -> dict[str, Any]:
        return WRITEBACK | {"writeback_limit": self.limit, "limit_left": self.rest if self.limit else None}


class FakeService:
    def __init__(self) -> None:
        self.limit = 1048576
        self.clients = 0
        self.resets = 0
        self.peak = 4096
        self.fault = ""
        self.more: dict[str, object] = {}
        self.changed: dict[str, object] = {}
        self.hold = threading.Event()
        self.hold.set()
        self.device = self
        self.tiers = self
        self.disksize = 1 << 30
        self.passes: list[Pass] = []
        self.idle: list[float | None] = []
        self.tiers_off = ""
        self.writeback: FakeWriteback | Without = Without()

    def submit(self, wanted: Pass) -> None:
        if self.tiers_off:
            raise DeviceError(self.tiers_off)
        self.passes.append(wanted)

    def mark_idle(self, seconds: float | None) -> None:
        self.idle.append(seconds)

    def numbers(self) -> dict[str, object]:
        return dict(TIERS)

    def block_state(self, buf: bytearray, first: int, now: int, sweep: int) -> tuple[int, int]:
        self.hold.wait(10)
        count = min(len(buf) // 40, self.disksize // 4096 - first)
        buf[: 40 * count] = b"".join(b"%39d\n" % (first + block) for block in range(count))
        return 40 * count, first + count

    def snapshot(self) -> snapshots.Snapshot:
        made = snapshots.take(FakeDevice(), name="zram0", comp_algorithm="lz4", version="0", started=0.0)
        changed = {"mem_limit": self.limit, "mem_used_max": self.peak}
        return dataclasses.replace(made, values=made.values | changed, writeback=self.writeback.numbers())

    def classes(self) -> list[snapshots.ClassRow]:
        return snapshots.take_classes(FakeDevice())

    def health(self) -> dict[str, str | int]:
        return {"status": "ok", "compactor": "idle"}

    def compact(self, timeout: float) -> int:
        self.hold.wait(10)
        return 42

    def settings(self) -> dict[str, object]:
        self.hold.wait(10)
        return {"mem_limit": self.limit, **self.more}

    def change(self, name: str, text: str) -> object:
        value = config.value(config.find(name), text)
        self.changed[name] = value
        if name == "mem_limit":
            self.limit = value
        return value

    def check(self) -> None:
        if self.fault:
            raise CorruptionError(self.fault)

    def block(self, number: int) -> dict[str, int | str]:
        if number > 9:
            raise ValueError(f"block {number} is not on the device, which has blocks 0 to 9")
        return {"block": number, "kind": "hole"}

    def reset(self) -> bool:
        if self.clients:
            return False
        self.resets += 1
        return True

    def reset_mem_used_max(self) -> None:
        self.peak = 0


class Running:
    """An endpoint with the accepting thread that the server would give it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.service = FakeService()
        self.troubles = Troubles()
        self.endpoint = endpoint.Endpoint(str(path), self.service, self.troubles)
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self.endpoint, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        while self._stop_read not in (ready := [fd for fd, _ in poll.poll()]):
            if ready:
                self.endpoint.accept()

    def close(self) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join()
        self.endpoint.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(10)
        sock.connect(str(self.path))
        return sock

    def raw(self, data: bytes, end: bool = False) -> bytes:
        with self.connect() as sock:
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def ask(self, method: str, path: str, body: str = "") -> tuple[int, str]:
        request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        header, _, content = self.raw(request.encode()).decode().partition("\r\n\r\n")
        assert f"\r\nContent-Length: {len(content)}" in header
        assert "\r\nConnection: close" in header
        return int(header.split()[1]), content


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path / "control.sock")
    yield made
    made.service.hold.set()
    made.close()


def status(answer: bytes) -> int:
    return int(answer.split()[1])


def test_closed_to_others(running: Running) -> None:
    assert stat.S_IMODE(running.path.stat().st_mode) == 0o600


def test_get(running: Running) -> None:
    service = running.service
    assert running.ask("GET", "/mm_stat") == (200, texts.mm_stat(service.snapshot()))
    assert running.ask("GET", "/io_stat") == (200, texts.io_stat(service.snapshot()))
    assert running.ask("GET", "/classes") == (200, texts.classes_table(service.classes()))
    code, text = running.ask("GET", "/metrics")
    assert code == 200
    assert text.startswith("# HELP zramd_")
    assert json.loads(running.ask("GET", "/stats?pretty=1")[1])["orig_data_size"] == 40960
    assert json.loads(running.ask("GET", "/health")[1]) == {
        "status": "ok",
        "compactor": "idle",
        "streams": [],
    }


def test_paths_are_listed(running: Running) -> None:
    code, paths = running.ask("GET", "/")
    assert code == 200
    assert {"GET /stats", "POST /compact", "PUT /mem_limit", "POST /reset"} <= set(paths.splitlines())
    code, text = running.ask("GET", "/nope")
    assert code == 404
    assert text == f"no such path '/nope'; there are:\n{paths}"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/stats", "GET"),
        ("GET", "/compact", "POST"),
        ("DELETE", "/mem_limit", "PUT"),
        ("HEAD", "/", "GET"),
    ],
)
def test_wrong_method(running: Running, method: str, path: str, allow: str) -> None:
    answer = running.raw(f"{method} {path} HTTP/1.1\r\n\r\n".encode())
    assert status(answer) == 405
    assert f"\r\nAllow: {allow}\r\n".encode() in answer


def test_recompress(running: Running) -> None:
    code, text = running.ask("PUT", "/recompress", "type=huge_idle  threshold=300 max_pages=7\n")
    kinds = ["huge", "idle"]
    assert (code, json.loads(text)) == (
        200,
        {"recompress": {"kinds": kinds, "threshold": 300, "max_pages": 7}},
    )
    assert running.ask("POST", "/recompress")[0] == 200
    assert running.service.passes == [Pass(frozenset(kinds), 300, 7), Pass()]


def test_a_wrong_word_recompresses_nothing(running: Running) -> None:
    code, text = running.ask("PUT", "/recompress", "type=hgue")
    assert (code, text) == (400, "unknown type 'hgue': use one of idle, huge, huge_idle\n")
    assert running.service.passes == []


def test_recompress_while_it_is_off(running: Running) -> None:
    running.service.tiers_off = "recompression is off: 'zramd set zram0 recompression=zstd' turns it on"
    assert running.ask("PUT", "/recompress", "type=idle") == (409, running.service.tiers_off + "\n")
    assert running.ask("PUT", "/recompress", "type=bad")[0] == 400


@pytest.fixture
def backed(running: Running) -> FakeWriteback:
    """What writes out, of a device that has a backing device."""
    made = running.service.writeback = FakeWriteback()
    return made


def test_writeback(running: Running, backed: FakeWriteback) -> None:
    code, text = running.ask("POST", "/writeback", "huge_idle\n")
    assert (code, json.loads(text)) == (200, {"writeback": {"kinds": ["huge", "idle"], "ranges": []}})
    last = running.service.disksize // 4096 - 1
    code, text = running.ask("PUT", "/writeback", f"page_index=7 page_indexes=9-{last}")
    ranges = [[7, 8], [9, last + 1]]
    assert (code, json.loads(text)) == (200, {"writeback": {"kinds": [], "ranges": ranges}})
    assert backed.passes == [
        WritePass(frozenset({"huge", "idle"})),
        WritePass(frozenset(), ((7, 8), (9, last + 1))),
    ]
    assert running.ask("POST", "/writeback", f"page_index={last + 1}")[0] == 400
    assert running.ask("POST", "/writeback", "")[0] == 400
    backed.full = "16 passes are queued already: try again when some are done"
    assert running.ask("POST", "/writeback", "type=idle") == (409, backed.full + "\n")
    assert len(backed.passes) == 2


def test_as_many_numbers_as_one_of_zrams_files_takes(running: Running, backed: FakeWriteback) -> None:
    text = " ".join(f"page_index={block}" for block in range(250))
    assert 3 << 10 < len(text) < 4 << 10
    assert running.ask("POST", "/writeback", text)[0] == 200
    assert backed.passes[0].ranges == tuple((block, block + 1) for block in range(250))


def test_bring_back(running: Running, backed: FakeWriteback) -> None:
    assert running.ask("POST", "/bring_back") == (200, '{"bring_back": "all"}\n')
    assert running.ask("POST", "/bring_back", "page_index=1")[0] == 400
    assert backed.returns == 1


def test_writeback_limit(running: Running, backed: FakeWriteback) -> None:
    assert running.ask("GET", "/writeback_limit") == (200, f"{5 << 8}\n")
    assert running.ask("POST", "/writeback_limit", "102400\n") == (200, '{"writeback_limit": 102400}\n')
    assert backed.rest == 400 << 20
    assert running.ask("GET", "/writeback_limit") == (200, "102400\n")
    assert running.ask("POST", "/writeback_limit", "1G")[0] == 400
    backed.limit = 0
    assert running.ask("GET", "/writeback_limit") == (200, "0\n")
    code, text = running.ask("POST", "/writeback_limit", "1")
    assert (code, text) == (409, "writeback_limit is off\n")
    assert backed.rest == 400 << 20


class LimitedService(FakeService):
    """One whose setting writeback_limit is what its writeback goes by."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.backed = self.writeback = FakeWriteback()
        self.backed.limit = limit

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "writeback_limit": self.backed.limit}

    def change(self, name: str, text: str) -> object:
        assert name == "writeback_limit"
        self.backed.limit = 0 if text == "off" else config.parse_size(text)
        return self.backed.limit


def test_writeback_limit_enable() -> None:
    """0 is writeback_limit=off; 1 is the limit that there was, whoever has switched it off."""
    service = LimitedService(2 << 30)
    backed = service.backed
    made = routes.Routes(service)

    def ask(method: str, path: str, text: str = "") -> tuple[int, str]:
        reply = made.answer(method, f"/writeback_limit{path}", text.encode())
        return reply.status, reply.body

    assert ask("GET", "_enable") == (200, "1\n")
    assert ask("POST", "_enable", "1\n") == (200, '{"writeback_limit_enable": 1}\n')
    assert backed.limit == 2 << 30
    assert ask("POST", "_enable", "0") == (200, '{"writeback_limit_enable": 0}\n')
    assert ask("GET", "_enable") == (200, "0\n")
    assert backed.limit == 0
    assert ask("POST", "_enable", "1")[0] == 200
    assert backed.limit == 2 << 30
    assert ask("PUT", "", "3G") == (200, f'{{"writeback_limit": {3 << 30}}}\n')
    assert ask("PUT", "", "off") == ask("PUT", "", "off") == (200, '{"writeback_limit": 0}\n')
    assert ask("PUT", "_enable", "1")[0] == 200
    assert backed.limit == 3 << 30
    for text in ("", "2", "off"):
        assert ask("POST", "_enable", text)[0] == 400
    assert backed.limit == 3 << 30


def test_a_limit_that_was_never_on_is_the_default() -> None:
    service = LimitedService(0)
    assert routes.Routes(service).answer("POST", "/writeback_limit_enable", b"1").status == 200
    assert service.backed.limit == config.parse_size(config.find("writeback_limit").default or "")


def test_what_is_shown_of_a_backing_device(running: Running, backed: FakeWriteback) -> None:
    assert running.ask("GET", "/backing_dev") == (200, f"{WRITEBACK['backing']}\n")
    used = 2 * 1024 * 256 - 32 - 16  # without what was given up, and the superblock
    assert running.ask("GET", "/bd_stat") == (200, f"{used:8} {40 * 256:8} {1700 * 256:8}\n")
    assert json.loads(running.ask("GET", "/stats")[1])["writeback"] == backed.numbers()


def test_without_a_backing_device(running: Running) -> None:
    """What can be read is as in a kernel whose zram has none; what would do something says why not."""
    told = "there is no backing device: 'zramd restart NAME backing=PATH' gives it one\n"
    for path, text in (
        ("/writeback", "type=idle"),
        ("/bring_back", ""),
        ("/writeback_limit", "100"),
        ("/writeback_limit_enable", "1"),
    ):
        assert running.ask("POST", path, text) == (409, told)
        assert running.ask("POST", path, "nonsense")[0] == 400
    assert running.ask("GET", "/backing_dev") == (200, "none\n")
    assert running.ask("GET", "/bd_stat") == (200, "       0        0        0\n")
    assert running.ask("GET", "/writeback_limit") == running.ask("GET", "/writeback_limit_enable")
    assert running.ask("GET", "/writeback_limit_enable") == (200, "0\n")
    assert "writeback" not in json.loads(running.ask("GET", "/stats")[1])


def test_idle(running: Running) -> None:
    assert running.ask("PUT", "/idle", "all\n") == (200, '{"idle": "all"}\n')
    assert running.ask("POST", "/idle", "300") == (200, '{"idle": "300"}\n')
    assert running.service.idle == [None, 300]
    code, text = running.ask("PUT", "/idle", "al")
    assert (code, text) == (400, "'al' is not an age: use all, or a time such as 300, 5min or 1h\n")
    assert running.service.idle == [None, 300]


def test_algorithms(running: Running) -> None:
    running.service.more = {"comp_algorithm": "lz4"}
    assert running.ask("GET", "/recomp_algorithm") == (200, "#1: [zstd] \n")
    assert "[lz4] " in running.ask("GET", "/comp_algorithm")[1]


def test_block_state_is_a_stream(running: Running) -> None:
    answer = running.raw(b"GET /block_state HTTP/1.1\r\n\r\n")
    header, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Length" not in header
    assert b"Content-Type: text/plain" in header
    assert [int(line) for line in body.splitlines()] == list(range(1 << 18))


def test_block_state_waits_for_its_reader_and_ends_with_it(running: Running) -> None:
    with running.connect() as sock:
        sock.sendall(b"GET /block_state HTTP/1.1\r\n\r\n")
        wait_until(lambda: "block_state" in running.ask("GET", "/health")[1])
        assert len(sock.recv(100, socket.MSG_WAITALL)) == 100
    wait_until(lambda: "block_state" not in running.ask("GET", "/health")[1])
    assert running.troubles.causes() == []


def test_compact(running: Running) -> None:
    code, text = running.ask("POST", "/compact")
    assert (code, json.loads(text)) == (200, {"pages_freed": 42, "frag_ratio": 75.0})


def test_mem_limit(running: Running) -> None:
    code, text = running.ask("PUT", "/mem_limit", "64M\n")
    assert (code, json.loads(text)) == (200, {"mem_limit": 64 << 20})
    assert running.service.limit == 64 << 20


@pytest.mark.parametrize("body", ["", "half", "64X", "-1", "\x00\xff"])
def test_bad_mem_limit(running: Running, body: str) -> None:
    request = b"PUT /mem_limit HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body.encode("latin-1"))
    answer = running.raw(request + body.encode("latin-1"))
    assert status(answer) == 400
    assert b"is not a size" in answer
    assert running.service.limit == 1048576


def test_mem_used_max(running: Running) -> None:
    assert json.loads(running.ask("POST", "/mem_used_max")[1]) == {"mem_used_max": 0}


def test_reset(running: Running) -> None:
    running.service.clients = 1
    code, text = running.ask("POST", "/reset")
    assert (code, running.service.resets) == (409, 0)
    assert text == "device is in use: disconnect every client before a reset\n"
    running.service.clients = 0
    assert running.ask("POST", "/reset")[0] == 200
    assert running.service.resets == 1


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("compaction", "off", False),
        ("compaction_threshold", "10%", 10.0),
        ("compaction_near_limit", "75", 75.0),
        ("compaction_interval", "0.5", 0.5),
        ("compaction_step", "256K", 256 << 10),
        ("stats_interval", "0", 0.0),
    ],
)
def test_change(running: Running, name: str, text: str, value: object) -> None:
    code, answer = running.ask("PUT", f"/{name}", text)
    assert (code, json.loads(answer)) == (200, {name: value})
    assert running.service.changed == {name: value}
    assert running.ask("PUT", f"/{name}", "x")[0] == 400
    assert running.service.changed == {name: value}


def test_only_what_can_change_has_a_path(running: Running) -> None:
    paths = running.ask("GET", "/")[1].splitlines()
    for setting in config.SETTINGS:
        assert (f"PUT /{setting.name}" in paths) is not bool(setting.fixed)


def test_settings(running: Running) -> None:
    assert json.loads(running.ask("GET", "/settings")[1]) == {"mem_limit": 1048576}


def test_check(running: Running) -> None:
    assert json.loads(running.ask("POST", "/check")[1]) == {"sound": True}
    running.service.fault = "the counters differ from the slots (at 0)"
    code, text = running.ask("POST", "/check")
    assert (code, json.loads(text)) == (200, {"sound": False, "fault": running.service.fault})


def test_block(running: Running) -> None:
    assert json.loads(running.ask("GET", "/block/7")[1]) == {"block": 7, "kind": "hole"}
    code, text = running.ask("GET", "/block/10")
    assert (code, text) == (400, "block 10 is not on the device, which has blocks 0 to 9\n")
    for wrong in ("", "x", "-1", "1/2", "9" * 20):
        code, text = running.ask("GET", f"/block/{wrong}")
        assert code == 400
        assert text.startswith(f"'{wrong}' is not a block's number")


def test_classes_json(running: Running) -> None:
    rows = json.loads(running.ask("GET", "/classes.json")[1])
    assert [row["size"] for row in rows] == [row.size for row in running.service.classes()]
    assert rows[0]["zspages"]["10%"] == 1
    assert rows[0]["obj_used"] == 640


def test_failing_service(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(timeout: float) -> int:
        raise RuntimeError("compactor is not running: broken")

    monkeypatch.setattr(running.service, "compact", fail)
    assert running.ask("POST", "/compact") == (500, "compactor is not running: broken\n")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\x03",
        b"\r\n\r\n",
        b"NBDMAGIC\x49\x48\x41\x56\x45\x4f\x50\x54",
        bytes(range(256)) * 8,
        b"GET\r\n\r\n",
        b"GET /stats\r\n\r\n",
        b"GET stats HTTP/1.1\r\n\r\n",
        b"GET /stats HTTP/2\r\n\r\n",
        b"get /stats HTTP/1.1\r\n\r\n",
        b"GET /st\xe4ts HTTP/1.1\r\n\r\n",
        b"GET /stats HTTP/1.1\n\n",
        b"PUT /mem_limit HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"PUT /mem_limit HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_not_http(running: Running, data: bytes) -> None:
    assert status(running.raw(data)) == 400
    assert running.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "data", [b"", b"GET", b"GET / HTTP/1.1\r\nHost", b"PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\n1"]
)
def test_ends_too_early(running: Running, data: bytes) -> None:
    assert status(running.raw(data, end=True)) == 400


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET /" + b"x" * 1000 + b" HTTP/1.1\r\n\r\n", 404),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 3000, 431),
        (b"PUT /mem_limit HTTP/1.1\r\nContent-Length: 4097\r\n\r\n", 413),
        (b"PUT /mem_limit HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n", 413),
        (b"PUT /mem_limit HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n1\r\n0\r\n\r\n", 411),
    ],
)
def test_too_much(running: Running, data: bytes, code: int) -> None:
    assert status(running.raw(data)) == code


def test_slow_client(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "DEADLINE", 0.05)
    assert status(running.raw(b"GET /stats HTTP/1.1\r\n")) == 408


def test_bytes_one_by_one(running: Running) -> None:
    with running.connect() as sock:
        for byte in b"PUT /mem_limit HTTP/1.0\r\nContent-Length: 2\r\n\r\n8K":
            sock.send(bytes([byte]))
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert status(answer) == 200
    assert running.service.limit == 8192


def test_vanishing_clients(running: Running) -> None:
    for _ in range(50):
        with running.connect() as sock:
            sock.send(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert running.ask("GET", "/health")[0] == 200


def test_what_takes_long_leaves_room(running: Running) -> None:
    running.service.hold.clear()
    waiting = []
    for _ in range(endpoint.MAX_LENGTHY):
        sock = running.connect()
        sock.sendall(b"POST /compact HTTP/1.1\r\n\r\n")
        waiting.append(sock)
    wait_until(lambda: sum(one.lengthy for one in running.endpoint._open) == len(waiting))
    for request in ("POST /compact", "POST /check", "GET /save", "GET /save/live", "PUT /load"):
        code, text = running.ask(*request.split())
        assert (code, text) == (
            503,
            "8 saves, loads, lists of blocks, compactions, checks or looks at a backing are under way: ask "
            "again later\n",
        )
    assert running.ask("GET", "/health")[0] == 200
    running.service.hold.set()
    for sock in waiting:
        assert status(sock.recv(4096)) == 200
        sock.close()
    assert running.ask("POST", "/compact")[0] == 200


def test_too_many_that_are_being_answered(running: Running) -> None:
    running.service.hold.clear()
    waiting = []
    for _ in range(endpoint.MAX_CONNECTIONS):
        sock = running.connect()
        sock.sendall(b"GET /settings HTTP/1.1\r\n\r\n")
        waiting.append(sock)
    wait_until(lambda: sum(not one.waits for one in running.endpoint._open) == len(waiting))
    with running.connect() as extra:
        assert status(b"".join(iter(lambda: extra.recv(4096), b""))) == 503
    running.service.hold.set()
    for sock in waiting:
        assert status(sock.recv(4096)) == 200
        sock.close()


@pytest.mark.parametrize("begun", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_the_silent_make_room(running: Running, begun: bytes) -> None:
    silent = [running.connect() for _ in range(3 * endpoint.MAX_CONNECTIONS)]
    for sock in silent:
        if begun:
            with contextlib.suppress(BrokenPipeError):  # it was cut off already
                sock.sendall(begun)
        assert running.ask("GET", "/health")[0] == 200
    assert silent[0].recv(4096)[:12] in (b"", b"HTTP/1.1 400")
    for sock in silent:
        sock.close()


def test_who_does_not_read_makes_room(running: Running) -> None:
    running.service.more = {"long": "x" * (4 << 20)}  # more than the socket holds
    deaf = []
    for _ in range(2 * endpoint.MAX_CONNECTIONS):
        sock = running.connect()
        sock.sendall(b"GET /settings HTTP/1.1\r\n\r\n")
        deaf.append(sock)
        assert running.ask("GET", "/health")[0] == 200
    for sock in deaf:
        sock.close()


class TestWithoutThreads:
    @pytest.fixture(autouse=True)
    def no_threads(self, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: object, **keywords: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(endpoint, "start_thread", refuse)

    def test_short_requests_are_answered(self, running: Running) -> None:
        assert running.ask("GET", "/health")[0] == 200
        assert running.ask("PUT", "/mem_limit", "8192")[0] == 200
        assert running.service.limit == 8192

    @pytest.mark.parametrize("request_line", ["POST /compact", "POST /check", "GET /save", "PUT /load"])
    def test_what_takes_long_is_refused(self, running: Running, request_line: str) -> None:
        code, text = running.ask(*request_line.split())
        assert code == 503
        assert "no thread can be started for this: raise ulimit -u" in text

    def test_the_silent_are_cut_off(self, running: Running) -> None:
        with running.connect() as sock:
            assert status(sock.recv(4096)) == 408


@pytest.mark.parametrize("call", ["_receive", "_send"])
@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
def test_a_call_that_fails_for_want_of_something_is_told_until_one_is_answered(
    running: Running, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Who asks is only cut off: the log and /health are where the cause can be."""

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as short:
        short.setattr(endpoint, call, fail)
        with contextlib.suppress(ConnectionError):
            assert running.raw(b"GET /health HTTP/1.1\r\n\r\n") == b""
        wait_until(lambda: bool(running.troubles))
    assert running.troubles.causes() == [f"the control socket does not answer: {os.strerror(number).lower()}"]
    assert running.ask("GET", "/health")[0] == 200
    wait_until(lambda: not running.troubles)


def test_a_caller_who_leaves_is_no_trouble(running: Running) -> None:
    with running.connect() as sock:
        sock.sendall(b"GET /hea")
    assert running.ask("GET", "/health")[0] == 200
    wait_until(lambda: not running.endpoint._open)
    assert not running.troubles


def test_accept_tells_of_a_shortage(tmp_path: Path) -> None:
    """Else who polls would come again and again, at once."""
    made = endpoint.Endpoint(str(tmp_path / "control.sock"), FakeService(), Troubles())
    made.accept()  # nobody has come

    class Short:
        def accept(self) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        def close(self) -> None:
            pass

    made._listener.close()
    made._listener = Short()  # type: ignore[assignment]
    with pytest.raises(OSError, match="Too many open files"):
        made.accept()
    made.close()


def test_close_ends_waiting_clients(tmp_path: Path) -> None:
    made = Running(tmp_path / "control.sock")
    with made.connect() as sock:
        sock.send(b"GET")
        wait_until(lambda: bool(made.endpoint._open))
        made.close()
        assert sock.recv(4096)[:12] in (b"", b"HTTP/1.1 400")


def test_curl(running: Running) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    # A sanitizer that is preloaded for this process hangs in a program that was built without it.
    curl = ["env", "-u", "LD_PRELOAD", "curl", "-sS", "--fail", "--unix-socket", str(running.path)]

    def run(*words: str) -> str:
        return subprocess.run([*curl, *words], capture_output=True, text=True, check=True, timeout=20).stdout

    assert json.loads(run("http://zramd/stats"))["writes"] == 41
    assert json.loads(run("-X", "POST", "http://zramd/compact"))["pages_freed"] == 42
    assert json.loads(run("-X", "PUT", "-d", "2M", "http://zramd/mem_limit"))["mem_limit"] == 2 << 20


def test_a_client_that_waits_before_it_sends_its_body(running: Running) -> None:
    """curl does with a large one, for a second."""
    head = b"PUT /mem_limit HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-Continue\r\n\r\n"
    with running.connect() as sock:
        sock.sendall(head)
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"2M")
        assert status(b"".join(iter(lambda: sock.recv(65536), b""))) == 200
    assert running.service.limit == 2 << 20
    # Who sends it at once, sends none, too much, or speaks HTTP/1.0, is told nothing in between.
    assert status(running.raw(head + b"3M")) == 200
    assert status(running.raw(head.replace(b"Content-Length: 2", b"Content-Length: 0"))) == 400
    assert status(running.raw(head.replace(b"Content-Length: 2", b"Content-Length: 20000"))) == 413
    assert status(running.raw(head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"2M")) == 200
