"""nbdkit's command line, and the URI that follows from it."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from zramd.errors import ConfigError
from zramd.launch import nbdkit, uris
from zramd.settings import config


@pytest.fixture
def settings() -> config.Config:
    return config.parse([("size", "1G"), ("name", "zram0"), ("rundir", "/run/z")])


def run_line(settings: config.Config, words: str) -> str:
    options = nbdkit.read_options(words.split())
    return " ".join(nbdkit.command(settings, [("size", "1G")], options)).replace(
        nbdkit.plugin_path(), "PLUGIN"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "nbdkit -f -U /run/z/nbd.sock python PLUGIN size=1G"),
        ("-t 4", "nbdkit -f -U /run/z/nbd.sock -t 4 python PLUGIN size=1G"),
        ("-t4 -v", "nbdkit -f -U /run/z/nbd.sock -t4 -v python PLUGIN size=1G"),
        ("-p 10809", "nbdkit -f -p 10809 python PLUGIN size=1G"),
        ("-p10809", "nbdkit -f -p10809 python PLUGIN size=1G"),
        ("--port=10809", "nbdkit -f --port=10809 python PLUGIN size=1G"),
        ("--port 10809 --tls=require", "nbdkit -f --port 10809 --tls=require python PLUGIN size=1G"),
        ("-i 127.0.0.1", "nbdkit -f -i 127.0.0.1 python PLUGIN size=1G"),
        ("-U -", "nbdkit -f -U - python PLUGIN size=1G"),
        ("--vsock", "nbdkit -f --vsock python PLUGIN size=1G"),
        ("-s", "nbdkit -f -s python PLUGIN size=1G"),
        (
            "--filter=delay rdelay=1 --filter log a=x",
            "nbdkit -f -U /run/z/nbd.sock --filter=delay --filter log python PLUGIN size=1G rdelay=1 a=x",
        ),
        ("-D nbdkit.gc=1", "nbdkit -f -U /run/z/nbd.sock -D nbdkit.gc=1 python PLUGIN size=1G"),
        ("--run x=y", "nbdkit -f -U /run/z/nbd.sock --run x=y python PLUGIN size=1G"),
    ],
)
def test_command(settings: config.Config, words: str, line: str) -> None:
    assert run_line(settings, words) == line


@pytest.mark.parametrize(
    ("model", "words", "given"),
    [
        ("auto", "", []),
        ("serialize_requests", "", []),
        ("parallel", "", [f"--threads={nbdkit.THREADS}"]),
        ("parallel", "-v", [f"--threads={nbdkit.THREADS}", "-v"]),
        ("parallel", "-t 8", ["-t", "8"]),
        ("parallel", "-t8", ["-t8"]),
        ("parallel", "--threads=8", ["--threads=8"]),
        ("parallel", "--thr 8", ["--thr", "8"]),
        ("serialize_requests", "--threads=8", ["--threads=8"]),
    ],
)
def test_threads_for_each_client(model: str, words: str, given: list[str]) -> None:
    """Where there are several: fewer than nbdkit's own number, unless the user says how many."""
    pairs = [("size", "1G"), ("rundir", "/run/z"), ("thread_model", model)]
    line = nbdkit.command(config.parse(pairs), pairs, nbdkit.read_options(words.split()))
    assert line[4 : line.index("python")] == given


@pytest.mark.parametrize(
    ("model", "given"), [("auto", [f"--threads={nbdkit.THREADS}"]), ("serialize_requests", [])]
)
def test_threads_where_a_read_may_wait_for_a_disk(model: str, given: list[str]) -> None:
    pairs = [("size", "1G"), ("rundir", "/run/z"), ("thread_model", model), ("backing", "/dev/sdb")]
    line = nbdkit.command(config.parse(pairs), pairs, nbdkit.read_options([]))
    assert line[4 : line.index("python")] == given


def test_plugin_is_there() -> None:
    assert os.path.exists(nbdkit.plugin_path())


@pytest.mark.parametrize(
    ("words", "uri"),
    [
        ("", "nbd+unix:///zram0?socket=/run/z/nbd.sock"),
        ("--tls=require", "nbds+unix:///zram0?socket=/run/z/nbd.sock"),
        ("-U /tmp/a%b", "nbd+unix:///zram0?socket=/tmp/a%25b"),
        ("--unix=/tmp/x", "nbd+unix:///zram0?socket=/tmp/x"),
        ("-U -", ""),
        ("-p 1234", "nbd://localhost:1234/zram0"),
        ("-p1234 --tls=require", "nbds://localhost:1234/zram0"),
        ("--ipaddr=::1", "nbd://[::1]:10809/zram0"),
        ("--vsock --port 5", "nbd+vsock://1:5/zram0"),
        ("--vsock", "nbd+vsock://1:10809/zram0"),
        ("--tls require -p 0010809", "nbds://localhost:10809/zram0"),
        ("-6 -p 1", "nbd://[::1]:1/zram0"),
        ("--ipv6 --po 1", "nbd://[::1]:1/zram0"),
        ("-p nonesuch", ""),
        ("-p 0", ""),
        ("--tls=require --tls-psk /x/y", "nbds+unix:///zram0?socket=/run/z/nbd.sock&tls-psk-file=/x/y"),
    ],
)
def test_uri(settings: config.Config, words: str, uri: str) -> None:
    assert uris.uri(settings, nbdkit.read_options(words.split())) == uri


def test_passed_sockets(settings: config.Config) -> None:
    options = nbdkit.read_options([])
    options.sockets = [3]
    pairs = [("size", "1G")]
    assert nbdkit.command(settings, pairs, options) == [
        "nbdkit",
        "-f",
        "python",
        nbdkit.plugin_path(),
        "size=1G",
    ]


def test_paths_hold_wherever_the_server_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting that a folder has a say in."""
    monkeypatch.chdir(tmp_path)
    pairs = [("size", "1G")]
    for setting in config.SETTINGS:
        text = "psk:some/file" if setting.name == "tls" else "some/file.prom"
        with suppress(ConfigError):
            if f"{tmp_path}/" in str(setting.parse(text)):
                pairs.append((setting.name, text))
    assert {"rundir", "state", "metrics_file", "tls"} <= {key for key, _ in pairs}
    settings = config.parse([*pairs, ("listen", "127.0.0.1")])
    for key, value in nbdkit.absolute(settings, pairs)[1:]:
        assert f"{tmp_path}/some/file" in value, key
