"""Memory that is not used becomes smaller by itself: a real server, and its own clock."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.client import NbdSocket
from support.content import noise
from support.run import wait_until, zramd_command
from support.server import NbdkitProcess

Serve = Callable[..., NbdkitProcess]
BLOCK = 4096
BLOCKS = 200
ENOSPC = 28


def text(seed: int) -> bytes:
    """What lz4 brings to some 2000 bytes, and zstd to less."""
    return b"".join(b"%d %d\n" % (seed, number * number * (seed + 7)) for number in range(1000))[:BLOCK]


def hexadecimal(seed: int) -> bytes:
    """What lz4 cannot make smaller, and zstd can."""
    return noise(seed)[: BLOCK // 2].hex().encode()


CONTENTS = [text(number) for number in range(BLOCKS - 40)] + [hexadecimal(number) for number in range(40)]


def fill(client: NbdSocket) -> None:
    assert client.ask(client.WRITE, 0, BLOCKS * BLOCK, b"".join(CONTENTS)) == 0


def kind(served: NbdkitProcess, block: int) -> Any:
    return json.loads(served.request("GET", f"/block/{block}")[1])["kind"]


def test_by_themselves(serve: Serve, memory_folder: Path) -> None:
    """Blocks become cold, and hot when they are read again and again; a kill loses neither, nor does off."""
    settings = {"state": memory_folder / "state", "cold_age": "10", "verify": "on"}
    served = serve(**settings)
    client = NbdSocket(served)
    fill(client)
    before = served.stats()
    assert before["cold_pages"] == 0
    wait_until(lambda: served.stats()["cold_pages"] == BLOCKS, timeout=60)
    after = served.stats()
    assert (after["huge_pages"], after["recompressed"], after["pages_stored"]) == (0, BLOCKS, BLOCKS)
    assert after["compr_data_size"] == before["compr_data_size"] - after["recompress_saved"]
    assert after["compr_data_size"] < 0.8 * before["compr_data_size"]

    def is_hot() -> bool:
        assert client.read(3 * BLOCK, BLOCK) == CONTENTS[3]
        return bool(kind(served, 3) == "lz4")

    wait_until(is_hot, timeout=60)
    assert served.stats()["promoted"] == 1
    assert client.read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    cold = served.stats()["cold_pages"]
    assert cold == BLOCKS - 1
    served.stop(signal.SIGKILL)

    served = serve(recompression="off", **settings)
    client = NbdSocket(served)
    assert served.stats()["cold_pages"] == cold
    assert client.read(0, BLOCKS * BLOCK) == b"".join(CONTENTS)
    assert served.request("POST", "/check")[0] == 200


def test_refused_writes_make_it_hurry(serve: Serve) -> None:
    """The pool is full: what was left alone for a sweep becomes cold, hours before its age."""
    served = serve(cold_age="5h", mem_limit="2M")
    client = NbdSocket(served)
    stored = 0
    while client.ask(client.WRITE, stored * BLOCK, BLOCK, CONTENTS[stored % BLOCKS]) == 0:
        stored += 1
    assert served.stats()["failed_writes"] == 1
    wait_until(lambda: served.stats()["cold_pages"] > stored / 2, timeout=60)
    for block in range(stored, stored + 50):
        assert client.ask(client.WRITE, block * BLOCK, BLOCK, CONTENTS[block % BLOCKS]) == 0
    assert served.stats()["mem_used_max"] <= 2 << 20
    for block in range(stored + 50):
        assert client.read(block * BLOCK, BLOCK) == CONTENTS[block % BLOCKS]
    assert served.request("POST", "/check")[0] == 200


def test_settings_at_work(serve: Serve) -> None:
    served = serve()
    at = ("--rundir", served.rundir)
    done = zramd_command("set", *at, "recompression=zstd(level=9)", "cold_age=1h")
    assert done.stdout.splitlines() == ["recompression=zstd(level=9)", "cold_age=3600"]
    levels = served.stats()["metadata_bytes"]
    done = zramd_command("set", *at, "recompression=off")
    assert done.stdout == "recompression=off\n"
    assert served.stats()["metadata_bytes"] < levels
    assert json.loads(served.request("GET", "/settings")[1])["cold_age"] == 3600


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("recompression=lz4", "recompression: 'lz4' does not recompress: use zstd, zstd(level=N) or off"),
        (
            "recompression=zstd(level=20)",
            "recompression: 'zstd(level=20)' is out of range: use zstd(level=N)",
        ),
        ("cold_age=1s", "cold_age: '1s' is out of range: use 10 seconds to 5 hours, such as 300, 5min or 1h"),
        ("cold_age=soon", "cold_age: 'soon' is out of range: use 10 seconds to 5 hours"),
    ],
)
def test_bad_settings(serve: Serve, setting: str, sentence: str) -> None:
    served = serve()
    done = zramd_command("set", "--rundir", served.rundir, setting)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
