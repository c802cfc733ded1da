"""The sampler: exact greedy, the right distribution, filters as a plain reference has them,
and the same tokens for a seeded request whatever runs beside it."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sglang.srt.layers import sampler
from sglang.srt.layers.sampler import (
    SamplingBatch,
    Withheld,
    _gumbel,
    _gumbel_of_bits,
    _mix32,
    _row_keys,
    sample,
)
from sglang.srt.sampling_params import SamplingParams

_CPU = torch.device("cpu")
_GREEDY = SamplingParams(temperature=0.0)
_RANDOM = SamplingParams()


def _batch(
    params: list[SamplingParams],
    vocab_size: int,
    seeds: list[int] | None = None,
    withheld: tuple[Withheld, ...] = (),
) -> SamplingBatch:
    seeds = list(range(len(params))) if seeds is None else seeds
    return SamplingBatch.from_params(params, seeds, vocab_size, _CPU, withheld=withheld)


def _draws(params: SamplingParams, logits: torch.Tensor, count: int) -> npt.NDArray[np.int64]:
    """`count` tokens of one request with these logits at each of its positions."""
    batch = _batch([params] * count, len(logits), seeds=[7] * count)
    return sample(logits.repeat(count, 1), torch.arange(count), batch).numpy()


def _reference_probs(logits: torch.Tensor, params: SamplingParams) -> npt.NDArray[np.float64]:
    """The distribution in float64, one rule after the other."""
    scaled = logits.double().numpy() / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0.0
        probs /= probs.sum()
    if params.top_p < 1.0:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p]] = 0.0
    probs[probs < params.min_p * probs.max()] = 0.0
    reference: npt.NDArray[np.float64] = probs / probs.sum()
    return reference


def _chi_square_ok(drawn: npt.NDArray[np.int64], probs: npt.NDArray[np.float64]) -> bool:
    """Whether counts fit, at five standard deviations of the chi-square statistic."""
    counts = np.bincount(drawn, minlength=len(probs))
    if counts[probs == 0].any():
        return False
    expected = probs[probs > 0] * len(drawn)
    assert expected.min() > 5, "too few draws for this test"
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    return bool(statistic < freedom + 5 * np.sqrt(2 * max(freedom, 1)))


def test_greedy_rows_take_the_largest_logit_and_of_ties_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-5.0, -4.0, -3.0, -3.0]])
    batch = _batch([_GREEDY, SamplingParams(top_k=1), _GREEDY], 4)
    assert batch.all_greedy
    assert sample(logits, torch.zeros(3, dtype=torch.int64), batch).tolist() == [1, 0, 2]


def test_greedy_rows_are_exact_beside_random_ones() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 1000)
    params = [_GREEDY if row % 3 else _RANDOM for row in range(9)]
    ids = sample(logits, torch.arange(9), _batch(params, 1000))
    greedy = [row for row in range(9) if row % 3]
    assert ids.dtype == torch.int64
    assert ids[greedy].tolist() == logits.argmax(dim=-1)[greedy].tolist()


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(4, 50)
    before = logits.clone()
    params = [_GREEDY, _RANDOM, SamplingParams(top_k=3, min_p=0.2), SamplingParams(top_p=0.5)]
    batch = _batch(params, 50, withheld=(Withheld(0, [3], 10), Withheld(1, [4], 10)))
    sample(logits, torch.arange(4), batch)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=1.5, top_k=9, top_p=0.8, min_p=0.15),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = torch.linspace(-1.5, 1.5, 20)[torch.randperm(20, generator=torch.manual_seed(1))]
    assert _chi_square_ok(_draws(params, logits, 20_000), _reference_probs(logits, params))


def test_the_distribution_test_notices_a_wrong_temperature() -> None:
    logits = torch.linspace(-1.5, 1.5, 20)
    drawn = _draws(SamplingParams(temperature=1.1), logits, 20_000)
    assert not _chi_square_ok(drawn, _reference_probs(logits, SamplingParams()))


def test_rare_tokens_come_as_often_as_they_should() -> None:
    """One likely token beside 20000 unlikely ones that share 1 % of the mass."""
    logits = torch.full((20_001,), float(np.log(0.01 / 20_000)))
    logits[123] = float(np.log(0.99))
    rare = int((_draws(_RANDOM, logits, 4000) != 123).sum())
    assert abs(rare - 40) < 4 * np.sqrt(40)


def test_consecutive_seeds_and_positions_draw_independently() -> None:
    """Pairs of neighbours over (seed, position) are uniform over the 8 x 8 outcomes."""
    logits = torch.zeros(128, 8)
    seeds = torch.arange(128).repeat_interleave(128)
    positions = torch.arange(128).repeat(128)
    batch = _batch([_RANDOM] * len(seeds), 8, seeds=seeds.tolist())
    grid = sample(logits.repeat(128, 1), positions, batch).reshape(128, 128).numpy()
    uniform = np.full(64, 1 / 64)
    assert _chi_square_ok((grid[:, 1:] * 8 + grid[:, :-1]).ravel(), uniform)
    assert _chi_square_ok((grid[1:] * 8 + grid[:-1]).ravel(), uniform)


def test_noise_is_gumbel_distributed_and_finite() -> None:
    keys = _row_keys(torch.arange(64), torch.full((64,), 5))
    noise = _gumbel(keys, _mix32(torch.arange(20_000, dtype=torch.int32)))
    assert bool(torch.isfinite(noise).all())
    assert abs(float(noise.double().mean()) - np.euler_gamma) < 0.005
    assert abs(float(noise.double().var()) - np.pi**2 / 6) < 0.02
    sorted_noise = noise.flatten().double().sort().values
    cdf = torch.exp(-torch.exp(-sorted_noise))
    steps = torch.arange(1, len(cdf) + 1) / len(cdf)
    assert float((cdf - steps).abs().max()) < 2 / len(cdf) ** 0.5  # Kolmogorov-Smirnov


def test_the_extreme_hashes_give_finite_noise() -> None:
    """A uniform of exactly 0 or 1 would give infinite noise."""
    bits = torch.tensor([0, 1, 2**31 - 2, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    noise = _gumbel_of_bits(bits)
    assert bool(torch.isfinite(noise).all())
    assert noise[0] > noise[1] > 20  # rare tokens need noise finer than f32 near 1 has
    assert noise[3] <= noise[2] < -2


def _mixed_params(count: int) -> list[SamplingParams]:
    kinds = [
        _RANDOM,
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(top_k=20),
        SamplingParams(min_p=0.05),
        _GREEDY,
        SamplingParams(temperature=1.3, top_k=50, top_p=0.95, min_p=0.01),
    ]
    return [kinds[row % len(kinds)] for row in range(count)]


def test_a_seeded_request_gets_the_same_token_in_any_batch() -> None:
    torch.manual_seed(3)
    count, vocab_size = 24, 3001
    logits, positions = torch.randn(count, vocab_size) * 3, torch.randint(0, 9999, (count,))
    params, seeds = _mixed_params(count), [row * 977 - 5000 for row in range(count)]
    together = sample(logits, positions, _batch(params, vocab_size, seeds)).tolist()
    alone = [
        int(
            sample(
                logits[row : row + 1],
                positions[row : row + 1],
                _batch([params[row]], vocab_size, [seeds[row]]),
            )
        )
        for row in range(count)
    ]
    assert together == alone
    order = torch.randperm(count).tolist()
    shuffled = sample(
        logits[order],
        positions[order],
        _batch([params[i] for i in order], vocab_size, [seeds[i] for i in order]),
    )
    assert shuffled.tolist() == [together[i] for i in order]


def test_batches_larger_than_a_noise_chunk_draw_the_same() -> None:
    vocab_size = 150_000  # 27 rows a chunk
    logits = torch.zeros(1, vocab_size).expand(60, vocab_size)
    positions = torch.arange(60)
    ids = sample(logits, positions, _batch([_RANDOM] * 60, vocab_size, [1] * 60))
    for row in (0, 26, 27, 28, 59):
        one = sample(logits[:1], positions[row : row + 1], _batch([_RANDOM], vocab_size, [1]))
        assert ids[row] == one
    assert len(set(ids.tolist())) > 55


def test_seed_and_position_both_matter() -> None:
    logits = torch.zeros(4, 10_000)
    batch = _batch([_RANDOM] * 4, 10_000, seeds=[1, 1, 2, -1])
    a, b, c, d = sample(logits, torch.tensor([5, 6, 5, 5]), batch).tolist()
    assert len({a, b, c, d}) == 4
    assert sample(logits, torch.tensor([5, 6, 5, 5]), batch).tolist() == [a, b, c, d]


@pytest.mark.parametrize("top_k", [-1, 1, 2, 7, 40, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.97, 0.5, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.3, 1.0])
def test_filters_keep_what_the_reference_keeps(top_k: int, top_p: float, min_p: float) -> None:
    """With the kept tokens nearly level, every one of them turns up, and no other."""
    generator = torch.manual_seed(11)
    logits = torch.randn(40, generator=generator)
    params = SamplingParams(temperature=4.0, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = set(np.flatnonzero(_reference_probs(logits, params)).tolist())
    assert set(_draws(params, logits, 4000).tolist()) == kept


def test_each_row_has_its_own_filter() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    params = [
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.75),
        SamplingParams(min_p=0.3),
        _RANDOM,
        SamplingParams(top_k=3, top_p=0.7),  # of 4/9, 3/9, 2/9 the first two reach 0.7
    ]
    seen: list[set[int]] = [set() for _ in params]
    for position in range(300):
        positions = torch.full((len(params),), position)
        ids = sample(logits.repeat(len(params), 1), positions, _batch(params, 4))
        for row, token in enumerate(ids.tolist()):
            seen[row].add(token)
    assert seen == [{0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1}]


def test_ties_with_the_last_kept_token_are_kept() -> None:
    logits = torch.tensor([5.0, 1.0, 5.0, 5.0, 0.0])
    assert set(_draws(SamplingParams(top_k=2), logits, 200).tolist()) == {0, 2, 3}


def test_top_k_beyond_the_vocabulary_is_off() -> None:
    [part] = _batch([SamplingParams(top_k=1000)], 8).parts
    assert part.cut_rows is None
    assert part.top_ks.tolist() == [8]


def test_only_as_much_is_sorted_as_the_cuts_need() -> None:
    params = [_RANDOM, SamplingParams(top_k=20, top_p=0.9), _GREEDY, SamplingParams(top_k=50)]
    [part] = _batch(params, 1000).parts
    assert part.cut_rows is not None
    assert (part.cut_rows.tolist(), part.cut_width) == ([1, 2], 50)
    [part] = _batch([*params, SamplingParams(top_p=0.9)], 1000).parts
    assert part.cut_width == 1000
    [part] = _batch([_RANDOM, _GREEDY, SamplingParams(min_p=0.1)], 1000).parts
    assert part.cut_rows is None


@pytest.mark.parametrize("greedy_too", [True, False])
@pytest.mark.parametrize("rows_each", [1, 2, 5])
def test_rows_draw_the_same_however_few_are_taken_at_a_time(
    rows_each: int, greedy_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab_size = 40
    wishes = [
        _RANDOM,
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=2.0, top_k=9, top_p=0.8, min_p=0.01),
    ]
    params = [wish for wish in wishes for _ in range(3)] + ([_GREEDY] * 4 if greedy_too else [])
    logits = torch.randn(len(params), vocab_size, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(len(params))
    together = _batch(params, vocab_size)
    monkeypatch.setattr(sampler, "_PART_ELEMENTS", rows_each * vocab_size)
    apart = _batch(params, vocab_size)
    assert len(together.parts) == 1
    assert [len(part.seeds) for part in apart.parts] == (
        [rows_each] * (15 // rows_each) + [15 % rows_each] * (15 % rows_each > 0)
    )
    assert sample(logits, positions, apart).tolist() == sample(logits, positions, together).tolist()


@pytest.mark.parametrize(
    "params",
    [
        _GREEDY,
        _RANDOM,
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.3),
        SamplingParams(min_p=0.5),
        SamplingParams(temperature=1e-5, top_k=4, top_p=0.9, min_p=0.1),
    ],
    ids=str,
)
def test_extreme_logits(params: SamplingParams) -> None:
    inf = torch.inf
    one_left = torch.tensor([-inf, -inf, 0.0, -inf, -inf])
    certain = torch.tensor([0.0, 1.0, -2.0, inf, 3.0])
    huge = torch.tensor([-3e38, 3e38, -3e38, 1e38, 0.0])
    for logits, expected in ((one_left, 2), (certain, 3), (huge, 1)):
        assert set(_draws(params, logits, 50).tolist()) == {expected}
    for logits in (torch.full((5,), -inf), torch.full((5,), inf), torch.full((5,), torch.nan)):
        assert set(_draws(params, logits, 20).tolist()) <= set(range(5))


def test_withheld_tokens_are_not_chosen_before_their_position() -> None:
    logits = torch.tensor([[9.0, 0.0, 1.0], [9.0, 0.0, 1.0], [9.0, 8.0, -50.0]])
    params = [_GREEDY, _RANDOM, _GREEDY]
    batch = _batch(params, 3, withheld=(Withheld(0, [0, 2], 6), Withheld(1, [0], 6)))
    early = sample(logits, torch.tensor([5, 5, 5]), batch).tolist()
    assert early[0] == 1
    assert early[1] in (1, 2)
    assert early[2] == 0
    late = sample(logits, torch.tensor([6, 6, 6]), batch).tolist()
    assert (late[0], late[2]) == (0, 0)


def test_two_lanes_sample_at_once_without_disturbing_each_other() -> None:
    torch.manual_seed(5)
    inputs = [(torch.randn(12, 4000), torch.arange(12) + lane) for lane in range(2)]
    batches = [
        _batch(_mixed_params(12), 4000, [lane * 100 + i for i in range(12)]) for lane in (0, 1)
    ]
    alone = [sample(*inputs[lane], batches[lane]).tolist() for lane in (0, 1)]
    seen: list[list[list[int]]] = [[], []]
    start = threading.Barrier(2, timeout=30)

    def run(lane: int) -> None:
        start.wait()
        for _ in range(20):
            seen[lane].append(sample(*inputs[lane], batches[lane]).tolist())

    threads = [threading.Thread(target=run, args=(lane,)) for lane in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert seen == [[alone[0]] * 20, [alone[1]] * 20]


def test_an_empty_batch_gives_no_tokens() -> None:
    ids = sample(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), _batch([], 8))
    assert ids.tolist() == []


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="1 sampling parameters with 2 seeds"):
        _batch([_RANDOM], 8, seeds=[1, 2])
    with pytest.raises(ValueError, match=r"expected floats \[1, vocab_size\]"):
        sample(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), _batch([_RANDOM], 8))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        sample(torch.zeros(1, 8).long(), torch.zeros(1, dtype=torch.int64), _batch([_RANDOM], 8))
