"""The plugin in a real nbdkit: data, errors, life and death."""

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.run import talk, wait_until
from support.server import PACKAGE_PARENT, PLUGIN, NbdkitProcess

import zramd
from zramd.core.device import codec, frames

Serve = Callable[..., NbdkitProcess]
MIB = 1 << 20
STOP_SECONDS = 10.0  # it is one, on a machine that does nothing else; for ever, if it waits for a client
STATS_FILES = [
    *("backing_dev", "bd_stat", "classes", "comp_algorithm", "disksize", "frag_ratio", "io_stat"),
    *("metrics.prom", "mm_stat", "recomp_algorithm", "stats.json"),
]


def extents(handle: Any, count: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    """Block status as (length, flags), neighbours of one kind joined, of as many replies as it takes."""
    found: list[tuple[int, int]] = []

    def note(context: str, start: int, entries: list[int], error: Any) -> None:
        for length, kind in zip(entries[::2], entries[1::2], strict=True):
            if found and found[-1][1] == kind:
                length += found.pop()[0]
            found.append((length, kind))

    while (told := sum(length for length, _ in found)) < count:
        handle.block_status(count - told, offset + told, note, flags)
        if flags:
            break
    return found


class TestData:
    def test_what_is_offered(self, serve: Serve) -> None:
        handle = serve(name="swap0", disksize="10000").connect()
        assert handle.get_size() == 12288
        assert not handle.is_read_only()
        assert not handle.is_rotational()
        offered = ("flush", "fua", "trim", "zero", "fast_zero", "multi_conn")
        assert all(getattr(handle, f"can_{what}")() for what in offered)
        assert handle.can_cache()
        handle.cache(8192, 4096)  # there is nothing to do, and that is done
        assert [handle.get_block_size(which) for which in range(3)] == [1, 4096, 64 * MIB]

    def test_round_trips(self, serve: Serve) -> None:
        """Any offset and length: compared with a bytearray."""
        import nbd

        served = serve(disksize="1M", compaction_interval="0.01")
        handle = served.connect()
        model = bytearray(MIB)
        dice = random.Random(7)
        for _ in range(400):
            offset = dice.randrange(MIB)
            length = min(dice.choice((1, 100, 512, 4096, 5000, 65536)), MIB - offset)
            action = dice.randrange(6)
            if action < 2:
                data = (dice.randbytes(dice.randrange(1, 600)) * (length // 1 + 1))[:length]
                handle.pwrite(data, offset, dice.choice((0, nbd.CMD_FLAG_FUA)))
                model[offset : offset + length] = data
            elif action == 2:
                handle.zero(length, offset, dice.choice((0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO)))
                model[offset : offset + length] = bytes(length)
            elif action == 3:
                start, end = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
                if start < end:
                    handle.trim(end - start, start)
                    model[start:end] = bytes(end - start)
            else:
                assert handle.pread(length, offset) == model[offset : offset + length]
        handle.flush()
        assert handle.pread(MIB, 0) == model

    def test_extents(self, serve: Serve) -> None:
        import nbd

        handle = serve(disksize="1M").connect()
        data, hole, zero = 0, nbd.STATE_HOLE | nbd.STATE_ZERO, nbd.STATE_ZERO
        assert extents(handle, MIB, 0) == [(MIB, hole)]
        handle.pwrite(os.urandom(8192), 4096)
        assert extents(handle, MIB, 0) == [(4096, hole), (8192, data), (MIB - 12288, hole)]
        assert extents(handle, 100, 4000, nbd.CMD_FLAG_REQ_ONE)[0][0] <= 100
        handle.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE)
        assert extents(handle, 8192, 4096) == [(4096, zero), (4096, data)]
        handle.zero(8192, 4096)
        assert extents(handle, MIB, 0) == [(MIB, hole)]

    def test_one_export(self, serve: Serve) -> None:
        import nbd

        served = serve(name="zram7")
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        handle.connect_uri(served.uri)
        names: list[tuple[str, str]] = []
        handle.opt_list(lambda name, description: names.append((name, description)))
        assert [name for name, _ in names] == ["zram7"]
        assert names[0][1].startswith("zramd ")
        handle.set_export_name("other")
        with pytest.raises(nbd.Error) as caught:
            handle.opt_go()
        assert caught.value.errnum == errno.ENOENT
        handle.set_export_name("")
        handle.opt_go()
        assert handle.get_size() == 64 * MIB
        # (Another thread of the server writes its log, and no client waits for that.)
        wait_until(lambda: "export 'other' does not exist: use 'zram7'" in served.log.read_text())
        assert "Traceback" not in served.log.read_text()

    def test_many_connections(self, serve: Serve) -> None:
        """200 at once, then what they wrote, seen through another one."""
        served = serve()
        handles = [served.connect() for _ in range(200)]
        for index, handle in enumerate(handles):
            handle.pwrite(bytes([index]) * 4096, index * 4096)
        assert served.clients() == 200
        expected = b"".join(bytes([index]) * 4096 for index in range(200))
        assert handles[0].pread(200 * 4096, 0) == expected
        for handle in handles:
            handle.shutdown()
        wait_until(lambda: served.clients() == 0)

    @pytest.mark.parametrize("request_size", [4096, MIB])
    @pytest.mark.parametrize("what", ["read", "write"])
    def test_client_that_vanishes(self, serve: Serve, what: str, request_size: int) -> None:
        """With 16 requests on their way: the others and the data go on unharmed, and so does the server."""
        served = serve()
        steady = served.connect()
        steady.pwrite(b"x" * 65536, 32 * MIB)
        script = (
            "import nbd, os, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); size = int(sys.argv[3])\n"
            "send = getattr(h, 'aio_p' + sys.argv[2])\n"
            "for i in range(16): send(nbd.Buffer.from_bytearray(bytearray(size)), i * size)\n"
            "while h.aio_in_flight() and not h.aio_peek_command_completed(): h.poll(1)\n"
            "os._exit(1)"
        )
        for _ in range(5):
            command = [sys.executable, "-c", script, served.uri, what, str(request_size)]
            subprocess.run(command, timeout=30, check=False)
            assert steady.pread(65536, 32 * MIB) == b"x" * 65536
        wait_until(lambda: served.clients() == 1)

    def test_random_bytes(self, serve: Serve) -> None:
        served = serve()
        steady = served.connect()
        for length in (1, 16, 5000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(str(served.socket))
                sock.sendall(random.Random(length).randbytes(length))
        steady.pwrite(b"y" * 4096, 0)
        assert steady.pread(4096, 0) == b"y" * 4096


class TestFullPool:
    def fill(self, handle: Any) -> int:
        """Write random blocks until one fails; return its errno."""
        import nbd

        for offset in range(0, 4 * MIB, 4096):
            try:
                handle.pwrite(os.urandom(4096), offset)
            except nbd.Error as error:
                return int(error.errnum)
        return 0

    def test_enospc(self, serve: Serve) -> None:
        served = serve(mem_limit="1M")
        handle = served.connect()
        handle.pwrite(b"old" * 1365 + b"!", 8 * MIB)
        assert self.fill(handle) == errno.ENOSPC
        assert served.stats()["mem_used_total"] <= MIB
        assert served.stats()["failed_writes"] >= 1
        handle.pwrite(b"\xaa" * 4096, 16 * MIB)  # one word repeated takes no room
        assert handle.pread(4096, 8 * MIB) == b"old" * 1365 + b"!"
        log = served.log.read_text()
        assert "Traceback" not in log
        assert len(log.splitlines()) == served.stats()["failed_writes"]
        assert served.request("PUT", "/mem_limit", "2M") == (200, f'{{"mem_limit": {2 * MIB}}}\n')
        handle.pwrite(os.urandom(4096), 20 * MIB)

    def test_eio(self, serve: Serve) -> None:
        handle = serve(mem_limit="1M", pool_full="eio").connect()
        assert self.fill(handle) == errno.EIO


class TestEndpointAndFiles:
    def test_files_follow(self, serve: Serve) -> None:
        served = serve(stats_interval="0.05")
        others = ["control.sock", "data_id", "nbd.sock", "pid", "state_path"]
        assert sorted(os.listdir(served.rundir)) == sorted([*STATS_FILES, *others])
        assert (served.rundir / "pid").read_text() == f"{served.process.pid}\n"
        handle = served.connect()
        handle.pwrite(b"some text that compresses " * 40000, 0)
        written = 26 * 40000
        wait_until(lambda: json.loads((served.rundir / "stats.json").read_text())["written_bytes"] == written)
        assert (served.rundir / "disksize").read_text() == f"{served.stats()['disksize']}\n"
        columns = [int(word) for word in (served.rundir / "mm_stat").read_text().split()]
        stats = served.stats()
        names = "orig_data_size compr_data_size mem_used_total mem_limit mem_used_max same_pages"
        assert columns[:6] == [stats[name] for name in names.split()]
        assert 0 < columns[1] < columns[0]
        assert 0 < float((served.rundir / "frag_ratio").read_text()) <= 100

    def test_unchanged_files_stay(self, serve: Serve) -> None:
        served = serve(stats_interval="0.02")
        before = (served.rundir / "mm_stat").stat().st_mtime_ns
        time.sleep(0.3)
        assert (served.rundir / "mm_stat").stat().st_mtime_ns == before

    def test_off(self, serve: Serve) -> None:
        served = serve(wait=False, stats_interval="0", endpoint="off")
        wait_until(served.socket.exists)
        handle = served.connect()
        handle.pwrite(b"x" * 4096, 0)
        assert sorted(os.listdir(served.rundir)) == ["data_id", "nbd.sock", "pid", "state_path"]
        assert served.stop() < STOP_SECONDS
        assert not served.rundir.exists()

    def test_reset(self, serve: Serve) -> None:
        served = serve()
        handle = served.connect()
        handle.pwrite(os.urandom(MIB), 0)
        assert served.request("POST", "/reset")[0] == 409
        assert served.stats()["orig_data_size"] == MIB
        handle.shutdown()
        wait_until(lambda: served.request("POST", "/reset")[0] == 200)
        assert served.stats()["orig_data_size"] == 0
        handle = served.connect()
        assert handle.pread(MIB, 0) == bytes(MIB)

    def fragment(self, handle: Any) -> None:
        """Write blocks of all sizes, and trim most of them, one here and one there."""
        dice = random.Random(3)
        for offset in range(0, 8 * MIB, 4096):
            handle.pwrite(dice.randbytes(dice.randrange(100, 2000)).ljust(4096, b"\0"), offset)
        for offset in range(0, 8 * MIB, 4096):
            if dice.random() < 0.65:
                handle.trim(4096, offset)

    def test_compact(self, serve: Serve) -> None:
        served = serve(compaction="off")
        handle = served.connect()
        self.fragment(handle)
        before = served.stats()
        assert before["freeable_pages"] > 50
        status, body = served.request("POST", "/compact")
        assert status == 200
        assert json.loads(body)["pages_freed"] > 50
        after = served.stats()
        assert after["mem_used_total"] < before["mem_used_total"]
        assert after["frag_ratio"] > before["frag_ratio"]
        served.request("POST", "/mem_used_max")
        assert served.stats()["mem_used_max"] == after["mem_used_total"]

    def test_background_compaction(self, serve: Serve) -> None:
        served = serve(compaction_interval="0.05")
        handle = served.connect()
        self.fragment(handle)
        wait_until(lambda: served.stats()["pages_compacted"] > 50)


class TestBadStart:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            (["disksize=64X"], "disksize: '64X' is not a size"),
            ([], "disksize is missing"),
            (["disksize=1M", "size=2M"], "size='2M' is a second value"),
            (["disksize=1M", "colour=red"], "unknown setting 'colour'"),
            (["disksize=1M", "name=a/b"], "name: 'a/b' is not a name"),
            (["disksize=1M", "rundir=/proc/none"], "rundir '/proc/none' cannot be used"),
            (["disksize=1M", "comp_algorithm=lzo"], "comp_algorithm: 'lzo' is not available"),
        ],
    )
    def test_one_sentence(self, settings: list[str], sentence: str, tmp_path: Path) -> None:
        command = ["nbdkit", "-f", "-U", str(tmp_path / "sock"), "python", str(PLUGIN), *settings]
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "XDG_RUNTIME_DIR": str(tmp_path)}
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
        assert ran.returncode != 0
        assert sentence in ran.stderr
        assert len(ran.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "sock").exists()

    def test_rundir_in_use(self, serve: Serve) -> None:
        first = serve()
        handle = first.connect()
        handle.pwrite(b"x" * 4096, 0)
        second = serve(wait=False, rundir=first.rundir)
        assert second.process.wait(10) != 0
        assert f"is in use by a running server (pid {first.process.pid})" in second.log.read_text()
        assert handle.pread(4096, 0) == b"x" * 4096
        assert first.stats()["reads"] >= 1

    def test_after_a_crash(self, serve: Serve) -> None:
        first = serve()
        first.process.kill()
        first.process.wait()
        assert first.socket.exists()
        second = serve(rundir=first.rundir)
        assert second.connect().get_size() == 64 * MIB

    def test_without_the_core(self, tmp_path: Path) -> None:
        shutil.copy(PLUGIN, tmp_path)
        command = ["nbdkit", "-f", "-s", "python", str(tmp_path / "nbdkit_plugin.py"), "disksize=1M"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
        assert ran.returncode != 0
        assert "run scripts/serve" in ran.stderr
        assert len(ran.stderr.strip().splitlines()) == 1

    def test_takes_the_package_beside_it(self, tmp_path: Path) -> None:
        """Not another one of the system's, which may know another format of the state."""
        for place in ("own", "other"):
            shutil.copytree(PACKAGE_PARENT, tmp_path / place, ignore=shutil.ignore_patterns("__pycache__"))
        init = tmp_path / "other" / "zramd" / "__init__.py"
        init.write_text(init.read_text() + '\n__version__ = "9.9.9"\n')
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "other")}
        for place, version in (("own", zramd.__version__), ("other", "9.9.9")):
            command = ["nbdkit", "python", f"{tmp_path}/{place}/nbdkit_plugin.py", "--dump-plugin"]
            ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=True)
            assert f"zramd_version={version}\n" in ran.stdout

    def test_interrupted_while_it_is_loaded(self, tmp_path: Path) -> None:
        """Python would say where that was."""
        shutil.copy(PLUGIN, tmp_path)
        (tmp_path / "zramd").mkdir()
        (tmp_path / "zramd/__init__.py").write_text("import time\nprint(1, flush=True)\ntime.sleep(60)\n")
        command = ["nbdkit", "-f", "-s", "python", str(tmp_path / "nbdkit_plugin.py"), "disksize=1M"]
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"1\n"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == (b"", b"")
            assert process.returncode == -signal.SIGINT

    def test_dump_plugin(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
        command = ["nbdkit", "python", str(PLUGIN), "--dump-plugin"]
        text = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=True).stdout
        assert text.startswith("zramd_version=")
        assert "\nzramd_setting_mem_limit=0: " in text
        assert f"\nzramd_lz4={codec.LZ4_VERSION}\nzramd_zstd={frames.ZSTD_VERSION}\n" in text


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_without_client(self, serve: Serve, number: int) -> None:
        served = serve()
        assert served.stop(number) < STOP_SECONDS
        assert served.process.returncode == 0
        assert not served.rundir.exists()
        assert served.log.read_text() == ""

    def test_idle_client(self, serve: Serve) -> None:
        served = serve()
        handle = served.connect()
        handle.pwrite(b"x" * 4096, 0)
        assert served.stop() < STOP_SECONDS
        assert served.process.returncode == 0
        assert not served.rundir.exists()

    def test_client_in_handshake(self, serve: Serve) -> None:
        served = serve()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(served.socket))
            sock.recv(18)
            assert served.stop() < STOP_SECONDS
        assert not served.rundir.exists()

    def test_clients_in_the_middle_of_writes(self, serve: Serve) -> None:
        import nbd

        served = serve()
        ended = []

        def write(offset: int) -> None:
            handle = served.connect()
            data = os.urandom(MIB)
            try:
                while True:
                    handle.pwrite(data, offset)
            except nbd.Error as error:
                ended.append(error)

        writers = [threading.Thread(target=write, args=(index * MIB,)) for index in range(3)]
        for writer in writers:
            writer.start()
        wait_until(lambda: served.stats()["writes"] > 20)
        assert served.stop() < STOP_SECONDS
        for writer in writers:
            writer.join(10)
        assert len(ended) == 3
        assert served.process.returncode == 0
        assert not served.rundir.exists()

    def test_client_that_does_not_take_its_answers(self, serve: Serve) -> None:
        import nbd

        served = serve()
        handle = served.connect()
        for _ in range(8):
            handle.aio_pread(nbd.Buffer(8 * MIB), 0)
        wait_until(lambda: served.stats()["reads"] >= 1)
        assert served.stop() < STOP_SECONDS
        assert served.process.returncode == 0, served.log.read_text()
        assert not served.rundir.exists()

    def test_half_a_request(self, serve: Serve) -> None:
        """A client that has announced more data than it ever sends."""
        served = serve()
        handle = served.connect()
        raw = socket.socket(fileno=os.dup(handle.aio_get_fd()))
        raw.send(
            bytes.fromhex("25609513 0000 0001 0000000000000001 0000000000000000 00010000".replace(" ", ""))
        )
        time.sleep(0.05)
        assert served.stop() < STOP_SECONDS
        assert not served.rundir.exists()
        raw.close()

    def test_busy_endpoint(self, serve: Serve) -> None:
        served = serve()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(served.rundir / "control.sock"))
            sock.send(b"GET /")
            assert served.stop() < STOP_SECONDS
        assert not served.rundir.exists()

    def test_second_signal(self, serve: Serve) -> None:
        served = serve()
        handle = served.connect()
        served.process.send_signal(signal.SIGTERM)
        assert served.stop(signal.SIGINT) < STOP_SECONDS
        assert not served.rundir.exists()
        del handle

    def test_foreign_files_stay(self, serve: Serve) -> None:
        served = serve()
        (served.rundir / "notes").write_text("mine")
        served.stop()
        assert os.listdir(served.rundir) == ["notes"]

    def command(self, tmp_path: Path, *words: str) -> list[str]:
        return ["nbdkit", *words, "python", str(PLUGIN), "disksize=1M", f"rundir={tmp_path}/run"]

    def env(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}

    @pytest.mark.parametrize("signalled", [False, True])
    def test_on_standard_input(self, tmp_path: Path, signalled: bool) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                self.command(tmp_path, "-s"),
                env=self.env(),
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
            )
            theirs.close()
            assert ours.recv(18)[:8] == b"NBDMAGIC"
            started = time.monotonic()
            if signalled:
                process.terminate()
            else:
                ours.shutdown(socket.SHUT_WR)
            process.wait(10)
            assert time.monotonic() - started < STOP_SECONDS
            process.communicate()
        assert not (tmp_path / "run").exists()

    def test_on_pipes(self, tmp_path: Path) -> None:
        """Nothing can cut a pipe: the process leaves without nbdkit."""
        process = subprocess.Popen(
            self.command(tmp_path, "-s"),
            env=self.env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.read(18)[:8] == b"NBDMAGIC"
        started = time.monotonic()
        process.terminate()
        process.wait(10)
        assert time.monotonic() - started < STOP_SECONDS
        process.communicate()
        assert not (tmp_path / "run").exists()

    def test_under_run(self, tmp_path: Path) -> None:
        run = f"cat {tmp_path}/run/pid; nbdinfo --size $uri; ls {tmp_path}/run"
        command = self.command(tmp_path, "-U", "-", "--run", run)
        ran = subprocess.run(command, env=self.env(), capture_output=True, text=True, timeout=30, check=False)
        assert ran.returncode == 0, ran.stderr
        assert "\n1048576\n" in ran.stdout
        assert not (tmp_path / "run").exists()

    def test_under_run_with_a_client_left(self, tmp_path: Path) -> None:
        script = "import nbd, sys, time; h = nbd.NBD(); h.connect_uri(sys.argv[1]); time.sleep(60)"
        run = f"{sys.executable} -c '{script}' $uri & sleep 0.7; echo $!"
        command = self.command(tmp_path, "-U", "-", "--run", run)
        with subprocess.Popen(command, env=self.env(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            client = int(process.stdout.readline())
            try:
                process.wait(30)
            finally:
                os.kill(client, signal.SIGKILL)
        assert not (tmp_path / "run").exists()

    def test_daemon(self, tmp_path: Path) -> None:
        """In the background: the lock and the pid file follow the process that serves."""
        pidfile, path = tmp_path / "nbdkit.pid", tmp_path / "run" / "nbd.sock"
        command = self.command(tmp_path, "-U", str(path), "-P", str(pidfile))
        subprocess.run(command, env=self.env(), timeout=30, check=True)
        control = tmp_path / "run" / "control.sock"
        wait_until(lambda: control.exists() and b"200 OK" in talk(control, b"GET /health HTTP/1.1\r\n\r\n"))
        pid = int(pidfile.read_text())
        try:
            assert (tmp_path / "run" / "pid").read_text() == f"{pid}\n"
            ran = subprocess.run(
                command, env=self.env(), capture_output=True, text=True, timeout=30, check=False
            )
            assert f"(pid {pid})" in ran.stderr
        finally:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not (tmp_path / "run").exists(), 2)


class TestLauncher:
    def test_serve(self, tmp_path: Path) -> None:
        command = [
            sys.executable,
            "-P",
            "-m",
            "zramd",
            "serve",
            "--name",
            "z1",
            "--size",
            "8M",
            f"rundir={tmp_path}/r",
        ]
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            text = process.stdout.read()  # ends with the watcher: nbdkit has let go of it
            assert f"nbd+unix:///z1?socket={tmp_path}/r/nbd.sock" in text
            assert f"kill {process.pid}" in text
            nbd = pytest.importorskip("nbd")
            handle = nbd.NBD()
            handle.connect_uri(f"nbd+unix:///z1?socket={tmp_path}/r/nbd.sock")
            assert handle.get_size() == 8 * MIB
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert time.monotonic() - started < STOP_SECONDS
        assert not (tmp_path / "r").exists()
