"""Times batches on the engine's lanes, without a server: python -m sglang.bench_one_batch --help.

python -m sglang.bench_one_batch --model-path MODEL --load-format dummy
python -m sglang.bench_one_batch --model-path MODEL --decode 48x8800 --prefill 2048+32768 \
    --partition 84/48 --co-run

Exit codes: 0, or 2 for a flag or machine that does not allow what was asked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang.srt.benchmarks.one_batch.options import parse_options
from sglang.srt.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the process's exit code."""
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        # Only now what --help does not need.
        from sglang.srt.benchmarks.one_batch.session import run
        from sglang.srt.logs import configure_logging

        configure_logging(options.server.log_level)
        run(options)
    except ConfigError as error:
        print(f"bench_one_batch: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
