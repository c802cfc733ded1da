"""The sampler: from logits to next token ids, batched and without waiting for the device.

A random row takes the token with the largest `logit / temperature + noise`, with Gumbel noise:
that draws exactly from the softmax. The noise is a hash of (seed, position, token id), not the
state of a generator, so a request gets the same tokens beside any neighbours and in any lane,
and nothing is shared between lanes.

Top-k, top-p and min-p all come down to one logit per row below which nothing is chosen. Tokens
that tie with that logit are kept, so that the outcome does not hang on the order of a sort.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sglang.srt.layers.fused import use_kernels
from sglang.srt.layers.penalties import PenalisedRows
from sglang.srt.sampling_params import SamplingParams

# Logits of random rows at a time, 16 MiB of them: their noise stays in the L2 cache, and what is
# sorted and scaled takes the same memory however many rows there are.
_PART_ELEMENTS = 1 << 22


class Withheld(NamedTuple):
    """Token ids that one row may not choose at positions before `until` (min_new_tokens)."""

    row: int
    token_ids: Sequence[int]
    until: int


@dataclass(frozen=True, slots=True)
class RandomRows:
    """How R rows draw their token; tensors on the device of the logits.

    rows [R] i64: which rows of the batch; None if they are rows `start` and on.
        temperatures [R] f32, above 0
        top_ks [R] i64, vocab_size where off
        top_ps [R] f32, 1 where off
        min_ps [R] f32, 0 where off
        seeds [R] i64
    cut_rows [C] i64: which of the R have a top-k or top-p, None if none. cut_width: how many of the
    likeliest tokens must be sorted to cut those.
    """

    start: int
    rows: torch.Tensor | None
    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    seeds: torch.Tensor
    any_min_p: bool
    cut_rows: torch.Tensor | None
    cut_width: int

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of values [B, ...]."""
        if self.rows is not None:
            return values.index_select(0, self.rows)
        return values[self.start : self.start + len(self.seeds)]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each of B rows chooses its token; all tensors live on the device of the logits.

    random_rows [R] i64: the rows that draw, None if all do; the others take the likeliest token.
    parts: the random rows in that order, a few at a time.
    withheld_rows, withheld_ids, withheld_until [N] i64: see Withheld; None if there are none.
    penalised: rows whose logits depend on what they had. bias_rows, bias_ids [M] i64, biases [M]
    f32: what is added to logits; None if there are none.
    """

    num_rows: int
    random_rows: torch.Tensor | None
    parts: tuple[RandomRows, ...]
    withheld_rows: torch.Tensor | None
    withheld_ids: torch.Tensor | None
    withheld_until: torch.Tensor | None
    penalised: tuple[PenalisedRows, ...]
    bias_rows: torch.Tensor | None
    bias_ids: torch.Tensor | None
    biases: torch.Tensor | None

    def adjusted(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What tokens are chosen by, and log-probabilities told of: penalties first, then biases,
        then what may not be chosen yet. f32 where there is a penalty or bias: halves are coarse.
        """
        if self.penalised or self.biases is not None:
            logits = logits.to(torch.float32, copy=True)
        for rows in self.penalised:
            rows.apply(logits)
        if self.biases is not None:
            logits[self.bias_rows, self.bias_ids] += self.biases
        return _withhold(logits, positions, self)

    def count(self, tokens: torch.Tensor) -> None:
        """The tokens [B] i64 were chosen: later penalties are for them too."""
        for rows in self.penalised:
            rows.count(tokens)

    @property
    def all_greedy(self) -> bool:
        return not self.parts

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        vocab_size: int,
        device: torch.device,
        *,
        withheld: Sequence[Withheld] = (),
        penalised: tuple[PenalisedRows, ...] = (),
    ) -> SamplingBatch:
        """Row i follows params[i] and draws from seeds[i] (64 bits). Does not wait for the device.

        Stays valid over decode steps until the rows change.
        """
        if len(params) != len(seeds):
            raise ValueError(f"{len(params)} sampling parameters with {len(seeds)} seeds")
        upload = functools.partial(_on_device, device=device)
        random = [row for row, wish in enumerate(params) if not wish.greedy]
        random_rows = upload(random, torch.int64) if len(random) < len(params) else None
        flat = [(w.row, token, w.until) for w in withheld for token in w.token_ids]
        biased = [
            (row, token, bias)
            for row, wish in enumerate(params)
            for token, bias in wish.logit_bias.items()
        ]
        return cls(
            num_rows=len(params),
            random_rows=random_rows,
            parts=_parts(
                [params[row] for row in random],
                [seeds[row] for row in random],
                random_rows,
                vocab_size,
                device,
            ),
            withheld_rows=upload([row for row, _, _ in flat], torch.int64) if flat else None,
            withheld_ids=upload([token for _, token, _ in flat], torch.int64) if flat else None,
            withheld_until=upload([until for _, _, until in flat], torch.int64) if flat else None,
            penalised=penalised,
            bias_rows=upload([row for row, _, _ in biased], torch.int64) if biased else None,
            bias_ids=upload([token for _, token, _ in biased], torch.int64) if biased else None,
            biases=upload([bias for _, _, bias in biased], torch.float32) if biased else None,
        )


def _parts(
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    rows: torch.Tensor | None,
    vocab_size: int,
    device: torch.device,
) -> tuple[RandomRows, ...]:
    """Of all random rows; `rows` as in SamplingBatch.random_rows."""
    if not params:
        return ()
    upload = functools.partial(_on_device, device=device)
    step = max(1, _PART_ELEMENTS // vocab_size)
    spans = [slice(start, start + step) for start in range(0, len(params), step)]
    widths = [vocab_size if p.top_k < 1 else min(p.top_k, vocab_size) for p in params]
    is_cut = [k < vocab_size or p.top_p < 1.0 for k, p in zip(widths, params, strict=True)]
    cuts = [[place for place, cut in enumerate(is_cut[span]) if cut] for span in spans]
    # One copy of each kind, however many parts there are.
    temperatures = upload([p.temperature for p in params], torch.float32)
    top_ks = upload(widths, torch.int64)
    top_ps = upload([p.top_p for p in params], torch.float32)
    min_ps = upload([p.min_p for p in params], torch.float32)
    seed_values = upload(list(seeds), torch.int64)
    cut_rows = upload([place for cut in cuts for place in cut], torch.int64).split(
        [len(cut) for cut in cuts]
    )
    return tuple(
        RandomRows(
            start=span.start,
            rows=None if rows is None else rows[span],
            temperatures=temperatures[span],
            top_ks=top_ks[span],
            top_ps=top_ps[span],
            min_ps=min_ps[span],
            seeds=seed_values[span],
            any_min_p=any(p.min_p > 0 for p in params[span]),
            cut_rows=part_cut_rows if cut else None,
            cut_width=max((widths[span][place] for place in cut), default=0),
        )
        for span, cut, part_cut_rows in zip(spans, cuts, cut_rows, strict=True)
    )


def _on_device(
    values: list[int] | list[float], dtype: torch.dtype, *, device: torch.device
) -> torch.Tensor:
    # Pinned, so that the copy does not wait for what the stream has yet to do.
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def sample(logits: torch.Tensor, positions: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Chooses one token for each row: ids [B] i64.

    logits [B, vocab_size] f32, bf16 or f16, left as they are; randomness is drawn in f32.
    positions [B] i64: index in its sequence of the token to choose.
    Greedy rows take the largest logit, of equal ones the lowest id.
    """
    if not logits.is_floating_point() or logits.shape[0] != batch.num_rows:
        raise ValueError(
            f"logits are {list(logits.shape)} {logits.dtype}, "
            f"expected floats [{batch.num_rows}, vocab_size]"
        )
    return choose(batch.adjusted(logits, positions), positions, batch)


def choose(logits: torch.Tensor, positions: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The second half of `sample`: takes logits that are adjusted already."""
    if batch.all_greedy:
        return likeliest(logits)
    columns = _mix32(torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device))
    drawn = torch.cat([_draw(logits, positions, part, columns) for part in batch.parts])
    if batch.random_rows is None:
        return drawn
    return likeliest(logits).index_copy_(0, batch.random_rows, drawn)


def likeliest(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The id of each row's largest logit, of equal ones the lowest: [B] i64, in `out` if given."""
    if use_kernels(logits):
        from sgl_kernel import greedy as kernels

        return kernels.greedy_tokens(logits, out)
    return torch.argmax(logits, dim=-1, out=out)


def _withhold(logits: torch.Tensor, positions: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Logits with -inf at the tokens that their row may not choose yet."""
    rows, ids, until = batch.withheld_rows, batch.withheld_ids, batch.withheld_until
    if rows is None or ids is None or until is None:
        return logits
    current = logits[rows, ids]
    masked = torch.where(positions[rows] < until, -torch.inf, current)
    return logits.index_put((rows, ids), masked)


def _draw(
    logits: torch.Tensor, positions: torch.Tensor, part: RandomRows, columns: torch.Tensor
) -> torch.Tensor:
    """Ids [R] i64 for the part's rows of logits [B, vocab_size] and positions [B] i64.

    columns [vocab_size] i32: mixed token ids.
    """
    scaled = part.of(logits).float() / part.temperatures[:, None]
    floor = _lowest_kept(scaled, part)
    if floor is not None:
        scaled.masked_fill_(scaled < floor[:, None], -torch.inf)
    noise = _gumbel(_row_keys(part.seeds, part.of(positions)), columns)
    return noise.add_(scaled).argmax(dim=-1)


def _lowest_kept(scaled: torch.Tensor, part: RandomRows) -> torch.Tensor | None:
    """The smallest logit that top-k, top-p and min-p leave in each row, [R] f32; None if all stay.

    Top-p counts the probabilities that top-k leaves, scaled to a sum of 1, and keeps the fewest
    that reach it. Min-p asks for a share of the largest probability, which no cut changes.
    """
    floor: torch.Tensor | None = None
    if part.cut_rows is not None:
        cut = _sorted_cut(
            scaled.index_select(0, part.cut_rows),
            part.top_ks.index_select(0, part.cut_rows),
            part.top_ps.index_select(0, part.cut_rows),
            part.cut_width,
        )
        floor = torch.full_like(part.temperatures, -torch.inf).index_copy_(0, part.cut_rows, cut)
    if part.any_min_p:
        by_min_p = scaled.amax(dim=-1) + part.min_ps.log()
        floor = by_min_p if floor is None else torch.maximum(floor, by_min_p)
    return floor


def _sorted_cut(
    scaled: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, width: int
) -> torch.Tensor:
    """The last logit kept by top-k, then top-p: [C] f32 of scaled [C, vocab_size] f32."""
    best = torch.topk(scaled, width, dim=-1).values
    ranks = torch.arange(width, device=scaled.device)
    probs = (best - best[:, :1]).exp().masked_fill(ranks >= top_ks[:, None], 0.0)
    before = probs.cumsum(dim=-1) - probs
    kept_by_p = (before < top_ps[:, None] * probs.sum(dim=-1, keepdim=True)).sum(dim=-1)
    # Rounding in the sums must not cut the tail of a row that has no top-p.
    kept = torch.where(top_ps < 1.0, kept_by_p.clamp(min=1), width).minimum(top_ks)
    return best.gather(1, kept[:, None] - 1).squeeze(1)


def _gumbel(keys: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Noise [rows, vocab_size] f32 of row keys [rows, 2] i32 and mixed ids [vocab_size] i32."""
    bits = columns[None, :] ^ keys[:, :1]
    return _gumbel_of_bits(_mix32(bits.add_(keys[:, 1:])))


def _gumbel_of_bits(bits: torch.Tensor) -> torch.Tensor:
    """Gumbel noise f32 of random i32, which it overwrites.

    -log(-log(u)) cares for u near 1, where f32 is coarse. So the uniform here is v = 1 - u, made
    from 31 bits and finest near 0; it is never 0 or 1.
    """
    v = bits.bitwise_and_(0x7FFFFFFF).float()
    v = v.mul_(2.0**-31 * (1 - 2.0**-23)).add_(2.0**-33)
    return v.neg_().log1p_().neg_().log_().neg_()


def _row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Two 32-bit keys of each row, [R, 2] i32, from seeds [R] i64 and positions [R] i64."""
    key = _mix64(_mix64(seeds) + positions)
    return key[:, None].view(torch.int32)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """A bijection of i64 that lets each bit of x reach all bits (finaliser of splitmix64)."""
    x = (x ^ _shift_right(x, 30, 64)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27, 64)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31, 64)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """The same for i32 (finaliser of MurmurHash3); overwrites x, which may be large."""
    x.bitwise_xor_(_shift_right(x, 16, 32)).mul_(-0x7A143595)
    x.bitwise_xor_(_shift_right(x, 13, 32)).mul_(-0x3D4D51CB)
    return x.bitwise_xor_(_shift_right(x, 16, 32))


def _shift_right(x: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """x >> count with zeros moved in; torch's own shift of signed integers copies the sign."""
    return (x >> count).bitwise_and_((1 << (width - count)) - 1)
