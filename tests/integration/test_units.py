"""systemd's side: units installed and removed by the real command, and what a server tells its manager."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.manager import ServiceManager
from support.server import PACKAGE_PARENT, NbdkitProcess

import zramd
from zramd.contract import superblock
from zramd.launch import backingunit

UNITS = (
    *("zramd@.service", "zramd-attach@.service", "zramd-refresh.service", "zramd-refresh.timer"),
    *("zramd-net@.service", "zramd.slice"),
)


@pytest.fixture(scope="module")
def command() -> Iterator[Path]:
    """`zramd` as it is installed: in an environment of its own, where services can read it."""
    folder = Path(tempfile.mkdtemp(prefix="zramd-units-"))
    folder.chmod(0o755)
    venv = folder / "venv"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python3*/site-packages")
    shutil.copytree(Path(zramd.__file__).parent, packages / "zramd")
    shutil.copy(PACKAGE_PARENT / "nbdkit_plugin.py", packages)
    script = venv / "bin/zramd"
    # -E: not the build that PYTHONPATH names, which may lie where no service can read it.
    script.write_text(
        f"#!{venv}/bin/python3 -E\nimport sys\nfrom zramd.__main__ import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    # As installers do. The first command to run would else make the folders, with that command's umask.
    subprocess.run([venv / "bin/python3", "-m", "compileall", "-q", packages], check=True)
    yield script
    shutil.rmtree(folder)


def run(command: Path, *words: str | Path) -> tuple[int, str, str]:
    done = subprocess.run([command, *words], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text(errors="replace")
        for path in root.rglob("*")
        if path.is_file()
    }


def test_install_and_remove(command: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    folder = root / "usr/local/lib/systemd/system"
    status, said, complaint = run(command, "install-units", "--root", root)
    assert (status, complaint) == (0, "")
    assert said == "".join(f"installed  {folder / name}\n" for name in UNITS) + (
        f"installed  {root}/etc/zramd.conf, an example\n"
    )
    installed = tree(root)
    assert sorted(installed) == sorted(
        ["etc/zramd.conf", *(f"usr/local/lib/systemd/system/{name}" for name in UNITS)]
    )
    service = (folder / "zramd@.service").read_text()
    assert f"\nExecStart={command} serve --config %i\n" in service
    assert f"\nRequiresMountsFor={command}\n" in service
    assert "/usr/local/bin/zramd" not in "".join(tree(folder).values())
    assert (folder / "zramd@.service").stat().st_mode & 0o777 == 0o644

    # Again: nothing changes, and it says so. An older one is updated.
    status, said, complaint = run(command, "install-units", "--root", root)
    assert (status, complaint) == (0, "")
    assert said == "".join(f"unchanged  {folder / name}\n" for name in UNITS) + (
        f"kept       {root}/etc/zramd.conf\n"
    )
    (folder / "zramd.slice").write_text((folder / "zramd.slice").read_text() + "[Slice]\nCPUWeight=1\n")
    assert f"updated    {folder}/zramd.slice\n" in run(command, "install-units", "--root", root)[1]
    assert tree(root) == installed

    # Only what was installed goes.
    (folder / "zramd@zram0.service.d").mkdir()
    (folder / "zramd@zram0.service.d/mine.conf").write_text("[Service]\nNice=1\n")
    status, said, complaint = run(command, "remove-units", "--root", root)
    assert (status, complaint) == (0, "")
    assert said == "".join(f"removed  {folder / name}\n" for name in UNITS) + (
        f"removed  {root}/etc/zramd.conf\n"
    )
    assert list(tree(root)) == ["usr/local/lib/systemd/system/zramd@zram0.service.d/mine.conf"]
    assert run(command, "remove-units", "--root", root) == (
        0,
        f"there are no units of zramd in {folder}\n",
        "",
    )


def test_a_package_has_brought_them(command: Path, tmp_path: Path) -> None:
    """Other units in a place that comes first would stay when the package is upgraded."""
    folder = tmp_path / "usr/lib/systemd/system"
    folder.mkdir(parents=True)
    unit = folder / "zramd@.service"
    shipped = (Path(zramd.__file__).parent / "systemd/zramd@.service").read_text()
    unit.write_text(shipped.replace("/usr/local/bin/zramd", str(command)))
    before = tree(tmp_path)
    assert run(command, "install-units", "--root", tmp_path) == (
        1,
        "",
        f"zramd: the units of '{command}' are there: its package has put them into {folder}\n",
    )
    assert tree(tmp_path) == before
    # Those of another installation are none of its business.
    unit.write_text(shipped.replace("/usr/local/bin/zramd", "/usr/bin/zramd"))
    assert run(command, "install-units", "--root", tmp_path)[0] == 0


def test_configuration_is_the_users(command: Path, tmp_path: Path) -> None:
    conf = tmp_path / "etc/zramd.conf"
    conf.parent.mkdir()
    conf.write_text("[zram0]\n")
    assert f"kept       {conf}\n" in run(command, "install-units", "--root", tmp_path, "--prefix", "/usr")[1]
    assert (tmp_path / "usr/lib/systemd/system/zramd.slice").exists()
    assert (
        f"kept     {conf}: it is yours\n"
        in run(command, "remove-units", "--root", tmp_path, "--prefix", "/usr")[1]
    )
    assert conf.read_text() == "[zram0]\n"


def test_installed_in_another_root(command: Path) -> None:
    """The command is named as it will be seen from the system that is prepared."""
    root = command.parents[2]
    assert run(command, "install-units", "--root", root)[0] == 0
    service = root / "usr/local/lib/systemd/system/zramd@.service"
    assert "\nExecStart=/venv/bin/zramd serve --config %i\n" in service.read_text()
    assert run(command, "remove-units", "--root", root)[0] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--root", "/nowhere"], "--root '/nowhere' is not a folder"),
        (["--prefix", "usr", "--root", "/tmp"], "--prefix 'usr' is not an absolute path: use one such as"),
    ],
)
def test_bad_input(command: Path, words: list[str], sentence: str) -> None:
    for verb in ("install-units", "remove-units"):
        status, said, complaint = run(command, verb, *words)
        assert (status, said) == (2, "")
        assert complaint.startswith(f"zramd: {sentence}")
        assert complaint.count("\n") == 1


def test_what_cannot_be_written(command: Path, tmp_path: Path) -> None:
    """A limit on a file's size, for a disk that is full."""
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", command, "install-units", "--root", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    unit = tmp_path / "usr/local/lib/systemd/system/zramd@.service"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"zramd: '{unit}' cannot be used: file too large\n"


def test_refusals(command: Path, tmp_path: Path) -> None:
    def refused(verb: str, sentence: str, root: Path = tmp_path, by: Path = command) -> None:
        before = tree(root)
        status, said, complaint = run(by, verb, "--root", root)
        assert (status, said) == (1, "")
        assert sentence in complaint
        assert complaint.count("\n") == 1
        assert tree(root) == before

    folder = tmp_path / "usr/local/lib/systemd/system"
    folder.mkdir(parents=True)
    # Somebody else's unit is left alone, by both.
    (folder / "zramd@.service").write_text("[Service]\n")
    refused("install-units", f"{folder}/zramd@.service is not from 'zramd install-units'")
    assert run(command, "remove-units", "--root", tmp_path)[1] == f"there are no units of zramd in {folder}\n"
    (folder / "zramd@.service").unlink()
    # What is enabled would leave a dangling link.
    assert run(command, "install-units", "--root", tmp_path)[0] == 0
    wants = tmp_path / "etc/systemd/system/swap.target.wants"
    wants.mkdir(parents=True)
    (wants / "zramd@zram0.service").symlink_to("/usr/local/lib/systemd/system/zramd@.service")
    refused(
        "remove-units",
        "zramd@zram0.service is enabled or active: 'systemctl disable --now zramd@zram0.service' first",
    )
    # A service could not read it.
    home = tmp_path / "machine"
    shutil.copytree(command.parents[1], home / "home/me/venv", symlinks=True)
    moved = home / "home/me/venv/bin/zramd"
    moved.write_text(moved.read_text().replace(str(command.parents[1]), str(moved.parents[1])))
    refused(
        "install-units",
        f"'{moved}' is closed to services: install zramd and its Python elsewhere",
        home,
        moved,
    )
    moved.write_text("#!/bin/false\n")
    moved.chmod(0o644)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
    python = home / "home/me/venv/bin/python3"
    done = subprocess.run(
        [python, "-m", "zramd", "install-units", "--root", home],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert f"'{moved}' does not run by itself: install zramd" in done.stderr


@pytest.mark.parametrize("umask", [0o077, 0o000, 0o022])
def test_modes_whatever_the_umask(command: Path, tmp_path: Path, umask: int) -> None:
    """An image with an /etc and /usr that only root can enter is a machine for root alone."""
    root = tmp_path / "root"
    root.mkdir()
    done = subprocess.run(
        [command, "install-units", "--root", root], umask=umask, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    modes = {str(path.relative_to(root)): path.stat().st_mode & 0o777 for path in root.rglob("*")}
    assert {mode for path, mode in modes.items() if (root / path).is_dir()} == {0o755}
    assert {mode for path, mode in modes.items() if (root / path).is_file()} == {0o644}


@pytest.mark.parametrize("target", ["/real", "/../../real", "../../../../real", "{outside}"])
def test_links_of_an_image(command: Path, tmp_path: Path, target: str) -> None:
    """They lead where they will lead when the image is /, for what is written as for what is looked for."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "usr/local").mkdir(parents=True)
    outside.mkdir()
    (outside / "zramd.conf").write_text("[zram0]\n")
    (root / "usr/local/lib").symlink_to(target.format(outside=outside))
    (root / "etc").symlink_to(target.format(outside=outside))
    status, said, complaint = run(command, "install-units", "--root", root)
    assert (status, complaint) == (0, "")
    assert f"installed  {root}/etc/zramd.conf, an example\n" in said
    assert os.listdir(outside) == ["zramd.conf"]
    assert sorted(os.listdir(tmp_path)) == ["outside", "root"]
    where = Path(f"{root}/{outside}" if "{" in target else f"{root}/real")
    assert (where / "systemd/system/zramd@.service").is_file()
    assert run(command, "remove-units", "--root", root)[0] == 0
    assert not (where / "systemd/system/zramd@.service").exists()
    assert (outside / "zramd.conf").read_text() == "[zram0]\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
@pytest.mark.parametrize(
    "which", ["bin/zramd", "bin", "zramd/launch/units.py", "zramd", "nbdkit_plugin.py", "mode"]
)
def test_an_installation_of_another_user(command: Path, tmp_path: Path, which: str) -> None:
    """root would run at each boot what he has written there since."""
    venv = command.parents[1]
    (packages,) = venv.glob("lib/python3*/site-packages")
    path = venv / which if which.startswith("bin") else packages / which
    if which == "mode":
        path = packages
        path.chmod(0o777)
        sentence = f"other users may write to folder '{path}'"
    else:
        os.chown(path, 65534, 65534)
        sentence = f"'{path}' belongs to user "
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    words = [command, "install-units", "--root", tmp_path]
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
    finally:
        os.chown(path, 0, 0)
        path.chmod(0o755 if path.is_dir() or path == command else 0o644)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"zramd: {sentence}")
    assert "services would run it as root: install zramd as root, say in /opt/zramd" in done.stderr
    assert tree(tmp_path) == {}


# ---- What a service may write ----------------------------------------------------------------------------

SOURCE = Path(__file__).parents[2]
SERVICE = (SOURCE / "systemd/zramd@.service").read_text()


def settings_of(text: str, key: str) -> list[str]:
    """What a unit sets a key to, all its lines together."""
    return " ".join(re.findall(rf"^ *{key}=(.*)$", text, re.MULTILINE)).split()


def documented_drop_in(name: str) -> str:
    found = re.search(rf"<!-- drop-in: {name} -->\n((?:    .*\n)+)", (SOURCE / "docs/systemd.md").read_text())
    assert found
    return found[1]


def as_service(root: Path, drop_in: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a server as the unit does, as far as files go: `root` is read-only but for what may be written.

    One that serves is ended, and its status is 0 then.
    """
    assert settings_of(SERVICE, "ProtectSystem") == ["strict"]
    writable = [root / "run", *(root / path.lstrip("/") for path in settings_of(drop_in, "ReadWritePaths"))]
    kept = settings_of(SERVICE + drop_in, "CapabilityBoundingSet")
    capabilities = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in kept)
    script = f"mount --bind {root} {root} && mount -o remount,bind,ro {root} || exit 99\n"
    script += "".join(f"mount --bind {p} {p} && mount -o remount,bind,rw {p} || exit 99\n" for p in writable)
    script += f'exec setpriv --bounding-set=-all{capabilities} --inh-caps=-all "$@"'
    place = root / "manager"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), "NOTIFY_SOCKET": str(place)}
    command = [
        "unshare",
        "-m",
        "bash",
        "-c",
        script,
        "bash",
        sys.executable,
        "-P",
        "-m",
        "zramd",
        "serve",
        *words,
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place))
        manager.settimeout(0.1)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            while process.poll() is None:
                with suppress(TimeoutError):
                    if b"READY=1" in manager.recv(4096):
                        time.sleep(0.5)  # it writes what it is to write each tenth of a second
                        process.terminate()
                        break
            said, complaint = process.communicate(timeout=60)
        finally:
            process.kill()
            place.unlink()
    return subprocess.CompletedProcess(words, process.returncode, said, complaint)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, and gives a folder to another user")
@pytest.mark.parametrize("what", ["metrics_file", "state"])
def test_paths_that_a_service_may_write(tmp_path: Path, memory_folder: Path, what: str) -> None:
    """What zramd.conf proposes, under the unit: refused, and done with the documented drop-in."""
    root = memory_folder
    (root / "run").mkdir(0o700)
    collector = root / "var/lib/prometheus/node-exporter"
    collector.mkdir(parents=True)
    os.chown(collector, 65534, 65534)  # as Debian's prometheus has it
    path = collector / "x.prom" if what == "metrics_file" else root / "guest.state"
    words = ["--name", "unit", "--size", "16M", f"rundir={root}/run", f"{what}={path}"]
    refused = as_service(root, "", words)
    assert refused.returncode == 1, refused
    assert "docs/systemd.md, 'Paths'" in refused.stderr
    drop_in = documented_drop_in(what)
    if what == "state":  # the folder of this test stands for /srv/ram
        drop_in = drop_in.replace("=/srv/ram", "=/")
    done = as_service(root, drop_in, [*words, "stats_interval=0.1"])
    assert (done.returncode, done.stderr) == (0, ""), done
    if what == "state":
        assert path.stat().st_size
    nothing = as_service(root, "", words[:-1])
    assert (nothing.returncode, nothing.stderr) == (0, ""), nothing


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_a_backing_that_a_service_may_write(disk_folder: Path) -> None:
    """A file: refused, and done with the drop-in that 'zramd backing allow' writes, which is documented."""
    root = disk_folder
    (root / "run").mkdir(0o700)
    path = root / "zram0.backing"
    subprocess.run(["fallocate", "--length", "4M", path], check=True)
    path.chmod(0o600)
    words = ["--name", "unit", "--size", "16M", f"rundir={root}/run", f"backing={path}"]
    refused = as_service(root, "", words)
    assert refused.returncode == 1, refused
    assert (
        "a service may not write there yet: run 'zramd backing allow' with the device's name"
        in refused.stderr
    )
    drop_in = documented_drop_in("backing")
    assert drop_in.replace("    ", "") == backingunit.drop_in_for("/srv/zram0.backing")
    device = documented_drop_in("backing device").replace("    ", "")
    assert device == backingunit.drop_in_for("/dev/sdb1")
    done = as_service(root, drop_in.replace("/srv/", "/"), words)
    assert done.returncode == 0, done
    assert superblock.unpack(path.read_bytes()[: superblock.BYTES], str(path)).name == "unit"


def test_no_core_dump_of_a_service() -> None:
    for unit in ("zramd@.service", "zramd-net@.service", "zramd-attach@.service", "zramd-refresh.service"):
        text = (SOURCE / "systemd" / unit).read_text()
        assert settings_of(text, "LimitCORE") == ["0"]


def test_only_a_swap_of_this_machine_is_kept_from_the_oom_killer(serve: Callable[..., NbdkitProcess]) -> None:
    """A device that others fill may take all memory: its server must not be the last to go.

    (That of a swap sets it itself: tests/vm/test_debian.py looks.)
    """
    assert settings_of(SERVICE, "OOMScoreAdjust") == []
    before = Path("/proc/self/oom_score_adj").read_text()
    served = serve(swap="other")
    assert Path(f"/proc/{served.process.pid}/oom_score_adj").read_text() == before


# ---- What a server tells its manager ---------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceManager]:
    made = ServiceManager(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.path))
    yield made
    made.close()


def test_ready_and_status(
    manager: ServiceManager, serve: Callable[..., NbdkitProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(wait=False, stats_interval="0.1")
    assert manager.next_status() == "0 MiB stored in 0 MiB of memory"
    assert manager.next() == "READY=1"
    # Ready means ready: no second try.
    handle = served.connect()
    for block in range(1024):
        handle.pwrite(os.urandom(4096), block * 4096)
    # Nothing more for ten seconds, and then one message for all that has changed.
    status = manager.next_status()
    assert status.startswith("4 MiB stored in 4 MiB of memory, frag ratio ")
    handle.shutdown()
    served.process.send_signal(signal.SIGTERM)
    assert manager.next() == "STOPPING=1"
    served.process.wait(10)


def test_a_manager_that_does_not_listen(
    tmp_path: Path, serve: Callable[..., NbdkitProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert serve().stats()["disksize"] == 64 << 20


def configured(root: Path, text: str) -> dict[str, str]:
    (root / "etc").mkdir()
    (root / "etc/zramd.conf").write_text(text)
    return {**os.environ, "ZRAMD_ROOT": str(root), "PYTHONPATH": str(PACKAGE_PARENT)}


def test_serve_says_nothing_to_a_terminal_under_a_manager(manager: ServiceManager, tmp_path: Path) -> None:
    rundir = tmp_path / "run"
    environment = configured(tmp_path, f"[zram7]\ndisksize = 16M\nattach = no\nrundir = {rundir}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "zramd", "serve", "--config", "zram7"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert manager.next_status() == "0 MiB stored in 0 MiB of memory"
        assert manager.next() == "READY=1"
        assert int((rundir / "pid").read_text()) == process.pid
    finally:
        process.terminate()
        said = process.communicate(timeout=10)
    assert said == ("", "")


def test_a_device_that_is_not_for_this_machine(manager: ServiceManager, tmp_path: Path) -> None:
    """To systemd it has started, told why there is nothing, and ended well; to a user it is an error."""
    environment = configured(tmp_path, "[zram0]\nhost-memory-limit = 1\n")
    words = [sys.executable, "-m", "zramd", "serve", "--config", "zram0"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    message = manager.next()
    assert (done.returncode, done.stdout) == (0, "")
    assert message.startswith("STATUS=zram0: no device: host-memory-limit = 1 is less than the ")
    assert message.endswith("\nREADY=1")
    del environment["NOTIFY_SOCKET"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("zramd: zram0: no device: host-memory-limit = 1")
