"""zram-generator's and zramswap's configurations: what is taken over, what is named, what comes out."""

import re
from pathlib import Path

import pytest

from zramd.errors import ConfigError
from zramd.settings import conffiles, devices, foreign
from zramd.settings.devices import Configuration

RAM = 8192
GIB = 1 << 30


def read(tmp_path: Path, text: str, name: str = "zram-generator.conf") -> foreign.Translation:
    path = tmp_path / name
    path.write_text(text)
    return foreign.read([path])


def build(translation: foreign.Translation) -> Configuration:
    return devices.build(translation.sections, RAM, translation.problems)


def notes(translation: foreign.Translation) -> list[str]:
    """The notes from the line's number on."""
    return [note.partition(".conf:")[2] or note.partition("zramswap:")[2] for note in translation.notes]


def test_everything_that_can_be_taken_over(tmp_path):
    translation = read(
        tmp_path,
        "[zram0]\nzram-size = min(ram / 4, 4096)\nzram-resident-limit = 1024\nhost-memory-limit = none\n"
        "compression-algorithm = lz4(level=3)\nswap-priority = 50\noptions = discard=pages\nfs-type = swap\n",
    )
    assert translation.notes == []
    (device,) = build(translation).devices
    assert (device.disksize, device.swap_priority, device.options) == (2 * GIB, 50, "discard=pages")
    assert (device.settings().mem_limit, device.settings().codec) == (GIB, ("lz4", 3))
    assert device.swaps


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "set!two = echo 2\n[zram0]",
            "1: set!two = echo 2: zramd runs no commands: write the value where 'two' is used",
        ),
        ("x=1\n[zram0]", "1: x = 1 is before any section: zram-generator leaves it out, and so does this"),
        ("[zram0]\n[foo]\na = b", "2: [foo] is not zramN: zram-generator leaves it out, so does this"),
        (
            "[zram0]\nzram-size = 2G",
            "2: zram-size = 2G: 2G is a size here, a factor in zram-generator",
        ),
        (
            "[zram0]\ncompression-algorithm = lzo-rle",
            "2: compression-algorithm = lzo-rle: zramd has no lzo-rle, and uses lz4 instead",
        ),
        (
            "[zram0]\ncompression-algorithm = lz4 lz4hc",
            "2: compression-algorithm = lz4 lz4hc: lz4hc is left out: zramd recompresses by zstd, once",
        ),
        (
            "[zram0]\ncompression-algorithm = lz4 zstd zstd(level=9)",
            "2: compression-algorithm = lz4 zstd zstd(level=9): zstd(level=9) is left out: zramd "
            "recompresses by zstd, once",
        ),
        (
            "[zram0]\ncompression-algorithm = lz4 zstd (type=huge)",
            "2: compression-algorithm = lz4 zstd (type=huge): (type=huge) is left out: zramd recompresses "
            "what is idle, whatever else it is",
        ),
        (
            "[zram0]\ncompression-algorithm = zstd zstd(level=1)",
            "2: compression-algorithm = zstd zstd(level=1): recompression='zstd(level=1)' makes nothing "
            "smaller than comp_algorithm='zstd' did: use a higher level, or off: it is left out",
        ),
        (
            "[zram0]\ncompression-algorithm = lz4(level=2,dict=/x)",
            "2: compression-algorithm = lz4(level=2,dict=/x): zramd's lz4 has no parameter dict",
        ),
        (
            "[zram0]\nwriteback-device = /dev/sda",
            "2: writeback-device = /dev/sda: zramd itself writes what nobody has asked for in an hour, "
            "at most 1G a day (writeback_age, writeback_limit), to a device that is blank, or after "
            "'zramd backing format'",
        ),
        (
            "[zram0]\nwriteback-device = disk",
            "2: writeback-device = disk: 'disk' depends on the folder in which a command runs: write the "
            "whole path, from / on: it is left out",
        ),
        (
            "[zram0]\nswap-prioriti = 4",
            "2: swap-prioriti = 4: zram-generator does not know this key and leaves it out, "
            "and so does this: did you mean 'swap-priority'?",
        ),
    ],
)
def test_what_is_not_honoured_is_named_and_the_rest_goes_on(tmp_path, text, note):
    translation = read(tmp_path, text)
    assert notes(translation) == [note]
    (device,) = build(translation).devices
    assert device.name == "zram0"
    assert "(level=2)" not in text or device.settings().codec == ("lz4", 2)


@pytest.mark.parametrize(
    ("algorithms", "hot", "cold"),
    [
        ("lz4", "lz4", "zstd(level=4)"),
        ("zstd", "zstd", "off"),
        ("zstd(level=3)", "zstd(level=3)", "off"),
        ("lz4 zstd(level=3) (type=idle)", "lz4", "zstd(level=3)"),
        ("lz4 (type=idle)", "lz4", "zstd(level=4)"),
        ("lzo-rle zstd(level=7)", "lz4", "zstd(level=7)"),
        ("zstd(level=1) zstd(level=9)", "zstd(level=1)", "zstd(level=9)"),
        ("lz4hc lz4 zstd", "lz4hc", "zstd"),
    ],
)
def test_the_second_algorithm_recompresses(tmp_path, algorithms, hot, cold):
    translation = read(tmp_path, f"[zram0]\ncompression-algorithm = {algorithms}")
    (device,) = build(translation).devices
    assert (device.settings().comp_algorithm, device.settings().recompression) == (hot, cold)
    # What is written means the same when it is read again.
    again = tmp_path / "zramd.conf"
    again.write_text(foreign.text(translation))
    entries, problems = conffiles.parse(again.read_text().split("\n"), str(again))
    assert not problems
    sections = {"zram0": {entry.key: entry for entry in entries}}
    assert devices.build(sections, RAM, []).devices[0].pairs == device.pairs


@pytest.mark.parametrize("line", ["mount-point = /tmp", "fs-type = ext4"])
def test_a_file_system_never_becomes_swap(tmp_path, line):
    translation = read(tmp_path, f"[zram0]\n{line}\n[zram1]\n")
    assert notes(translation) == [
        f"2: {line}: zramd makes swap alone, and no file system: [zram0] is left out"
    ]
    assert [device.name for device in build(translation).devices] == ["zram1"]


@pytest.mark.parametrize(
    ("text", "expression", "size"),
    [
        ("zram-fraction = 0.25", "int(ram * 0.25)", 2 * GIB),
        ("max-zram-size = 1024", "min(int(ram * 0.5), 1024)", GIB),
        ("zram-size = 1\nzram-fraction = 0.5\nmax-zram-size = none", "int(ram * 0.5)", 4 * GIB),
    ],
)
def test_obsolete_sizes_override(tmp_path, text, expression, size):
    translation = read(tmp_path, f"[zram0]\n{text}")
    assert notes(translation)[0].endswith(f"is obsolete: it is taken as zram-size = {expression}")
    (device,) = build(translation).devices
    assert device.disksize == size


def test_the_obsolete_memory_limit(tmp_path):
    assert "zram0" in build(read(tmp_path, "[zram0]\nmemory-limit = 4096")).skipped


def test_the_last_value_wins_as_there(tmp_path):
    (device,) = build(
        read(tmp_path, "[zram0]\nswap-priority=1\nswap-priority=2\n[zram0]\nzram-size=1024")
    ).devices
    assert (device.swap_priority, device.disksize) == (2, GIB)


def test_a_variable_that_a_command_would_have_set(tmp_path):
    configuration = build(read(tmp_path, "set!two = echo 2\n[zram0]\nzram-size = ram * two"))
    (problem,) = configuration.problems
    assert str(problem).endswith(
        ".conf:3: zram-size: 'ram * two', character 7: there is no variable 'two': use ram"
    )


def test_drop_ins_have_zram_generators_precedence(tmp_path):
    for name, text in (
        ("etc/systemd/zram-generator.conf", "[zram0]\nswap-priority = 1\nzram-size = 1024"),
        ("usr/lib/systemd/zram-generator.conf", "[zram9]"),
        ("usr/lib/systemd/zram-generator.conf.d/50.conf", "[zram0]\nswap-priority = 2"),
        ("etc/default/zramswap", "SIZE=1"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (device,) = build(foreign.read(foreign.find(tmp_path))).devices
    assert (device.name, device.swap_priority, device.disksize) == ("zram0", 2, GIB)


@pytest.mark.parametrize(
    ("text", "size", "priority"),
    [
        ("", 256 << 20, 100),
        ("# ALGO=zstd\n#PERCENT=50\n", 256 << 20, 100),
        ("SIZE=1024\nPRIORITY=7", GIB, 7),
        ("PERCENT=25", 2 * GIB, 100),
        ("ALGO=lz4 # fast\nexport SIZE='2048'\nPERCENT=\n", 2 * GIB, 100),
    ],
)
def test_zramswap(tmp_path, text, size, priority):
    translation = read(tmp_path, text, "zramswap")
    assert translation.notes == []
    (device,) = build(translation).devices
    assert (device.name, device.disksize, device.swap_priority) == ("zram0", size, priority)


@pytest.mark.parametrize("value", ["none", ""])
def test_no_writeback_device(tmp_path, value):
    """zram-generator's default is nothing to speak of."""
    translation = read(tmp_path, f"[zram0]\nwriteback-device = {value}\n")
    assert translation.notes == []
    assert "backing" not in foreign.text(translation)
    (device,) = build(translation).devices
    assert device.settings().backing == ""


def test_what_zramswap_has_and_zramd_has_not(tmp_path):
    translation = read(
        tmp_path, "ALGO=lzo\nPERCENT=50\nSIZE=9\nCORES=$(nproc)\nCORES=2\nbroken='\n", "zramswap"
    )
    assert sorted(notes(translation)) == [
        "1: ALGO=lzo: zramd has no lzo, and uses lz4 instead",
        "3: SIZE=9: PERCENT is given, which overrides it: it is left out",
        "4: 'CORES=$(nproc)' is not a plain KEY=VALUE: it is left out",
        "5: CORES=2: zramd has nothing of this kind: it is left out",
        "6: 'broken='' is not a plain KEY=VALUE: it is left out",
    ]
    (device,) = build(translation).devices
    assert device.disksize == 4 * GIB


def test_an_empty_generator_conf_is_not_zramswaps(tmp_path):
    assert read(tmp_path, "# nothing\n").sections == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "zram-generator.conf",
            "set!x=y\n[zram0]\nzram-fraction=0.25\noptions=\n[zram7]\nmemory-limit=none\n",
        ),
        ("zramswap", "PERCENT=10\nALGO=lz4\n"),
    ],
)
def test_what_is_printed_means_the_same(tmp_path, name, text):
    translation = read(tmp_path, text, name)
    again = tmp_path / "zramd.conf"
    again.write_text(foreign.text(translation))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {RAM << 10} kB\n")
    loaded = devices.load(str(tmp_path), str(again))
    assert loaded.problems == ()
    assert loaded.devices == build(translation).devices
    assert len(loaded.devices) > 0
    for note in translation.notes:
        assert f"#   {note}\n" in again.read_text()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "nothing in it is theirs"),
        ("ENABLED=true\n", "nothing in it is theirs"),
        ("root:x:0:0:root:/root:/bin/bash\n", "nothing in it is theirs"),
        (
            "UUID=1 / ext4 errors=remount-ro 0 1\n# swap\ntmpfs /tmp tmpfs size=1G 0 0\n",
            "nothing in it is theirs",
        ),
        ("num_devices=2\ntype0=swap\nsize0=512\n", "this is zram-init's file"),
        ("zswap_enabled=1\nzram_size=$((RAM_SIZE/4))\n", "this is systemd-swap's file"),
        ("SIZE=40M\nPATH_DISK=/var/log\nZL2R=false\n", "this is log2ram's file"),
        ("SWAP=true\nZRAM_PERCENTAGE=50\nSIZE=512\n", "this is armbian-zram-config's file"),
        ('export _zram_fraction="1/2"\n', "this is zram-swap's file"),
        ("SIZE=40M\n", "nothing in it is theirs"),
        ("CORES=2\n", "nothing in it is theirs"),
        ("#PRIORITY=5\nname value\n", "nothing in it is theirs"),
        ("SIZE=512\nUSER=root\n", "nothing in it is theirs"),
        ("[Unit]\nDescription=x\n", "nothing in it is theirs"),
        ("[swap]\nzram-size = ram\n", "nothing in it is theirs"),
    ],
)
@pytest.mark.parametrize("name", ["x", "x.conf"])
def test_what_is_neither_programs_is_refused(tmp_path, name, text, what):
    with pytest.raises(ConfigError, match=re.escape(what)):
        read(tmp_path, text, name)


def test_a_file_by_another_name_is_known_by_its_words(tmp_path):
    for text in ("SIZE=512", "PERCENT=50 # half\nSIZE=", "# ALGO=lz4\n#PERCENT=50\n", "[zram0]", "set!a = b"):
        assert read(tmp_path, text, "x") is not None


def test_zramds_own_file_is_not_taken_for_zram_generators(tmp_path):
    with pytest.raises(ConfigError, match=":2: attach is zramd's own: use the file as it is"):
        read(tmp_path, "[zram0]\nattach = no\n")


@pytest.mark.parametrize(
    "text", ["\ufeff[zram0]\nhost-memory-limit: 1\n", "[zram0]\nhost-memory-limit : 1 = 1"]
)
def test_what_zram_generator_reads_is_read(tmp_path, text):
    configuration = build(read(tmp_path, text))
    assert configuration.devices == ()
    assert len(configuration.skipped) + len(configuration.problems) == 1


@pytest.mark.parametrize(
    ("name", "text", "left"),
    [
        ("zram-generator.conf", "[zram0]\nzram-size = 1024\nhost-memory-limit\n[zram1]\n", ["zram1"]),
        ("zram-generator.conf", "[zram0]\nzram-size = 1024 + two\n[zram1]\n", ["zram1"]),
        ("zram-generator.conf", "[zram0]\n[zram1\nzram-size = 1\n", []),
        ("zram-generator.conf", "word\n[zram0]\n", []),
        ("zramswap", "PERCENT=$((100 / 2))\n", []),
        ("zramswap", "PERCENT=50%\n", []),
        ("zramswap", "SIZE=40M\nPRIORITY=5\n", []),
        ("zramswap", "SIZE=512 # MB\n. /etc/more\n", []),
        ("zramswap", "PRIORITY='\n", []),
        ("zramswap", "PRIORITY=70000\n", []),
    ],
)
def test_what_cannot_be_read_never_means_something_else(tmp_path, name, text, left):
    """It stands at the head of what is printed, and its section is a comment."""
    translation = read(tmp_path, text, name)
    configuration = build(translation)
    assert [device.name for device in configuration.devices] == left
    (problem,) = configuration.problems
    printed = foreign.text(translation, configuration.problems)
    assert f"#   {problem}\n" in printed
    (tmp_path / "zramd.conf").write_text(printed)
    loaded = devices.load(str(tmp_path), str(tmp_path / "zramd.conf"))
    assert loaded.problems == ()
    assert [device.name for device in loaded.devices] == left


@pytest.mark.parametrize(
    ("text", "note", "size"),
    [
        ("PERCENTAGE=25", "1: PERCENTAGE=25: it is called PERCENT now: it is taken as that", 2 * GIB),
        ("ALLOCATION=1024", "1: ALLOCATION=1024: it is called SIZE now: it is taken as that", GIB),
        (
            "PERCENTAGE=9\nPERCENT=50",
            "1: PERCENTAGE=9: it is called PERCENT now: PERCENT is given, which counts",
            4 * GIB,
        ),
    ],
)
def test_words_of_older_zram_tools(tmp_path, text, note, size):
    translation = read(tmp_path, text, "zramswap")
    assert notes(translation) == [note]
    (device,) = build(translation).devices
    assert device.disksize == size
