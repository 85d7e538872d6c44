"""A server without nbdkit, for front=ublk: what nbdkit_plugin.py is to nbdkit.

    python -m zramd.server disksize=1G [key=value …]

Exit status: 0, 2 for settings that cannot be used, else 1, after one sentence on standard error.
"""

import signal

# Ctrl-C ends us at once until we have handlers of our own: Python's would print a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys
import threading

from zramd.errors import ConfigError, ZramdError, say, sentence
from zramd.settings import config


def main(words: list[str]) -> int:
    """Serve as the words, key=value, say; return only if that cannot be begun."""
    try:
        settings = config.parse((key, value) for key, _, value in (word.partition("=") for word in words))
        if settings.front != "ublk":
            raise ConfigError(f"front={settings.front} is not served without nbdkit: use 'zramd serve'")
        _serve(settings)
    except Exception as error:
        # What nobody expected gets a traceback.
        if not (expected := sentence(error)):
            raise
        say(expected)
        return error.exit_code if isinstance(error, ZramdError) else 1
    return 0


def _serve(settings: config.Config) -> None:
    try:
        from zramd.server.fronts.ublk import Ublk
        from zramd.server.server import prepare
    except ImportError as error:
        raise ZramdError(
            f"zramd cannot be loaded: {error}: build it for Python {sys.version.split()[0]}"
        ) from None
    ending = threading.Event()
    serving = prepare(settings, Ublk(ending.set)).start()
    ending.wait()
    serving.stop()
    # Not by Python's way: the core's threads may serve on until the last moment.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
