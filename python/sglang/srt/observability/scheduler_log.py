"""The scheduler's two log lines, in the words that people's scripts look for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """What both lines say of the server's state. token_usage: share of the KV pool in use."""

    token_usage: float
    used_tokens: int
    running: int
    queued: int


class SchedulerLog:
    """One line a launch that fills prompts, one line every `decode_interval` decode steps.

    A fused step is both, counted by its prompts here and by its running requests there.
    """

    def __init__(self, decode_interval: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._decode_interval = decode_interval
        self._clock = clock
        self._steps = 0
        self._tokens = 0
        self._since_s = clock()
        self.gen_throughput = 0.0
        # Since the start, under SGLang's names for them.
        self.realtime_tokens = {"prefill_compute": 0, "prefill_cache": 0, "decode": 0}

    def prefill(self, *, seqs: int, new_tokens: int, cached_tokens: int, load: Load) -> None:
        self.realtime_tokens["prefill_compute"] += new_tokens
        self.realtime_tokens["prefill_cache"] += cached_tokens
        logger.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, "
            "#running-req: %d, #queue-req: %d",
            seqs,
            new_tokens,
            cached_tokens,
            load.token_usage,
            load.running,
            load.queued,
        )

    def decode(
        self,
        *,
        requests: int,
        load: Callable[[], Load],
        slo: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        """Counts a step; `load` and `slo` are only asked when it is time for a line.

        slo: the window of Attainment.snapshot, None if no request has asked for anything.
        """
        self._steps += 1
        self._tokens += requests
        self.realtime_tokens["decode"] += requests
        if self._steps < self._decode_interval:
            return
        now_s = self._clock()
        self.gen_throughput = self._tokens / max(now_s - self._since_s, 1e-9)
        self._steps, self._tokens, self._since_s = 0, 0, now_s
        state, window = load(), slo()
        in_time = ""
        if window is not None and window["finished"]:
            in_time = (
                f", SLO attainment: {window['attainment']:.3f}, "
                f"goodput (req/s): {window['goodput_rps']:.2f}"
            )
        logger.info(
            "Decode batch, #running-req: %d, #token: %d, token usage: %.2f, "
            "gen throughput (token/s): %.2f, #queue-req: %d%s",
            state.running,
            state.used_tokens,
            state.token_usage,
            self.gen_throughput,
            state.queued,
            in_time,
        )
