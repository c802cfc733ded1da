"""What one iteration over answers sees when it is slower than the engine."""

from __future__ import annotations

import asyncio

from sglang.srt.managers.answers import Answer
from sglang.srt.managers.call import Call
from sglang.srt.managers.prompts import TokenizedPrompt
from sglang.srt.messages import FinishReason, TextBatch
from sglang.srt.sampling_params import SamplingParams


def batch(text: str, ids: list[int], count: int, finish: FinishReason | None) -> TextBatch:
    return TextBatch(
        rids=["a"],
        text=[text],
        new_ids=[ids],
        finish=[finish],
        prompt_tokens=[1],
        cached_tokens=[0],
        completion_tokens=[count],
        retractions=[0],
    )


def test_an_update_is_the_answer_as_it_was() -> None:
    """The end arrives while the reader still holds the beginning: only one update has an end."""
    tokenized = TokenizedPrompt([1], SamplingParams(), "")
    answer = Answer(0, "a", "a", "1:a", tokenized, 0.0)
    call = Call([answer], stream=True)

    async def read() -> None:
        updates = call.updates()
        answer.take(batch("Hel", [7], 1, None), 0, 1.0)
        call.noticed(answer)
        first = await anext(updates)
        answer.take(batch("lo", [8, 9], 3, FinishReason(type="stop", matched=9)), 0, 2.0)
        call.noticed(answer)
        second = await anext(updates)
        assert (first.answer.text, first.answer.output_ids, first.answer.finish) == (
            "Hel",
            [7],
            None,
        )
        assert first.answer.completion_tokens == 1
        assert first.answer.e2e_latency_s is None
        assert (second.new_text, second.new_ids) == ("lo", [8, 9])
        assert (second.answer.text, second.answer.output_ids) == ("Hello", [7, 8, 9])
        assert second.answer.finish == FinishReason(type="stop", matched=9)
        assert [update async for update in updates] == []

    asyncio.run(asyncio.wait_for(read(), 5))
