"""Measures what --enable-pd-multiplex plans with: python -m sglang.profile_drift --help.

python -m sglang.profile_drift --model-path MODEL --load-format dummy
python -m sglang.profile_drift --model-path MODEL --minutes 2 --out profile.json

Exit codes: 0, or 2 for a flag or machine that does not allow what was asked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang.srt.errors import ConfigError
from sglang.srt.profiling.options import parse_options


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the process's exit code."""
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        # Only now what --help does not need.
        from sglang.srt.logs import configure_logging
        from sglang.srt.profiling.run import run

        configure_logging(options.server.log_level)
        run(options)
    except ConfigError as error:
        print(f"profile_drift: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
