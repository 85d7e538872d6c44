"""The `zramd` command; `zramd.commands` has its parts."""

import sys

try:
    from zramd.commands import main
except (MemoryError, OSError) as shortage:
    why = getattr(shortage, "strerror", None) or "not enough memory for this command"
    sys.exit(f"zramd: {why.lower()}: free some, or raise the limits that 'ulimit -a' shows")

if __name__ == "__main__":
    sys.exit(main())
