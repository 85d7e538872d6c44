from typing import Any

ZSTD_VERSION: str

__test__: dict[str, Any]
