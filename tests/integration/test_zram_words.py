"""zram's words, through the real command and the control socket, against a real server."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.backings import preallocated
from support.client import NbdSocket
from support.run import wait_until
from support.run import zramd_command as zramd
from support.server import NbdkitProcess

from zramd.stats.tiers import MODES
from zramd.stats.writeback import WRITEBACK

Serve = Callable[..., NbdkitProcess]
BLOCK = 4096
EACH = 100  # blocks of each kind, one kind after the other
TEXTS, SIXES, NOISE, WORDS = (range(place * EACH, (place + 1) * EACH) for place in range(4))
LINE = re.compile(r" {0,11}(\d+) {1,12}(\d+)\.(\d{6}) ([s.][w.][h.][i.][r.][n.])")


def content(block: int) -> bytes:
    """Text that lz4 shrinks and zstd shrinks more, what only zstd shrinks, what nothing does, one word."""
    dice = random.Random(block)
    if block in TEXTS:
        words = [b"%x" % dice.randrange(4096) for _ in range(200)]
        return b" ".join(dice.choice(words) for _ in range(2000))[:BLOCK]
    if block in SIXES:
        return bytes(dice.choices(range(64), k=BLOCK))
    if block in NOISE:
        return dice.randbytes(BLOCK)
    return bytes([block % 256 or 1]) * BLOCK


class Filled:
    """A server with blocks of each kind, and a client."""

    def __init__(self, served: NbdkitProcess) -> None:
        self.served = served
        self.client = NbdSocket(served)
        for block in range(4 * EACH):
            assert self.client.ask(self.client.WRITE, block * BLOCK, BLOCK, content(block)) == 0

    def put(self, path: str, words: str) -> tuple[int, str]:
        return self.served.request("PUT", path, words)

    def flags(self) -> dict[int, str]:
        """Block → flags, from block_state as a script for the kernel's would read it."""
        status, text = self.served.request("GET", "/block_state")
        assert status == 200
        found = [LINE.fullmatch(line) for line in text.splitlines()]
        assert all(found), text
        return {int(one[1]): one[4] for one in found if one}

    def marked(self, letter: str) -> set[int]:
        return {block for block, flags in self.flags().items() if letter in flags}

    def check(self) -> None:
        """All that was written is what is read, and the structures agree."""
        for block in range(4 * EACH):
            assert self.client.read(block * BLOCK, BLOCK) == content(block)
        assert json.loads(self.served.request("POST", "/check")[1]) == {"sound": True}


@pytest.fixture
def filled(serve: Serve) -> Iterator[Filled]:
    made = Filled(serve(recompression="zstd(level=3)", cold_age="1h"))
    yield made
    made.client.close()


def said(*words: object) -> str:
    """Run the command, see that it succeeds in silence, and return what it prints."""
    done = zramd(*words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refused(*words: object, status: int) -> str:
    """Run the command, see that it prints one sentence and ends with `status`, and return the sentence."""
    done = zramd(*words)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("zramd: ").rstrip("\n")


def at(filled: Filled) -> tuple[str, str]:
    return "--rundir", str(filled.served.rundir)


def test_block_state_before_anything_is_recompressed(filled: Filled) -> None:
    assert Counter(filled.flags().values()) == {"......": EACH, "..h...": 2 * EACH, "s.....": EACH}
    assert said("debug", "block_state", *at(filled)) == filled.served.request("GET", "/block_state")[1]


def test_recompress_takes_all_and_does_not_wait(filled: Filled) -> None:
    assert filled.served.stats()["huge_pages"] == 2 * EACH
    assert said("recompress", *at(filled)) == (
        "blocks are recompressed in the background: 'zramd tiers' shows how far that is\n"
    )
    wait_until(lambda: filled.served.stats()["recompressed"] == 2 * EACH)
    wait_until(lambda: filled.served.stats()["recompress_useless"] == EACH)
    assert filled.marked("r") == {*TEXTS, *SIXES}
    assert filled.marked("n") == filled.marked("h") == set(NOISE)
    stats = filled.served.stats()
    assert (stats["cold_pages"], stats["huge_pages"]) == (2 * EACH, EACH), "what shrank is not huge any more"
    filled.check()


def test_recompress_what_is_huge(filled: Filled) -> None:
    assert filled.put("/recompress", "type=huge")[0] == 200
    wait_until(lambda: filled.served.stats()["recompress_useless"] == EACH)
    wait_until(lambda: filled.marked("r") == set(SIXES))
    filled.check()


def test_recompress_at_most_so_many(filled: Filled) -> None:
    said("recompress", *at(filled), "type=huge", "max_pages=7")

    def tried() -> int:
        stats = filled.served.stats()
        count: int = stats["recompressed"] + stats["recompress_useless"]
        return count

    wait_until(lambda: tried() == 7)
    assert filled.put("/recompress", "max_pages=3")[0] == 200
    wait_until(lambda: tried() == 10)


def test_recompress_only_large_payloads(filled: Filled) -> None:
    assert filled.put("/recompress", "threshold=4096")[0] == 200
    wait_until(lambda: filled.served.stats()["recompress_useless"] == EACH)
    wait_until(lambda: filled.marked("r") == set(SIXES))


def test_idle_marks_until_somebody_asks(filled: Filled) -> None:
    assert said("idle", "all", *at(filled)) == ""
    wait_until(lambda: filled.marked("i") == {*TEXTS, *SIXES, *NOISE})
    read, written = TEXTS[3], SIXES[3]
    filled.client.read(read * BLOCK, BLOCK)
    filled.client.ask(filled.client.WRITE, written * BLOCK, BLOCK, content(written))
    assert filled.marked("i") == {*TEXTS, *SIXES, *NOISE} - {read, written}
    said("recompress", "type=idle", *at(filled))
    wait_until(lambda: filled.marked("r") == {*TEXTS, *SIXES} - {read, written})
    filled.check()


def test_idle_by_seconds_spares_the_young(filled: Filled) -> None:
    assert filled.put("/idle", "3600") == (200, '{"idle": "3600"}\n')
    assert filled.marked("i") == set()


@pytest.mark.parametrize(
    "words", [["type=hgue"], ["threshold=5000"], ["type=huge", "type=huge"], ["page_index=1"], ["priority=2"]]
)
def test_wrong_words_do_nothing(filled: Filled, words: list[str]) -> None:
    status, sentence = filled.put("/recompress", " ".join(words))
    assert status == 400
    assert refused("recompress", *at(filled), *words, status=2) == f"run: {sentence.rstrip()}"
    assert filled.put("/recompress", "max_pages=1")[0] == 200
    wait_until(lambda: filled.served.stats()["recompressed"] == 1)
    assert filled.served.stats()["cold_pages"] == 1, "what was refused was not queued"


def test_a_word_in_the_place_of_the_name_is_not_taken_for_all(filled: Filled) -> None:
    """With --rundir nothing says which device NAME is: what stands there is a word without its key."""
    for words in (["recompress", "huge"], ["idle", "al", "all"]):
        assert "--rundir names the device already" in refused(*words, *at(filled), status=2)
    assert filled.marked("i") == filled.marked("r") == set()


def test_a_wrong_age_marks_nothing(filled: Filled) -> None:
    sentence = "run: 'al' is not an age: use all, or a time such as 300, 5min or 1h"
    assert refused("idle", "al", *at(filled), status=2) == sentence
    assert filled.marked("i") == set()


def test_algorithms_are_files_and_paths(filled: Filled) -> None:
    served = filled.served
    assert served.request("GET", "/recomp_algorithm") == (200, "#1: [zstd] \n")
    assert "[lz4] " in served.request("GET", "/comp_algorithm")[1]
    for name in ("comp_algorithm", "recomp_algorithm"):
        wait_until(
            lambda name=name: (served.rundir / name).read_text() == served.request("GET", f"/{name}")[1]
        )
    assert filled.put("/recomp_algorithm", "off") == (200, '{"recompression": "off"}\n')
    assert served.request("GET", "/recomp_algorithm") == (200, "")
    status, sentence = filled.put("/recompress", "type=huge")
    assert status == 409
    assert "off" in sentence
    assert "off" in refused("recompress", *at(filled), status=1)
    assert filled.put("/recomp_algorithm", "algo=zstd priority=1") == (200, '{"recompression": "zstd"}\n')
    assert filled.put("/recompress", "")[0] == 200
    assert filled.put("/recomp_algorithm", "algo=lz4 priority=1")[0] == 400
    assert filled.put("/recomp_algorithm", "nonsense")[0] == 400


def test_tiers(filled: Filled) -> None:
    said("recompress", *at(filled))
    wait_until(lambda: filled.served.stats()["recompress_useless"] == EACH)
    wait_until(lambda: filled.served.stats()["recompressed"] == 2 * EACH)
    text = said("tiers", *at(filled))
    assert text.startswith("zram0: hot lz4, cold zstd(level=3) after 1 h: ")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert {name: rows[name][1] for name in ("hot", "cold", "raw", "same", "all")} == {
        **{"hot": "0", "cold": str(2 * EACH), "raw": str(EACH)},
        **{"same": str(EACH), "all": str(4 * EACH)},
    }
    assert max(map(len, text.splitlines())) <= 80
    (told,) = json.loads(said("tiers", "--json", *at(filled)))["devices"]
    tiers = filled.served.stats()["tiers"]
    assert told["name"] == "zram0"
    assert told.keys() - {"name", "comp_algorithm"} == tiers.keys()
    assert tiers["cold_pages"] == told["cold_pages"] == filled.served.stats()["cold_pages"]
    assert {row[0]: None for row in tiers["ages"]}.keys() >= {10, 300, 3600, None, "idle"}


def test_tiers_of_several(serve: Serve) -> None:
    one, other = serve(name="a"), serve(name="b", recompression="off")
    places = [word for served in (one, other) for word in ("--rundir", served.rundir)]
    first, _, second = said("tiers", *places).partition("\n\nb: ")
    assert first.startswith("a: hot lz4, cold zstd")
    assert second.startswith("hot lz4, recompression is off\n")
    assert [told["name"] for told in json.loads(said("tiers", "-J", *places))["devices"]] == ["a", "b"]
    other.stop(9)
    assert refused("tiers", *places, status=1) == refused("list", *places, status=1)


# ------------------------------------------------------------------------------------------------------------
# writing back

STORED = {*TEXTS, *SIXES, *NOISE}  # what has an object; words take no memory that could be given back


@pytest.fixture
def backed(serve: Serve, disk_folder: Path) -> Iterator[Filled]:
    """The same with a backing, to which nothing goes by itself."""
    path = preallocated(disk_folder)
    made = Filled(serve(recompression="zstd(level=3)", cold_age="1h", writeback_age="5h", backing=path))
    yield made
    made.client.close()


def test_writeback_by_number(backed: Filled) -> None:
    assert backed.put("/writeback", "page_index=7 page_indexes=95-104 page_indexes=299-302")[0] == 200
    wait_until(lambda: backed.marked("w") == {7, *range(95, 105), 299})
    backed.check()
    assert backed.marked("w") == {7, *range(95, 105), 299}, "one read brings nothing back"


@pytest.mark.parametrize("words", ["idle", "type=idle"])
def test_writeback_of_what_is_idle(backed: Filled, words: str) -> None:
    said("idle", "all", *at(backed))
    backed.client.read(TEXTS[3] * BLOCK, BLOCK)
    assert backed.put("/writeback", words)[0] == 200
    wait_until(lambda: backed.marked("w") == STORED - {TEXTS[3]})
    assert backed.marked("i") == set()
    backed.check()


def test_writeback_of_what_is_huge(backed: Filled) -> None:
    assert said("writeback", *at(backed), "type=huge") == (
        "blocks are written out in the background: 'zramd tiers' shows how far that is\n"
    )
    wait_until(lambda: backed.marked("w") == {*SIXES, *NOISE})
    assert backed.marked("h") == {*SIXES, *NOISE}
    assert backed.served.stats()["huge_pages"] == 0, "none is in memory"


def test_writeback_of_what_did_not_shrink(backed: Filled) -> None:
    said("recompress", *at(backed))
    wait_until(lambda: backed.marked("n") == set(NOISE))
    said("writeback", *at(backed), "type=incompressible")
    wait_until(lambda: backed.marked("w") == set(NOISE))
    backed.check()


def test_writeback_of_what_is_huge_and_idle(backed: Filled) -> None:
    said("idle", "all", *at(backed))
    backed.client.read(NOISE[5] * BLOCK, BLOCK)
    assert backed.put("/writeback", "huge_idle")[0] == 200
    wait_until(lambda: backed.marked("w") == {*SIXES, *NOISE} - {NOISE[5]})


@pytest.mark.parametrize(
    "words", [[], ["type=hgue"], ["page_index=99999999"], ["page_indexes=9-3"], ["type=huge", "type=huge"]]
)
def test_wrong_words_write_nothing(backed: Filled, words: list[str]) -> None:
    status, sentence = backed.put("/writeback", " ".join(words))
    assert status == 400
    assert refused("writeback", *at(backed), *words, status=2) == f"run: {sentence.rstrip()}"
    assert backed.put("/writeback", "page_index=3")[0] == 200
    wait_until(lambda: backed.marked("w") == {3})


def test_what_is_out_comes_back(backed: Filled) -> None:
    assert backed.put("/writeback", "page_indexes=0-299")[0] == 200
    wait_until(lambda: backed.marked("w") == STORED)
    assert backed.served.stats()["compr_data_size"] == 0
    assert said("bring-back", *at(backed)) == (
        "blocks are brought back in the background: 'zramd tiers' shows how far that is\n"
    )
    wait_until(lambda: backed.marked("w") == set())
    assert backed.served.stats()["brought_back"] == len(STORED)
    backed.check()


def test_bd_stat_and_backing_dev_are_files_and_paths(backed: Filled) -> None:
    served = backed.served
    assert backed.put("/writeback", "page_indexes=0-299")[0] == 200
    wait_until(lambda: backed.marked("w") == STORED)
    backed.client.read(0, BLOCK)
    text = served.request("GET", "/bd_stat")[1]
    used, read, written = map(int, text.split())
    assert text == f"{used:8} {read:8} {written:8}\n"
    stats = served.stats()
    assert (read, written) == (stats["bd_reads"] // BLOCK, stats["bd_writes"] // BLOCK)
    # What lz4 does not shrink are 200 blocks, and only the last extent is not full.
    assert used % 16 == 0
    assert 200 <= written <= used <= 320
    assert read >= 1
    told = {"bd_stat": text, "backing_dev": f"{stats['writeback']['backing']}\n"}
    for name, shown in told.items():
        assert served.request("GET", f"/{name}")[1] == shown
        wait_until(lambda name=name, shown=shown: (served.rundir / name).read_text() == shown)


def test_the_limit_is_what_is_left_now(backed: Filled) -> None:
    def ask(method: str, path: str, text: str = "") -> tuple[int, str]:
        return backed.served.request(method, path, text)

    assert ask("GET", "/writeback_limit_enable") == (200, "1\n")
    assert ask("POST", "/writeback_limit", "16") == (200, '{"writeback_limit": 16}\n')
    assert ask("POST", "/writeback", "page_indexes=200-299")[0] == 200
    wait_until(lambda: backed.served.stats()["bd_writes"] > 0)
    wait_until(lambda: ask("GET", "/writeback_limit") == (200, "0\n"))
    assert 0 < backed.served.stats()["bd_writes"] <= 16 * BLOCK
    assert 0 < len(backed.marked("w")) < 16
    code, text = ask("POST", "/writeback", "page_indexes=200-299")
    assert code == 409
    assert text.startswith("writeback_limit is used up, the next extent may be written in ")
    assert ask("POST", "/writeback_limit_enable", "0") == (200, '{"writeback_limit_enable": 0}\n')
    assert ask("GET", "/writeback_limit_enable") == (200, "0\n")
    assert ask("POST", "/writeback_limit", "16")[0] == 409
    assert ask("POST", "/writeback", "page_indexes=200-299")[0] == 200
    wait_until(lambda: backed.marked("w") == set(NOISE))
    assert ask("POST", "/writeback_limit_enable", "1") == (200, '{"writeback_limit_enable": 1}\n')
    assert json.loads(ask("GET", "/settings")[1])["writeback_limit"] == 1 << 30


def test_what_is_out_is_shown(backed: Filled) -> None:
    said("writeback", *at(backed), "page_indexes=0-199")
    wait_until(lambda: backed.marked("w") == {*TEXTS, *SIXES})
    text = said("tiers", *at(backed))
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert {name: rows[name][1] for name in ("hot", "raw", "same", "out", "all")} == {
        **{"hot": "0", "raw": str(EACH), "same": str(EACH), "out": str(2 * EACH), "all": str(4 * EACH)}
    }
    (told,) = json.loads(said("tiers", "--json", *at(backed)))["devices"]
    assert told["writeback"].keys() == {number.name for number in WRITEBACK}, "each is documented"
    assert told["writeback"]["mode"] in MODES
    assert told["writeback"]["out_pages"] == backed.served.stats()["out_pages"] == 2 * EACH
    assert said("list", "-n", "-o", "OUT-PAGES", *at(backed)).split() == [str(2 * EACH)]
    block = said("debug", "block", *at(backed), "3")
    assert "kind          out: on the backing device, and not in memory\n" in block
    assert re.search(r"^codec +lz4$", block, re.MULTILINE)
    assert re.search(r"^place +0x[0-9a-f]+, bytes into the backing device$", block, re.MULTILINE)


def test_without_a_backing_nothing_is_written(filled: Filled) -> None:
    told = "run: there is no backing device: 'zramd restart NAME backing=PATH' gives it one"
    assert refused("writeback", *at(filled), "type=huge", status=1) == told
    assert refused("bring-back", *at(filled), status=1) == told
    assert filled.served.request("POST", "/writeback_limit_enable", "1")[0] == 409
    assert filled.served.request("GET", "/backing_dev") == (200, "none\n")
    assert filled.served.request("GET", "/bd_stat") == (200, "       0        0        0\n")
    assert "writeback" not in filled.served.stats()
