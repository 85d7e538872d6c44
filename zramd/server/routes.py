"""What the control socket answers to which path; zramd.server.endpoint has the sockets and HTTP.

GET   /stats /mm_stat /io_stat /classes /classes.json /metrics /health /settings /block/N
POST  /compact /check /reset /mem_used_max, /sockets PATH: sends those on which clients are accepted
GET   /save /save/live      the whole device as a stream, see docs/save-format.md
GET   /block_state          zram's, as a stream: a line for each block that is stored
GET   /comp_algorithm /recomp_algorithm   zram's, as it shows them
GET   /backing_dev /bd_stat /writeback_limit /writeback_limit_enable   the same
POST  /recomp_algorithm /recompress /idle /writeback   zram's, see zramd.server.words; PUT does the same
POST  /writeback_limit /writeback_limit_enable   zram's; PUT is the setting writeback_limit, of bytes a day
POST  /bring_back           what is out comes back into memory
PUT   /ublk                 {"number": N, "queues": Q, "depth": D, "max_io_bytes": B, "recovers": true|false}:
                            serves the kernel's device whose descriptor comes along (SCM_RIGHTS)
DELETE /ublk                {"number": N}: lets go of it, once the kernel has stopped it
PUT   /load                 such a stream into an empty device without clients
PUT   /NAME for each setting that can be changed while the device is served
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

from zramd.contract.rundir import COMPACT_TIMEOUT
from zramd.errors import (
    ConfigError,
    CorruptionError,
    DeviceError,
    UsageError,
    ZramdError,
    is_shortage,
    printable,
    reason,
    sentence,
)
from zramd.server import words
from zramd.server.tiers import Pass
from zramd.server.withoutbacking import WritePass
from zramd.settings.config import SETTINGS, find
from zramd.stats import prometheus, snapshots, texts

TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_BINARY = "application/octet-stream"
_BLOCK = "/block/"
_LIMIT = "writeback_limit"
_UBLK = "/ublk"
# What PUT /ublk says of a device, and the most of each: the kernel's bounds; False and True are the bools.
_DEVICE = {"number": 1 << 20, "queues": 4096, "depth": 4096, "max_io_bytes": 32 << 20}
_PATIENCE = 600.0  # seconds that a reader of block_state may stand still: it may be a person with a pager
# Whose answer, or body, is a stream of any length; an answer's content type.
STREAMS_OUT = {("GET", "/save"): _BINARY, ("GET", "/save/live"): _BINARY, ("GET", "/block_state"): TEXT}
STREAMS_IN = (("PUT", "/load"),)
# What takes long, a stream or not.
LENGTHY = (*STREAMS_OUT, *STREAMS_IN, ("POST", "/compact"), ("POST", "/check"), ("PUT", "/backing"))


class Device(Protocol):
    """What the endpoint asks of the device itself."""

    def check(self) -> None:
        """Raise CorruptionError when the device's structures contradict each other."""

    def block(self, number: int) -> dict[str, int | str]:
        """Return what stands for a block; raises ValueError beyond the device's end."""

    def reset_mem_used_max(self) -> None:
        """Forget the peak of the pool's size."""

    @property
    def disksize(self) -> int: ...
    def block_state(self, buf: bytearray, first: int, now: int, sweep: int) -> tuple[int, int]:
        """Fill a buffer with lines for blocks from `first` on; return its bytes, and the next block."""


class Tiers(Protocol):
    """What the endpoint asks of who recompresses."""

    def submit(self, wanted: Pass) -> None:
        """Have blocks recompressed in the background; raises DeviceError when recompression is off."""

    def mark_idle(self, seconds: float | None) -> None:
        """Mark the blocks that nobody asked for in so many seconds, None: all."""

    def numbers(self) -> dict[str, Any]:
        """Return the section `tiers` of stats.json."""


class Writeback(Protocol):
    """What the endpoint asks of who writes to the backing device."""

    def submit(self, wanted: WritePass) -> None:
        """Have blocks written out in the background; raises DeviceError when that cannot be."""

    def bring_back(self) -> None:
        """Have everything brought back in the background that is out; raises DeviceError."""

    def set_left(self, size: int) -> None:
        """Let so many bytes be written from now on; raises DeviceError without a limit."""


class Service(Protocol):
    """What the endpoint shows and steers."""

    @property
    def device(self) -> Device: ...
    @property
    def tiers(self) -> Tiers: ...
    @property
    def writeback(self) -> Writeback: ...
    def snapshot(self) -> snapshots.Snapshot: ...
    def classes(self) -> list[snapshots.ClassRow]: ...
    def health(self) -> dict[str, str | int]: ...
    def settings(self) -> dict[str, Any]: ...
    def change(self, name: str, text: str) -> Any:
        """Change a setting and return its value as it is then; raises ConfigError."""

    def compact(self, timeout: float) -> int:
        """Return the pages freed."""

    def reset(self) -> bool:
        """Drop all data; return False, with nothing done, while a client is connected."""

    def send_sockets(self, path: str) -> None:
        """Send the listening sockets to the process that listens at `path`. Raises OSError."""

    def attach(self, fd: int, wanted: dict[str, Any]) -> None:
        """Serve the kernel's device on a descriptor; raises DeviceError."""

    def detach(self, number: int) -> None:
        """Let go of a device that the kernel has stopped; raises DeviceError."""

    def save(self, fd: int, *, live: bool) -> None:
        """Write the device to a descriptor; raises SaveError, OSError once that has begun."""

    def load(self, fd: int, begun: bytes, length: int) -> dict[str, int]:
        """Fill the device from a descriptor, of which `begun` was read; length: all its bytes, or -1.

        Raises DeviceError when it is not a time for that, SaveError.
        """


class Reply(NamedTuple):
    """An answer: status code, content type, body, and the methods a 405 allows."""

    status: int
    content_type: str
    body: str
    allow: str = ""


class RefusedError(Exception):
    """The request is answered with an error status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.reply = Reply(status, TEXT, printable(sentence) + "\n")


Handler = Callable[[str], Reply]  # from the body, or from what follows in the path, to the answer


class Routes:
    """All paths, answered for one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._streams: list[str] = []  # those under way: save, load
        self._former_limit = ""  # what writeback_limit was before it was switched off
        self._routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": self._index},
            "/stats": {"GET": self._stats},
            "/mm_stat": {"GET": self._mm_stat},
            "/io_stat": {"GET": self._io_stat},
            "/classes": {"GET": self._classes},
            "/classes.json": {"GET": self._classes_json},
            "/metrics": {"GET": self._metrics},
            "/health": {"GET": self._health},
            "/settings": {"GET": self._settings},
            f"{_BLOCK}N": {"GET": self._block},
            "/compact": {"POST": self._compact},
            "/check": {"POST": self._check},
            "/mem_used_max": {"POST": self._mem_used_max},
            "/reset": {"POST": self._reset},
            "/comp_algorithm": {"GET": self._comp_algorithm},
            "/recomp_algorithm": {"GET": self._recomp_algorithm, **_written(self._set_recomp_algorithm)},
            "/recompress": _written(self._recompress),
            "/idle": _written(self._idle),
            "/backing_dev": {"GET": self._backing_dev},
            "/bd_stat": {"GET": self._bd_stat},
            "/writeback": _written(self._write_back),
            f"/{_LIMIT}": {"GET": self._limit, "POST": self._set_limit},
            f"/{_LIMIT}_enable": {"GET": self._limit_enable, **_written(self._set_limit_enable)},
            "/bring_back": _written(self._bring_back),
            "/sockets": {"POST": self._sockets},
            _UBLK: {"PUT": self._attach, "DELETE": self._detach},
        }
        for setting in SETTINGS:
            if not setting.fixed:
                methods = self._routes.setdefault(f"/{setting.name}", {})
                methods["PUT"] = partial(self._change, setting.name)

    def answer(self, method: str, path: str, body: bytes, fds: Sequence[int] = ()) -> Reply:
        """Return the answer to one request, with which these descriptors came; they stay the caller's."""
        text = body.decode(errors="backslashreplace").strip()
        if path.startswith(_BLOCK):
            path, text = f"{_BLOCK}N", path[len(_BLOCK) :]
        methods = self._routes.get(path)
        if methods is None:
            return Reply(404, TEXT, f"no such path '{path}'; there are:\n{self._paths()}")
        handler = methods.get(method)
        if handler is None:
            allow = ", ".join(methods)
            return Reply(405, TEXT, f"{path} takes {allow}, not {method}\n", allow)
        try:
            if (method, path) == ("PUT", _UBLK):
                return self._attach(text, fds)
            return handler(text)
        except RefusedError as refused:
            return refused.reply
        except (ConfigError, UsageError) as error:
            return _refused(400, error)
        except DeviceError as error:
            return _refused(409, error)
        except Exception as error:
            return _refused(500, error)

    def send(self, fd: int, path: str) -> None:
        """Answer one of STREAMS_OUT, after the header."""
        if path == "/block_state":
            with self._under_way("block_state"):
                words.send_block_state(self._service.device, fd, _PATIENCE)
            return
        with self._under_way("save"), suppress(ZramdError):  # the stream itself says so
            self._service.save(fd, live=path.endswith("live"))

    def load(self, fd: int, begun: bytes, length: int) -> Reply:
        """Return the answer to one of STREAMS_IN, whose body comes from a descriptor; length: bytes or -1."""
        try:
            with self._under_way("load"):
                return _json(self._service.load(fd, begun, length))
        except DeviceError as error:
            return _refused(409, error)
        except (ZramdError, MemoryError) as error:
            return _refused(422, error)

    @contextmanager
    def _under_way(self, what: str) -> Iterator[None]:
        self._streams.append(what)
        try:
            yield
        finally:
            self._streams.remove(what)

    def _paths(self) -> str:
        streams = "".join(f"{method} {path}\n" for method, path in (*STREAMS_OUT, *STREAMS_IN))
        return streams + "".join(
            f"{method} {path}\n" for path, methods in self._routes.items() for method in methods
        )

    def _index(self, text: str) -> Reply:
        return Reply(200, TEXT, self._paths())

    def _stats(self, text: str) -> Reply:
        return Reply(200, _JSON, texts.to_json(self._service.snapshot()))

    def _mm_stat(self, text: str) -> Reply:
        return Reply(200, TEXT, texts.mm_stat(self._service.snapshot()))

    def _io_stat(self, text: str) -> Reply:
        return Reply(200, TEXT, texts.io_stat(self._service.snapshot()))

    def _classes(self, text: str) -> Reply:
        return Reply(200, TEXT, texts.classes_table(self._service.classes()))

    def _classes_json(self, text: str) -> Reply:
        return Reply(200, _JSON, texts.classes_json(self._service.classes()))

    def _metrics(self, text: str) -> Reply:
        shown = prometheus.exposition(self._service.snapshot(), self._service.classes())
        return Reply(200, _PROMETHEUS, shown)

    def _health(self, text: str) -> Reply:
        return _json({**self._service.health(), "streams": self._streams})

    def _settings(self, text: str) -> Reply:
        return _json(self._service.settings())

    def _block(self, text: str) -> Reply:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise RefusedError(400, f"'{text}' is not a block's number: blocks have 4096 bytes, from 0 on")
        try:
            return _json(self._service.device.block(int(text)))
        except ValueError as error:
            raise RefusedError(400, str(error)) from None

    def _compact(self, text: str) -> Reply:
        freed = self._service.compact(COMPACT_TIMEOUT)
        frag_ratio = self._service.snapshot().values["frag_ratio"]
        return _json({"pages_freed": freed, "frag_ratio": round(frag_ratio, 4)})

    def _check(self, text: str) -> Reply:
        try:
            self._service.device.check()
        except CorruptionError as error:
            return _json({"sound": False, "fault": str(error)})
        return _json({"sound": True})

    def _change(self, name: str, text: str) -> Reply:
        before = self._service.settings()[name] if name == _LIMIT else ""
        value = self._service.change(name, text)
        if before:
            self._former_limit = str(before)
        return _json({name: value})

    def _comp_algorithm(self, text: str) -> Reply:
        return Reply(200, TEXT, words.comp_algorithm(self._service.settings()["comp_algorithm"]))

    def _recomp_algorithm(self, text: str) -> Reply:
        return Reply(200, TEXT, words.recomp_algorithm(self._service.tiers.numbers()["recompression"]))

    def _set_recomp_algorithm(self, text: str) -> Reply:
        now = self._service.tiers.numbers()["recompression"]
        return self._change("recompression", words.recompression(text, now))

    def _recompress(self, text: str) -> Reply:
        wanted = words.recompress(text)
        self._service.tiers.submit(wanted)
        return _json({"recompress": wanted._asdict() | {"kinds": sorted(wanted.kinds)}})

    def _idle(self, text: str) -> Reply:
        seconds = words.idle(text)
        self._service.tiers.mark_idle(seconds)
        return _json({"idle": "all" if seconds is None else f"{seconds:g}"})

    def _backing_dev(self, text: str) -> Reply:
        return Reply(200, TEXT, texts.backing_dev(self._service.snapshot()))

    def _bd_stat(self, text: str) -> Reply:
        return Reply(200, TEXT, texts.bd_stat(self._service.snapshot()))

    def _section(self) -> dict[str, Any]:
        """Return what is told of the backing device; nothing when there is none."""
        return self._service.snapshot().writeback or {}

    def _need_backing(self) -> None:
        if not self._section():
            raise DeviceError("there is no backing device: 'zramd restart NAME backing=PATH' gives it one")

    def _write_back(self, text: str) -> Reply:
        wanted = words.writeback(text, self._service.device.disksize >> 12)
        self._need_backing()
        self._service.writeback.submit(wanted)
        return _json({"writeback": {"kinds": sorted(wanted.kinds), "ranges": wanted.ranges}})

    def _bring_back(self, text: str) -> Reply:
        words.bring_back(text)
        self._need_backing()
        self._service.writeback.bring_back()
        return _json({"bring_back": "all"})

    def _limit(self, text: str) -> Reply:
        return Reply(200, TEXT, f"{(self._section().get('limit_left') or 0) >> 12}\n")

    def _set_limit(self, text: str) -> Reply:
        left = words.writeback_limit(text)
        self._need_backing()
        self._service.writeback.set_left(left)
        return _json({_LIMIT: left >> 12})

    def _limit_enable(self, text: str) -> Reply:
        return Reply(200, TEXT, f"{int(self._is_limited())}\n")

    def _is_limited(self) -> bool:
        return bool(self._section().get(_LIMIT))

    def _set_limit_enable(self, text: str) -> Reply:
        wanted = words.writeback_limit_enable(text)
        self._need_backing()
        if wanted != self._is_limited():
            self._change(_LIMIT, (self._former_limit or find(_LIMIT).default or "") if wanted else "off")
        return _json({f"{_LIMIT}_enable": int(wanted)})

    def _mem_used_max(self, text: str) -> Reply:
        self._service.device.reset_mem_used_max()
        return _json({"mem_used_max": self._service.snapshot().values["mem_used_max"]})

    def _sockets(self, text: str) -> Reply:
        try:
            self._service.send_sockets(text)
        except OSError as error:
            status = 503 if is_shortage(error) else 400
            raise RefusedError(status, f"cannot send to '{text}': {reason(error)}") from None
        return _json({"sent": True})

    def _attach(self, text: str, fds: Sequence[int] = ()) -> Reply:
        wanted = _object(text)
        for name, most in _DEVICE.items():
            value = wanted.get(name)
            if type(value) is not int or not (name != "number") <= value <= most:
                raise RefusedError(400, f"{name}={value!r} is not a number up to {most}")
        if type(wanted.get("recovers")) is not bool:
            raise RefusedError(400, f"recovers={wanted.get('recovers')!r} is neither true nor false")
        if len(fds) != 1:
            raise RefusedError(400, f"one descriptor, of /dev/ublkcN, is to come with this, not {len(fds)}")
        self._service.attach(fds[0], wanted)
        return _json({"pid": os.getpid()})

    def _detach(self, text: str) -> Reply:
        number = _object(text).get("number")
        if type(number) is not int:
            raise RefusedError(400, f"number={number!r} is not the number of a device")
        self._service.detach(number)
        return _json({"number": None})

    def _reset(self, text: str) -> Reply:
        if not self._service.reset():
            raise RefusedError(409, "device is in use: disconnect every client before a reset")
        return _json({"reset": True})


def _written(handler: Handler) -> dict[str, Handler]:
    """Return the methods of what stands for a file of zram's that is written to."""
    return {"PUT": handler, "POST": handler}


def _object(text: str) -> dict[str, Any]:
    """Return the JSON object that a body is. Raises RefusedError."""
    with suppress(ValueError, RecursionError):
        values = json.loads(text)
        if isinstance(values, dict):
            return values
    raise RefusedError(400, "the body is not a JSON object")


def _json(values: dict[str, Any]) -> Reply:
    return Reply(200, _JSON, json.dumps(values) + "\n")


def _refused(status: int, error: Exception) -> Reply:
    return RefusedError(status, sentence(error) or str(error) or type(error).__name__).reply
