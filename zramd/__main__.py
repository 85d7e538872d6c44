"""The `zramd` command; `zramd.commands` has its parts."""

import sys

from zramd.commands import main

if __name__ == "__main__":
    sys.exit(main())
