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
    from zramd.core.device.device import Device
    from zramd.core.pool.zsmalloc import Zsmalloc

__version__ = "0.2.0"
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
_IN_CORE = {"Device": "zramd.core.device.device", "Zsmalloc": "zramd.core.pool.zsmalloc"}


def __getattr__(name: str) -> object:
    """Import the compiled core when it is first asked for: the command line never does, and starts faster."""
    if name not in _IN_CORE:
        raise AttributeError(f"module 'zramd' has no attribute '{name}'")
    from importlib import import_module

    try:
        return getattr(import_module(_IN_CORE[name]), name)
    except ModuleNotFoundError as error:
        missing = error
    # Python begins its search where it stands: in a checkout that is the source, which hides what was built.
    try:
        if _use_installed():
            return getattr(import_module(_IN_CORE[name]), name)
    except ModuleNotFoundError as error:
        missing = error
    raise ImportError(
        f"zramd's compiled core cannot be imported ({missing}): "
        "'scripts/serve' or 'pip install .' builds it, the first for .venv/bin/python"
    ) from missing


def _use_installed() -> bool:
    """Have what is imported from now on come from an installation, if there is another than this folder."""
    import os
    import sys
    from importlib.machinery import PathFinder

    here = os.path.realpath(__path__[0])
    places = [place for place in sys.path if os.path.realpath(os.path.join(place or ".", "zramd")) != here]
    found = PathFinder.find_spec("zramd", places)
    if found is None or not found.submodule_search_locations:
        return False
    __path__[:] = found.submodule_search_locations
    for name in [name for name in sys.modules if name.startswith("zramd.core")]:
        del sys.modules[name]
    return True
