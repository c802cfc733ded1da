"""Which points a profile measures, and which ones it is checked against.

Sizes are spaced by powers of two: matrix products change tiles there, and the time between two
neighbours is close to a line.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from drift_scheduler.partition import Partition, PartitionTable
from drift_scheduler.profiler import DecodeBatch, Point, PrefillBatch

LONGEST_CONTEXT = 8192
MAX_PROMPTS = 4  # in one prefill batch
# Short batches are padded to multiples of 128 tokens; longer ones end in a tile of 128.
NEW_TOKENS = (
    64,
    128,
    256,
    384,
    512,
    640,
    768,
    1024,
    1280,
    1536,
    2048,
    2200,
    3072,
    4096,
    6144,
    8192,
)
# Not multiples of attention's tiles, so that a fit can tell how large those are.
BEHIND_CACHED = (100, 400, 1024, 4096)
CACHED_TOKENS = (4096, 16384, 32768)
# What attention costs a cached token rises in steps, where its tiles begin another wave on the SMs.
# It goes with the cached tokens, so one number of these is enough.
BETWEEN = (256, 640, 768, 2048)
REQUESTS = (1, 4, 8, 16, 32, 64, 96, 128, 256)
FUSED_NEW = (64, 128, 256, 512, 640, 768, 1024, 2048)
FUSED_CACHED = 8192


class Effort(enum.Enum):
    """FULL takes minutes; BRIEF seconds, and knows less of what lies between its points."""

    FULL = "full"
    BRIEF = "brief"


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine can hold at once.

    prefill_tokens: new tokens of a batch that prefills. requests: that decode. pool_tokens: of
    the KV pool, taken in pages of page_size. context_length: of one sequence.
    """

    prefill_tokens: int
    requests: int
    pool_tokens: int
    context_length: int
    page_size: int = 1

    @property
    def new_tokens(self) -> int:
        """The longest prompt part that one batch can take."""
        return min(self.prefill_tokens, self.context_length, self.pool_tokens)

    @property
    def prompts(self) -> int:
        """In a prefill batch of the grid; as many rows are kept from decode beside one."""
        return MAX_PROMPTS if self.requests >= 4 * MAX_PROMPTS else 1

    def hold(self, point: Point) -> bool:
        """Whether pool, rows and sequences have room for the point."""
        decode, prefill = point.decode, point.prefill
        tokens = 0
        if decode is not None:
            rows = self.requests - (self.prompts if prefill else 0)
            if decode.requests > rows or decode.context_each > self.context_length:
                return False
            tokens += decode.requests * self._whole_pages(decode.context_each)
        if prefill is not None:
            riding = decode.requests if decode is not None and point.fused else 0
            if (
                prefill.prompts > self.prompts
                or prefill.prompts * prefill.new + riding > self.prefill_tokens
                or prefill.length > self.context_length
            ):
                return False
            tokens += prefill.prompts * self._whole_pages(prefill.length)
        return tokens <= self.pool_tokens

    def _whole_pages(self, length: int) -> int:
        return -(-length // self.page_size) * self.page_size


def grid(table: PartitionTable, limits: Limits, effort: Effort) -> list[Point]:
    """Points that fit the limits, none twice, partition by partition."""
    make = _full if effort is Effort.FULL else _brief
    return _fitting(
        itertools.chain.from_iterable(make(table[i], limits) for i in range(len(table))), limits
    )


def held_out(table: PartitionTable, limits: Limits) -> list[Point]:
    """Points that lie between those of the full grid: measured to check a fit, not to make it."""
    prefills = [
        PrefillBatch(180),
        PrefillBatch(100, 300),
        PrefillBatch(700, 6000),
        PrefillBatch(3000),
        PrefillBatch(300, 1000, prompts=3),
    ]
    decodes = [DecodeBatch(3, 300), DecodeBatch(24, 5000), DecodeBatch(96, 1500)]
    points: list[Point] = []
    for index in range(len(table)):
        partition = table[index]
        points += _alone(partition, decodes, prefills)
        points += _both(partition, decodes[:1], prefills[1:2])
        points += _both(partition, decodes[1:2], prefills[2:3])
    fitted = set(grid(table, limits, Effort.FULL))
    return [point for point in _fitting(points, limits) if point not in fitted]


def _full(partition: Partition, limits: Limits) -> Iterator[Point]:
    contexts = _contexts(limits)
    prefills = [PrefillBatch(new) for new in _up_to(NEW_TOKENS, limits.new_tokens)]
    prefills += [
        PrefillBatch(new, cached)
        for new in _up_to(BEHIND_CACHED, limits.new_tokens)
        for cached in _cached(limits)
    ]
    cached = _cached(limits)[min(1, len(_cached(limits)) - 1)]
    prefills += [PrefillBatch(new, cached) for new in _up_to(BETWEEN, limits.new_tokens)]
    prefills.append(PrefillBatch(512, 4096, prompts=limits.prompts))
    decodes = [
        DecodeBatch(requests, context)
        for requests in _up_to(REQUESTS, limits.requests)
        for context in contexts
    ]
    yield from _alone(partition, decodes, prefills)
    short, middle, long = contexts
    if partition.exclusive:
        decodes = _capped(limits, (1, middle), (8, middle), (32, long), (64, middle), (128, short))
        cached = min(FUSED_CACHED, limits.context_length // 2)
        prefills = [
            PrefillBatch(new, behind)
            for new in _up_to(FUSED_NEW, limits.new_tokens)
            for behind in (0, cached)
        ]
    else:
        decodes = _capped(limits, (8, middle), (32, long), (128, middle))
        prefills = _capped_prefills(limits, (512, 8192), (2048, 0), (4096, 4096))
    yield from _both(partition, decodes, prefills)


def _brief(partition: Partition, limits: Limits) -> Iterator[Point]:
    short, middle, long = _contexts(limits)
    sizes = _up_to((32, 128, 512, 4096), limits.new_tokens)
    prefills = [PrefillBatch(new) for new in sizes]
    prefills += _capped_prefills(limits, (256, 8192))
    decodes = _capped(
        limits, (1, short), (4, short), (1, long), (16, middle), (32, long), (128, middle)
    )
    yield from _alone(partition, decodes, prefills)
    if partition.exclusive:
        prefills = _capped_prefills(limits, (128, 0), (512, 2048), (1024, 0))
        yield from _both(partition, _capped(limits, (8, middle), (64, middle)), prefills)
    else:
        prefills = _capped_prefills(limits, (1024, 1024))
        yield from _both(partition, _capped(limits, (16, middle)), prefills)


def _alone(
    partition: Partition, decodes: Sequence[DecodeBatch], prefills: Sequence[PrefillBatch]
) -> Iterator[Point]:
    yield from (Point(partition, decode=batch) for batch in decodes)
    yield from (Point(partition, prefill=batch) for batch in prefills)


def _both(
    partition: Partition, decodes: Sequence[DecodeBatch], prefills: Sequence[PrefillBatch]
) -> Iterator[Point]:
    for decode, prefill in itertools.product(decodes, prefills):
        yield Point(partition, decode, prefill)


def _fitting(points: Iterable[Point], limits: Limits) -> list[Point]:
    return [point for point in dict.fromkeys(points) if limits.hold(point)]


def _contexts(limits: Limits) -> tuple[int, int, int]:
    """Short, middle and long."""
    long = min(LONGEST_CONTEXT, limits.context_length, limits.pool_tokens)
    return max(1, long // 16), max(1, long // 4), long


def _cached(limits: Limits) -> list[int]:
    """Lengths of cached prefixes; of short contexts a quarter and a half."""
    room = limits.context_length - BEHIND_CACHED[0]
    return [cached for cached in CACHED_TOKENS if cached <= room] or [
        limits.context_length // 4,
        limits.context_length // 2,
    ]


def _up_to(sizes: Sequence[int], limit: int) -> list[int]:
    """The sizes below the limit, and where it cuts off others, the limit itself."""
    below = [size for size in sizes if size <= limit]
    return below if len(below) == len(sizes) or limit in below else [*below, limit]


def _capped(limits: Limits, *sizes: tuple[int, int]) -> list[DecodeBatch]:
    """Batches of (requests, context), those of too many requests with as many as there may be."""
    most = max(1, limits.requests - limits.prompts)
    return [DecodeBatch(min(requests, most), context) for requests, context in sizes]


def _capped_prefills(limits: Limits, *sizes: tuple[int, int]) -> list[PrefillBatch]:
    """Prompts of (new, cached), cut to what fits in a batch and a context."""
    batches = []
    for new, cached in sizes:
        new = min(new, limits.new_tokens)
        batches.append(PrefillBatch(new, min(cached, limits.context_length - new)))
    return batches
