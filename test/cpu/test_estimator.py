from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler import curves
from drift_scheduler.estimator import Estimator, EstimatorError
from drift_scheduler.profile import Kind, Sample, Split
from drift_scheduler.shapes import DecodeShape, PrefillShape

SMS = 132
WHOLE = Split(SMS, SMS, exclusive=True)
SPLITS = (WHOLE, *(Split(SMS - decode, decode) for decode in (16, 32, 48, 64, 80)))
DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
LAYERS, HIDDEN, KV_BYTES = 32, 4096, 4096  # KV bytes of a token and layer
PRODUCTS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # weights [n, k]
VOCABULARY = (128_256, 4096)
TILES = ((16, 128, 0.4), (32, 128, 0.55), (64, 128, 0.75), (128, 128, 0.9), (128, 256, 1.0))
LAUNCH_S = 12e-6


@dataclass(frozen=True)
class Roofline:
    """A device that runs an 8B model: bandwidth that saturates, tiles that come in waves."""

    sms: int

    @property
    def bytes_per_s(self) -> float:
        return 3e12 * (1 - math.exp(-self.sms / 28))

    @property
    def flops(self) -> float:
        return 6e12 * self.sms

    def product_s(self, rows: int, n: int, k: int) -> float:
        """The best tile's time; up to 512 rows its sums may be split to fill the last wave."""
        bound_s = 2 * (n * k + rows * (n + k)) / self.bytes_per_s
        best_s = math.inf
        for tile_rows, tile_columns, efficiency in TILES:
            tiles = -(-rows // tile_rows) * -(-n // tile_columns)
            for split in (1, 2, 4, 8) if rows <= 512 else (1, 2):
                waves = -(-tiles * split // self.sms)
                work = 2 * tile_rows * tile_columns * k / split
                best_s = min(best_s, waves * work * self.sms / (self.flops * efficiency))
        return max(best_s, bound_s)

    def layers_s(self, rows: int, sampled: int) -> float:
        products_s = sum(self.product_s(rows, *product) for product in PRODUCTS)
        norms_s = 28 * rows * HIDDEN / self.bytes_per_s
        head_s = self.product_s(sampled, *VOCABULARY)
        return LAYERS * (products_s + norms_s + LAUNCH_S) + head_s

    def prompts_s(self, parts) -> float:
        """Causal attention in tiles of 64 tokens."""
        seconds = 0.0
        for new, cached in parts:
            padded = -(-new // 64) * 64
            seconds += 4 * HIDDEN * (padded * cached + new * new / 2) / (0.75 * self.flops)
            seconds += KV_BYTES * (new + cached) / self.bytes_per_s
        return LAYERS * seconds

    def context_s(self, context: int) -> float:
        return LAYERS * (KV_BYTES * context / (0.9 * self.bytes_per_s) + 8e-6)

    def decode_s(self, requests: int, context: int) -> float:
        padded = next(size for size in DECODE_SIZES if size >= requests)
        return self.layers_s(padded, padded) + self.context_s(context)

    def prefill_s(self, parts) -> float:
        rows = sum(new for new, _ in parts)
        return self.layers_s(rows, len(parts)) + self.prompts_s(parts)

    def fused_s(self, requests: int, context: int, parts) -> float:
        rows = requests + sum(new for new, _ in parts)
        seconds = self.layers_s(rows, requests + len(parts))
        return seconds + self.context_s(context) + self.prompts_s(parts)


def decode_sample(split, requests, context, noise=1.0):
    seconds = Roofline(split.decode_sms).decode_s(requests, context) * noise
    return Sample(Kind.DECODE, split, seconds, decode=DecodeShape(requests, context))


def prefill_sample(split, parts, noise=1.0):
    seconds = Roofline(split.prefill_sms).prefill_s(parts) * noise
    shape = PrefillShape.of(parts)
    return Sample(Kind.PREFILL, split, seconds, prefill=shape, layers=4)


def fused_sample(requests, context, parts, noise=1.0):
    seconds = Roofline(SMS).fused_s(requests, context, parts) * noise
    shape = DecodeShape(requests, context)
    return Sample(Kind.FUSED, WHOLE, seconds, decode=shape, prefill=PrefillShape.of(parts))


# 24 batches, of sizes that differ, and 20 steps.
BATCHES = (
    *([(n, 0)] for n in (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)),
    *([(n, 0)] for n in (4096, 8192)),
    *([(100, 8192)], [(896, 4096)], [(512, 32768)], [(1152, 8192)], [(2176, 16384)]),
    *([(3072, 4096)], [(512, 0)] * 4, [(224, 2048)] * 7, [(1536, 1024)] * 4, [(72, 4096)] * 4),
)
STEPS = (
    *((1, 2000), (1, 32_000), (2, 500), (4, 16_000), (8, 8000), (8, 64_000), (16, 16_000)),
    *((16, 120_000), (24, 50_000), (32, 8000), (32, 32_000), (32, 250_000), (48, 100_000)),
    *((64, 16_000), (64, 64_000), (96, 60_000), (96, 200_000), (128, 30_000)),
    *((128, 128_000), (128, 300_000)),
)
FUSED = (
    *((8, 32_000, [(64, 0)]), (8, 8000, [(256, 8192)]), (16, 90_000, [(496, 0)])),
    *((32, 32_000, [(1024, 4096)]), (32, 250_000, [(480, 2048)]), (64, 64_000, [(192, 0)])),
    *((64, 128_000, [(960, 0)]), (128, 128_000, [(128, 16_384)]), (128, 30_000, [(1920, 0)])),
)


def profile(seed, splits=SPLITS, batches=BATCHES, steps=STEPS, fused=FUSED):
    rng = random.Random(seed)

    def noise():
        return math.exp(rng.gauss(0, 0.01))

    return [
        *(prefill_sample(split, batch, noise()) for split in splits for batch in batches),
        *(decode_sample(split, *step, noise()) for split in splits for step in steps),
        *(fused_sample(*step, noise()) for step in fused),
    ]


def unseen(seed, splits=SPLITS, count=80):
    """Shapes like those of serving: one prompt, or several that are not too short, with little or
    much of them cached; any number of requests with short or long contexts."""
    rng = random.Random(seed)
    found = []
    for split in splits:
        for _ in range(count):
            tokens = int(2 ** rng.uniform(5, 13))
            number = min(rng.choice((1, 1, 2, 4, 8)), tokens // 256 or 1)
            cached = rng.choice((0, 0, 2 ** rng.uniform(6, 14.5)))
            parts = [
                (int(tokens / number * rng.uniform(0.6, 1.4)), int(cached * rng.uniform(0.5, 1.5)))
                for _ in range(number)
            ]
            found.append(prefill_sample(split, parts))
            requests = rng.randint(1, 128)
            found.append(decode_sample(split, requests, int(requests * 2 ** rng.uniform(8, 13))))
    for _ in range(count):
        requests = rng.randint(1, 128)
        prompt = (int(2 ** rng.uniform(6, 11)), rng.choice((0, int(2 ** rng.uniform(6, 14)))))
        found.append(fused_sample(requests, int(requests * 2 ** rng.uniform(8, 13)), [prompt]))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_shapes_and_partitions_of_a_roofline_that_were_not_fitted(seed):
    estimator = Estimator.fit(profile(seed), SMS, decode_sizes=DECODE_SIZES)
    table = estimator.errors(unseen(seed + 100))
    assert len(table.rows) == 2 * len(SPLITS) + 1
    for row in table.rows:
        assert row.count == 80
        assert row.worst < 0.08, f"\n{table}"
        assert row.mean < 0.03, f"\n{table}"


def test_how_a_processor_rounds_decides_nothing(monkeypatch):
    """None of these batches tells tiles of 64 tokens from tiles of 128."""
    exact = curves._left_out_error
    rng = random.Random(0)
    monkeypatch.setattr(
        curves, "_left_out_error", lambda *given: exact(*given) * (1 + rng.gauss(0, 1e-12))
    )
    samples = profile(0)
    found = []
    for _ in range(4):
        estimator = Estimator.fit(samples, SMS, decode_sizes=DECODE_SIZES)
        found.append(estimator.prefill_s(PrefillShape.of([(64, 16_384)]), SMS))
    assert len(set(found)) == 1


@pytest.fixture(scope="module")
def estimator():
    return Estimator.fit(profile(7), SMS, decode_sizes=DECODE_SIZES)


def test_partitions_between_those_measured(estimator):
    between = (Split(92, 40), Split(76, 56), Split(108, 24))
    table = estimator.errors(unseen(1, splits=between))
    for row in table.rows:
        assert row.worst < 0.20, f"\n{table}"
        assert row.mean < 0.06, f"\n{table}"


def test_between_two_counts_work_is_mixed_in_inverse_sms(estimator):
    step = DecodeShape(16, 50_000)
    few, many = estimator.decode_s(step, 32), estimator.decode_s(step, 48)
    share = (1 / 40 - 1 / 48) / (1 / 32 - 1 / 48)
    assert estimator.decode_s(step, 40) == pytest.approx(share * few + (1 - share) * many)


def test_outside_the_counts_measured_nothing_is_promised():
    measured = Estimator.fit(profile(0, splits=(Split(100, 32), Split(68, 64))), SMS)
    batch, step = PrefillShape.of([(1000, 500)]), DecodeShape(16, 50_000)
    assert measured.decode_s(step, 16) == pytest.approx(2 * measured.decode_s(step, 32))
    assert measured.decode_s(step, 132) == measured.decode_s(step, 64)
    assert measured.prefill_s(batch, 34) == pytest.approx(2 * measured.prefill_s(batch, 68))
    assert measured.prefill_s(batch, 132) == measured.prefill_s(batch, 100)
    with pytest.raises(ValueError, match="sms=0"):
        measured.decode_s(step, 0)


def test_a_phase_without_samples_is_named():
    every = profile(0)
    with pytest.raises(EstimatorError, match="no decode sample"):
        Estimator.fit([s for s in every if s.kind is not Kind.DECODE], SMS)
    with pytest.raises(EstimatorError, match="no prefill sample"):
        Estimator.fit([s for s in every if s.kind is not Kind.PREFILL], SMS)
    with pytest.raises(EstimatorError, match="among 0"):
        Estimator.fit([], SMS)


def test_samples_beside_the_other_phase_play_no_part(estimator):
    beside = Sample(
        Kind.DECODE,
        Split(100, 32),
        10.0,
        decode=DecodeShape(16, 50_000),
        prefill=PrefillShape.of([(1000, 0)]),
        beside=True,
    )
    fitted = Estimator.fit([*profile(7), beside], SMS, decode_sizes=DECODE_SIZES)
    step = DecodeShape(16, 50_000)
    assert fitted.decode_s(step, 32) == estimator.decode_s(step, 32)
    assert Estimator.errors(fitted, [beside]).rows == ()


def test_one_sample_is_predicted_and_more_work_takes_longer():
    fitted = Estimator.fit([prefill_sample(WHOLE, [(512, 0)]), decode_sample(WHOLE, 8, 8000)], SMS)
    assert fitted.prefill_s(PrefillShape.of([(512, 0)]), SMS) == pytest.approx(
        Roofline(SMS).prefill_s([(512, 0)]), rel=0.02
    )
    assert fitted.decode_s(DecodeShape(8, 8000), SMS) == pytest.approx(
        Roofline(SMS).decode_s(8, 8000), rel=0.02
    )
    long = PrefillShape.of([(5120, 0)])
    assert fitted.prefill_s(long, SMS) >= 5 * fitted.prefill_s(PrefillShape.of([(512, 0)]), SMS)


def test_a_partition_with_few_samples_takes_its_shape_from_another():
    few = Split(68, 64)
    known = profile(3, splits=(WHOLE,))
    known += [prefill_sample(few, [(2048, 0)]), decode_sample(few, 32, 32_000)]
    fitted = Estimator.fit(known, SMS, decode_sizes=DECODE_SIZES)
    # Of a size that was not measured there.
    assert fitted.prefill_s(PrefillShape.of([(5000, 0)]), 68) == pytest.approx(
        Roofline(68).prefill_s([(5000, 0)]), rel=0.15
    )
    assert fitted.decode_s(DecodeShape(32, 120_000), 64) == pytest.approx(
        Roofline(64).decode_s(32, 120_000), rel=0.15
    )


def test_without_fused_samples_prefill_and_decode_tell():
    fitted = Estimator.fit(profile(3, fused=()), SMS, decode_sizes=DECODE_SIZES)
    table = fitted.errors(unseen(5, splits=()))
    assert table.mean(Kind.FUSED) < 0.08, f"\n{table}"
    assert table.worst(Kind.FUSED) < 0.25, f"\n{table}"


def test_padded_sizes_take_what_they_are_padded_to(estimator):
    assert estimator.decode_s(DecodeShape(33, 50_000), 32) == estimator.decode_s(
        DecodeShape(48, 50_000), 32
    )
    padded = Estimator.fit(profile(7), SMS, prefill_sizes=(128, 1024))
    short, full = PrefillShape(129, 0, 0), PrefillShape(1024, 0, 0)
    assert padded.prefill_s(short, SMS) == padded.prefill_s(full, SMS)
    assert padded.prefill_s(short, 100) == padded.prefill_s(full, 100)
    assert padded.fused_s(DecodeShape(1, 1000), PrefillShape(128, 0, 0)) == padded.fused_s(
        DecodeShape(1, 1000), PrefillShape(1023, 0, 0)
    )


def test_the_error_table_counts_what_it_was_given():
    samples = profile(7, splits=(WHOLE,))
    fitted = Estimator.fit(samples, SMS, decode_sizes=DECODE_SIZES)
    shape = DecodeShape(8, 8000)
    solo_s = fitted.decode_s(shape, SMS)
    off = [Sample(Kind.DECODE, WHOLE, solo_s / factor, decode=shape) for factor in (1.1, 0.7, 1)]
    table = fitted.errors(off)
    (row,) = table.rows
    assert (row.kind, row.partition, row.count) == (Kind.DECODE, WHOLE, 3)
    assert row.worst == table.worst(Kind.DECODE) == pytest.approx(0.3)
    assert row.mean == table.mean(Kind.DECODE) == pytest.approx(0.4 / 3)
    assert "30.0%" in str(table) and "whole" in str(table)


splits = st.sampled_from(SPLITS)
some_seconds = st.floats(1e-4, 10.0)
some_batches = st.lists(
    st.tuples(st.integers(1, 8192), st.integers(0, 32_768)), min_size=1, max_size=4
).map(PrefillShape.of)
some_steps = st.builds(DecodeShape, st.integers(1, 256), st.integers(1, 500_000))


@settings(max_examples=25)
@given(
    st.lists(st.tuples(splits, some_batches, some_seconds), min_size=1, max_size=10),
    st.lists(st.tuples(splits, some_steps, some_seconds), min_size=1, max_size=10),
    st.lists(st.tuples(some_steps, some_batches, some_seconds), max_size=6),
    some_batches,
    some_steps,
    st.integers(1, SMS),
)
def test_whatever_was_measured_more_work_never_takes_less(batches, steps, fused, batch, step, sms):
    fitted = Estimator.fit(
        [
            *(Sample(Kind.PREFILL, s, t, prefill=b, layers=1) for s, b, t in batches),
            *(Sample(Kind.DECODE, s, t, decode=d) for s, d, t in steps),
            *(Sample(Kind.FUSED, WHOLE, t, decode=d, prefill=b) for d, b, t in fused),
        ],
        SMS,
        decode_sizes=DECODE_SIZES,
    )
    more = PrefillShape(2 * batch.tokens, 2 * batch.squares, 2 * batch.cross, 2 * batch.requests)
    longer = DecodeShape(step.requests + 5, step.context + 1000)
    for less_s, more_s in (
        (fitted.prefill_s(batch, sms), fitted.prefill_s(more, sms)),
        (fitted.decode_s(step, sms), fitted.decode_s(longer, sms)),
        (fitted.fused_s(step, batch), fitted.fused_s(longer, batch)),
    ):
        # Not numpy's: a forecast is computed thousands of times a second.
        assert type(less_s) is type(more_s) is float
        assert 0 < less_s <= more_s * (1 + 1e-9)
        assert math.isfinite(more_s)


def test_attention_that_is_bound_by_reading_where_few_tokens_attend():
    """The longer of reading the cached keys and of the arithmetic, not their sum."""

    def seconds(new, cached):
        attention_s = cached * max(4e-7, 1e-9 * new)
        return 4e-3 + max(3e-3, 2e-5 * new) + 5e-10 * new**2 + attention_s

    def sample(new, cached):
        shape = PrefillShape.of([(new, cached)])
        return Sample(Kind.PREFILL, WHOLE, seconds(new, cached), prefill=shape, layers=4)

    fresh = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
    samples = [sample(new, 0) for new in fresh]
    samples += [
        sample(new, cached) for new in (100, 400, 1024, 4096) for cached in (4096, 16384, 32768)
    ]
    samples.append(decode_sample(WHOLE, 8, 8000))
    estimator = Estimator.fit(samples, SMS)
    for new in (120, 300, 700, 2000, 3000):
        for cached in (6000, 20_000, 30_000):
            predicted_s = estimator.prefill_s(PrefillShape.of([(new, cached)]), SMS)
            assert predicted_s == pytest.approx(seconds(new, cached), rel=0.08)
