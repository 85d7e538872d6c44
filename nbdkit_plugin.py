"""zramd as an nbdkit plugin: the names nbdkit looks for, each a call of the device. No policy here.

    nbdkit python nbdkit_plugin.py disksize=1G [key=value …]

nbdkit calls, in this order: config for each key=value, config_complete, get_ready, then it forks, after_fork,
open and the rest for each client, cleanup.
"""

from __future__ import annotations

import signal

# Ctrl-C ends nbdkit at once until it has handlers of its own: Python's would print a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import errno
import os
import site
import sys
import traceback
from typing import TYPE_CHECKING, Any

import nbdkit

if TYPE_CHECKING:
    from zramd.core.device.device import Device

API_VERSION = 2
MAX_REQUEST = 64 << 20  # bytes that nbdkit reads or writes at once; one more is ENOMEM


def _find_package() -> None:
    """Make `import zramd` find the package that this file came with: beside it, or in the .venv beside it.

    Another one, installed for the whole system say, may be of another version. It is taken where neither is.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    venv = f"{here}/.venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    if _is_built(here):
        sys.path.insert(0, here)
    elif os.path.isdir(venv) and "PYTHONPATH" not in os.environ:
        sys.path.insert(0, venv)
        site.addsitedir(venv)  # reads .pth files: an editable install works too


def _is_built(folder: str) -> bool:
    try:
        names = os.listdir(f"{folder}/zramd/core/device")
    except OSError:
        return False
    return any(name.startswith("device.") and name.endswith(".so") for name in names)


try:
    _find_package()
    from zramd import __version__
    from zramd.contract import exported
    from zramd.core.device import codec, frames, requests
    from zramd.errors import ConfigError, ZramdError, sentence
    from zramd.server import strangers
    from zramd.server.fronts.nbd import Nbd
    from zramd.server.server import Prepared, Serving, prepare
    from zramd.settings import config as settings
except (ImportError, OSError, MemoryError) as error:
    # Of a library that is there and does not load the text says which.
    why = getattr(error, "strerror", None) or str(error) or "not enough memory"
    if isinstance(error, ImportError) and not (error.path or "").endswith(".so"):
        running = sys.version.split()[0]
        why = f"zramd is not built for nbdkit's Python {running}: run scripts/serve ({why})"
    elif "cannot map" in why or "failed to map" in why:
        why = f"zramd cannot be loaded: not enough memory: {why}"
    else:
        why = f"zramd cannot be loaded: {why}"
    print(f"nbdkit: error: {why}", file=sys.stderr, flush=True)
    os._exit(1)

# nbdkit logs what this function returns for an exception. The user gets the sentence; only what nobody
# expected gets a traceback. (Imported early, too: nothing on the request path may import.)
_with_traceback = traceback.format_exception


def _format_exception(kind: type[BaseException], error: BaseException, trace: Any = None) -> list[str]:
    if expected := sentence(error):
        return [expected]
    return [str(error)] if trace is None else _with_traceback(kind, error, trace)


traceback.format_exception = _format_exception  # type: ignore[assignment]

_pairs: list[tuple[str, str]] = []
_config: settings.Config
_prepared: Prepared
_serving: Serving
_front = Nbd(nbdkit.shutdown)
_thread_model = "auto"


# The server's life.


def config(key: str, value: str) -> None:
    settings.find(key)
    _pairs.append((key, value))


def config_complete() -> None:
    global _config, _thread_model
    _config = settings.parse(_pairs)
    if _config.front == "ublk":
        raise ConfigError("front=ublk is served without nbdkit: use 'zramd serve --ublk'")
    _config = _config._replace(front="nbd")  # of auto nothing else is left here
    strangers.check(_config, can_tell=hasattr(nbdkit, "peer_tls_dn"))
    # An nbdkit before 1.34 goes on to send the next extent when it could not send one, to a socket that it
    # has closed: "raw_send_socket: Assertion `sock >= 0' failed". A client that leaves while many are told
    # would end the server so, with everyone's data.
    full = {"enospc": errno.ENOSPC, "eio": errno.EIO}[_config.pool_full]
    requests.prepare(nbdkit.set_error, full, not hasattr(nbdkit, "disconnect"))
    _thread_model = _config.thread_model
    if _thread_model == "auto":
        _thread_model = _best_thread_model(_config)


def _best_thread_model(config: settings.Config) -> str:
    # One thread for each client: clients run in parallel, and several threads of one would queue for the
    # interpreter. But where a read may wait for a disk, the requests behind it are not to wait as well. An
    # nbdkit before 1.34 would abort with several, and take everyone's data along, when a client vanishes
    # while they answer: "raw_send_socket: Assertion `sock >= 0' failed".
    return "parallel" if config.backing and hasattr(nbdkit, "disconnect") else "serialize_requests"


def thread_model() -> int:
    model = "serialize_requests" if _thread_model == "auto" else _thread_model
    value: int = getattr(nbdkit, f"THREAD_MODEL_{model.upper()}")
    return value


def get_ready() -> None:
    global _prepared
    _prepared = prepare(_config, _front)


def after_fork() -> None:
    global _serving
    _serving = _prepared.start()


def cleanup() -> None:
    _serving.stop()


def dump_plugin() -> None:
    print(f"zramd_version={__version__}")
    print(f"zramd_python={sys.version.split()[0]}")
    print(f"zramd_lz4={codec.LZ4_VERSION}")
    print(f"zramd_zstd={frames.ZSTD_VERSION}")
    for setting in settings.SETTINGS:
        print(f"zramd_setting_{setting.name}={setting.default_text}: {setting.help}")


# Exports and clients. The handle of a client is the device itself. An exception in `preconnect` cuts one off.


def preconnect(readonly: bool) -> None:
    _front.client_connects()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return [(_config.name, _description())]


def default_export(readonly: bool, is_tls: bool) -> str:
    return _config.name


def open(readonly: bool) -> Device:
    try:
        wanted = nbdkit.export_name()
    except UnicodeDecodeError as error:
        wanted = error.object.decode(errors="backslashreplace")
    if refusal := exported.refusal(wanted, _config.name, _prepared.device.data_id):
        nbdkit.set_error(errno.ENOENT)
        raise ZramdError(refusal)
    if _config.clients and _config.tls.startswith("x509:"):
        strangers.refuse(_config, nbdkit.peer_tls_dn())
    _front.client_opened()
    return _prepared.device


def close(device: Device) -> None:
    _front.client_closed()


def get_size(device: Device) -> int:
    return device.disksize


def export_description(device: Device) -> str:
    return _description()


def _description() -> str:
    return exported.description(__version__, _config.comp_algorithm, _prepared.device.data_id)


def block_size(device: Device) -> tuple[int, int, int]:
    return (1, 4096, MAX_REQUEST)


# nbdkit compares with `is True`: nothing else counts.
def can_write(device: Device) -> bool:
    return True


def is_rotational(device: Device) -> bool:
    return False


# A flush has nothing to do: what is answered is in memory, and nothing here is more durable than that memory.
# So every connection sees what another one wrote, and FUA costs nothing.
can_flush = can_trim = can_zero = can_fast_zero = can_extents = can_multi_conn = can_write


def can_fua(device: Device) -> int:
    native: int = nbdkit.FUA_NATIVE
    return native


def can_cache(device: Device) -> int:
    native: int = nbdkit.CACHE_NATIVE  # all is in memory already: there is nothing to do
    return native


# Requests, from many threads at once, are C: see zramd/core/device/requests.pyx.
pread, pwrite, flush, cache, trim, zero, extents = (
    requests.pread,
    requests.pwrite,
    requests.flush,
    requests.cache,
    requests.trim,
    requests.zero,
    requests.extents,
)
