"""`python -m sglang ...` is the command `sglang ...`."""

from __future__ import annotations

import sys

from sglang.cli.main import main

if __name__ == "__main__":  # children are spawned and import this file again
    sys.exit(main())
