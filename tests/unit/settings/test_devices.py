"""Configured devices: values, precedence, what makes no device, and every error with its place."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from zramd.errors import ConfigError
from zramd.settings import config, devices, keys
from zramd.settings.devices import Configuration, SkippedError

EXAMPLE = Path(__file__).parents[3] / "docs" / "zramd.conf"
GIB = 1 << 30


class Root:
    """A folder that stands for /, of a machine with 8 GiB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("proc/meminfo", "MemFree: 1 kB\nMemTotal:        8388608 kB\n")

    def write(self, name: str, text: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def load(self, text: str | None = None) -> Configuration:
        if text is not None:
            self.write("etc/zramd.conf", text)
        return devices.load(str(self.path))

    def device(self, text: str) -> devices.ConfiguredDevice:
        configuration = self.load(text)
        assert configuration.problems == ()
        (device,) = configuration.devices
        return device

    def problems(self, text: str) -> list[str]:
        return [str(problem).removeprefix(f"{self.path}/") for problem in self.load(text).problems]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_an_empty_section_is_zram_generators_default(root):
    device = root.device("[zram0]")
    assert device == devices.ConfiguredDevice(
        name="zram0",
        disksize=4 * GIB,
        pairs=(("name", "zram0"), ("disksize", "4294967296"), ("swap", "local")),
        attach="swap",
        swap_priority=100,
        swap_areas=None,
        options="discard",
        timeout=None,
        dead_conn_timeout=120,
        connections=1,
    )
    assert device.attached
    assert device.swaps


def test_every_key(root):
    device = root.device(
        """[fast.1]
        zram-size = ram / 4
        zram-resident-limit = 1G
        compression-algorithm = lz4(level=4)
        host-memory-limit = 8192
        attach = device
        swap = local
        timeout = 60
        dead-conn-timeout = 90
        connections = 2
        thread_model = parallel
        compaction = off
        rundir = /run/elsewhere
        """
    )
    assert (device.name, device.disksize, device.attach) == ("fast.1", 2 * GIB, "device")
    assert (device.timeout, device.dead_conn_timeout, device.connections) == (60, 90, 2)
    assert dict(device.pairs) == {
        "name": "fast.1",
        "disksize": str(2 * GIB),
        "swap": "local",
        "mem_limit": str(GIB),
        "comp_algorithm": "lz4(level=4)",
        "thread_model": "parallel",
        "compaction": "off",
        "rundir": "/run/elsewhere",
    }
    settings = device.settings()
    assert settings == config.parse(device.pairs)
    assert (settings.mem_limit, settings.codec, settings.compaction) == (GIB, ("lz4", 4), False)
    assert device.attached
    assert not device.swaps


@pytest.mark.parametrize(("attach", "pair"), [("swap", ("swap", "local")), ("device", None), ("no", None)])
def test_a_machine_that_swaps_onto_its_own_server_locks_it(root, attach, pair):
    device = root.device(f"[a]\nattach = {attach}\n")
    assert (pair in device.pairs) is (pair is not None)
    assert device.settings().swap == ("local" if pair else "other")


def test_own_words_stand_for_generators(root):
    device = root.device("[a]\nsize = 3G\nmem_limit = 1G\ncomp_algorithm = lz4(level=2)\n")
    assert device.disksize == 3 * GIB
    assert device.settings().mem_limit == GIB
    assert device.settings().codec == ("lz4", 2)


def test_a_later_file_replaces_key_by_key(root):
    root.write("usr/lib/zramd.conf", "[never]")
    root.write("etc/zramd.conf.d/20.conf", "[zram0]\nmem_limit = 2G\n[new]\nattach = no\n")
    root.write("run/zramd.conf.d/10.conf", "[zram0]\nswap-priority = 5\nzram-resident-limit = 3G")
    configuration = root.load("[zram0]\nsize = 1G\nswap-priority = 7\nmem_limit = 1G")
    assert configuration.problems == ()
    old, new = configuration.devices
    assert (old.name, new.name) == ("zram0", "new")
    assert (old.disksize, old.swap_priority, old.settings().mem_limit) == (GIB, 5, 2 * GIB)
    assert old.where["mem_limit"] == f"{root.path}/etc/zramd.conf.d/20.conf:2"
    assert configuration.files == tuple(
        f"{root.path}/{name}"
        for name in ("etc/zramd.conf", "run/zramd.conf.d/10.conf", "etc/zramd.conf.d/20.conf")
    )


def test_a_replaced_value_does_not_matter(root):
    root.write("run/zramd.conf.d/10.conf", "[zram0]\nswap-priority = 5")
    assert root.device("[zram0]\nswap-priority = x").swap_priority == 5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("zram-size = 0", "no device: zram-size = 0 is 0 here (ROOT/etc/zramd.conf:2)"),
        (
            "zram-size = max(0, 4G - ram)",
            "no device: zram-size = max(0, 4G - ram) is 0 here (ROOT/etc/zramd.conf:2)",
        ),
        (
            "host-memory-limit = 8191",
            "no device: host-memory-limit = 8191 is less than the 8192 MB that this machine has "
            "(ROOT/etc/zramd.conf:2)",
        ),
    ],
)
def test_no_device(root, text, why):
    configuration = root.load(f"[zram0]\n{text}")
    assert configuration.devices == ()
    assert configuration.problems == ()
    assert configuration.skipped == {"zram0": why.replace("ROOT", str(root.path))}
    with pytest.raises(SkippedError, match="zram0: no device"):
        configuration.find("zram0")


@pytest.mark.parametrize(
    "text", ["host-memory-limit = 8192", "host-memory-limit = none", "host-memory-limit = 8G"]
)
def test_memory_within_the_limit(root, text):
    assert root.device(f"[zram0]\n{text}").disksize == 4 * GIB


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zram-size = ram / 0", "zram-size: 'ram / 0', character 5: division by zero"),
        ("zram-size = 1 - ram", "zram-size: '1 - ram' is -8191 megabytes"),
        ("zram-size = 5T", "zram-size: '5T' is 5497558138880 bytes: use at most 4T"),
        ("zram-resident-limit = 1e30", "zram-resident-limit: '1e30' is 1e+30 megabytes: use less"),
        ("zram-size = 9e99", "zram-size: '9e99' is 9e+99 megabytes: use at most 4T"),
        ("zram-size = 8 GB", "zram-size: '8 GB', character 3: an operator is missing before 'GB': write 8GB"),
        ("size = 8 GB", "size: '8 GB' is not a size: write 8GB"),
        ("size = 1.5G", "size: '1.5G' is not a size: write 1536M"),
        ("mem_limit = 50%", "mem_limit: '50%' is not a size: in zramd.conf write zram-size = ram * 50 / 100"),
        ("\u200bsize = 1G", "unknown key '\u200bsize': did you mean 'size'?"),
        ("zram-size =", "zram-size: '', character 1: it is empty"),
        ("disksize = 0", "disksize: '0' is out of range: use more than 0 and at most 4T"),
        ("disksize = ram / 2", "disksize: 'ram / 2' is not a size"),
        ("zram-resident-limit = mem", "zram-resident-limit: 'mem', character 1: there is no variable 'mem'"),
        ("host-memory-limit = lots", "host-memory-limit: 'lots', character 1: there is no variable 'lots'"),
        ("compression-algorithm = lzo", "compression-algorithm: 'lzo' is not available: use lz4"),
        ("compression-algorithm = lz4 lz4", "compression-algorithm: 'lz4' does not recompress: use zstd"),
        ("compression-algorithm = lz4 zstd zstd", "compression-algorithm: 'lz4 zstd zstd' is more than two"),
        (
            "compression-algorithm = lz4 zstd (type=huge)",
            "compression-algorithm: '(type=huge)' is not available",
        ),
        ("compression-algorithm = (type=idle)", "compression-algorithm: '(type=idle)' names no algorithm"),
        ("compression-algorithm = zstd zstd", "compression-algorithm: recompression='zstd' makes nothing"),
        (
            "compression-algorithm = lz4 zstd(level=20)",
            "compression-algorithm: 'zstd(level=20)' is out of range",
        ),
        ("comp_algorithm = lz4 zstd", "comp_algorithm: 'lz4 zstd' is more than one algorithm"),
        (
            "swap-priority = 32768",
            "swap-priority: '32768' is not a priority: use -1 (the kernel chooses) to 32767",
        ),
        ("swap-areas = 25", "swap-areas: '25' is out of range: use 1 to 24 areas"),
        ("swap-areas = 0", "swap-areas: '0' is out of range: use 1 to 24 areas"),
        (
            "swap-areas = 8\nswap-priority = 6",
            "swap-areas: 8 areas need swap-priority = 7 or more, because the first one has the highest, and "
            "swap-priority = 6",
        ),
        ("swap-priority = -2", "swap-priority: '-2' is not a priority"),
        ("swap-priority = ٣", "swap-priority: '٣' is not a priority"),
        ("options = discard,pri=5", "options: 'pri=5': use swap-priority = 5 instead"),
        ("options = dicard", "options: 'dicard' is not an option of swapon"),
        ("attach = yes", "attach: 'yes' is not a way to attach: use swap, device or no"),
        ("fs-type = ext4", "fs-type: 'ext4' is not made by zramd: use attach = device"),
        ("timeout = -1", "timeout: '-1' is out of range: use 0 to 1000000 seconds"),
        ("dead-conn-timeout = 1m", "dead-conn-timeout: '1m' is out of range: use 0 to 1000000 seconds"),
        ("connections = 0", "connections: '0' is out of range: use 1 to 16 connections"),
        ("compaction = maybe", "compaction: 'maybe' is neither on nor off: use one of them"),
        (
            "swap = other",
            "swap: 'other' would let this machine's swap deadlock: use local, or attach = no or device",
        ),
        (
            "client_limit = 4\nfront = ublk",
            "client_limit: is for front = nbd: leave it out with front = ublk",
        ),
        ("endpoint = off\nfront = ublk", "endpoint: off leaves no way to attach a device of front = ublk"),
        ("mount-point = /tmp", "mount-point = /tmp: zramd mounts nothing: use attach = device"),
        ("zram-fraction = 0.5", "zram-fraction = 0.5: it is obsolete: use zram-size = ram * FRACTION"),
        ("name = x", "name = x: the section's name is the device's: remove it"),
        ("swap-prioritty = 1", "unknown key 'swap-prioritty': did you mean 'swap-priority'?"),
        ("mem-limit = 1G", "unknown key 'mem-limit': did you mean 'mem_limit'?"),
        ("xyzzy = 1", "unknown key 'xyzzy': docs/zramd.conf has all keys"),
        ("zram-size 4G", "'zram-size 4G' is neither KEY = VALUE, nor [NAME], nor # comment"),
    ],
)
def test_errors_have_place_value_and_remedy(root, line, message):
    (problem,) = root.problems(f"# first\n[zram0]\n\n{line}\n")
    assert problem.startswith(f"etc/zramd.conf:4: {message}")
    assert root.load().devices == ()
    with pytest.raises(ConfigError) as caught:
        devices.find("zram0", str(root.path))
    assert str(caught.value).endswith(problem)


@pytest.mark.parametrize(
    ("algorithms", "message"),
    [
        (
            "compression-algorithm = lz4 zstd\nrecompression = off",
            "compression-algorithm = lz4 zstd has one already",
        ),
        (
            "compression-algorithm = zstd\nrecompression = zstd",
            "recompression='zstd' makes nothing smaller than",
        ),
        ("comp_algorithm = zstd\nrecompression = zstd", "recompression='zstd' makes nothing smaller than"),
    ],
)
def test_algorithms_that_do_not_go_together(root, algorithms, message):
    (problem,) = root.problems(f"[zram0]\n{algorithms}\n")
    assert problem.startswith(f"etc/zramd.conf:3: recompression: {message}")


def test_algorithms_as_zram_generator_writes_them(root):
    device = root.device("[zram0]\ncompression-algorithm = lz4(level=2)  zstd( level=7 ) ( type=idle )\n")
    pairs = dict(device.pairs)
    assert (pairs["comp_algorithm"], pairs["recompression"]) == ("lz4(level=2)", "zstd(level=7)")
    assert device.settings().recompression == "zstd(level=7)"
    assert "recompression" not in dict(root.device("[zram0]\ncompression-algorithm = zstd\n").pairs)
    other = root.device("[zram0]\ncomp_algorithm = lz4hc\nrecompression = off\n").settings()
    assert (other.comp_algorithm, other.recompression) == ("lz4hc", "off")


def test_errors_outside_of_sections_stop_all(root):
    assert root.problems("set!two = echo 2\nsize = 1G\n[]\n[bad name]\n[good]") == [
        "etc/zramd.conf:1: set!two = echo 2: zramd runs no commands: write the value where 'two' is used",
        "etc/zramd.conf:2: size = 1G is before any section: write [zram0] above it",
        "etc/zramd.conf:3: [] has no name: write [zram0]",
        "etc/zramd.conf:4: 'bad name' is not a name: use 1 to 64 letters, digits, _ . or -, "
        "not starting with . or -",
    ]
    assert root.load().devices == ()
    with pytest.raises(ConfigError, match=r"zramd\.conf:1: set!two"):
        devices.find("good", str(root.path))


def test_second_values(root):
    text = (
        "[a]\nzram-size = 1G\nsize = 2G\n[b]\nzram-size = 1G\n[a]\ndisksize = 3G\nattach = no\nattach = no\n"
    )
    first = f"zram-size = 1G is at {root.path}/etc/zramd.conf:2"
    assert root.problems(text) == [
        f"etc/zramd.conf:3: size = 2G is a second value: {first}",
        f"etc/zramd.conf:7: disksize = 3G is a second value: {first}",
        f"etc/zramd.conf:9: attach = no is a second value: attach = no is at {root.path}/etc/zramd.conf:8",
    ]


def test_all_errors_are_told_and_sound_devices_go_on(root):
    configuration = root.load("[a]\ntimeout = x\nconnections = y\n[b]\n[c]\nzram-size = 1 +\n")
    assert [problem.section for problem in configuration.problems] == ["a", "a", "c"]
    assert [device.name for device in configuration.devices] == ["b"]
    assert configuration.find("b").disksize == 4 * GIB
    with pytest.raises(ConfigError, match=r"zramd\.conf:2: timeout: 'x'"):
        configuration.find("a")


def test_two_devices_need_two_folders(root):
    (problem,) = root.problems("[a]\n[b]\nrundir = /run/zramd/b/../a/\n")
    assert problem == "etc/zramd.conf:3: rundir = /run/zramd/a is also that of [a]: use another"


def test_a_device_that_is_not_there(root):
    with pytest.raises(ConfigError) as caught:
        root.load("[a]\n[b]\n").find("c")
    assert str(caught.value) == (
        f"there is no device 'c' in {root.path}/etc/zramd.conf: add a section [c] (there: a, b)"
    )


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("size = 4096", "size = 4096 is 4096 bytes: if megabytes were meant, use zram-size or a unit"),
        ("zram-size = 0.3", "zram-size = 0.3 is 315392 bytes: for a share of the memory write ram * 0.3"),
        ("zram-size = ram / 99999", "bytes: a number without a unit is megabytes"),
        ("zram-resident-limit = .5", "is 524288 bytes: for a share of the memory write ram * .5"),
        ("mem_limit = 512", "mem_limit = 512 is 512 bytes: if megabytes were meant, use zram-size or a unit"),
        (
            "zram-size = ram * 2",
            "zram-size = ram * 2 is more than half of this machine's 8192 MB: at its",
        ),
        ("disksize = 5G", "disksize = 5G is more than half of this machine's 8192 MB: at its"),
        ("zram-size = 40 * ram", "zram-size = 40 * ram is 40 times the memory: no compression reaches that"),
        ("options =", "options = : without discard, memory of freed swap never comes back"),
        ("attach = no\nswap-areas = 5", "swap-areas = 5 has no effect with attach = no"),
        ("attach = no\nswap-priority = 5", "swap-priority = 5 has no effect with attach = no"),
        ("attach = device\noptions = discard", "options = discard has no effect with attach = device"),
        ("attach = no\ntimeout = 5", "timeout = 5 has no effect with attach = no"),
    ],
)
def test_notes(root, text, note):
    configuration = root.load(f"[a]\n{text}")
    assert configuration.problems == ()
    (found,) = configuration.notes
    assert note in found


def test_no_notes_for_what_is_usual(root):
    assert root.load("[zram0]\nzram-size = ram / 2\n[b]\nattach = no\nsize = 1G").notes == ()


def test_zram_generator_is_never_served_unasked(root):
    root.write("etc/systemd/zram-generator.conf", "[zram0]")
    configuration = devices.load(str(root.path))
    assert configuration.devices == ()
    (note,) = configuration.notes
    assert "'zramd config import' takes it over" in note


def test_both_in_use_is_told(root):
    root.write("etc/systemd/zram-generator.conf", "[zram0]")
    root.write("etc/default/zramswap", "")
    assert root.load("[zram0]").notes == ()  # neither program is installed
    root.write("usr/lib/systemd/system-generators/zram-generator", "")
    root.write("usr/sbin/zramswap", "")
    generator, zramswap = root.load("[zram0]").notes
    assert "'ln -s /dev/null /etc/systemd/system-generators/zram-generator' turns it off" in generator
    assert "'systemctl disable --now zramswap' turns it off" in zramswap
    assert root.load("[zram0]\nattach = no").notes == ()


def test_root_comes_from_the_environment(root, monkeypatch):
    root.write("etc/zramd.conf", "[here]")
    monkeypatch.setenv("ZRAMD_ROOT", str(root.path))
    assert devices.find("here").disksize == 4 * GIB


def test_words_for_serve(root):
    device = root.device("[a]\nsize = 1G\nmem_limit = 1M\nattach = no")
    assert device.words() == ["name=a", f"disksize={GIB}", "mem_limit=1M"]
    assert device.words(["size=2G", "mem_limit=0"]) == ["name=a", "size=2G", "mem_limit=0"]
    with pytest.raises(ConfigError, match="unknown setting 'siez'"):
        device.words(["siez=2G"])


def uncommented() -> str:
    lines = EXAMPLE.read_text().splitlines()
    return "\n".join(line[1:] if line[:1] == "#" and line[1:2].strip() else line for line in lines)


def test_the_example_parses_as_it_is(root):
    configuration = root.load(EXAMPLE.read_text())
    assert configuration.problems == ()
    assert configuration.notes == ()
    assert [device.name for device in configuration.devices] == ["zram0"]


def test_the_example_shows_the_defaults(root):
    plain = root.load(EXAMPLE.read_text()).find("zram0")
    full = root.load(uncommented())
    assert full.problems == ()
    assert full.notes == ()
    shown = full.find("zram0")
    for name in (
        field.name
        for field in fields(devices.ConfiguredDevice)
        if field.name not in ("pairs", "shared", "where")
    ):
        assert getattr(shown, name) == getattr(plain, name), name
    assert shown.settings() == plain.settings()
    assert full.find("guest0").attach == "no"


def test_the_example_writes_defaults_as_the_tables_have_them(root):
    values: dict[str, Any] = {}
    for line in uncommented().partition("[guest0]")[0].splitlines():
        key, equals, value = line.partition(" = ")
        if equals and not line.startswith("#"):
            values[key] = value
    for setting in (*keys.table(8192), *config.SETTINGS):
        if setting.name in values and setting.default is not None and setting.name != "swap":
            assert values[setting.name] == setting.default, setting.name


def test_the_example_has_every_key(root):
    full = root.load(uncommented())
    written = {key for device in full.devices for key in device.where if key}
    known = {setting.name for setting in (*keys.table(8192), *config.SETTINGS)} - {"name"}
    assert written | set(full.shared) == known


def test_one_file_of_two_devices(root):
    (root.path / "link").symlink_to(root.path)
    here, there = f"{root.path}/x", f"{root.path}/link/x"
    for key, first, second in (
        ("state", here, there),
        ("backing", here, there),
        ("metrics_file", f"{here}.prom", f"{there}.prom"),
        ("rundir", here, there),
    ):
        problems = root.problems(f"[a]\nattach = no\n{key} = {first}\n[b]\nattach = no\n{key} = {second}\n")
        assert problems == [f"etc/zramd.conf:6: {key} = {second} is also that of [a]: use another"]
    assert root.problems("[a]\nattach = no\nstate = /run/zramd/b/nbd.sock\n[b]\n") == [
        "etc/zramd.conf:4: rundir = /run/zramd/b is also state of [a]: use another"
    ]
    assert root.problems("[a]\nstate = /x.prom\nmetrics_file = /x.prom\n") == [
        "etc/zramd.conf:3: metrics_file = /x.prom is also state of [a]: use another"
    ]
    assert root.problems("[a]\nstate = systemd\n[b]\nstate = systemd\n") == []


def test_a_backing_by_both_its_names(root):
    device = root.load("[a]\nwriteback-device = /dev/sdb\nwriteback_limit = off\n").find("a")
    assert device.settings().backing == "/dev/sdb"
    assert device.settings().writeback_limit == 0
    assert device.where["backing"] == f"{root.path}/etc/zramd.conf:2"
    assert root.problems("[a]\nbacking = /dev/sdb\n[b]\nwriteback-device = /dev/sdb\n") == [
        "etc/zramd.conf:4: backing = /dev/sdb is also that of [a]: use another"
    ]
    assert root.problems("[a]\nbacking = /dev/sdb\nwriteback-device = /dev/sdc\n") == [
        "etc/zramd.conf:3: writeback-device = /dev/sdc is a second value: backing = /dev/sdb is at "
        f"{root.path}/etc/zramd.conf:2"
    ]


def test_what_belongs_to_a_backing_without_one(root):
    for none in ("", "backing = none\n", "writeback-device =\n"):
        loaded = root.load(f"[a]\nwriteback_age = 2h\n{none}")
        (note,) = loaded.notes
        assert note.endswith("etc/zramd.conf:2: writeback_age = 2h has no effect without backing")
        assert loaded.find("a").settings().backing == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backing", "disk.img"),
        ("writeback-device", "dev/sdb1"),
        ("state", "a.state"),
        ("metrics_file", "./a.prom"),
        ("rundir", "run"),
        ("tls", "psk:keys"),
    ],
)
def test_a_path_does_not_depend_on_where_a_command_runs(root, key, value):
    """A service and a shell would mean different files by it."""
    text = f"{key}: '{value}' depends on the folder in which a command runs: write the whole path, from / on"
    assert root.problems(f"[a]\nattach = no\n{key} = {value}\n") == [f"etc/zramd.conf:3: {text}"]


def test_a_device_that_is_not_there_where_others_have_errors(root):
    with pytest.raises(ConfigError) as caught:
        root.load("[a]\n[b]\nsiez = 1\n[c]\nzram-size = 0\n").find("d")
    assert str(caught.value).endswith("(there: a; with errors: b; not on this machine: c)")


def test_where_each_section_has_its_run_folder(root):
    """Also one that has an error since it was started, or is not for this machine."""
    configuration = root.load("[a]\n[b]\nrundir = /x\nsiez = 1\n[c]\nzram-size = 0\nrundir = /y\n")
    assert configuration.rundirs == {"a": "", "b": "/x", "c": "/y"}


def test_what_devices_share_is_for_roots_servers(root, monkeypatch):
    """Of a service with a user of its own, as zramd-net@ has one, the budget's file is not to be opened."""
    text = "[zramd]\nbudget = 64M\n[a]\n[b]\nbudget = 0\n[c]\nrundir = /tmp/c\n"
    configuration = root.load(text)
    assert configuration.problems == ()
    budgets = {device.name: device.settings().budget for device in configuration.devices}
    assert budgets == {"a": 64 << 20, "b": 0, "c": 0}
    a, b, _ = configuration.devices

    def words(device: devices.ConfiguredDevice, *others: str) -> list[str]:
        return [word for word in device.words(others) if word.startswith("budget")]

    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert words(a) == words(a, "rundir=/run/zramd/other") == ["budget=64M"]
    assert words(a, "budget=1G") == ["budget=1G"]
    assert words(a, "rundir=/tmp/a") == []
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert words(a) == words(a, "rundir=/run/zramd/a") == []
    assert words(a, "budget=1G") == ["budget=1G"]
    assert words(b) == ["budget=0"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (":10809", ":10809"),
        ("[::]", "*:10809"),
        ("memory1:7", "MEMORY1:7"),
        ("127.0.0.1:7", ":7"),
        ("[::]:7", "[2001:db8::1]:7"),
    ],
)
def test_two_devices_on_one_port(root: Root, first: str, second: str) -> None:
    text = "[{}]\nattach = no\ntls = off\nlisten = {}\n"
    port = first.rpartition(":")[2] if first[-1] != "]" else "10809"
    assert root.problems(text.format("a", first) + text.format("b", second)) == [
        f"etc/zramd.conf:8: listen = {second}: [a] listens on port {port} there: use another port"
    ]


def test_two_devices_on_ports_of_their_own(root: Root) -> None:
    text = "[{}]\nattach = no\ntls = off\nlisten = {}\n"
    lines = [text.format("a", ":7"), text.format("b", ":8"), text.format("c", "10.0.0.1:9")]
    assert root.problems("".join([*lines, text.format("d", "10.0.0.2:9")])) == []


def test_floors_that_do_not_fit_into_the_budget(root: Root) -> None:
    """Each of them does; without [zramd], or with a budget of its own, a device has no part in that."""
    host = "[zramd]\nbudget = 8M\n"
    floor = "[{}]\nbudget-floor = 5M\n"
    assert root.problems(host + floor.format("a") + floor.format("b")) == [
        "etc/zramd.conf:6: budget_floor = 5242880: with those above 10485760 bytes are kept, and the budget "
        "has 8388608 bytes: lower a budget_floor, or raise the budget"
    ]
    assert root.problems(host + floor.format("a") + floor.format("b") + "budget = 0\n") == []
    assert root.problems(host + floor.format("a") + "[b]\nbudget-floor = 3M\n") == []
