"""The requests of a measured window, made again for the simulator.

They come from the client's own loader and its own arrival times. Of every prompt only its length
and the identity of its blocks are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmark.policy_plan import Comparison, Workload
from benchmark.policy_table import Row
from benchmark.trace_load import TraceLoad
from drift_scheduler.simulation.trace import TraceRequest
from sglang.bench.arrivals import poisson_arrivals_s
from sglang.bench.cli import parse_options
from sglang.bench.datasets import load_conversations
from sglang.bench.prompts import PromptMaker
from sglang.bench.workload import TokenIds

# The server shares prefixes token by token. On average half a block of each shared prefix is not
# found by the simulator.
BLOCK_TOKENS = 32
# Which tokens a prompt has does not matter, only which prompts begin alike; of so many ids no two
# blocks are the same by chance.
_VOCABULARY = 1 << 16


class PromptBlocks:
    """Numbers for full blocks of token ids: equal ones where a block and all before it are equal.

    One object for all prompts of a window.
    """

    def __init__(self) -> None:
        self._ids: dict[tuple[int, bytes], int] = {}

    def of(self, prompt: TokenIds) -> tuple[int, ...]:
        """prompt [tokens] i32."""
        blocks: list[int] = []
        before = -1
        for start in range(0, prompt.size - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            content = prompt[start : start + BLOCK_TOKENS].tobytes()
            before = self._ids.setdefault((before, content), len(self._ids))
            blocks.append(before)
        return tuple(blocks)


def comparison_of(row: Row, workload: Workload, drain_seconds: float) -> Comparison:
    """The plan of one window: a policy at a point."""
    return Comparison(
        workloads=(workload,),
        policies=(row["policy"],),
        rates=(row["rate"],),
        tbts_ms=(row["slo_tbt_ms"],),
        seconds=row["seconds"],
        warm_up_seconds=row["warm_up_seconds"],
        drain_seconds=drain_seconds,
        max_input_len=row["max_input_len"],
        ttft_ms=row["slo_ttft_ms"],
        ttft_ms_per_token=row["slo_ttft_ms_per_token"],
        seed=row["seed"],
    )


def requests_of(load: TraceLoad) -> list[TraceRequest]:
    """What the client sends, and when, in seconds from its start.

    Every row of a replayed trace is a conversation of one turn, so the arrivals are all there is
    to know: nothing is sent in answer to an answer. Raises BenchError.
    """
    options = parse_options(["--backend=sglang", *load.bench_flags()])
    ids = np.arange(_VOCABULARY, dtype=np.int32)
    conversations = load_conversations(options, PromptMaker(ids, None, send_ids=True)).conversations
    arrivals_s = poisson_arrivals_s(len(conversations), options.request_rate, options.seed)
    blocks = PromptBlocks()
    requests: list[TraceRequest] = []
    for conversation, arrival_s in zip(conversations, arrivals_s, strict=True):
        (turn,) = conversation.turns
        assert isinstance(turn.prompt, np.ndarray), "prompts travel as ids"
        requests.append(
            TraceRequest(
                arrival_s,
                turn.prompt.size,
                turn.max_tokens,
                blocks.of(turn.prompt),
                BLOCK_TOKENS,
            )
        )
    return requests


def workload_named(name: str, workloads: Sequence[Workload]) -> Workload | None:
    """The one whose rows are named so: by kind and by the file's name, wherever it lies."""
    return next((workload for workload in workloads if str(workload) == name), None)
