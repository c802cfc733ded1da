"""Measures the throughput of an engine without a server: all prompts are there at once.

python -m sglang.bench_offline_throughput --model-path MODEL --load-format dummy \
    --dataset-name random-ids --num-prompts 100 --random-input-len 1024 --random-output-len 128
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang.bench.errors import BenchError
from sglang.srt.benchmarks.offline_throughput.options import parse_options
from sglang.srt.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 if any request completed, 1 if none did, 2 for a flag or file at fault."""
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        # Only now what --help does not need.
        from sglang.srt.benchmarks.offline_throughput.session import run
        from sglang.srt.logs import configure_logging

        configure_logging(options.server.log_level)
        result = run(options)
    except (BenchError, ConfigError) as error:
        print(f"bench_offline_throughput: error: {error}", file=sys.stderr)
        return 2
    return 0 if result["successful_requests"] else 1


if __name__ == "__main__":
    sys.exit(main())
