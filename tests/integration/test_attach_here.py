"""What a keeper knows a server's data by."""

from collections.abc import Callable
from typing import Any

import pytest

from zramd.errors import AttachError
from zramd.kernel import attached, netlink


def data_id(served: Any) -> str:
    """As a keeper reads it: after a handshake."""
    with netlink.dial(str(served.socket)) as sock:
        assert netlink.handshake(sock, served.name).size == 64 << 20
        return attached.data_of(str(served.rundir))


def test_data_that_begins_anew_has_a_new_name(serve: Callable[..., Any]) -> None:
    served = serve()
    first = data_id(served)
    assert len(first) == 32
    assert data_id(served) == first
    for _ in range(50):  # the handshake's connection is still being taken down
        if served.request("POST", "/reset")[0] == 200:
            break
    second = data_id(served)
    assert second != first
    served.stop(9)
    third = data_id(serve(rundir=served.rundir))
    assert len({first, second, third}) == 3


def test_unknown_export(serve: Callable[..., Any]) -> None:
    with (
        netlink.dial(str(serve().socket)) as sock,
        pytest.raises(AttachError, match=r"^the server has no export 'other'"),
    ):
        netlink.handshake(sock, "other")
