"""`python -m sglang.launch_server --model-path ...`: parse the flags, run the server.

Exit codes: 0 after a clean shutdown, 2 for a flag or machine that does not allow what was asked;
anything else comes from a server that failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang.srt.errors import ConfigError
from sglang.srt.server_args import PROG, ServerArgs


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the server until it is told to stop; returns the process's exit code.

    prog: the command that was typed, for --help.
    """
    try:
        server_args = ServerArgs.from_cli(sys.argv[1:] if argv is None else argv, prog)
        # Only now: --help and a mistyped flag are answered without loading torch.
        from sglang.srt.entrypoints.http_server import launch

        return launch(server_args)
    except ConfigError as error:
        print(f"sglang: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was a server to stop
        return 130


if __name__ == "__main__":  # children are spawned and import this file again
    sys.exit(main())
