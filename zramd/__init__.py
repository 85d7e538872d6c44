"""zramd: a compressed RAM block device in userspace."""

try:
    from zramd.core.device import Device
    from zramd.core.zsmalloc import Zsmalloc
except ModuleNotFoundError as error:
    raise ImportError(
        f"zramd's compiled core cannot be imported ({error}): 'scripts/serve' or 'pip install .' builds it"
    ) from error

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
    "Zsmalloc",
    "ZramdError",
    "__version__",
]
