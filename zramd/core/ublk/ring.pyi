from typing import Any

def refusal() -> str: ...

__test__: dict[str, Any]
