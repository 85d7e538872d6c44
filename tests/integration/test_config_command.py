"""`zramd config` through the real command, and a configured device through a real server."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.run import talk
from support.server import PACKAGE_PARENT

EXAMPLE = Path(__file__).parents[2] / "docs" / "zramd.conf"
GENERATOR = """\
set!two = echo 2
[zram0]
zram-size = ram / 4
compression-algorithm = lzo-rle zstd(level=4) (type=idle)
writeback-device = /dev/sdb
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that stands for /, of a machine with 8 GiB."""
    put(tmp_path, "proc/meminfo", "MemTotal: 8388608 kB\n")
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "ZRAMD_ROOT": str(root), "PYTHONPATH": str(PACKAGE_PARENT)}


def run(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "zramd", *words], env=environment(root), capture_output=True, text=True
    )


def zramd(root: Path, *words: str) -> tuple[int, str, str]:
    """Run `zramd config WORDS`; returns the status and both outputs, the root's path left out."""
    done = run(root, "config", *words)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.replace(str(root), ""), done.stderr.replace(str(root), "")


def test_nothing_configured(root):
    assert zramd(root, "show") == (
        0,
        "no device is configured: write /etc/zramd.conf, as docs/zramd.conf shows\n",
        "",
    )
    assert zramd(root, "check") == (
        0,
        "nothing is configured: write /etc/zramd.conf, as docs/zramd.conf shows\n",
        "",
    )


def test_show(root):
    put(
        root,
        "etc/zramd.conf",
        "[zram0]\nzram-size = 2G\nswap-priority = 7\n[vm]\nattach = no\nsize = 1G\n[off]\nzram-size=0",
    )
    status, output, errors = zramd(root, "show")
    assert (status, errors) == (0, "")
    assert output.startswith("zram0: 2 GiB, this machine swaps to it with priority 7\n")
    lines = [line.split() for line in output.splitlines()]
    assert ["disksize", "2147483648", "2", "GiB", "/etc/zramd.conf:2"] in lines
    assert ["swap-priority", "7", "/etc/zramd.conf:3"] in lines
    assert ["swap", "local", "attach", "=", "swap"] in lines
    assert ["compaction", "on", "default"] in lines
    assert ["client_limit", "1000", "default"] in lines  # connections, not bytes
    assert "\nvm: 1 GiB, for others to attach\n" in output
    assert "\noff: no device: zram-size = 0 is 0 here (/etc/zramd.conf:8)\n" in output
    status, output, _ = zramd(root, "show", "vm")
    assert status == 0
    assert output.startswith("vm: ")
    assert "zram0" not in output
    why = "off: no device: zram-size = 0 is 0 here (/etc/zramd.conf:8)\n"
    assert zramd(root, "show", "off") == (0, why, "")


def test_show_json(root):
    put(root, "etc/zramd.conf", "[zram0]\nzram-resident-limit = ram / 8\n[off]\nhost-memory-limit = 1G\n")
    status, output, _ = zramd(root, "show", "--json")
    assert status == 0
    found = json.loads(output)
    (device,) = found["devices"]
    assert (device["name"], device["disksize"]) == ("zram0", 4 << 30)
    assert device["values"]["mem_limit"] == 1 << 30
    assert device["values"]["compaction"] is True
    assert device["from"]["mem_limit"] == "/etc/zramd.conf:2"
    assert device["from"]["compaction"] is None
    assert device["serve"] == ["name=zram0", f"disksize={4 << 30}", "swap=local", f"mem_limit={1 << 30}"]
    assert list(found["skipped"]) == ["off"]
    assert found["files"] == ["/etc/zramd.conf"]


def test_the_example_is_sound(root):
    assert zramd(root, "check", str(EXAMPLE)) == (0, f"no errors in {EXAMPLE}: zram0\n", "")


def test_all_errors_are_printed(root):
    put(
        root, "etc/zramd.conf", "[zram0]\nzram-size = min\nswap-prio = 5\n[b]\ncompaction = perhaps\n[good]\n"
    )
    errors = (
        "zramd: /etc/zramd.conf:3: unknown key 'swap-prio': did you mean 'swap-priority'?\n"
        "zramd: /etc/zramd.conf:2: zram-size: 'min', character 1: 'min' is a function: write min(a, b, …)\n"
        "zramd: /etc/zramd.conf:5: compaction: 'perhaps' is neither on nor off: use one of them\n"
    )
    assert zramd(root, "check") == (1, "", errors)
    status, output, found = zramd(root, "show")
    assert (status, found) == (2, errors)
    assert output.startswith("good: 4 GiB")
    assert "zram0" not in output
    status, output, found = zramd(root, "show", "b")
    assert (status, output, found) == (2, "", errors.splitlines(keepends=True)[2])


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["check", "/none.conf"], 2, "zramd: /none.conf: there is no such file\n"),
        (
            ["check", ""],
            2,
            "zramd: '' is not a file's name: give a FILE, or none for what this machine has\n",
        ),
        (["import", ""], 2, None),
        (["check", "/"], 1, "zramd: / cannot be read: is a directory\n"),
        (["import", "/none.conf"], 2, "zramd: /none.conf: there is no such file\n"),
        (["import"], 2, "zramd: nothing is configured for zram-generator or zramswap below : give a FILE\n"),
        (
            ["show", "vm"],
            2,
            "zramd: there is no device 'vm' in /etc/zramd.conf: add a section [vm] (there: none)\n",
        ),
        (
            ["show", "a/b"],
            2,
            "zramd: 'a/b' is not a name: use 1 to 64 letters, digits, _ . or -, not starting with . or -\n",
        ),
        (["shwo"], 2, None),
        ([], 2, None),
    ],
)
def test_bad_input(root, words, status, message):
    found, output, errors = zramd(root, *words)
    assert (found, output, errors.count("\n")) == (status, "", 1)
    assert message is None or errors == message


def test_import_of_zram_generator(root):
    put(root, "etc/systemd/zram-generator.conf", GENERATOR)
    status, output, errors = zramd(root, "import")
    assert (status, errors) == (0, "")
    for note in (
        "set!two = echo 2: zramd runs no commands",
        "writeback-device = /dev/sdb: zramd itself writes what nobody has asked for in an hour",
        "\nbacking = /dev/sdb\n",
        "zramd has no lzo-rle, and uses lz4 instead",
        "\ncompression-algorithm = lz4 zstd(level=4)\n",
    ):
        assert note in output
    put(root, "etc/zramd.conf", output)
    status, output, _ = zramd(root, "check")
    assert (status, output) == (0, "no errors in /etc/zramd.conf: zram0\n")
    assert zramd(root, "show", "zram0")[1].startswith("zram0: 2 GiB, ")


def test_import_of_zramswap(root):
    put(root, "etc/default/zramswap", "ALGO=lz4\nPERCENT=50\n")
    assert zramd(root, "import") == (
        0,
        "# Made by 'zramd config import' from /etc/default/zramswap.\n"
        "# Both must not run: docs/configuration.md says how to turn the other off.\n\n"
        "[zram0]\ncompression-algorithm = lz4\nzram-size = ram * 50 / 100\n",
        "",
    )


def test_import_tells_what_must_be_mended(root):
    put(root, "x.conf", "set!two = echo 2\n[zram0]\nzram-size = ram * two\n")
    status, output, errors = zramd(root, "import", str(root / "x.conf"))
    assert status == 1
    assert "zram-size = ram * two" in output
    assert (
        errors
        == "zramd: /x.conf:3: zram-size: 'ram * two', character 7: there is no variable 'two': use ram\n"
    )


def test_zram_generator_is_read_only_when_asked(root):
    put(root, "etc/systemd/zram-generator.conf", GENERATOR)
    status, output, _ = zramd(root, "show")
    assert status == 0
    assert output.startswith("no device is configured")
    assert (
        "zramd does not start what is configured for zram-generator: 'zramd config import' takes it over"
        in output
    )
    status, output, _ = zramd(root, "show", "--generator")
    assert status == 0
    assert output.startswith("zram0: 2 GiB, ")
    assert "note: /etc/systemd/zram-generator.conf:5: writeback-device = /dev/sdb: " in output
    assert zramd(root, "check", "--generator")[0] == 0


@pytest.fixture
def disk(root: Path) -> Path:
    """The run folder of a device that is configured as `disk`."""
    folder = root / "run/disk"
    put(root, "etc/zramd.conf", f"[disk]\nzram-size = 64\nattach = no\nmem_limit = 4M\nrundir = {folder}\n")
    return folder


def sizes(folder: Path) -> tuple[int, int]:
    """The size and the limit of the device that is served in a run folder, in MiB."""
    answer = talk(folder / "control.sock", b"GET /stats HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")[2]
    stats = json.loads(answer)
    return stats["disksize"] >> 20, stats["mem_limit"] >> 20


def test_a_configured_device_is_served(root, disk):
    command = [sys.executable, "-m", "zramd", "serve", "--config", "disk", "compaction=off", "mem_limit=8M"]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment(root), stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        assert f"serves disk, {64 << 20} bytes" in greeting, (root / "log").read_text()
        assert sizes(disk) == (64, 8)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


@pytest.mark.parametrize(("words", "found"), [([], (64, 4)), (["mem_limit=8M", "size=1M"], (1, 8))])
def test_a_configured_device_is_started_by_its_name(root, disk, words, found):
    done = run(root, "start", "disk", *words)
    assert (done.returncode, done.stderr) == (0, "")
    try:
        assert f"socket        {disk}/nbd.sock\n" in done.stdout
        assert sizes(disk) == found
    finally:
        os.kill(int((disk / "pid").read_text()), signal.SIGTERM)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zram-size = 0", "disk: no device: zram-size = 0 is 0 here (/etc/zramd.conf:2)"),
        ("zram-size = ram +", "/etc/zramd.conf:2: zram-size: 'ram +', character 6: a number, a variable or"),
        ("siez = 4", "/etc/zramd.conf:2: unknown key 'siez': did you mean 'size'?"),
    ],
)
def test_start_never_falls_back_to_defaults(root, line, message):
    put(root, "etc/zramd.conf", f"[disk]\n{line}\n")
    done = run(root, "start", "disk")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.replace(str(root), "").startswith(f"zramd: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--config", "none"],
            "there is no device 'none' in /etc/zramd.conf: add a section [none] (there: disk)",
        ),
        (["--config", "disk", "--name", "x"], "name='disk' is a second value: name is already 'x'"),
        (["--config", "disk", "sizee=1G"], "unknown setting 'sizee': did you mean 'size'?"),
        (
            ["--config", "disk", "--size", "0"],
            "disksize: '0' is out of range: use more than 0 and at most 4T",
        ),
    ],
)
def test_serve_refuses(root, words, message):
    put(root, "etc/zramd.conf", "[disk]\nattach = no\n")
    done = run(root, "serve", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.replace(str(root), "") == f"zramd: {message}\n"
