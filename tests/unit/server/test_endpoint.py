"""The control socket: right requests, wrong requests, and no requests at all."""

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from support.endpoints import FakeService, Running, status
from support.run import wait_until

from zramd.server import endpoint
from zramd.server.trouble import Troubles


def test_closed_to_others(running: Running) -> None:
    assert stat.S_IMODE(running.path.stat().st_mode) == 0o600


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
