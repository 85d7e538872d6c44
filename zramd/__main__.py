"""The `zramd` command; `zramd.launch` has its parts."""

import sys

from zramd.launch import main

if __name__ == "__main__":
    sys.exit(main())
