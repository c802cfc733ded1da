"""How tests are shared out among processes, see `make test`."""

from __future__ import annotations

from typing import Any

import pytest

END_TO_END = "test/e2e"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay together, and so do all that need servers of a real model: two such
    servers at once would halve each other's memory bandwidth."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(f"{END_TO_END}/"):
                return END_TO_END
            return super()._split_scope(nodeid)

    return Scheduling(config, log)
