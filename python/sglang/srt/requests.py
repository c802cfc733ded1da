"""A request's life on the engine thread.

    waiting -> prefilling -> running -> finished
       ^____________________________|  retracted when memory runs short; its prefix stays cached

Lengths of one request:

    tokens          prompt + output, all that the host knows
    computed        tokens whose keys and values are in the pool once launched work is done
    launched_output output tokens asked of the device, known to the host or not

All times are those of one clock, time.monotonic() in a server.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from drift_scheduler.attainment import Pace
from sglang.srt.constrained.constraint import Constraint
from sglang.srt.managers.request_logprobs import RequestLogprobs
from sglang.srt.mem_cache.sequence_cache import CachedSequence
from sglang.srt.messages import FinishReason, GenerateRequest, StreamOptions
from sglang.srt.model_executor.host_batch import SampleWish
from sglang.srt.sampling_params import SamplingParams

PROMPT_TAIL_TOKENS = 8


class Request:
    """Owned by the engine thread; lanes never see it."""

    def __init__(
        self,
        message: GenerateRequest,
        *,
        max_new_tokens: int,
        seed: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.rid = message.rid
        self.sampling: SamplingParams = message.sampling
        self.namespace = message.namespace
        self.arrival_s = message.arrival_s
        self.slo = message.slo
        self.slo_class = message.slo_class
        self.rank = message.rank
        self.pace = Pace(self.arrival_s, self.slo.tbt_s)
        # When its next token is due while it waits: the first one, or after a retraction the one
        # behind those it has.
        self.due_s = math.inf
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.grammar = self.sampling.grammar
        # Of the compiled grammar; it also says where the answer may end.
        self.constraint: Constraint | None = None
        eos = () if self.sampling.ignore_eos else eos_token_ids
        self.stop_ids = tuple({*eos, *self.sampling.stop_token_ids})

        self.prompt: npt.NDArray[np.int32] = np.frombuffer(message.input_ids, dtype=np.int32)
        minimum = self.sampling.min_new_tokens
        self.wish = SampleWish(
            self.sampling,
            seed,
            withheld_ids=self.stop_ids if minimum and self.grammar is None else (),
            withheld_until=len(self.prompt) + minimum,
            logprobs=message.logprobs,
        )
        asked = message.logprobs
        self.logprobs = None if asked is None else RequestLogprobs(asked, self.prompt)
        self.output: list[int] = []
        self.finish: FinishReason | None = None

        self.sequence: CachedSequence | None = None
        self.row: int | None = None
        self.computed = 0
        self.launched_output = 0
        self.jobs_in_flight = 0
        # How often in a row smaller prompts that were named behind it went in front of it.
        self.times_overtaken = 0
        # First token whose slot the device's slot table does not hold yet.
        self.table_valid = 0

        # Of the prompt: cached when it was first taken up, not cached when it arrived.
        self.cached_tokens = 0
        self.uncached_at_arrival = len(self.prompt)
        self.first_prefill_started = False
        self.retractions = 0
        self.sent_output = 0
        self.stream_opened = False

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def reuse_limit(self) -> int:
        """How many of its tokens the prefix cache may give: at least the last is computed."""
        limit = None if self.logprobs is None else self.logprobs.reuse_limit
        return self.num_tokens - 1 if limit is None else limit

    def tokens(self) -> npt.NDArray[np.int32]:
        """prompt + output [num_tokens] i32."""
        if not self.output:
            return self.prompt
        return np.concatenate([self.prompt, np.asarray(self.output, dtype=np.int32)])

    @property
    def next_token_due_s(self) -> float:
        """Of a request that has a token; infinity if nobody minds."""
        return self.pace.last_s + self.slo.tbt_s

    @property
    def wants_step(self) -> bool:
        return self.finish is None and self.launched_output < self.max_new_tokens

    def constrain(self, constraint: Constraint) -> None:
        """Its grammar is compiled: from now on the answer follows it."""
        self.constraint = constraint
        self.stop_ids = tuple({*self.stop_ids, *constraint.end_ids})

    def append(self, token: int) -> None:
        """Takes one generated token and decides whether it is the last; one that may not come
        next ends the request and is no part of it."""
        problem = self.constraint.take(token) if self.constraint is not None else None
        if problem is not None:
            message = f"the answer cannot go on: {problem}"
            self.finish = FinishReason(type="abort", message=message, status_code=400)
            return
        self.output.append(token)
        if token in self.stop_ids:
            self.finish = FinishReason(type="stop", matched=token)
        elif len(self.output) >= self.max_new_tokens:
            self.finish = FinishReason(type="length", length=len(self.output))

    def stream_options(self) -> StreamOptions:
        return StreamOptions(
            rid=self.rid,
            prompt_tail=self.prompt[-PROMPT_TAIL_TOKENS:].tolist(),
            stop=self.sampling.stop,
            skip_special_tokens=self.sampling.skip_special_tokens,
            spaces_between_special_tokens=self.sampling.spaces_between_special_tokens,
            no_stop_trim=self.sampling.no_stop_trim,
            stop_regex=self.sampling.stop_regex,
        )
