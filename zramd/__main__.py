"""The `zramd` command; `zramd.commands` has its parts."""

import sys

try:
    from zramd.commands import main
except (MemoryError, OSError):
    sys.exit(
        f"zramd: {getattr(sys.exc_info()[1], 'strerror', None) or 'not enough memory'}: "
        "free some, or raise the limits that 'ulimit -a' shows"
    )

if __name__ == "__main__":
    sys.exit(main())
