"""Settings: sizes, names, algorithms, duplicates, and defaults."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.server import PACKAGE_PARENT

from zramd.core.device import device
from zramd.errors import ConfigError
from zramd.settings import amounts, config, values


def parse(**settings: str) -> config.Config:
    return config.parse({"disksize": "1M", "rundir": "/tmp/zramd-test", **settings}.items())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("4096", 4096),
        ("1k", 1024),
        ("1K", 1024),
        ("3M", 3 << 20),
        ("2g", 2 << 30),
        ("1T", 1 << 40),
        ("1p", 1 << 50),
        ("15E", 15 << 60),
        ("0x10", 16),
        ("0X1fM", 31 << 20),
        ("0x1E", 30),  # E is a digit here, as it is for the kernel
        ("010", 8),
        ("010K", 8192),
        ("512B", 512),
        ("1KB", 1024),
        ("1KiB", 1024),
        ("1gib", 1 << 30),
    ],
)
def test_size(text: str, size: int) -> None:
    assert amounts.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "K", "-1", "+1", "1.5G", "1 G", "64X", "08", "1KK", "1iB", "0x", "1e3", "\uff11", "1" * 5000],
)
def test_bad_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size") as caught:
        amounts.parse_size(text)
    assert f"'{text}'" in str(caught.value)


def test_size_beyond_64_bits() -> None:
    with pytest.raises(ConfigError, match="'16E' does not fit"):
        amounts.parse_size("16E")


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert config.parse([("size", "1G")]) == config.Config(
        disksize=1 << 30,
        name="zram0",
        mem_limit=0,
        budget=0,
        budget_floor=0,
        comp_algorithm="lz4",
        rundir="/run/zramd/zram0",
        state="",
        verify=False,
        pool_full="enospc",
        swap="other",
        reserve=8 << 20,
        front="nbd",
        thread_model="auto",
        client_limit=1000,
        listen="",
        tls="",
        clients="",
        client_idle=0.0,
        handshake_limit=32,
        compaction=True,
        compaction_threshold=2.0,
        compaction_near_limit=90.0,
        compaction_interval=1.0,
        compaction_step=65536,
        recompression="zstd(level=4)",
        cold_age=300.0,
        backing="",
        writeback_age=3600.0,
        writeback_limit=1 << 30,
        stats_interval=1.0,
        metrics_file="",
        endpoint=True,
    )


def test_disksize_is_rounded_up() -> None:
    assert parse(disksize="1").disksize == 4096
    assert parse(disksize="4097").disksize == 8192
    assert parse(disksize="4T").disksize == device.MAX_DISKSIZE == values.MAX_DISKSIZE


@pytest.mark.parametrize("text", ["0", "5T", "4398046511105"])
def test_disksize_out_of_range(text: str) -> None:
    with pytest.raises(ConfigError, match=f"disksize: '{text}' is out of range"):
        parse(disksize=text)


@pytest.mark.parametrize("text", ["zram0", "a", "A.b-c_9", "_", "9", "x" * 64])
def test_name(text: str) -> None:
    assert parse(name=text).name == text


@pytest.mark.parametrize("text", ["", ".", "..", ".a", "-a", "a/b", "a b", "x" * 65, "a\n", "é", 'a"b'])
def test_bad_name(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a name"):
        parse(name=text)


@pytest.mark.parametrize(
    ("text", "algorithm", "codec"),
    [
        ("lz4", "lz4", ("lz4", 1)),
        ("lz4(level=1)", "lz4(level=1)", ("lz4", 1)),
        ("lz4(level=65537)", "lz4(level=65537)", ("lz4", 65537)),
        ("lz4( level = 08 )", "lz4(level=8)", ("lz4", 8)),
        ("lz4hc", "lz4hc", ("lz4hc", 9)),
        ("lz4hc(level=3)", "lz4hc(level=3)", ("lz4hc", 3)),
        ("zstd", "zstd", ("zstd", 3)),
        ("zstd(level=1)", "zstd(level=1)", ("zstd", 1)),
        ("zstd(level=19)", "zstd(level=19)", ("zstd", 19)),
        ("none", "none", ("none", 0)),
    ],
)
def test_algorithm(text: str, algorithm: str, codec: tuple[str, int]) -> None:
    parsed = parse(comp_algorithm=text)
    assert (parsed.comp_algorithm, parsed.codec) == (algorithm, codec)


@pytest.mark.parametrize(
    "text",
    ["", "LZ4", "lzo-rle", "842", "deflate", "lz4()", "lz4(level=-1)", "zstd(dict=/x)", "lz4(level=1", "é"],
)
def test_bad_algorithm(text: str) -> None:
    with pytest.raises(ConfigError, match="is not available: use lz4, lz4hc, zstd or none") as caught:
        parse(comp_algorithm=text)
    assert f"comp_algorithm: '{text}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("lz4(level=0)", "lz4(level=N) with N from 1 to 65537"),
        ("lz4(level=65538)", "lz4(level=N) with N from 1 to 65537"),
        ("lz4hc(level=2)", "lz4hc(level=N) with N from 3 to 9"),
        ("lz4hc(level=10)", "lz4hc(level=N) with N from 3 to 9"),
        ("zstd(level=0)", "zstd(level=N) with N from 1 to 19"),
        ("zstd(level=20)", "zstd(level=N) with N from 1 to 19"),
    ],
)
def test_a_level_out_of_range(text: str, use: str) -> None:
    for setting in {"comp_algorithm", "recompression" if text.startswith("zstd") else "comp_algorithm"}:
        with pytest.raises(ConfigError) as caught:
            parse(**{setting: text})
        assert str(caught.value) == f"{setting}: '{text}' is out of range: use {use}"


def test_none_has_no_level() -> None:
    with pytest.raises(ConfigError, match=r"'none\(level=1\)' is not available: none has no level"):
        parse(comp_algorithm="none(level=1)")


@pytest.mark.parametrize(
    "text", ["lz4 zstd", "lz4 zstd(level=3)", "zstd(level=3) (type=idle)", "lz4,zstd(level=3)x"]
)
def test_two_algorithms_are_two_settings(text: str) -> None:
    with pytest.raises(
        ConfigError, match="is more than one algorithm: use comp_algorithm for what is written"
    ):
        parse(comp_algorithm=text)


@pytest.mark.parametrize(
    ("text", "recompression", "level"),
    [
        ("zstd", "zstd", 3),
        ("zstd(level=1)", "zstd(level=1)", 1),
        ("zstd( level=019 )", "zstd(level=19)", 19),
        ("off", "off", 0),
        ("No", "off", 0),
    ],
)
def test_recompression(text: str, recompression: str, level: int) -> None:
    parsed = parse(recompression=text)
    assert (parsed.recompression, parsed.cold_level) == (recompression, level)


@pytest.mark.parametrize("text", ["", "on", "lz4", "lz4hc", "none", "zstd lz4", "zstd()", "lzo-rle(level=3)"])
def test_bad_recompression(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(recompression=text)
    sentence = f"recompression: '{text}' does not recompress: use zstd, zstd(level=N) or off"
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("algorithm", "default"),
    [("lz4", "zstd(level=4)"), ("lz4hc(level=3)", "zstd(level=4)"), ("zstd", "off"), ("none", "off")],
)
def test_the_default_recompression_is_what_gains(algorithm: str, default: str) -> None:
    assert parse(comp_algorithm=algorithm).recompression == default


def test_a_recompression_that_gains_nothing() -> None:
    for level in (1, 3):
        with pytest.raises(
            ConfigError, match="makes nothing smaller than comp_algorithm='zstd' did: use a higher"
        ):
            parse(comp_algorithm="zstd", recompression=f"zstd(level={level})")
    assert parse(comp_algorithm="zstd", recompression="zstd(level=4)").recompression == "zstd(level=4)"
    assert parse(comp_algorithm="zstd(level=19)", recompression="off").recompression == "off"


@pytest.mark.parametrize("text", ["on", "yes", "TRUE", "1"])
def test_true(text: str) -> None:
    assert parse(compaction=text).compaction is True


@pytest.mark.parametrize("text", ["off", "No", "false", "0"])
def test_false(text: str) -> None:
    assert parse(endpoint=text).endpoint is False


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("compaction", "2"),
        ("endpoint", ""),
        ("pool_full", "enomem"),
        ("thread_model", "serial"),
        ("compaction_threshold", "0"),
        ("compaction_threshold", "101"),
        ("compaction_near_limit", "nan"),
        ("compaction_interval", "0"),
        ("compaction_interval", "inf"),
        ("compaction_step", "4095"),
        ("compaction_step", "2G"),
        ("recompression", "lz4"),
        ("recompression", "zstd(level=0)"),
        ("recompression", "zstd(level=20)"),
        ("recompression", "zstd level=3"),
        ("recompression", ""),
        ("cold_age", "9"),
        ("cold_age", "9.9s"),
        ("cold_age", "301min"),
        ("cold_age", "6h"),
        ("cold_age", "1e3"),
        ("cold_age", "5 m"),
        ("cold_age", "min"),
        ("cold_age", ""),
        ("cold_age", "300ms"),
        ("writeback_age", "9"),
        ("writeback_age", "6h"),
        ("budget", "1"),
        ("budget", "4095"),
        ("writeback_limit", "none"),
        ("writeback_limit", "0"),
        ("writeback_limit", "0x0"),
        ("writeback_limit", "1"),
        ("writeback_limit", "65535"),
        ("writeback_limit", "1G a day"),
        ("client_limit", "0"),
        ("client_limit", "65537"),
        ("client_limit", "-1"),
        ("client_limit", "1e3"),
        ("client_limit", "²"),
        ("stats_interval", "-1"),
        ("stats_interval", "1e9"),
        ("mem_limit", "half"),
        ("metrics_file", "/var/lib/metrics"),
        ("metrics_file", "/var/lib/x.prom/"),
        ("rundir", ""),
        ("rundir", "/" + "x" * 200),
    ],
)
def test_bad_value_is_quoted(key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**{key: text})
    sentence = str(caught.value)
    assert sentence.startswith(f"{key}: '{text}' ")
    assert "\n" not in sentence


def test_other_values() -> None:
    parsed = parse(
        compaction_threshold="12.5%", compaction_interval=".5", stats_interval="0", pool_full="EIO"
    )
    assert parsed.compaction_threshold == 12.5
    assert parsed.compaction_interval == 0.5
    assert parsed.stats_interval == 0
    assert parsed.pool_full == "eio"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 10), ("10s", 10), ("90 s", 90), ("5min", 300), ("1.5h", 5400), ("5h", 18000), ("0.1d", 8640)],
)
def test_cold_age(text: str, seconds: float) -> None:
    assert parse(cold_age=text).cold_age == seconds
    assert parse(cold_age=config.written("cold_age", parse(cold_age=text).cold_age)).cold_age == seconds


@pytest.mark.parametrize(("text", "limit"), [("64K", 65536), ("1G", 1 << 30), ("off", 0), ("OFF", 0)])
def test_writeback_limit(text: str, limit: int) -> None:
    assert parse(writeback_limit=text).writeback_limit == limit
    again = config.written("writeback_limit", limit)  # as a restart has it
    assert parse(writeback_limit=again).writeback_limit == limit


def test_no_limit_is_not_written_as_nothing() -> None:
    """To the kernel's zram 0 means that nothing may be written."""
    with pytest.raises(ConfigError, match=r"^writeback_limit: '0' cannot be set: use off for no limit, 64K "):
        parse(writeback_limit="0")
    assert config.written("writeback_limit", 0) == "off"
    assert config.written("stats_interval", 0.0) == config.written("mem_limit", 0) == "0"
    assert config.written("what", 0) == "0"


def test_backing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(backing="disk").backing == f"{tmp_path}/disk"
    assert parse(**{"writeback-device": "/dev/sdb1"}).backing == "/dev/sdb1"
    assert parse(backing="").backing == parse(backing="none").backing == ""
    assert parse(backing="./none").backing == f"{tmp_path}/none"
    assert parse(backing="//dev//sdb1").backing == "/dev/sdb1"  # two slashes are a root of their own to POSIX


@pytest.mark.parametrize(
    ("key", "text", "relative"),
    [
        ("backing", "disk", True),
        ("backing", "./none", True),
        ("backing", "none", False),
        ("backing", "", False),
        ("backing", "/dev/sdb1", False),
        ("state", "run/state", True),
        ("state", "systemd", False),
        ("rundir", "../run", True),
        ("metrics_file", "x.prom", True),
        ("metrics_file", "", False),
        ("tls", "psk:keys", True),
        ("tls", "x509:/etc/zramd", False),
        ("tls", "psk:%d/keys", False),
        ("tls", "off", False),
        ("name", "disk", False),
        ("mem_limit", "1G", False),
    ],
)
def test_a_path_that_depends_on_a_folder(key: str, text: str, relative: bool) -> None:
    """A command line is read where it is written, a file is not."""
    setting = config.find(key)
    if relative:
        with pytest.raises(ConfigError, match=r"^'.*' depends on the folder in which a command runs: write"):
            setting.parse_of_file(text)
        assert "/" in setting.parse(text)
    else:
        assert setting.parse_of_file(text) == setting.parse(text)
    with pytest.raises(ConfigError, match="is not a path"):
        parse(backing="a\0b")
    with pytest.raises(ConfigError, match=r"backing='/tmp/zramd-test/stats.json' is the name of a file of"):
        parse(backing="/tmp/zramd-test/stats.json")
    with pytest.raises(ConfigError, match="backing='x' is a second value: backing is already '/dev/sdb'"):
        config.parse([("size", "1M"), ("writeback-device", "/dev/sdb"), ("backing", "x")])


def test_metrics_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(metrics_file="x.prom").metrics_file == f"{tmp_path}/x.prom"
    with pytest.raises(
        ConfigError, match=r"metrics_file='/x.prom' would never be written: stats_interval is 0"
    ):
        parse(metrics_file="/x.prom", stats_interval="0")


def test_unknown_key() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'memlimit': did you mean 'mem_limit'"):
        parse(memlimit="1M")
    with pytest.raises(ConfigError, match="unknown setting 'qqq': use one of disksize, name"):
        parse(qqq="1")


@pytest.mark.parametrize("second", ["disksize", "size"])
def test_second_value(second: str) -> None:
    with pytest.raises(ConfigError, match=f"{second}='2M' is a second value: disksize is already '1M'"):
        config.parse([("disksize", "1M"), (second, "2M")])


def test_disksize_is_required() -> None:
    with pytest.raises(ConfigError, match="disksize is missing"):
        config.parse([])


def test_rundir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert config.default_rundir("x") == "/run/user/1000/zramd/x"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR or give rundir=FOLDER"):
        config.default_rundir("x")
    monkeypatch.chdir(tmp_path)
    assert parse(rundir="here").rundir == f"{tmp_path}/here"


@pytest.mark.parametrize("key", ["rundir", "state", "metrics_file"])
def test_a_path_that_is_no_text(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{key}: '/run/\udcff.prom' is not UTF-8 text, as nbdkit's Python"
    ):
        parse(**{key: "/run/\udcff.prom"})


def test_table_is_complete() -> None:
    names = [setting.name for setting in config.SETTINGS]
    assert names == list(config.Config._fields)
    for setting in config.SETTINGS:
        assert setting.help
        assert setting.name in config.help_text()
        # Each example can be used, with what it needs beside it.
        others = {"tls": "off"} if setting.name == "listen" else {"listen": ":1", "tls": "psk:/k"}
        others = others if setting.name in ("listen", "tls", "clients") else {}
        parse(**{**others, setting.name: setting.example})


@pytest.mark.parametrize(
    ("key", "name"),
    [("state", "log"), ("state", "mm_stat"), ("state", "state_path"), ("metrics_file", "metrics.prom")],
)
def test_the_servers_own_names_in_its_folder(key: str, name: str) -> None:
    """What it replaces and removes there must not be what the user gave it to keep."""
    pairs = [("disksize", "1M"), ("rundir", "/run/x")]
    with pytest.raises(ConfigError, match="is the name of a file of the server's own: use another name"):
        config.parse([*pairs, (key, f"/run/x/{name}")])
    config.parse([*pairs, (key, f"/run/x/my-{name}")])
    config.parse([*pairs, (key, f"/run/y/{name}")])


def test_a_path_that_the_locale_cannot_write() -> None:
    code = (
        "from zramd.settings import config\n"
        "try: config.parse([('size', '1M'), ('rundir', '/run/\\xe4')])\n"
        "except config.ConfigError as error: print(ascii(str(error)))"
    )
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(PACKAGE_PARENT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert "is no path in this locale: set LC_ALL=C.UTF-8" in done.stdout
