"""The snippets of README and the documents are run, or looked through where that takes a machine of its own.

Behind the language of a code block stands what it takes:

    ```sh                   is run as it stands, by root of an empty /run and /dev/shm
    ```sh served=zram0      the same, while that device is served
    ```sh needs=root,nbd    is looked through: syntax, commands, options, settings, scripts
    ```python               is run
    ```ini                  sections of zramd.conf must be without an error
    ```xml                  must be well-formed
    ```text, or nothing     is for people

Commands in the middle of a sentence, such as `zramd set NAME mem_limit=3G`, are looked through as well.
"""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from support.run import zramd_command

from zramd import commands
from zramd.errors import ConfigError
from zramd.settings import config, keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("sh", "python", "ini", "xml", "text")
NEEDS = {
    *("root", "nbd", "qemu", "guest", "libvirt", "network", "systemd", "terminal"),
    *("backing", "build", "generator", "tracer", "ublk"),
}
TIMEOUT = 180  # seconds until something hangs


class Snippet(NamedTuple):
    """A block of code: where it begins, its language, and what it takes."""

    page: str
    line: int
    language: str
    needs: frozenset[str]
    served: tuple[str, ...]
    text: str

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "python") and not self.needs


def snippets(page: str, text: str) -> list[Snippet]:
    """Every block of code of a page, whose fences may be indented."""
    found = []
    for match in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE):
        language, *words = match[2].split() or ["text"]
        pairs = [word.partition("=") for word in words]
        assert all(key in ("needs", "served") for key, _, _ in pairs), f"{page}: {match[2]}"
        found.append(
            Snippet(
                page,
                text.count("\n", 0, match.start()) + 1,
                language,
                frozenset(need for key, _, value in pairs if key == "needs" for need in value.split(",")),
                tuple(value for key, _, value in pairs if key == "served"),
                match[3],
            )
        )
    return found


ALL = [snippet for page in PAGES for snippet in snippets(str(page.relative_to(ROOT)), page.read_text())]
RUN = [snippet for snippet in ALL if snippet.is_run]


def place(snippet: Snippet) -> str:
    return f"{snippet.page}:{snippet.line}"


# ------------------------------------------------------------------------------------------------------------
# what is run


def test_there_is_something_to_run() -> None:
    assert len(RUN) >= 8
    assert {snippet.language for snippet in RUN} == {"sh", "python"}
    assert {snippet.language for snippet in ALL} <= set(LANGUAGES)
    assert frozenset().union(*(snippet.needs for snippet in ALL)) <= NEEDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_is_missed(page: Path) -> None:
    fences = re.findall(r"^ *```", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * sum(snippet.page == str(page.relative_to(ROOT)) for snippet in ALL)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder to stand in, with a configuration and the command."""
    folder = tmp_path / "here"
    (tmp_path / "bin").mkdir()
    (tmp_path / "root/etc/systemd").mkdir(parents=True)
    (tmp_path / "root/proc").mkdir()
    folder.mkdir()
    (tmp_path / "root/etc/zramd.conf").write_text("[zram0]\nzram-size = min(ram / 2, 64)\nattach = no\n")
    (tmp_path / "root/etc/systemd/zram-generator.conf").write_text("[zram0]\nzram-size = ram / 2\n")
    (tmp_path / "root/proc/meminfo").write_text("MemTotal: 8388608 kB\n")
    command = tmp_path / "bin/zramd"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m zramd "$@"\n')
    command.chmod(0o755)
    return folder


def run(snippet: Snippet, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a snippet of the shell, as root of a place where nobody else's devices are."""
    start = "".join(f"zramd start {name} --size 64M >/dev/null\n" for name in snippet.served)
    script = f"""
        set -euo pipefail
        mount -t tmpfs tmpfs /run
        mount -t tmpfs tmpfs /dev/shm
        end() {{ cat /run/zramd/*/pid 2>/dev/null | xargs --no-run-if-empty kill -9 || true; }}
        trap end EXIT
        {start}
    """
    own = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    environment = {**os.environ, "ZRAMD_ROOT": str(folder.parent / "root"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PATH"] = f"{folder.parent}/bin:{environment['PATH']}"
    return subprocess.run(
        [*own, "bash", "-c", script + snippet.text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


@pytest.mark.parametrize("snippet", [one for one in RUN if one.language == "sh"], ids=place)
def test_shell(snippet: Snippet, world: Path) -> None:
    done = run(snippet, world)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("wrong", ["zramd start", "zramd stats nobody", "false", "zramd strat x"])
def test_a_snippet_that_fails_is_noticed(wrong: str, world: Path) -> None:
    text = f"zramd start one --size 1M\n{wrong} one\nzramd list\n"
    assert run(Snippet("", 0, "sh", frozenset(), (), text), world).returncode != 0


@pytest.mark.parametrize("snippet", [one for one in RUN if one.language == "python"], ids=place)
def test_python(snippet: Snippet, world: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", snippet.text], cwd=world, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("snippet", [one for one in ALL if one.language == "ini"], ids=place)
def test_configuration(snippet: Snippet, world: Path) -> None:
    file = world / "zramd.conf"
    file.write_text(snippet.text)
    done = zramd_command("config", "check", file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("snippet", [one for one in ALL if one.language == "xml"], ids=place)
def test_xml(snippet: Snippet) -> None:
    ElementTree.fromstring(snippet.text)


# ------------------------------------------------------------------------------------------------------------
# what is looked through


@cache
def known() -> dict[str, commands.Parser]:
    """The parsers of all verbs; those of a verb of a verb as `config show`."""
    found = {}
    for name in commands.VERBS:
        parser = commands.verb_parser(name)
        inner = commands.parts(parser)
        found |= {f"{name} {deeper}": inner[deeper] for deeper in inner} or {name: parser}
    return found


@cache
def script_help(path: Path) -> str:
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def complaints(words: list[str]) -> list[str]:
    """What is wrong with a command of zramd's, or of one of the scripts: words that nobody knows."""
    if words[0].startswith("scripts/"):
        return _script_complaints(words)
    words = words[1:]
    for count in (2, 1):
        verb = " ".join(words[:count])
        if verb in known():
            return _verb_complaints(verb, words[count:])
    if not words or words[0] in ("COMMAND", "--version", "--help", "-h", "-V"):
        return []
    return [f"no command '{words[0]}'"]


def _script_complaints(words: list[str]) -> list[str]:
    path = ROOT / words[0]
    if not path.is_file():
        return [f"no script '{words[0]}'"]
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("--") and len(word) > 2]
    return [f"{words[0]} has no {option}" for option in options if option not in script_help(path)]


def _verb_complaints(verb: str, words: list[str]) -> list[str]:
    parser = known()[verb]
    if "--" in words:
        split = words.index("--")
        words = words[:split] if parser.takes_nbdkit_options else words
    options = {name for action in parser._actions for name in action.option_strings}
    found = [
        f"zramd {verb} has no {word}"
        for word in words
        if re.match(r"-[\w-]", word) and word.partition("=")[0] not in options
    ]
    for word in words:
        key, is_pair, value = word.partition("=")
        if not is_pair or not parser.takes_settings or not re.fullmatch(r"\w+", key) or key == "key":
            continue
        try:
            setting = config.find(key)
            if re.search(r"[…$]|[A-Z]{4}", value) is None and value:
                config.value(setting, value)
        except ConfigError as error:
            found.append(str(error))
    return found


COMMAND = re.compile(r"(?:^|[\s(;&|=])((?:[\w/.-]*/)?zramd|scripts/[\w-]+)(?= |$)([^|;&)>]*)")


def commands_in(text: str) -> list[list[str]]:
    """The commands of zramd's and the scripts in a piece of shell, each as its words."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        bare = re.sub(r"(^|\s)#.*", "", line)
        for match in COMMAND.finditer(bare):
            if match[1].endswith(("@zramd", "lib/zramd")):
                continue
            try:
                found.append([match[1], *shlex.split(match[2])])
            except ValueError:  # a quotation that ends behind a pipe
                found.append([match[1], *match[2].split()])
    return found


def test_words_that_nobody_knows_are_noticed() -> None:
    wrong = """
        zramd strat x
        zramd start x --sized 1G   # a comment with zramd nonsense
        x=$(zramd attach --swop x) && scripts/nothing
        zramd set x mem_limt=1G; zramd set x mem_limit=1X
        zramd config chek; scripts/test --nothing tests | zramd save x \\
            --liv -
    """
    found = [complaint for words in commands_in(wrong) for complaint in complaints(words)]
    assert len(found) == 9, found
    right = "zramd start x --size 1G mem_limit=2G -- -p 10809 && .venv/bin/zramd set NAME mem_limit=SIZE"
    assert [complaints(words) for words in commands_in(right)] == [[], []]


@pytest.mark.parametrize("snippet", [one for one in ALL if one.language == "sh"], ids=place)
def test_shell_is_looked_through(snippet: Snippet) -> None:
    done = subprocess.run(["bash", "-n"], input=snippet.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [complaint for words in commands_in(snippet.text) for complaint in complaints(words)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences(page: Path) -> None:
    text = re.sub(r"^( *)```.*\n(?:.*\n)*?\1```$", "", page.read_text(), flags=re.MULTILINE)
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]
    found = [
        complaint
        for span in spans
        if span.startswith(("zramd ", "scripts/", "sudo zramd "))
        for words in commands_in(span)
        for complaint in complaints(words)
    ]
    assert found == []


def test_blocks_that_are_not_fenced_hold_no_shell() -> None:
    """Nobody would look at them."""
    shell = re.compile(r"^    (?:sudo )?(?:zramd|scripts/\S+|curl|systemctl|mkswap|swapon|nbd-client) ")
    found = []
    for page in PAGES:
        fenced = False
        for number, line in enumerate(page.read_text().splitlines(), 1):
            fenced ^= line.lstrip().startswith("```")
            if not fenced and shell.match(line):
                found.append(f"{page.name}:{number}: {line}")
    assert found == []


def test_configured_keys_are_those_of_zramd_conf() -> None:
    """Each `key = value` in configuration.md's sentences is a key."""
    text = (ROOT / "docs/configuration.md").read_text()
    names = re.findall(r"`([a-z_-]+) = [^`]+`", text)
    assert names
    for name in names:
        keys.canonical(name)
