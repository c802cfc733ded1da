"""ModelRunner: everything that touches the device, as work for lanes.

`start(batch)` gives a ModelRun; its `slice_work` returns closures that a lane enqueues (CUDA) or
computes (CPU). A closure reads only what it captured: the engine's state may have moved on.
Work of one phase runs in the order of launch whatever its lane, so tensors may pass from one
slice to the next, and memory freed by one is safe to use for another.

Tables on the device, shared by both phases, which write disjoint rows of them:
    slot_table  [rows, context] i32  slot of every token of every request
    relay       [rows] i64           the token each request generated last, the next step's input
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from drift_scheduler.lane import Lane, Phase, Work
from sglang.srt.layers.attention.base import AttentionBackend, KVPool
from sglang.srt.layers.logprobs import PackedScores, SampleScores, prompt_scores
from sglang.srt.layers.matmul.base import Matmul
from sglang.srt.layers.penalties import PenaltyTable
from sglang.srt.layers.sampler import SamplingBatch, Withheld, choose, likeliest
from sglang.srt.layers.token_mask import forbid
from sglang.srt.logprobs import NO_SCORES, BatchScores, TokenScores
from sglang.srt.model_executor.host_batch import (
    DeviceBatch,
    HostBatch,
    SampleWish,
    upload,
    upload_mask,
    upload_table_update,
)
from sglang.srt.model_executor.sampling_cache import SamplingCache, sample_scores
from sglang.srt.models.base import CausalLM, HiddenState, LayerContext

if TYPE_CHECKING:
    from sglang.srt.model_executor.decode_graphs import DecodeGraphs
    from sglang.srt.model_executor.prefill_graphs import PrefillGraphs

LaneKey = tuple[Phase, int]
WHOLE_PREFILL: LaneKey = (Phase.PREFILL, 0)


class LaneKernels(NamedTuple):
    """What a lane runs batches with; the attention's scratch is the lane's own."""

    attention: AttentionBackend
    matmul: Matmul


class Run(Protocol):
    """A batch on its way through the model."""

    @property
    def indivisible(self) -> bool:
        """Whether all its layers are to be one slice: a graph has them."""
        ...

    def slice_work(self, lane: Lane, first: int, last: int) -> Work:
        """Layers first..last-1; embeds before layer 0 and samples after the last."""
        ...

    def tokens(self) -> list[int]:
        """The sampled tokens, in the order of the batch's samples; after the last slice is done."""
        ...

    def scores(self) -> BatchScores:
        """What the batch's wishes ask to be told of its tokens, when `tokens` can be taken."""
        ...


class Runner(Protocol):
    """What the serving engine needs of a model."""

    @property
    def num_layers(self) -> int: ...

    def start(self, batch: HostBatch) -> Run: ...

    def forget(self, wish: SampleWish) -> None:
        """A request with penalties has ended, and no work in flight samples for it."""
        ...


class ModelRunner:
    """A model, its tables, and the kernels of every lane."""

    def __init__(
        self,
        model: CausalLM,
        kv_pool: KVPool,
        kernels: Mapping[LaneKey, LaneKernels],
        *,
        device: torch.device,
        num_rows: int,
    ) -> None:
        self.model = model
        self.kv_pool = kv_pool
        self.kernels = kernels
        self.device = device
        self.graphs: DecodeGraphs | None = None
        self.prefill_graphs: dict[LaneKey, PrefillGraphs] = {}
        self.slot_table = torch.zeros(
            num_rows, model.config.context_length, dtype=torch.int32, device=device
        )
        self.relay = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.penalties = PenaltyTable(model.config.vocab_size, device)
        self._decode_sampling = SamplingCache(self._new_sampling, device)

    @property
    def num_layers(self) -> int:
        return self.model.config.num_layers

    def start(self, batch: HostBatch) -> Run:
        for history in batch.histories:
            self.penalties.take(history.owner)
        graphs = self.graphs
        if graphs is not None and batch.is_decode and graphs.size_for(len(batch.rows)):
            return GraphedStep(self, graphs, batch)
        return ModelRun(self, batch)

    def forget(self, wish: SampleWish) -> None:
        self.penalties.forget(wish)

    def use_graphs(self, graphs: DecodeGraphs) -> None:
        """From now on decode steps that fit replay a graph. Before that, all run eagerly."""
        self.graphs = graphs

    def use_prefill_graphs(self, graphs: Mapping[LaneKey, PrefillGraphs]) -> None:
        """From now on short batches that prefill replay a graph where their lane has one: every
        prefill lane, or none."""
        self.prefill_graphs = dict(graphs)

    def drop_graphs(self) -> None:
        """Gives back the graphs and their memory; work runs kernel by kernel again."""
        self.graphs = None
        self.prefill_graphs = {}

    def update_slot_table(self, index: torch.Tensor, slots: torch.Tensor) -> None:
        """index [n] i64 into the flattened table, slots [n]."""
        self.slot_table.view(-1)[index] = slots.to(torch.int32)

    def choose(
        self,
        host: HostBatch,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        result: torch.Tensor,
    ) -> PackedScores | None:
        """Samples; tokens go to the relay table's rows and, asynchronously, to `result`.

        logits [samples, vocab_size], those of tokens that the mask forbids are overwritten; rows,
        positions [samples] i64: see SampleTensors. Returns what `sample_scores` wants to know of
        the tokens.
        """
        if host.mask is not None:
            forbid(logits, *upload_mask(host.mask, self.device))
        if self.takes_likeliest(host):
            tokens = likeliest(logits)
        else:
            for history in host.histories:
                self.penalties.begin(history)
            sampling = self._sampling_for(host)
            logits = sampling.adjusted(logits, positions)
            tokens = choose(logits, positions, sampling)
            sampling.count(tokens)
        self.relay[rows] = tokens
        result.copy_(tokens, non_blocking=True)
        return self.score(host, logits, tokens)

    def score(
        self, host: HostBatch, logits: torch.Tensor, tokens: torch.Tensor
    ) -> PackedScores | None:
        """Of the tokens [samples] i64 chosen by logits [samples, vocab_size]; None if nobody has
        asked. On the lane."""
        asked = self.sample_scores(host)
        return None if asked is None else asked.compute(logits, tokens)

    def sample_scores(self, batch: HostBatch) -> SampleScores | None:
        """Which of its samples are to tell their log-probabilities, None if none."""
        if batch.is_decode:
            return self._decode_sampling.scores(batch.samples)
        return sample_scores(batch.samples, self.device)

    def takes_likeliest(self, batch: HostBatch) -> bool:
        """Whether the largest logit decides for all its samples; on the lane."""
        if batch.is_decode:
            return self._decode_sampling.takes_likeliest(batch.samples)
        return all(wish.takes_likeliest for wish in batch.samples)

    def new_result(self, batch: HostBatch) -> torch.Tensor:
        """Where the sampled tokens arrive on the host, [samples] i64."""
        return torch.empty(
            len(batch.samples), dtype=torch.int64, pin_memory=self.device.type == "cuda"
        )

    def _sampling_for(self, batch: HostBatch) -> SamplingBatch:
        """On the lane: decode keeps the last batch's tensors, since they rarely change."""
        if batch.is_decode:
            return self._decode_sampling.get(batch.samples)
        return self._new_sampling(batch.samples)

    def _new_sampling(self, samples: tuple[SampleWish, ...]) -> SamplingBatch:
        params = [wish.sampling for wish in samples]
        return SamplingBatch.from_params(
            params,
            [wish.seed for wish in samples],
            self.model.config.vocab_size,
            self.device,
            withheld=[
                Withheld(i, wish.withheld_ids, wish.withheld_until)
                for i, wish in enumerate(samples)
                if wish.withheld_ids
            ],
            penalised=self.penalties.rows_of(samples, params),
        )


class ModelRun:
    """One batch between its first layer and its tokens."""

    def __init__(self, runner: ModelRunner, batch: HostBatch) -> None:
        self._runner = runner
        self._host = batch
        self._batch: DeviceBatch | None = None
        self._state: HiddenState | None = None
        self._context: LayerContext | None = None
        self._result = runner.new_result(batch)
        self._sample_scores: PackedScores | None = None
        self._prompt_scores: list[PackedScores] = []

    @property
    def indivisible(self) -> bool:
        graphs = self._runner.prefill_graphs.get(WHOLE_PREFILL)
        return graphs is not None and self._fits(graphs)

    def slice_work(self, lane: Lane, first: int, last: int) -> Work:
        key = lane.phase, lane.partition.index
        graphs = self._runner.prefill_graphs.get(key)
        whole = (first, last) == (0, self._runner.num_layers)
        if graphs is not None and whole and self._fits(graphs):
            return lambda: self._replay(graphs)
        kernels = self._runner.kernels[key]
        return lambda: self._run(kernels, first, last)

    def tokens(self) -> list[int]:
        return self._result.tolist()

    def scores(self) -> BatchScores:
        host = self._host
        if self._sample_scores is None and not host.scored:
            return NO_SCORES
        return BatchScores(
            _of_samples(host, self._sample_scores),
            [
                scores.of(0, len(part.next_ids), part.wish)
                for part, scores in zip(host.scored, self._prompt_scores, strict=True)
            ],
        )

    def _fits(self, graphs: PrefillGraphs) -> bool:
        host = self._host
        return graphs.takes(len(host.token_slots), len(host.rows), host.decode_reqs)

    def _replay(self, graphs: PrefillGraphs) -> None:
        batch, input_ids = self._begin()
        self._finish(batch, graphs.replay(input_ids, batch.forward))

    def _run(self, kernels: LaneKernels, first: int, last: int) -> None:
        runner = self._runner
        if first == 0:
            self._batch, input_ids = self._begin()
            self._state = runner.model.embed(input_ids)
        batch, state = self._batch, self._state
        assert batch is not None and state is not None, f"slice from layer {first} comes first"
        attention = kernels.attention
        # Another lane, or slices of another batch on this one since the last of ours.
        if attention.planned is not batch.forward:
            attention.plan(batch.forward)
        context = self._context
        if context is None or context.attention is not attention:
            context = LayerContext(batch.forward, runner.kv_pool, attention, kernels.matmul)
            self._context = context
        self._state = runner.model.run_layers(state, context, first, last)
        if last == runner.num_layers:
            self._finish(batch, self._state)
            self._batch = self._state = self._context = None

    def _finish(self, batch: DeviceBatch, state: HiddenState) -> None:
        """Chooses the tokens that the batch is to yield."""
        runner = self._runner
        model = runner.model
        if self._host.samples:
            tokens, rows, positions = batch.samples
            logits = model.logits(state, tokens)
            self._sample_scores = runner.choose(self._host, logits, rows, positions, self._result)
        for part in self._host.scored:
            self._prompt_scores.append(
                prompt_scores(
                    lambda tokens: model.logits(state, tokens),
                    *part,
                    model.config.vocab_size,
                    runner.device,
                )
            )

    def _begin(self) -> tuple[DeviceBatch, torch.Tensor]:
        """The batch on the device, its slots in the table, and the ids of all its tokens."""
        runner = self._runner
        batch = upload(self._host, runner.slot_table)
        runner.update_slot_table(batch.table_index, batch.table_slots)
        if not self._host.decode_reqs:
            return batch, batch.input_ids
        decoding = batch.forward.rows[: self._host.decode_reqs]
        return batch, torch.cat([runner.relay[decoding], batch.input_ids])


class GraphedStep:
    """A decode step that replays a graph: all layers in one launch."""

    def __init__(self, runner: ModelRunner, graphs: DecodeGraphs, batch: HostBatch) -> None:
        self._runner = runner
        self._graphs = graphs
        self._host = batch
        self._result = runner.new_result(batch)
        self._scores: PackedScores | None = None

    @property
    def indivisible(self) -> bool:
        return True

    def slice_work(self, lane: Lane, first: int, last: int) -> Work:
        assert (first, last) == (0, self._runner.num_layers), "a decode step is not sliced"
        return lambda: self._run(lane)

    def tokens(self) -> list[int]:
        return self._result.tolist()

    def scores(self) -> BatchScores:
        if self._scores is None:
            return NO_SCORES
        return BatchScores(_of_samples(self._host, self._scores), ())

    def _run(self, lane: Lane) -> None:
        runner, host = self._runner, self._host
        assert len(host.samples) == len(host.rows), "a decode step samples every request"
        # The graph enters the new tokens themselves; more is missing where a request has joined.
        if len(host.table_index) > len(host.rows):
            runner.update_slot_table(*upload_table_update(host, runner.device))
        step = self._graphs.replay(lane, host)
        if host.mask is None and runner.takes_likeliest(host):
            self._result.copy_(step.tokens, non_blocking=True)
            self._scores = runner.score(host, step.logits, step.tokens)
            return
        positions = step.positions + 1
        self._scores = runner.choose(host, step.logits, step.rows, positions, self._result)


def _of_samples(host: HostBatch, scores: PackedScores | None) -> Mapping[int, TokenScores]:
    if scores is None:
        return {}
    wishes = {i: wish.logprobs for i, wish in enumerate(host.samples) if wish.logprobs is not None}
    return {place: scores.of(i, i + 1, wish) for i, (place, wish) in enumerate(wishes.items())}
