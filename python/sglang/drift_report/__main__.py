"""python -m sglang.drift_report: pictures, numbers and traces of what a server's lanes did."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang.drift_report.errors import ReportError
from sglang.drift_report.source import TRACE_PATH, fetch, is_server, load_timeline
from sglang.drift_report.summary import render, summarise

EXIT_BAD_REQUEST = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 for a file, address or flag at fault."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        if options.command == "trace":
            _trace(options)
        else:
            _perfetto(options)
    except ReportError as error:
        print(f"drift_report: error: {error}", file=sys.stderr)
        return EXIT_BAD_REQUEST
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sglang.drift_report", description=__doc__)
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    trace = commands.add_parser(
        "trace", help="draw the timeline and print its numbers", description=_trace.__doc__
    )
    trace.add_argument(
        "source", metavar="FILE|URL", help="a saved /pd_multiplex/timeline, or http://host:port"
    )
    trace.add_argument("--out", type=Path, help="PNG to write; only the numbers if not given")
    perfetto = commands.add_parser(
        "perfetto", help="save a trace for ui.perfetto.dev", description=_perfetto.__doc__
    )
    perfetto.add_argument("source", metavar="URL", help="http://host:port of the server")
    perfetto.add_argument("--out", type=Path, required=True, help="JSON file to write")
    for command in (trace, perfetto):
        command.add_argument("--seconds", type=_seconds, help="only the last seconds")
        command.add_argument("--api-key", help="of the server")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def _trace(options: argparse.Namespace) -> None:
    """Prints how the time was shared, and draws it with --out."""
    timeline = load_timeline(options.source, options.seconds, options.api_key)
    summary = summarise(timeline)
    if options.out is not None:
        try:
            from sglang.drift_report.picture import draw

            draw(timeline, summary, options.out)
        except ModuleNotFoundError as error:
            raise ReportError(
                f"--out: {error.name} is missing: pip install 'sglang-drift[bench]'"
            ) from None
        except (OSError, ValueError) as error:
            raise ReportError(f"--out {options.out}: {error}") from None
    print(render(summary))


def _perfetto(options: argparse.Namespace) -> None:
    """Saves what the server says; open the file at ui.perfetto.dev."""
    if not is_server(options.source):
        raise ReportError(f"{options.source}: must be http://host:port of a running server")
    body = fetch(options.source, TRACE_PATH, options.seconds, options.api_key)
    try:
        options.out.write_bytes(body)
    except OSError as error:
        raise ReportError(f"--out {options.out}: {error.strerror}") from None
    print(f"{options.out}: {len(body)} bytes, to be opened at https://ui.perfetto.dev")


if __name__ == "__main__":
    sys.exit(main())
