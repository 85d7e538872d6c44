"""What each path of the control socket answers, and has the service do."""

import json
import socket

import pytest
from support.endpoints import FakeService, FakeWriteback, Running, status
from support.numbers import WRITEBACK
from support.run import wait_until

from zramd.server import routes
from zramd.server.tiers import Pass
from zramd.server.writeback import WritePass
from zramd.settings import amounts, config
from zramd.stats import texts


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


def test_what_was_sent_is_quoted_in_one_line(running: Running) -> None:
    """A command shows the first: the rest would be missing, and a terminal obey what is in it."""
    code, text = running.ask("PUT", "/mem_limit", "1\n\x1b[31mG")
    assert (code, text.count("\n"), "\x1b" in text) == (400, 1, False)
    assert r"'1\x0a\x1b[31mG'" in text
    running.service.tiers_off = "backing 'a\nb' is not there"
    assert running.ask("PUT", "/recompress", "type=idle") == (409, "backing 'a\\x0ab' is not there\n")


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
        self.backed.limit = 0 if text == "off" else amounts.parse_size(text)
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
    assert service.backed.limit == amounts.parse_size(config.find("writeback_limit").default or "")


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
