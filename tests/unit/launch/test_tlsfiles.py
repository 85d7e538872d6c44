"""Files of keys and certificates: what cannot be used is refused in one sentence, before a server starts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from zramd.contract import rundir
from zramd.errors import ConfigError
from zramd.launch import tlsfiles
from zramd.settings import config

KEY = "0123456789abcdef" * 4


def settings(folder: Path, tls: str, clients: str = "") -> config.Config:
    pairs = [("size", "1M"), ("rundir", f"{folder}/run"), ("listen", ":1")]
    pairs += [("tls", tls), ("clients", clients)]
    return config.parse(pairs)


def refused(folder: Path, tls: str, clients: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        tlsfiles.options(settings(folder, tls, clients))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.touch(0o600)
    return path


class TestKeys:
    def test_without_names_nbdkit_gets_the_users_file(self, file: Path) -> None:
        file.write_text(f"# by hand\n\nguest1:{KEY}\nguest2:{KEY.upper()}")
        wanted = settings(file.parent, f"psk:{file}")
        assert tlsfiles.options(wanted) == ["--tls=require", f"--tls-psk={file}"]
        tlsfiles.put(wanted, tlsfiles.options(wanted))
        assert os.listdir(file.parent) == [file.name]

    def test_with_names_it_gets_their_lines(self, file: Path) -> None:
        file.write_text(f"a:{KEY}\nb:{KEY}\nc:{KEY}\n")
        (file.parent / "run").mkdir(0o700)
        wanted = settings(file.parent, f"psk:{file}", "c,a")
        options = tlsfiles.options(wanted)
        made = file.parent / "run" / rundir.KEYS[0]
        assert options == ["--tls=require", f"--tls-psk={made}"]
        umask = os.umask(0)
        try:
            tlsfiles.put(wanted, options)
        finally:
            os.umask(umask)
        assert made.read_text() == f"c:{KEY}\na:{KEY}\n"
        assert made.stat().st_mode & 0o777 == 0o600
        tlsfiles.sweep(str(file.parent / "run"))  # no server has it
        assert not made.exists()

    def test_the_file_of_a_live_server_is_left_alone(self, file: Path, tmp_path: Path) -> None:
        """nbdkit reads it at each handshake."""
        file.write_text(f"a:{KEY}\n")
        folder = tmp_path / "run"
        folder.mkdir(0o700)
        mine = folder / rundir.KEYS[0]
        mine.touch()
        taken = {rundir.KEYS[0]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tlsfiles, "_in_use", lambda folder: taken)
            assert tlsfiles.options(settings(tmp_path, f"psk:{file}", "a"))[1] == (
                f"--tls-psk={folder}/{rundir.KEYS[1]}"
            )
            tlsfiles.sweep(str(folder))
        assert mine.exists()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "tls: 'FILE' is empty: docs/network.md says how to make it"),
            ("# none\n", "tls: 'FILE' has no key: 'psktool -u NAME -p FILE' makes one"),
            ("guest1\n", "tls: line 1 of 'FILE' is not NAME:KEY: 'psktool -u NAME -p FILE' makes one"),
            (f":{KEY}\n", "tls: line 1 of 'FILE' is not NAME:KEY: 'psktool -u NAME -p FILE' makes one"),
            (
                "a:xyz\n",
                "tls: the key of 'a' in 'FILE' is not in hexadecimal digits: 'psktool -u "
                "NAME -p FILE' makes one",
            ),
            (
                f"a:{KEY} \n",
                "tls: the key of 'a' in 'FILE' is not in hexadecimal digits: 'psktool -u "
                "NAME -p FILE' makes one",
            ),
            (
                f"a:{KEY}0\n",
                "tls: the key of 'a' in 'FILE' is not in hexadecimal digits: 'psktool -u "
                "NAME -p FILE' makes one",
            ),
            (
                "a:0011\n",
                "tls: the key of 'a' in 'FILE' has 2 bytes and could be guessed: use 16 or more: "
                "'psktool -u NAME -p FILE' makes one",
            ),
            (
                f"a:{KEY}\r\n",
                "tls: line 1 of 'FILE' ends as on Windows, which nbdkit takes for a part of the key: run "
                "\"sed -i 's/\\r$//' 'FILE'\"",
            ),
            (
                f"\ufeffa:{KEY}\n",
                "tls: 'FILE' begins with a byte order mark, which nbdkit takes for a part of the name: run "
                "\"sed -i '1s/^\\xef\\xbb\\xbf//' 'FILE'\"",
            ),
            (
                f"a:{KEY}\nb:{KEY}\na:{KEY}\n",
                "tls: 'a' is there twice in 'FILE', in lines 1 and 3: remove one",
            ),
        ],
    )
    def test_what_is_in_it(self, file: Path, text: str, said: str) -> None:
        file.write_bytes(text.encode())
        assert refused(file.parent, f"psk:{file}") == said.replace("FILE' makes", "@' makes").replace(
            "FILE", str(file)
        ).replace("@' makes", "FILE' makes")

    def test_what_is_no_text_or_too_long(self, file: Path) -> None:
        file.write_bytes(b"\xff\xfe")
        assert refused(file.parent, f"psk:{file}") == (
            f"tls: '{file}' is not text: docs/network.md says how to make it"
        )
        file.write_bytes(b"#" * (tlsfiles.MAX_BYTES + 1))
        assert refused(file.parent, f"psk:{file}") == (
            f"tls: '{file}' has more than 1048576 bytes: it is not what it should be"
        )

    def test_who_has_no_key(self, file: Path) -> None:
        file.write_text(f"a:{KEY}\n")
        assert refused(file.parent, f"psk:{file}", "a,b") == (
            f"clients: 'b' has no key in '{file}': run \"psktool -u b -p '{file}'\", or leave it out"
        )

    def test_what_is_not_there_or_no_file(self, tmp_path: Path) -> None:
        assert refused(tmp_path, f"psk:{tmp_path}/no") == (
            f"tls: there is no file '{tmp_path}/no': make it, or name another one"
        )
        assert refused(tmp_path, f"psk:{tmp_path}") == (
            f"tls: '{tmp_path}' is not a regular file: use a file of your own"
        )
        os.mkfifo(tmp_path / "fifo", 0o600)
        assert refused(tmp_path, f"psk:{tmp_path}/fifo") == (
            f"tls: '{tmp_path}/fifo' is not a regular file: use a file of your own"
        )

    @pytest.mark.parametrize(("mode", "fine"), [(0o600, True), (0o400, True), (0o604, False), (0o644, False)])
    def test_who_else_may_read(self, file: Path, mode: int, fine: bool) -> None:
        file.write_text(f"a:{KEY}\n")
        file.chmod(mode)
        if fine:
            assert tlsfiles.options(settings(file.parent, f"psk:{file}"))
        else:
            assert refused(file.parent, f"psk:{file}") == (
                f"tls: other users may read '{file}': run \"chmod 600 '{file}'\", and make new keys"
            )

    @pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
    def test_files_of_another_user(self, file: Path) -> None:
        file.write_text(f"a:{KEY}\n")
        os.chown(file, 65534, -1)
        assert refused(file.parent, f"psk:{file}").endswith(": use a file of your own")

    def test_a_file_of_the_service(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        assert refused(file.parent, "psk:%d/keys.psk") == (
            "tls=psk:%d/keys.psk: %d is the folder of a service's credentials, and this is "
            "no service that has "
            "any: add LoadCredential= to its unit, or name another file"
        )
        file.write_text(f"a:{KEY}\n")
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(file.parent))
        assert tlsfiles.options(settings(file.parent, "psk:%d/keys.psk"))[1] == f"--tls-psk={file}"


def certtool(folder: Path, *words: str) -> None:
    subprocess.run(["certtool", *words], cwd=folder, capture_output=True, check=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server's certificate of one day, and a key that is another's."""
    if shutil.which("certtool") is None:
        pytest.skip("certtool is not installed: gnutls-bin")
    folder = tmp_path_factory.mktemp("pki")
    (folder / "ca.info").write_text("cn = test\nca\ncert_signing_key\nexpiration_days = 30\n")
    (folder / "server.info").write_text("cn = localhost\ntls_www_server\nsigning_key\nexpiration_days = 1\n")
    (folder / "old.info").write_text(
        'cn = localhost\ntls_www_server\nsigning_key\nactivation_date = "2001-02-03 04:05:06 UTC"\n'
        'expiration_date = "2002-02-03 04:05:06 UTC"\n'
    )
    (folder / "early.info").write_text(
        'cn = localhost\ntls_www_server\nsigning_key\nactivation_date = "2061-02-03 04:05:06 UTC"\n'
        'expiration_date = "2062-02-03 04:05:06 UTC"\n'
    )
    (folder / "client.info").write_text("cn = localhost\ntls_www_client\nsigning_key\nexpiration_days = 1\n")
    for name in ("ca", "server", "other"):
        certtool(folder, "--generate-privkey", "--key-type=ecdsa", f"--outfile={name}-key.pem")
    ca = ("--load-privkey=ca-key.pem", "--template=ca.info", "--outfile=ca-cert.pem")
    certtool(folder, "--generate-self-signed", *ca)
    certtool(
        folder,
        *("--generate-self-signed", "--load-privkey=other-key.pem", "--template=ca.info"),
        "--outfile=other-ca.pem",
    )
    for name in ("server", "old", "early", "client"):
        certtool(
            folder,
            *("--generate-certificate", "--load-privkey=server-key.pem", "--load-ca-certificate=ca-cert.pem"),
            *("--load-ca-privkey=ca-key.pem", f"--template={name}.info", f"--outfile={name}-cert.pem"),
        )
    certtool(
        folder,
        *("--generate-crl", "--load-ca-certificate=ca-cert.pem", "--load-ca-privkey=ca-key.pem"),
        *("--template=ca.info", f"--outfile={tlsfiles.REVOKED}"),
    )
    return folder


@pytest.fixture
def pki(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pki"
    folder.mkdir(0o700)
    for name in (tlsfiles.CA, tlsfiles.CERTIFICATE, tlsfiles.KEY):
        shutil.copy(made / name, folder / name)
        (folder / name).chmod(0o600)
    return folder


class TestCertificates:
    def test_a_folder_that_has_all(self, pki: Path) -> None:
        (pki / tlsfiles.CERTIFICATE).chmod(0o644)  # no secret
        assert tlsfiles.options(settings(pki.parent, f"x509:{pki}")) == [
            "--tls=require",
            f"--tls-certificates={pki}",
            "--tls-verify-peer",
        ]

    def test_no_folder(self, tmp_path: Path) -> None:
        assert refused(tmp_path, f"x509:{tmp_path}/no") == (
            f"tls: there is no folder '{tmp_path}/no': make it with ca-cert.pem, server-cert.pem and "
            "server-key.pem"
        )

    @pytest.mark.parametrize("name", [tlsfiles.CA, tlsfiles.CERTIFICATE, tlsfiles.KEY])
    def test_a_file_that_lacks(self, pki: Path, name: str) -> None:
        (pki / name).unlink()
        assert refused(pki.parent, f"x509:{pki}") == (
            f"tls: there is no file '{pki}/{name}': make it, or name another one"
        )

    def test_a_key_that_others_read(self, pki: Path) -> None:
        (pki / tlsfiles.KEY).chmod(0o644)
        assert refused(pki.parent, f"x509:{pki}").startswith("tls: other users may read ")

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("ca-cert.pem", "x", "has no certificate: certtool makes one, as docs/network.md says"),
            ("server-key.pem", "x", "has no private key: 'certtool --generate-privkey' makes one"),
        ],
    )
    def test_what_is_none(self, pki: Path, name: str, text: str, said: str) -> None:
        (pki / name).write_text(text)
        assert refused(pki.parent, f"x509:{pki}") == f"tls: '{pki}/{name}' {said}"

    def test_a_damaged_one(self, pki: Path) -> None:
        file = pki / tlsfiles.CERTIFICATE
        lines = file.read_text().splitlines()
        begin = lines.index("-----BEGIN CERTIFICATE-----")
        file.write_text("\n".join([*lines[: begin + 2], "-----END CERTIFICATE-----"]))
        assert refused(pki.parent, f"x509:{pki}") == (
            f"tls: a certificate in '{file}' is damaged: make it again"
        )

    @pytest.mark.parametrize(
        ("which", "said"),
        [
            ("old", "was valid until 2002-02-03: make a new one"),
            ("early", "is valid from 2061-02-03 on: set the clock, or wait"),
        ],
    )
    def test_one_that_is_not_valid_now(self, made: Path, pki: Path, which: str, said: str) -> None:
        shutil.copy(made / f"{which}-cert.pem", pki / tlsfiles.CERTIFICATE)
        assert refused(pki.parent, f"x509:{pki}") == (
            f"tls: the certificate in '{pki}/server-cert.pem' {said}"
        )

    @pytest.mark.parametrize(
        ("name", "instead", "why"),
        [
            (tlsfiles.CA, "other-ca.pem", "unable to get local issuer certificate"),
            (tlsfiles.CERTIFICATE, "client-cert.pem", "unsuitable certificate purpose"),
        ],
    )
    def test_one_that_clients_refuse(self, made: Path, pki: Path, name: str, instead: str, why: str) -> None:
        shutil.copy(made / instead, pki / name)
        assert refused(pki.parent, f"x509:{pki}") == (
            f"tls: clients would refuse '{pki}/server-cert.pem' ({why}): have '{pki}/ca-cert.pem' sign it, "
            "for a server (tls_www_server)"
        )

    def test_a_list_of_revoked_ones(self, made: Path, pki: Path) -> None:
        file = pki / tlsfiles.REVOKED
        shutil.copy(made / file.name, file)
        file.chmod(0o644)
        assert tlsfiles.options(settings(pki.parent, f"x509:{pki}"))
        file.chmod(0o666)
        assert f"'{file}'" in refused(pki.parent, f"x509:{pki}")
        file.unlink()
        os.mkfifo(file)
        assert f"'{file}'" in refused(pki.parent, f"x509:{pki}")
        file.unlink()
        file.write_text("x")
        assert refused(pki.parent, f"x509:{pki}") == (
            f"tls: '{file}' lists no revoked certificates: 'certtool --generate-crl' does"
        )

    def test_the_key_of_another(self, made: Path, pki: Path) -> None:
        shutil.copy(made / "other-key.pem", pki / tlsfiles.KEY)
        assert refused(pki.parent, f"x509:{pki}") == (
            f"tls: '{pki}/server-key.pem' is not the key of '{pki}/server-cert.pem' (key values mismatch): "
            "make both again"
        )

    def test_a_key_with_a_passphrase(self, pki: Path) -> None:
        words = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", tlsfiles.KEY, "-out", "new"]
        subprocess.run(words, cwd=pki, check=True, capture_output=True)
        os.replace(pki / "new", pki / tlsfiles.KEY)
        (pki / tlsfiles.KEY).chmod(0o600)
        assert refused(pki.parent, f"x509:{pki}") == (
            f"tls: '{pki}/server-key.pem' has a passphrase, and nobody to give it: remove that"
        )
