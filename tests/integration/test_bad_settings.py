"""Settings that cannot be used: the plugin and the command say why in one line, and leave nothing behind."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.client import bystander
from support.server import PACKAGE_PARENT, PLUGIN, NbdkitProcess

Serve = Callable[..., NbdkitProcess]
NOBODY = 65534


class TestBadSettings:
    """One sentence that names the value, an exit status, and nothing left behind."""

    CASES = (
        ("colour", "red"),
        ("mem_limits", "1G"),
        ("disksize", "64X"),
        ("disksize", "0"),
        ("disksize", "-1"),
        ("disksize", "1.5G"),
        ("disksize", ""),
        ("disksize", "1 G"),
        ("disksize", "0x"),
        ("disksize", "9E"),
        ("disksize", "18446744073709551616"),
        ("size", "2M"),
        ("name", "a/b"),
        ("name", ".."),
        ("name", ""),
        ("name", "x" * 65),
        ("mem_limit", "half"),
        ("comp_algorithm", "lzo-rle"),
        ("comp_algorithm", "lz4(level=0)"),
        ("comp_algorithm", "lz4hc(level=10)"),
        ("comp_algorithm", "zstd(level=20)"),
        ("comp_algorithm", "lz4 zstd"),
        ("recompression", "lz4"),
        ("compaction", "maybe"),
        ("compaction_threshold", "0"),
        ("compaction_threshold", "101"),
        ("compaction_near_limit", "nan"),
        ("compaction_interval", "-1"),
        ("compaction_interval", "inf"),
        ("compaction_step", "1"),
        ("pool_full", "maybe"),
        ("stats_interval", "often"),
        ("endpoint", "2"),
        ("rundir", ""),
        ("rundir", "/" + "x" * 200),
        ("rundir", "/proc/none"),
        ("rundir", "/dev/null"),
        ("rundir", "/dev/null/run"),
        ("rundir", "/tmp"),
    )

    def refused(self, folder: Path, command: list[str], user: int | None = None) -> str:
        """Run what must fail in `folder`; return its one line of errors."""
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "PYTHONDONTWRITEBYTECODE": "1"}
        env["XDG_RUNTIME_DIR"] = str(folder)
        before = sorted(folder.rglob("*"))
        ran = subprocess.run(
            command,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            user=user,
            check=False,
        )
        assert ran.returncode in (1, 2), ran
        assert ran.stdout == ""
        assert len(ran.stderr.splitlines()) == 1, ran.stderr
        assert sorted(folder.rglob("*")) == before
        return ran.stderr

    @pytest.mark.parametrize(("key", "value"), CASES)
    def test_plugin(self, tmp_path: Path, key: str, value: str) -> None:
        words = [] if key == "disksize" else ["disksize=1M"]
        if key != "rundir":
            words.append(f"rundir={tmp_path}/run")
        command = ["nbdkit", "-f", "-U", f"{tmp_path}/sock", "python", str(PLUGIN), *words, f"{key}={value}"]
        said = self.refused(tmp_path, command)
        assert key in said
        assert f"'{key if key in ('colour', 'mem_limits') else value}'" in said

    @pytest.mark.parametrize(("key", "value"), CASES)
    def test_launcher(self, tmp_path: Path, key: str, value: str) -> None:
        words = [] if key == "disksize" else ["disksize=1M"]
        if key != "rundir":
            words.append(f"rundir={tmp_path}/run")
        said = self.refused(
            tmp_path, [sys.executable, "-P", "-m", "zramd", "serve", *words, f"{key}={value}"]
        )
        assert said.startswith(("zramd: ", "nbdkit: "))  # what it cannot know before, the plugin tells
        assert f"'{key if key in ('colour', 'mem_limits') else value}'" in said

    def test_rundir_that_is_not_ours_to_write(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            user = NOBODY if os.geteuid() == 0 else None
            readable = subprocess.run(["test", "-r", str(PLUGIN)], user=user, check=False).returncode == 0
            if not readable:
                pytest.skip("needs a checkout that other users can read")
            folder.chmod(0o555)
            words = ["disksize=1M", f"rundir={folder}/run"]
            said = self.refused(folder, ["nbdkit", "-f", "-U", "-", "python", str(PLUGIN), *words], user)
            assert f"rundir '{folder}/run' cannot be used: permission denied" in said
            folder.chmod(0o755)

    def test_rundir_in_use(self, serve: Serve, tmp_path: Path) -> None:
        served = serve()
        with bystander(served):
            before = sorted(served.rundir.iterdir())
            command = ["nbdkit", "-f", "-U", f"{tmp_path}/sock", "python", str(PLUGIN), "disksize=1M"]
            said = self.refused(tmp_path, [*command, f"rundir={served.rundir}"])
            assert f"'{served.rundir}' is in use by a running server (pid {served.process.pid})" in said
            launcher = [sys.executable, "-P", "-m", "zramd", "serve", f"rundir={served.rundir}"]
            assert f"(pid {served.process.pid})" in self.refused(tmp_path, launcher)
            assert sorted(served.rundir.iterdir()) == before
