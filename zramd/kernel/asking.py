"""Asks the server of a ublk device, in JSON both ways, for the keeper and who takes a device away."""

import json

from zramd.contract import exchange
from zramd.errors import AttachError

MAX_ANSWER = 64 << 10  # bytes; those that are asked for here have some hundred


def ask(
    folder: str, method: str, path: str, body: object = None, *, fd: int = -1, timeout: float
) -> tuple[int, str]:
    """Send one request to the server of a run folder; return status and text of its answer.

    body: goes as JSON, unless None. fd: goes with the request. Raises OSError when there is no answer within
    `timeout` seconds, or nobody who could give one.
    """
    words = "" if body is None else json.dumps(body)
    return exchange.ask(folder, method, path, words, timeout, fd=fd, most=MAX_ANSWER)


def ask_json(
    folder: str, method: str, path: str, body: object = None, *, fd: int = -1, timeout: float
) -> dict[str, object]:
    """Return the JSON object that is the answer. Raises as `ask`, and AttachError when it refuses."""
    status, text = ask(folder, method, path, body, fd=fd, timeout=timeout)
    if status != 200:
        raise AttachError(text.split("\n", 1)[0] or f"its server answers {path} with status {status}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise AttachError(f"its server does not answer {path} in whole")
    return found
