"""zramd: a compressed RAM block device in userspace."""

from zramd.errors import (
    ConfigError,
    CorruptionError,
    CorruptObjectError,
    HandleError,
    PoolFullError,
    RundirError,
    ZramdError,
)

TYPE_CHECKING = False  # what typing says too, without the time that it takes to import
if TYPE_CHECKING:
    from zramd.core.device import Device
    from zramd.core.zsmalloc import Zsmalloc

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "CorruptObjectError",
    "CorruptionError",
    "Device",
    "HandleError",
    "PoolFullError",
    "RundirError",
    "ZramdError",
    "Zsmalloc",
    "__version__",
]
_IN_CORE = {"Device": "zramd.core.device", "Zsmalloc": "zramd.core.zsmalloc"}


def __getattr__(name: str) -> object:
    """Import the compiled core when it is first asked for: the command line never does, and starts faster."""
    if name not in _IN_CORE:
        raise AttributeError(f"module 'zramd' has no attribute '{name}'")
    from importlib import import_module

    try:
        return getattr(import_module(_IN_CORE[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"zramd's compiled core cannot be imported ({error}): "
            "'scripts/serve' or 'pip install .' builds it"
        ) from error
