"""Configuration files: which count, in which order, and how their lines are read."""

import os
from pathlib import Path

import pytest

from zramd.errors import ConfigError, ZramdError
from zramd.settings import conffiles, devices
from zramd.settings.conffiles import Entry


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


def found(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in conffiles.find(root, "zramd.conf")]


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert found(tmp_path) == []


def test_the_strongest_main_file_counts_alone(tmp_path):
    folders = ("usr/lib", "usr/local/lib", "etc", "run")
    for folder in folders:
        put(tmp_path, f"{folder}/zramd.conf")
        assert found(tmp_path) == [f"{folder}/zramd.conf"]


def test_drop_ins_come_after_the_main_file_sorted_by_name_over_all_folders(tmp_path):
    put(
        tmp_path, "run/zramd.conf.d/10-b.conf", "usr/lib/zramd.conf.d/20-c.conf", "etc/zramd.conf.d/05-a.conf"
    )
    put(tmp_path, "usr/lib/zramd.conf", "usr/local/lib/zramd.conf.d/15-x.conf")
    assert found(tmp_path) == [
        "usr/lib/zramd.conf",
        "etc/zramd.conf.d/05-a.conf",
        "run/zramd.conf.d/10-b.conf",
        "usr/local/lib/zramd.conf.d/15-x.conf",
        "usr/lib/zramd.conf.d/20-c.conf",
    ]


def test_of_drop_ins_with_one_name_the_strongest_folder_counts(tmp_path):
    for folder in ("usr/lib", "usr/local/lib", "etc", "run"):
        put(tmp_path, f"{folder}/zramd.conf.d/10.conf")
        assert found(tmp_path) == [f"{folder}/zramd.conf.d/10.conf"]


def test_a_link_to_dev_null_hides_what_is_below(tmp_path):
    put(tmp_path, "usr/lib/zramd.conf", "usr/lib/zramd.conf.d/10.conf", "usr/lib/zramd.conf.d/20.conf")
    (tmp_path / "etc/zramd.conf.d").mkdir(parents=True)
    (tmp_path / "etc/zramd.conf").symlink_to("/dev/null")
    (tmp_path / "etc/zramd.conf.d/10.conf").symlink_to("/dev/null")
    assert found(tmp_path) == ["usr/lib/zramd.conf.d/20.conf"]


def test_other_files_in_the_folder_do_not_count(tmp_path):
    put(tmp_path, "etc/zramd.conf.d/10.conf~", "etc/zramd.conf.d/.11.conf", "etc/zramd.conf.d/README")
    assert found(tmp_path) == []


def test_lines(tmp_path):
    lines = [
        "# x",
        "; y",
        "",
        "a=1",
        "[zram0]",
        "  zram-size  =  ram == 1 ",
        "options=",
        "b = 'c d'",
        'c="e"',
        "d='",
    ]
    entries, problems = conffiles.parse(lines, "f")
    assert problems == []
    assert entries == [
        Entry("f:4", "", "a", "1"),
        Entry("f:5", "zram0", "", ""),
        Entry("f:6", "zram0", "zram-size", "ram == 1"),
        Entry("f:7", "zram0", "options", ""),
        Entry("f:8", "zram0", "b", "c d"),
        Entry("f:9", "zram0", "c", "e"),
        Entry("f:10", "zram0", "d", "'"),
    ]


def test_lines_that_are_none(tmp_path):
    entries, problems = conffiles.parse(
        ["[zram0", "lost = 1", "[b] # no", "[c]", "word", "= 3", "x = 1"], "f"
    )
    assert [str(problem) for problem in problems] == [
        "f:1: '[zram0' is not a section: write [zram0] and nothing else",
        "f:3: '[b] # no' is not a section: write [zram0] and nothing else",
        "f:5: 'word' is neither KEY = VALUE, nor [NAME], nor # comment",
        "f:6: '= 3' is neither KEY = VALUE, nor [NAME], nor # comment",
    ]
    assert [entry.key for entry in entries] == ["", "x"]


def test_lines_are_counted_as_editors_count_them(tmp_path):
    (tmp_path / "f").write_text("# form\x0cfeed and \u2028\r\n[zram0]\r\n")
    (entry,), problems = conffiles.read(tmp_path / "f")
    assert problems == []
    assert entry == Entry(f"{tmp_path}/f:2", "zram0", "", "")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        conffiles.read(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"[zram0]\n\xff\n")
    with pytest.raises(ConfigError, match="byte 8 is not UTF-8 text"):
        conffiles.read(tmp_path / "binary")


@pytest.mark.parametrize("wrong", ["mode", "owner", "link", "folder"])
def test_a_file_that_another_user_may_change(tmp_path: Path, wrong: str) -> None:
    """root starts what stands there, with the paths that stand there."""
    path = tmp_path / "etc/zramd.conf"
    path.parent.mkdir()
    path.write_text("[zram0]\n")
    conffiles.refuse_untrusted(path)
    if wrong != "mode" and os.geteuid() != 0:
        pytest.skip("gives files to another user")
    if wrong == "mode":
        path.chmod(0o666)
    elif wrong == "owner":
        os.chown(path, 65534, -1)
    elif wrong == "folder":
        os.chown(path.parent, 65534, -1)
    else:
        path.rename(tmp_path / "real")
        path.symlink_to(tmp_path / "real")
        os.chown(path, 65534, -1, follow_symlinks=False)
    with pytest.raises(
        ZramdError, match=r"zramd\.conf is not used: .*: have it owned by root, with mode 644"
    ):
        devices.load(str(tmp_path))


def test_a_mark_at_the_beginning_and_colons(tmp_path):
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbf[zram0]\nzram-size : ram == 1\noptions = a:b\nx:\n")
    entries, problems = conffiles.read(tmp_path / "f")
    assert problems == []
    assert [(entry.section, entry.key, entry.value) for entry in entries[1:]] == [
        ("zram0", "zram-size", "ram == 1"),
        ("zram0", "options", "a:b"),
        ("zram0", "x", ""),
    ]


def test_what_is_no_configuration(tmp_path):
    (tmp_path / "nul").write_bytes(b"[zram0]\n\0")
    with pytest.raises(ConfigError, match="byte 8 is a NUL: this is no text"):
        conffiles.read(tmp_path / "nul")
    with pytest.raises(ConfigError, match="this is no configuration"):
        conffiles.read(Path("/dev/zero"))
    with pytest.raises(ConfigError, match="there is no such file"):
        conffiles.read(tmp_path / "nul" / "x")


@pytest.mark.parametrize("value", ["", "a", "'a'", '"', '""', ' a"'])
def test_a_line_that_is_written_reads_the_same(value):
    (entry,), problems = conffiles.parse([conffiles.line("key", value)], "f")
    assert problems == []
    assert (entry.key, entry.value) == ("key", value)
