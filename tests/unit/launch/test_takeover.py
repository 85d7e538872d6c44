"""What the server that takes over finds: the folder in which the old one stands, and sockets from 3 on."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from zramd.control import life, peer, servers
from zramd.errors import DeviceError
from zramd.kernel import attached
from zramd.launch import processes, takeover


@pytest.mark.parametrize("number", [3, 4, 20])
def test_its_folder_is_not_taken_by_a_socket(tmp_path: Path, number: int) -> None:
    """Which descriptors the command has free, and so for the folder, is up to who runs it."""
    said = tmp_path / "said"
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(tmp_path, os.O_PATH | os.O_DIRECTORY), number)
            old = SimpleNamespace(
                folder=number, process=os.pidfd_open(os.getpid()), leaves_pid=True, made=False
            )
            old.listening = [socket.socket(socket.AF_UNIX).detach() for _ in range(2)]
            turn = SimpleNamespace(fd=os.open("/", os.O_PATH), words=dict)
            argv = ["sh", "-c", "pwd >said.new; readlink /proc/$$/fd/3 >>said.new; mv said.new said"]
            plan = SimpleNamespace(settings=SimpleNamespace(front="nbd", clients=()), argv=argv)
            new = takeover._Successor(plan, old, turn)  # type: ignore[arg-type]
            while os.read(new._errors, 4096):
                pass
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    folder, first = said.read_text().split()
    assert folder == str(tmp_path)
    assert first.startswith("socket:")


def test_one_that_has_ended_is_not_killed_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may have that by now."""
    numbers: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: numbers.append(pid))
    with socket.socket(socket.AF_UNIX) as listening:
        old = SimpleNamespace(
            folder=os.open("/", os.O_PATH), process=os.pidfd_open(os.getpid()), leaves_pid=True, made=False
        )
        old.listening = [listening.fileno()]
        turn = SimpleNamespace(fd=os.open("/", os.O_PATH), words=dict)
        plan = SimpleNamespace(settings=SimpleNamespace(front="nbd", clients=()), argv=["true"])
        new = takeover._Successor(plan, old, turn)  # type: ignore[arg-type]
        while os.read(new._errors, 4096):
            pass
        new.kill()
    assert numbers == []
    for fd in (old.folder, old.process, turn.fd):
        os.close(fd)


@pytest.mark.parametrize("reaped", [False, True])
def test_a_server_that_ends_while_one_looks_is_said_to_have_ended(tmp_path: Path, reaped: bool) -> None:
    """The kernel has no words of it any more, and soon another process has its number."""
    (tmp_path / "pid").write_text("1234567\n")
    child = os.fork()
    if child == 0:
        os._exit(0)
    process = peer.Process(child, os.geteuid(), os.pidfd_open(child))
    assert process.ended(10)
    if reaped:
        os.waitpid(child, 0)
    for name in ("cmdline", "environ", "cgroup"):
        with (
            life.turn(str(tmp_path), "a"),
            pytest.raises(DeviceError, match="the server of a has died, and its data with it: "),
        ):
            processes.told(servers.Served("a", str(tmp_path), child), process, name)
    process.close()
    if not reaped:
        os.waitpid(child, 0)


@pytest.mark.parametrize(("device", "held"), [("/dev/nbd0", True), ("/dev/ublkb0", False)])
def test_only_an_nbd_device_is_held_back(monkeypatch: pytest.MonkeyPatch, device: str, held: bool) -> None:
    """The queue of the other would wait for the next server, and the process that set its length with it."""
    forked: list[str] = []
    monkeypatch.setattr(attached, "find", lambda name: attached.Attached(name, device, 1, "data"))
    monkeypatch.setattr(os, "fork", lambda: forked.append(device) or 1)
    takeover._drain("a", 3)
    assert bool(forked) is held
