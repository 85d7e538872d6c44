"""Clients from a network: whose certificate opens the device, and an nbdkit that was told something else."""

import socket

import pytest

from zramd.errors import ConfigError, ZramdError
from zramd.server import sockets, strangers
from zramd.settings import config


def settings(**words: str) -> config.Config:
    return config.parse([("size", "1M"), ("rundir", "/run/x"), *words.items()])


X509 = {"listen": ":1", "tls": "x509:/pki", "clients": "guest1,a@b"}


@pytest.mark.parametrize(
    ("dn", "names"),
    [
        ("CN=guest1", ["guest1"]),
        ("CN=guest1,O=BigCo,C=US", ["guest1"]),
        ("O=x\\,CN=guest1,CN=a@b", ["a@b"]),
        ("O=x\\2cCN=guest1,CN=other", ["other"]),
        ("C=US,CN=guest1", ["guest1"]),
        ("2.5.4.3=guest1", ["guest1"]),
        ("cn=guest1+UID=7", ["guest1"]),
        ("CN=guest1,CN=other", ["guest1", "other"]),
        ("CN=\\67uest1", ["guest1"]),
        ("CN=gr\\C3\\B6n", ["gr\\C3\\B6n"]),
        ("", []),
        ("O=only", []),
        ("CN=guest1,", []),
        ("guest1", []),
        ("CN=guest1,O", []),
        ("CN=", [""]),
    ],
)
def test_common_names(dn: str, names: list[str]) -> None:
    assert strangers.common_names(dn) == names


@pytest.mark.parametrize("dn", ["CN=guest1", "O=BigCo,CN=a@b"])
def test_who_may_come(dn: str) -> None:
    strangers.refuse(settings(**X509), dn)


@pytest.mark.parametrize(
    ("dn", "who"),
    [
        ("CN=guest2", "guest2"),
        ("", ""),
        ("O=guest1", "O=guest1"),
        ("CN=guest1,CN=guest2", "guest1', 'guest2"),
        ("O=x\\,CN=guest1", "O=x\\,CN=guest1"),
        ("CN=GUEST1", "GUEST1"),
        ("CN=guest1 ", "guest1 "),
    ],
)
def test_who_may_not(dn: str, who: str) -> None:
    with pytest.raises(ZramdError) as caught:
        strangers.refuse(settings(**X509), dn)
    assert str(caught.value) == (
        f"client '{who}' is none of clients=guest1,a@b: add its name, if it may come"
    )


class TestWhatNbdkitWasTold:
    @pytest.fixture(autouse=True)
    def nothing_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.listening: list[int] = []
        self.words = ["nbdkit"]
        monkeypatch.setattr(sockets, "listening", lambda: self.listening)
        monkeypatch.setattr(sockets, "told", lambda: self.words)

    def test_as_the_settings_say(self) -> None:
        strangers.check(settings(), can_tell=False)
        self.words = ["nbdkit", "-p", "1", "--tls=require"]
        strangers.check(settings(listen=":1", tls="psk:/k"), can_tell=False)
        strangers.check(settings(**X509), can_tell=True)
        self.words = ["nbdkit", "--tls=off"]
        self.listening = [3]  # of the server before
        strangers.check(settings(listen="127.0.0.1:1"), can_tell=False)

    @pytest.mark.parametrize(
        "words", [["-p", "1"], ["--tls=require"], ["-p", "1", "--tls=off"], ["-p", "1", "--tls=on"]]
    )
    def test_something_else(self, words: list[str]) -> None:
        self.words = ["nbdkit", *words]
        with pytest.raises(ConfigError, match="is for 'zramd serve' and 'zramd start', which give nbdkit"):
            strangers.check(settings(listen=":1", tls="psk:/k"), can_tell=True)

    def test_an_nbdkit_that_cannot_tell(self) -> None:
        self.words = ["nbdkit", "-p", "1", "--tls=require"]
        with pytest.raises(ConfigError) as caught:
            strangers.check(settings(**X509), can_tell=False)
        assert str(caught.value) == (
            "clients=guest1,a@b: this nbdkit does not say whose certificate a client has: use nbdkit 1.40 or "
            "later, tls=psk:FILE, or a CA for this device alone"
        )


class TestIdle:
    def test_tcp_alone_and_the_silent_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here, there = socket.socketpair()
        with socket.create_server(("127.0.0.1", 0)) as listener, here, there:
            client = socket.create_connection(listener.getsockname(), timeout=30)
            served, _ = listener.accept()
            with client, served:
                monkeypatch.setattr(sockets, "_clients", lambda others: iter([here, served]))
                assert sockets.end_idle(frozenset(), 60) == 0
                client.send(b"x")
                served.recv(1)
                assert sockets.end_idle(frozenset(), -1) == 1
                assert client.recv(1) == b""
                there.send(b"y")
                assert here.recv(1) == b"y"
