"""ScriptedScheduler stands for the engine: one message a turn, whatever the number of requests."""

from __future__ import annotations

import itertools
import threading

import zmq

from sglang.srt.ipc import Receiver, Sender, ipc_directory
from sglang.srt.managers.scripted_scheduler import ScriptedScheduler
from sglang.srt.messages import GenerateRequest, Shutdown, ToDetokenizer, TokenBatch, token_ids
from sglang.srt.sampling_params import SamplingParams

LIMIT_MS = 10_000


def test_a_turn_is_one_message() -> None:
    stamps = itertools.count(500)
    with ipc_directory() as ipc, zmq.Context() as context:
        detokenizer: Receiver[TokenBatch | Shutdown] = Receiver(
            context, ipc.detokenizer, ToDetokenizer
        )
        scheduler = ScriptedScheduler(context, ipc, cached_tokens=lambda: next(stamps))
        to_scheduler = Sender(context, ipc.scheduler)
        for rid in "abc":
            sampling = SamplingParams(max_new_tokens=3)
            to_scheduler.send(
                GenerateRequest(
                    rid=rid, input_ids=token_ids([1, 2]), sampling=sampling, arrival_s=0.0
                )
            )
        thread = threading.Thread(target=scheduler.run, daemon=True)
        thread.start()
        batches: list[TokenBatch] = []
        while sum(finish is not None for b in batches for finish in b.finish) < 3:
            fresh = detokenizer.recv_all(LIMIT_MS)
            assert fresh, "the scheduler fell silent"
            batches += [message for message in fresh if isinstance(message, TokenBatch)]
        to_scheduler.send(Shutdown())
        thread.join(LIMIT_MS / 1000)
        to_scheduler.close()
        detokenizer.close()

    opened = [options.rid for batch in batches for options in batch.opened]
    assert opened == ["a", "b", "c"]
    for rid in "abc":
        ids = [b.new_ids[b.rids.index(rid)] for b in batches if rid in b.rids]
        assert ids == [[100], [101], [102]]
    assert any(len(batch.rids) == 3 for batch in batches)
    assert [b.cached_tokens for b in batches] == [
        [500 + i] * len(b.rids) for i, b in enumerate(batches)
    ]
