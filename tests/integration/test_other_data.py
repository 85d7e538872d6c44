"""A client that connects again by itself: qemu gets the data that it had, or none, by NAME@DATA_ID."""

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.run import wait_until
from support.server import NbdkitProcess

Serve = Callable[..., NbdkitProcess]
PROMPT = "qemu-io> "

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils is not installed")


class Qemu:
    """qemu's NBD client with a disk; it waits for a server that is away, but not for long."""

    def __init__(self, process: "subprocess.Popen[str]", output: Path) -> None:
        self._process = process
        self._output = output
        self._said()

    def ask(self, command: str) -> str:
        """Have it do something, and return what it says of that."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._said()

    def _said(self) -> str:
        wait_until(lambda: self._output.read_text().endswith(PROMPT), 60)
        said = self._output.read_text().removesuffix(PROMPT)
        with self._output.open("r+") as file:  # it is appended to
            file.truncate(0)
        return said


@contextmanager
def connected(served: NbdkitProcess, export: str, output: Path) -> Iterator[Qemu]:
    """qemu-io as a client of a server's export."""
    where = f"server.type=unix,server.path={served.socket},export={export},reconnect-delay=2"
    with output.open("a") as file:
        process = subprocess.Popen(
            ["qemu-io", "--image-opts", f"driver=nbd,{where}"],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            text=True,
        )
    try:
        yield Qemu(process, output)
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize(
    ("has_state", "names_data", "says"),
    [
        pytest.param(True, True, "read 4096/4096 bytes", id="the same data"),
        pytest.param(False, True, "read failed: Input/output error", id="other data"),
        # Why there is such a name: to a guest it would be memory full of zeros.
        pytest.param(False, False, "Pattern verification failed", id="any data"),
    ],
)
def test_what_qemu_reads_after_a_server_was_killed(
    serve: Serve, tmp_path: Path, memory_folder: Path, has_state: bool, names_data: bool, says: str
) -> None:
    settings: dict[str, object] = {"name": "zram7", "rundir": tmp_path / "run"}
    if has_state:
        settings["state"] = memory_folder / "state"
    first = serve(**settings)
    data = (first.rundir / "data_id").read_text().strip()
    export = f"zram7@{data}" if names_data else "zram7"
    with connected(first, export, tmp_path / "output") as qemu:
        assert "wrote 4096/4096 bytes" in qemu.ask("write -P 7 8k 4k")
        first.stop(signal.SIGKILL)
        second = serve(**settings)
        assert says in qemu.ask("read -P 7 8k 4k")
    now = (second.rundir / "data_id").read_text().strip()
    assert (now == data) == has_state
    refusal = f"export '{export}' is no more: 'zram7' holds other data now, 'zram7@{now}'"
    if names_data and not has_state:
        wait_until(lambda: refusal in second.log.read_text())
    else:
        assert "export" not in second.log.read_text()


def test_a_reset_is_other_data(serve: Serve, tmp_path: Path) -> None:
    served = serve(name="zram7")
    before = (served.rundir / "data_id").read_text().strip()
    assert served.request("POST", "/reset")[0] == 200
    after = (served.rundir / "data_id").read_text().strip()
    assert before != after
    with connected(served, f"zram7@{after}", tmp_path / "output") as qemu:
        assert "read 4096/4096 bytes" in qemu.ask("read -P 0 0 4k")
    done = subprocess.run(
        [
            "qemu-io",
            "--image-opts",
            f"driver=nbd,server.type=unix,server.path={served.socket},export=zram7@{before}",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "Requested export not available" in done.stderr
