"""What `zramd attach nbd://HOST/NAME` takes for a server of another machine, and what it calls that."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from zramd.commands import main
from zramd.errors import AttachError, UsageError
from zramd.kernel import attached, swap
from zramd.launch import attaching, keepers, nbdway, remote
from zramd.launch.remote import Remote
from zramd.launch.wishes import Wanted


@pytest.mark.parametrize(
    ("uri", "found", "name"),
    [
        ("nbd://memory1/zram0", Remote("zram0", "memory1", 10809), "zram0@memory1:10809"),
        ("NBD://10.0.0.2:7/a.b-c", Remote("a.b-c", "10.0.0.2", 7), "a.b-c@10.0.0.2:7"),
        ("nbd://[fd00::1]:7/swap0", Remote("swap0", "fd00::1", 7), "swap0@[fd00::1]:7"),
        ("nbd://[fe80::1%25eth0]/swap0", Remote("swap0", "fe80::1%25eth0", 10809), None),
        ("nbd://h/%7Aram0", Remote("zram0", "h", 10809), "zram0@h:10809"),
    ],
)
def test_uris(uri: str, found: Remote, name: str | None) -> None:
    assert remote.parse(uri) == found
    if name:
        assert found.name == name
        assert remote.called(uri) == remote.called(name) == name


@pytest.mark.parametrize(
    "uri",
    [
        *("nbd://h", "nbd://h/", "nbd:///zram0", "nbd://:1/zram0", "nbd://h:0/a", "nbd://h:65536/a"),
        *("nbd://h:x/a", "nbd://me@h/a", "nbd://h/a?tls=1", "nbd://h/a#b", "nbd://[::1/a", "http://h/a"),
        *("nbd+unix:///a?socket=/x", "nbd+vsock://1/a"),
    ],
)
def test_what_is_no_uri_of_a_server(uri: str) -> None:
    assert remote.is_uri(uri)
    with pytest.raises(UsageError, match=r"is not nbd://HOST\[:PORT\]/NAME"):
        remote.parse(uri)


@pytest.mark.parametrize("uri", ["nbds://h/a", "NBDS+unix:///a?socket=/x"])
def test_the_kernel_has_no_tls(uri: str) -> None:
    with pytest.raises(
        AttachError, match=r"the kernel's NBD client has no TLS, which .* asks for: put a tunnel"
    ):
        remote.parse(uri)


def test_a_name_that_none_can_be() -> None:
    with pytest.raises(UsageError, match=r"'nbd://h/a/b': 'a/b' is not a name"):
        remote.parse("nbd://h/a/b")


def test_names_of_this_machine_are_not_taken_for_others() -> None:
    for word in ("zram0", "/dev/nbd0", "../a@b", ""):
        assert remote.called(word) == ""


def test_a_host_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper gets a number: when it acts it must not ask anybody."""
    there = [(socket.AF_INET6, 1, 6, "", ("fd00::2", 7, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: there)
    assert Remote("a", "memory1", 7).address() == "[fd00::2]:7"
    job = nbdway._job(Remote("a", "memory1", 7), Wanted())
    assert (job.name, job.export, job.address, job.folder) == ("a@memory1:7", "a", "[fd00::2]:7", "")


def test_a_host_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str, port: int, type: int) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(AttachError, match=r"^'memory1' is not found: "):
        Remote("a", "memory1", 7).address()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--rundir", "/x"], "--rundir"),
        (["--config"], "--config"),
        (["--standby"], "--standby"),
        (["--no-standby"], "--standby"),
        (["--nbd-client"], "--nbd-client"),
    ],
)
def test_what_is_for_servers_of_this_machine(
    words: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attach", "nbd://h/a", *words]) == 2
    assert capsys.readouterr().err == (
        f"zramd: a server of another machine is attached without {option}: leave it out\n"
    )


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with /dev/nbd7, which belongs to whoever notes it."""
    monkeypatch.setattr(attached, "FOLDER", str(tmp_path))
    monkeypatch.setattr(attached, "is_connected", lambda device: device == "/dev/nbd7")
    monkeypatch.setattr(attached, "read_sys", lambda device, name: {"size": "65536"}.get(name, ""))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(swap, "find", lambda device: None)
    monkeypatch.setattr(swap, "uses", lambda device: ["[SWAP]"])
    return tmp_path


def test_attached_listed_and_detached(
    noted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to the keeper's words, and away again."""
    record: list[attached.Record] = []

    def started(module: str, name: str, words: list[str], undo: object) -> tuple[int, int]:
        assert (module, name, words[:4]) == (nbdway.KEEPER, "a@127.0.0.1:7", [name, "a", "127.0.0.1:7", ""])
        record.append(attached.Record(name))
        record[0].write("/dev/nbd7", "data", keeper=os.getpid())
        return 7, os.getpid()

    used: list[Any] = []
    monkeypatch.setattr(nbdway, "_has_netlink", lambda: True)
    monkeypatch.setattr(keepers, "start", started)
    monkeypatch.setattr(
        attaching, "_use", lambda name, device, wanted: used.append((name, device, wanted.swap))
    )
    assert main(["attach", "nbd://127.0.0.1:7/a", "--swap"]) == 0
    assert capsys.readouterr().out == "/dev/nbd7\n"
    assert used == [("a@127.0.0.1:7", "/dev/nbd7", True)]

    assert main(["attach", "nbd://127.0.0.1:7/a"]) == 1
    assert capsys.readouterr().err == (
        "zramd: a@127.0.0.1:7 is attached as /dev/nbd7 already: 'zramd detach a@127.0.0.1:7' first\n"
    )

    # As `zramd list` has it: its server is nowhere here, and what it stores nobody knows.
    monkeypatch.setattr("zramd.control.servers.every", lambda: [])
    assert main(["list", "--raw", "-o", "NAME,DISKSIZE,DATA,STREAMS,MOUNTPOINT,ATTACHED"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "a@127.0.0.1:7 32M - - [SWAP] /dev/nbd7"

    ended: list[str] = []
    monkeypatch.setattr(nbdway, "disconnect", lambda there: ended.append(there.device) or (lambda: True))
    monkeypatch.setattr(attaching, "_must_be_free", lambda device: None)
    for word in ("nbd://127.0.0.1:7/a", "a@127.0.0.1:7", "/dev/nbd7"):
        assert main(["detach", word]) == 0, word
    assert ended == ["/dev/nbd7"] * 3
    record[0].close()


def test_a_lost_keeper_is_replaced(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = attached.Record("a@127.0.0.1:7")
    record.write("/dev/nbd7", "data", keeper=1)
    record.close()
    started: list[list[str]] = []
    monkeypatch.setattr(keepers, "start", lambda module, name, words, undo: started.append(words))
    with pytest.raises(AttachError, match=r"the keeper of a@127\.0\.0\.1:7 has died"):
        attaching.attach("nbd://127.0.0.1:7/a", None, Wanted())  # the one that was started does not live
    assert started[0][:7] == ["a@127.0.0.1:7", "a", "127.0.0.1:7", "", "7", "1", "data"]
