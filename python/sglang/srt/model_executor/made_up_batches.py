"""Batches that are made up, to run what serving will need: slots and rows as if they were free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sglang.srt.constrained.grammar import words_for
from sglang.srt.layers.penalties import History
from sglang.srt.logprobs import LogprobWish
from sglang.srt.mem_cache.slot_table import PADDING_ROW
from sglang.srt.model_executor.host_batch import HostBatch, PromptPart, SampleWish, TokenMask
from sglang.srt.sampling_params import SamplingParams

FIRST_ROW = 1
GREEDY = SamplingParams(temperature=0)
CUTTING = SamplingParams(temperature=1, top_k=20, top_p=0.9)
SORTING = SamplingParams(temperature=1, top_p=0.9)  # all logits, which takes the most memory
LOGPROBS = LogprobWish(top=2, token_ids=[0])
ALL_WISHES = SampleWish(
    SamplingParams(
        temperature=1,
        min_p=0.1,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        repetition_penalty=1.1,
        logit_bias={0: 1.0},
    ),
    seed=0,
    withheld_ids=(0,),
    withheld_until=1 << 30,
    logprobs=LOGPROBS,
)


def batch_of(
    prompts: Sequence[int], decode_reqs: int, sampling: SamplingParams, context_length: int
) -> HostBatch:
    """Prompts of so many tokens on slots 1, 2, ..., behind decodes of one token in scratch."""
    count = sum(prompts)
    scratch = np.zeros(decode_reqs, dtype=np.int64)
    tokens = np.concatenate([scratch, *map(np.arange, prompts)])
    slots = np.concatenate([scratch, np.arange(1, count + 1)])
    lengths = np.concatenate([scratch + 1, np.asarray(prompts, dtype=np.int64)])
    rows = np.concatenate([scratch + PADDING_ROW, FIRST_ROW + np.arange(len(prompts))])
    return HostBatch(
        decode_reqs=decode_reqs,
        input_ids=np.zeros(count, dtype=np.int64),
        positions=tokens,
        token_slots=slots,
        rows=rows,
        seq_lens=lengths,
        new_lens=lengths,
        table_index=np.repeat(rows, lengths) * context_length + tokens,
        table_slots=slots,
        samples=(SampleWish(sampling, seed=0),) * len(rows),
        sample_tokens=np.cumsum(lengths) - 1,
        sample_rows=rows,
    )


def with_all_wishes(batch: HostBatch, vocab_size: int) -> HostBatch:
    """A batch of one prompt, with all that requests may ask of their tokens."""
    everything = np.full((1, words_for(vocab_size)), -1, dtype=np.int32)
    return dataclasses.replace(
        batch,
        samples=(ALL_WISHES,),
        mask=TokenMask(np.zeros(1, dtype=np.int64), everything),
        scored=(PromptPart(0, batch.input_ids[1:], LOGPROBS),),
        histories=(History(ALL_WISHES, batch.input_ids, batch.input_ids[:1]),),
    )
