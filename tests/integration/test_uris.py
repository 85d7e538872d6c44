"""Each NBD URI that `zramd start` prints connects: nbdinfo is given it as it stands."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.run import zramd_command

Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server with these options of nbdkit, and return the URI that is printed."""
    if shutil.which("nbdinfo") is None:
        pytest.skip("nbdinfo is not installed")
    folder = tmp_path / "run"

    def run(words: str) -> str:
        done = zramd_command("start", "uri", "--size", "16M", f"rundir={folder}", "--", *shlex.split(words))
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("NBD URI ")]
        return line.removeprefix("NBD URI").strip()

    yield run
    if (folder / "pid").exists():
        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)


@pytest.fixture
def port() -> str:
    with socket.create_server(("localhost", 0)) as listener:
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key that two sides share, and certificates for this machine."""
    folder = tmp_path_factory.mktemp("tls")
    dump = subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True, check=True).stdout
    if "tls=yes" not in dump.split():
        pytest.skip("nbdkit has no TLS")
    (folder / "keys psk").write_text("# made by hand\nalice&bob:" + os.urandom(32).hex() + "\n")
    return folder


def certificates(folder: Path) -> Path:
    if shutil.which("certtool") is None:
        pytest.skip("certtool is not installed: gnutls-bin")
    here = folder / "pki"
    here.mkdir(exist_ok=True)
    common = 'cn = "zramd test"\nexpiration_days = 1\n'
    (here / "ca.info").write_text(f"{common}ca\ncert_signing_key\n")
    (here / "server.info").write_text(
        'cn = "localhost"\ndns_name = "localhost"\nip_address = "127.0.0.1"\nip_address = "::1"\n'
        "expiration_days = 1\ntls_www_server\nencryption_key\nsigning_key\n"
    )

    def certtool(*words: str) -> None:
        subprocess.run(["certtool", *words], cwd=here, capture_output=True, check=True)

    for name in ("ca", "server"):
        certtool("--generate-privkey", "--key-type=ecdsa", "--outfile", f"{name}-key.pem")
    certtool(
        "--generate-self-signed", "--load-privkey=ca-key.pem", "--template=ca.info", "--outfile=ca-cert.pem"
    )
    certtool(
        *("--generate-certificate", "--load-privkey=server-key.pem", "--load-ca-certificate=ca-cert.pem"),
        *("--load-ca-privkey=ca-key.pem", "--template=server.info", "--outfile=server-cert.pem"),
    )
    return here


def connects(uri: str, *, tls: bool) -> None:
    done = subprocess.run(["nbdinfo", uri], capture_output=True, text=True, errors="replace", timeout=30)
    assert done.returncode == 0, (uri, done.stderr)
    assert "export-size: 16777216" in done.stdout
    assert ("with TLS" in done.stdout) == tls, done.stdout
    size = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, timeout=30, check=True)
    assert size.stdout == "16777216\n"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "-p PORT",
        "--port PORT",
        "--por PORT",
        "-p 0PORT -4",
        "-p PORT -i 127.0.0.1",
        "-p PORT --ip-addr=0.0.0.0",
        "-U 'TMP/a b%c.sock'",
        "--unix=TMP/x?y#z",
        "-U TMP/\udcff",  # a byte that is no text
        "--tls off",
    ],
)
def test_without_tls(start: Start, port: str, tmp_path: Path, words: str) -> None:
    connects(start(words.replace("PORT", port).replace("TMP", str(tmp_path))), tls=False)


@pytest.mark.parametrize(
    "words", ["-6 -p PORT", "-p PORT -i ::1", "--ipv6-only --port=PORT", "-i :: -p PORT"]
)
def test_without_tls_by_ipv6(start: Start, port: str, words: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    connects(start(words.replace("PORT", port)), tls=False)


@pytest.mark.parametrize(
    "words",
    [
        "--tls=require --tls-psk=KEYS",
        "--tls require --tls-psk KEYS",
        "-p PORT --tls require --tls-psk KEYS",
        "--tls-ps KEYS --tls=require -U TMP/s",
    ],
)
def test_with_a_shared_key(start: Start, secrets: Path, port: str, tmp_path: Path, words: str) -> None:
    keys = shlex.quote(str(secrets / "keys psk"))
    words = words.replace("KEYS", keys).replace("PORT", port).replace("TMP", str(tmp_path))
    connects(start(words), tls=True)


@pytest.mark.parametrize(
    "words",
    [
        "--tls=require --tls-certificates=PKI",
        "-p PORT --tls require --tls-certificates PKI",
        "-p PORT -i 127.0.0.1 --tls=require --tls-cert=PKI",
    ],
)
def test_with_certificates(start: Start, secrets: Path, port: str, words: str) -> None:
    words = words.replace("PKI", str(certificates(secrets))).replace("PORT", port)
    connects(start(words), tls=True)


@pytest.mark.parametrize("words", ["-U -", "-p 0"])
def test_no_uri_where_none_is_known(start: Start, words: str) -> None:
    assert start(words) == "as nbdkit was told"
