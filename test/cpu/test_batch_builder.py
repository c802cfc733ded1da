"""BatchBuilder: every index of a launch, against the sequences it speaks of."""

from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.managers.batch_builder import BatchBuilder
from sglang.srt.managers.jobs import Fill
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.sequence_cache import SequenceCache
from sglang.srt.mem_cache.slot_allocator import SlotAllocator
from sglang.srt.messages import GenerateRequest, token_ids
from sglang.srt.model_executor.host_batch import HostBatch
from sglang.srt.requests import Request
from sglang.srt.sampling_params import SamplingParams

CONTEXT_LENGTH = 100
EOS = 3


@pytest.fixture
def cache() -> SequenceCache:
    allocator = SlotAllocator(1000, 1)
    return SequenceCache(RadixCache(1, allocator.free), allocator)


def request(
    cache: SequenceCache, rid: str, *, row: int, prompt: int, slots: int, table_valid: int, **wish
) -> Request:
    """A request whose sequence has `slots` slots, of which the device knows `table_valid`."""
    ids = [10 * row + i for i in range(prompt)]
    message = GenerateRequest(
        rid=rid, input_ids=token_ids(ids), sampling=SamplingParams(**wish), arrival_s=0.0
    )
    made = Request(message, max_new_tokens=20, seed=row, eos_token_ids=frozenset({EOS}))
    made.row = row
    made.sequence = cache.open(made.prompt, rid, reuse_limit=0)
    cache.extend(made.sequence, slots)
    made.table_valid = table_valid
    return made


def table_writes(batch: HostBatch) -> dict[tuple[int, int], int]:
    """(row, token) -> slot."""
    pairs = zip(batch.table_index.tolist(), batch.table_slots.tolist(), strict=True)
    writes = {divmod(index, CONTEXT_LENGTH): slot for index, slot in pairs}
    assert len(writes) == len(batch.table_index), "an entry of the table is written twice"
    return writes


def slots_of(one: Request, start: int) -> dict[tuple[int, int], int]:
    assert one.sequence is not None and one.row is not None
    return {(one.row, start + i): s for i, s in enumerate(one.sequence.slots[start:].tolist())}


def test_members_decode_and_fills_follow(cache: SequenceCache) -> None:
    steady = request(cache, "steady", row=4, prompt=5, slots=8, table_valid=7)
    rebound = request(cache, "rebound", row=2, prompt=6, slots=7, table_valid=3)
    ends = request(cache, "ends", row=7, prompt=9, slots=9, table_valid=0)
    chunk = request(cache, "chunk", row=1, prompt=12, slots=6, table_valid=2)
    fills = [Fill(ends, 4, 9, completes_prompt=True), Fill(chunk, 2, 6, completes_prompt=False)]

    batch = BatchBuilder(CONTEXT_LENGTH).step([steady, rebound], fills)

    assert batch.decode_reqs == 2
    assert batch.rows.tolist() == [4, 2, 7, 1]
    assert batch.seq_lens.tolist() == [8, 7, 9, 6]
    assert batch.new_lens.tolist() == [1, 1, 5, 4]
    assert batch.positions.tolist() == [7, 6, *range(4, 9), *range(2, 6)]
    assert batch.input_ids.tolist() == [*range(74, 79), *range(12, 16)]
    new_slots = [*slots_of(steady, 7).values(), *slots_of(rebound, 6).values()]
    new_slots += [*slots_of(ends, 4).values(), *slots_of(chunk, 2).values()]
    assert batch.token_slots.tolist() == new_slots
    assert table_writes(batch) == {
        **slots_of(steady, 7),
        **slots_of(rebound, 3),
        **slots_of(ends, 0),
        **slots_of(chunk, 2),
    }
    # The chunk does not end its prompt: nothing is sampled for it.
    assert batch.sample_tokens.tolist() == [0, 1, 6]
    assert batch.sample_rows.tolist() == [4, 2, 7]
    assert batch.sample_positions.tolist() == [8, 7, 9]
    assert [wish.seed for wish in batch.samples] == [4, 2, 7]
    for name in HostBatch.__slots__:
        value = getattr(batch, name)
        assert not isinstance(value, np.ndarray) or value.dtype == np.int64, name


def test_what_a_launch_has_written_the_next_one_leaves_out(cache: SequenceCache) -> None:
    one = request(cache, "one", row=3, prompt=4, slots=5, table_valid=0)
    builder = BatchBuilder(CONTEXT_LENGTH)
    builder.step([one], [])
    assert one.sequence is not None
    cache.extend(one.sequence, 1)
    batch = builder.step([one], [])
    assert table_writes(batch) == slots_of(one, 5)
    assert batch.input_ids.tolist() == []
    assert batch.is_decode


def test_stop_tokens_are_withheld_up_to_the_minimum(cache: SequenceCache) -> None:
    free = request(cache, "free", row=1, prompt=4, slots=5, table_valid=0)
    held = request(
        cache, "held", row=2, prompt=4, slots=5, table_valid=0, min_new_tokens=6, stop_token_ids=[9]
    )
    first, second = BatchBuilder(CONTEXT_LENGTH).step([free, held], []).samples
    assert first.withheld_ids == ()
    assert sorted(second.withheld_ids) == [EOS, 9]
    assert second.withheld_until == 10
