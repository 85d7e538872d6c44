"""zramd: a compressed RAM block device in userspace."""

try:
    from zramd.core.device import Device
    from zramd.core.zsmalloc import Zsmalloc
except ModuleNotFoundError as _error:
    raise ImportError(
        f"zramd's compiled core cannot be imported ({_error}): 'scripts/serve' or 'pip install .' builds it"
    ) from _error

from zramd.errors import (
    ConfigError,
    CorruptionError,
    CorruptObjectError,
    HandleError,
    PoolFullError,
    RundirError,
    ZramdError,
)

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
