"""Measures a running server: python -m sglang.bench_serving --help."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang.bench.cli import parse_options
from sglang.bench.errors import BenchError

EXIT_BAD_REQUEST = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 if any request completed, 1 if none did, 2 for a flag, file or address at
    fault, 130 after Ctrl-C."""
    options = parse_options(argv)
    # Only now what --help does not need.
    try:
        import uvloop

        from sglang.bench.session import EXIT_INTERRUPTED, run_benchmark
    except ModuleNotFoundError as error:
        print(
            f"bench_serving: error: {error.name} is missing: pip install 'sglang-drift[bench]'",
            file=sys.stderr,
        )
        return EXIT_BAD_REQUEST

    try:
        return uvloop.run(run_benchmark(options))
    except BenchError as error:
        print(f"bench_serving: error: {error}", file=sys.stderr)
        return EXIT_BAD_REQUEST
    except KeyboardInterrupt:  # before the measurement, which ends in a report by itself
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
