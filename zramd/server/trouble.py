"""What goes wrong now while all else goes on: said once, and shown by /health until it is over."""

from zramd import errors
from zramd.server.log import say


class Troubles:
    """The causes, by what each is about."""

    def __init__(self) -> None:
        self._causes: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._causes)

    def begin(self, what: str, cause: BaseException | str = "") -> None:
        """Take note of a trouble; `what` is a sentence's beginning. Never raises."""
        if isinstance(cause, BaseException):
            cause = errors.sentence(cause) or f"{type(cause).__name__}: {cause}"
        text = f"{what}: {cause}" if cause else what
        if what not in self._causes:
            say(text)
        self._causes[what] = text

    def over(self, what: str) -> None:
        """Forget a trouble, if there was one."""
        self._causes.pop(what, None)

    def causes(self) -> list[str]:
        """Return all that goes wrong now, each as a sentence."""
        return list(self._causes.values())
