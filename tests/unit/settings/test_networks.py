"""listen, tls and clients: what they mean, what is refused, and what does not go together."""

import pytest

from zramd.errors import ConfigError
from zramd.settings import config, network
from zramd.settings.network import Address


def parse(**settings: str) -> config.Config:
    return config.parse([("size", "1M"), ("rundir", "/run/x"), *settings.items()])


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1", Address("127.0.0.1", 10809)),
        ("127.0.0.1:1", Address("127.0.0.1", 1)),
        ("0.0.0.0:65535", Address("0.0.0.0", 65535)),
        (":10810", Address("", 10810)),
        ("*:10810", Address("", 10810)),
        ("*", Address("", 10809)),
        ("[::]", Address("", 10809)),
        ("[::]:7", Address("", 7)),
        ("[::0:0]:7", Address("", 7)),
        ("[0:0:0:0:0:0:0:0]", Address("", 10809)),
        ("[2001:db8::1]:7", Address("2001:db8::1", 7)),
        ("[fe80::1%eth0]:7", Address("fe80::1%eth0", 7)),
        ("memory-host.example.org:010", Address("memory-host.example.org", 10)),
        ("localhost", Address("localhost", 10809)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert network.address(text) == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("::1", "'::1' is not an address: write [::1], or :PORT for all addresses"),
        ("::1%lo", "'::1%lo' is not an address: write [::1%lo], or :PORT for all addresses"),
        ("a:1:2", "'a:1:2' is not an address: use HOST:PORT, or :PORT for all addresses"),
        (":", "':' has no port that can be listened on, '': use 1 to 65535"),
        (":0", "':0' has no port that can be listened on, '0': use 1 to 65535"),
        (":65536", "':65536' has no port that can be listened on, '65536': use 1 to 65535"),
        (":-1", "':-1' has no port that can be listened on, '-1': use 1 to 65535"),
        (":nbd", "':nbd' has no port that can be listened on, 'nbd': use 1 to 65535"),
        (":٣", "':٣' has no port that can be listened on, '٣': use 1 to 65535"),
        (
            "[1.2.3.4]:1",
            "'[1.2.3.4]:1' has no IPv6 address in its brackets: write it as [2001:db8::1]:10809",
        ),
        ("[]", "'[]' has no IPv6 address in its brackets: write it as [2001:db8::1]:10809"),
        ("[::1%]", "'[::1%]' has no IPv6 address in its brackets: write it as [2001:db8::1]:10809"),
        ("[fe80::1]:7", "'[fe80::1]:7' is on which link? Write it as [fe80::1%INTERFACE]:7"),
        ("1.2.3", "'1.2.3' has no IPv4 address, '1.2.3': use four numbers from 0 to 255"),
        ("1.2.3.256", "'1.2.3.256' has no IPv4 address, '1.2.3.256': use four numbers from 0 to 255"),
        ("0x7f000001", "'0x7f000001' has no IPv4 address, '0x7f000001': use four numbers from 0 to 255"),
        ("a b", "'a b' has no host's name, 'a b': use letters, digits, - and ., or an address"),
        ("-x:1", "'-x:1' has no host's name, '-x': use letters, digits, - and ., or an address"),
        ("größe", "'größe' has no host's name, 'größe': use letters, digits, - and ., or an address"),
        ("h\n:1", "'h\n:1' has no host's name, 'h\n': use letters, digits, - and ., or an address"),
    ],
)
def test_what_is_no_address(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(listen=text, tls="off")
    assert str(caught.value) == f"listen: {said}"


@pytest.mark.parametrize("text", ["127.0.0.1", "127.9.9.9:1", "[::1]:1", "localhost:1", "LOCALHOST"])
def test_this_machine_alone_needs_no_keys(text: str) -> None:
    assert parse(listen=text).tls == ""


@pytest.mark.parametrize(
    "text", [":1", "*", "[::]", "0.0.0.0", "10.0.0.1", "localhost.example.org", "128.0.0.1"]
)
def test_others_need_a_word(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(listen=text)
    assert str(caught.value) == (
        f"listen={text} gives the device to everyone on the network: add tls=psk:FILE or tls=x509:FOLDER, or "
        "tls=off where the network below is encrypted, as by WireGuard"
    )
    for tls in ("off", "OFF", "psk:/k", "x509:/f"):
        parse(listen=text, tls=tls)


@pytest.mark.parametrize("text", ["on", "psk", "psk:", "x509:", "/etc/keys", "tls:x", "psk:a\0b"])
def test_what_is_no_tls(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(listen=":1", tls=text)
    assert str(caught.value) == (
        f"tls: '{text}' is not a way to know a client: use psk:FILE or x509:FOLDER, or off where the network "
        "below is encrypted"
    )


def test_paths_hold_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")
    assert parse(listen=":1", tls="PSK:keys").tls == "psk:/tmp/keys"
    assert parse(listen=":1", tls="x509:../pki").tls == "x509:/pki"
    # Of the service that reads it; another process cannot know where that is.
    assert parse(listen=":1", tls="psk:%d/keys").tls == "psk:%d/keys"
    assert parse(listen=":1", tls="x509:%d").tls == "x509:%d"


def test_names() -> None:
    made = parse(listen=":1", tls="psk:/k", clients="guest1, a@b.example ,_x+y-z")
    assert made.clients == "guest1,a@b.example,_x+y-z"
    assert network.names("") == []


@pytest.mark.parametrize("name", ["", "a b", "-x", "a:b", "#00", "größe", "a\nb", "x" * 65, "*"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(listen=":1", tls="psk:/k", clients=f"guest1,{name}")
    shown = name.strip()
    assert str(caught.value) == (
        f"clients: '{shown}' is not a client's name: use 1 to 64 letters, digits, _ . @ + or -, with commas "
        "between"
    )


def test_names_twice_and_too_many() -> None:
    with pytest.raises(ConfigError, match=r"^clients: 'a' is there twice: name each client once$"):
        parse(listen=":1", tls="psk:/k", clients="a,b,a")
    with pytest.raises(ConfigError, match=r"^clients: there are 1001 names: use at most 1000"):
        parse(listen=":1", tls="psk:/k", clients=",".join(f"n{i}" for i in range(1001)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tls": "psk:/k"}, "tls=psk:/k is for a network: say where to listen, such as listen=:10809"),
        ({"tls": "off"}, "tls=off is for a network: say where to listen, such as listen=:10809"),
        ({"clients": "a"}, "clients=a is for a network: add listen=:10809 and tls=psk:FILE"),
        (
            {"listen": "127.0.0.1", "clients": "a"},
            "clients=a: without TLS nobody knows who a client is: add tls=psk:FILE or tls=x509:FOLDER",
        ),
        (
            {"listen": ":1", "tls": "off", "clients": "a"},
            "clients=a: without TLS nobody knows who a client is: add tls=psk:FILE or tls=x509:FOLDER",
        ),
        (
            {"listen": "127.0.0.1", "swap": "local"},
            "listen=127.0.0.1 is for other machines, swap=local for this machine's kernel, which comes by a "
            "socket of its own: leave one out",
        ),
        (
            {"listen": "127.0.0.1", "front": "ublk"},
            "listen=127.0.0.1 is for front=nbd: leave it out with front=ublk",
        ),
        (
            {"handshake_limit": "4", "front": "ublk"},
            "handshake_limit=4 is for front=nbd: leave it out with front=ublk",
        ),
    ],
)
def test_what_does_not_go_together(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**settings)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("90", 90), ("90s", 90), ("5min", 300), ("1d", 86400)]
)
def test_idle(text: str, seconds: float) -> None:
    made = parse(client_idle=text).client_idle
    assert made == seconds
    again = config.written("client_idle", made)  # as a restart writes it
    assert parse(client_idle=again).client_idle == seconds


@pytest.mark.parametrize("text", ["9", "2d", "-1", "never", "1m", ""])
def test_what_is_no_idle_time(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(client_idle=text)
    assert str(caught.value) == (
        f"client_idle: '{text}' is out of range: use 10 seconds to 24 hours, such as 90s or "
        "1h, or 0 for never"
    )
