from typing import Any, NamedTuple, final

QUEUES: int
DEPTH: int
MAX_IO_BYTES: int
CONTROL: str

class Info(NamedTuple):
    number: int
    queues: int
    depth: int
    max_io_bytes: int
    state: str
    pid: int
    recovers: bool
    flags: int
    owner_uid: int
    owner_gid: int
    mark: int

def available(path: str = ...) -> str: ...

@final
class Control:
    """The driver's control device: disks are made and ended by it."""

    timeout: float
    def __new__(cls, path: str = ..., timeout: float = 10) -> Control: ...
    def __enter__(self) -> Control: ...
    def __exit__(self, *exception: object) -> None: ...
    def close(self) -> None: ...
    def features(self) -> frozenset[str]: ...
    def add(
        self,
        number: int = -1,
        *,
        queues: int = ...,
        depth: int = ...,
        max_io_bytes: int = ...,
        recovers: bool = False,
        mark: int = 0,
        timeout: float | None = None,
    ) -> Info: ...
    def set_params(self, number: int, disksize: int, *, max_io_bytes: int = ...) -> None: ...
    def start(self, number: int, pid: int, *, timeout: float | None = None) -> None: ...
    def stop(self, number: int, *, timeout: float | None = None) -> None: ...
    def delete(self, number: int, *, wait: bool = True, timeout: float | None = None) -> None: ...
    def info(self, number: int) -> Info: ...
    def params(self, number: int) -> dict[str, int]: ...
    def start_recovery(self, number: int, *, timeout: float | None = None) -> None: ...
    def end_recovery(self, number: int, pid: int, *, timeout: float | None = None) -> None: ...

__test__: dict[str, Any]
