"""Real input, there and back: a file system with a real tree in it, and pages of real programs' memory."""

import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.run import wait_until
from support.server import NbdkitProcess

Serve = Callable[..., NbdkitProcess]
MIB = 1 << 20
PAGE = 4096
# Texts and programs that are wherever the tests are: Python's library, and the headers that a build needs.
TREES = (sysconfig.get_path("stdlib"), "/usr/include")

CAPTURE = Path(__file__).resolve().parents[2] / "scripts" / "capture_pages"


def run(*command: str | Path, ok: tuple[int, ...] = (0,)) -> str:
    """Run a command and return what it said; skips where it is missing."""
    # e2fsprogs is where only root looks.
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    program = shutil.which(command[0], path=path)
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    ran = subprocess.run(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode in ok, f"{command}\n{ran.stdout[-2000:]}"
    return ran.stdout


def files(top: Path) -> dict[Path, Path]:
    """Every plain file below `top`, by its path there."""
    return {
        path.relative_to(top): path for path in top.rglob("*") if path.is_file() and not path.is_symlink()
    }


def real_tree(into: Path, room: int) -> None:
    """Copy real trees, up to `room` bytes, whole files in the order of their names."""
    for number, tree in enumerate(map(Path, TREES)):
        for name, path in sorted(files(tree).items()):
            room -= path.stat().st_size
            if room < 0:
                return
            place = into / str(number) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def ratio(served: NbdkitProcess) -> float:
    """Bytes stored for each byte of the pool; prints it with the rest that matters."""
    stats = served.stats()
    value: float = stats["orig_data_size"] / stats["mem_used_total"]
    print(
        f"{stats['orig_data_size'] / MIB:.1f} MiB stored in {stats['mem_used_total'] / MIB:.1f} MiB: "
        f"ratio {value:.3f} (lz4 alone {stats['orig_data_size'] / stats['compr_data_size']:.3f}), "
        f"frag ratio {stats['frag_ratio']:.2f} %"
    )
    return value


def compare(tree: Path, image: Path, out: Path) -> None:
    """Take the files out of an ext4 image and compare them with the tree that it was made from."""
    out.mkdir()
    # As an ordinary user it cannot give the files to their owners, and says so.
    run("debugfs", "-R", f"rdump / {out}", image)
    there, back = files(tree), files(out)
    assert set(there) <= set(back)
    assert all(path.read_bytes() == back[name].read_bytes() for name, path in there.items())


def trim_and_compact(served: NbdkitProcess, handle: Any, dice: random.Random) -> int:
    """Write noise past the data, trim most of it, compact; return the objects migrated."""
    start, end = handle.get_size() - 16 * MIB, handle.get_size()
    before = served.stats()["objects_migrated"]
    for offset in range(start, end, PAGE):
        handle.pwrite(dice.randbytes(dice.randrange(10, 3500)).ljust(PAGE, b"\0"), offset)
    for offset in range(start, end, PAGE):
        if dice.random() < 0.65:
            handle.trim(PAGE, offset)
    assert served.request("POST", "/compact")[0] == 200
    handle.trim(end - start, start)
    assert served.request("POST", "/compact")[0] == 200
    moved: int = served.stats()["objects_migrated"] - before
    return moved


def test_file_system(serve: Serve, tmp_path: Path) -> None:
    """An ext4 file system with a real tree: copied in, aged around, copied out, checked, compared."""
    tree, image, copy = tmp_path / "tree", tmp_path / "image", tmp_path / "copy"
    tree.mkdir()
    real_tree(tree, 100 * MIB)
    stored = sum(path.stat().st_size for path in files(tree).values())
    size = (stored * 3 // 2 + 64 * MIB) // MIB * MIB  # room for partly filled blocks and the metadata
    with image.open("wb") as file:
        file.truncate(size)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image)

    served = serve(disksize=size + 16 * MIB)
    handle = served.connect()
    run("nbdcopy", image, served.uri)
    print(f"a file system of {size >> 20} MiB with {len(files(tree))} files, {stored / MIB:.1f} MiB")
    assert ratio(served) > 1.3

    assert trim_and_compact(served, handle, random.Random(1)) > 100
    # Blocks of the image itself: gone and written again, in another order.
    data = image.read_bytes()
    offsets = random.Random(2).sample(range(0, size, PAGE), size // PAGE // 3)
    for offset in offsets:
        handle.trim(PAGE, offset)
    assert served.request("POST", "/compact")[0] == 200
    for offset in offsets:
        if data.count(0, offset, offset + PAGE) != PAGE:
            handle.pwrite(data[offset : offset + PAGE], offset)
    assert served.request("POST", "/compact")[0] == 200
    assert ratio(served) > 1.3

    run("nbdcopy", served.uri, copy)
    with copy.open("r+b") as file:
        file.truncate(size)
    assert copy.read_bytes() == data
    run("e2fsck", "-fn", copy)
    compare(tree, copy, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts with FUSE")
def test_file_system_made_on_the_device(serve: Serve, tmp_path: Path) -> None:
    """e2fsprogs make the file system and write the tree on the device, which nbdfuse shows as a file."""
    device, tree, copy = tmp_path / "device", tmp_path / "tree", tmp_path / "copy"
    device.touch()
    tree.mkdir()
    real_tree(tree, 12 * MIB)
    served = serve(disksize="96M", compaction_interval="0.05")
    if shutil.which("nbdfuse") is None:
        pytest.skip("nbdfuse is not installed")
    fuse = subprocess.Popen(["nbdfuse", device, served.uri], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: fuse.poll() is not None or device.stat().st_size)
        if fuse.poll() is not None:
            pytest.skip("FUSE cannot be mounted here")
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, device, "80M")  # 16 MiB are left for the noise
        assert trim_and_compact(served, served.connect(), random.Random(1)) > 100
        run("e2fsck", "-fn", device)
        ratio(served)
    finally:
        run("umount", device, ok=(0, 1, 32))
        fuse.terminate()
        fuse.wait(10)
    run("nbdcopy", served.uri, copy)
    run("e2fsck", "-fn", copy)
    compare(tree, copy, tmp_path / "out")


def test_memory_pages(serve: Serve, tmp_path: Path) -> None:
    """Pages of programs' memory: what a swap device gets."""
    corpus = tmp_path / "corpus"
    captured = subprocess.run(
        [sys.executable, CAPTURE, corpus, "48"], capture_output=True, text=True, timeout=120, check=False
    )
    if "run as root" in captured.stderr:
        pytest.skip("the memory of a child process cannot be read here")
    assert captured.returncode == 0, captured.stderr
    with corpus.open("rb") as file:
        pages = list(iter(lambda: file.read(PAGE), b""))
    assert len(pages) > 2000
    dice = random.Random(1)
    served = serve(disksize=len(pages) * PAGE + 16 * MIB)
    handle = served.connect()
    # As a swap device gets them: in runs of a few pages.
    at = 0
    while at < len(pages):
        some = pages[at : at + dice.randrange(1, 33)]
        handle.pwrite(b"".join(some), at * PAGE)
        at += len(some)
    print(f"{len(pages)} pages of programs' memory")
    assert ratio(served) > 1.3

    def check(live: list[int]) -> None:
        for index in live:
            assert handle.pread(PAGE, index * PAGE) == pages[index]

    everything = list(range(len(pages)))
    check(everything)
    assert trim_and_compact(served, handle, dice) > 100
    check(everything)
    # As after swapping in and out: two thirds are freed, and come back in another order.
    freed = dice.sample(everything, len(pages) * 2 // 3)
    for index in freed:
        handle.trim(PAGE, index * PAGE)
    fragmented = served.stats()["frag_ratio"]
    assert served.request("POST", "/compact")[0] == 200
    assert served.stats()["frag_ratio"] > fragmented
    print("after two thirds are freed and compaction:")
    ratio(served)
    check(sorted(set(everything).difference(freed)))
    for index in freed:
        handle.pwrite(pages[index], index * PAGE)
    print("after they came back:")
    assert ratio(served) > 1.3
    check(everything)
