"""Bring-up: from flags to lanes, a loaded model, and pools that fit the memory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from drift_scheduler.clock import ClockRatio
from drift_scheduler.dispatcher import Dispatcher
from drift_scheduler.lane import LaneProvider, Phase
from drift_scheduler.latencies import Latencies
from drift_scheduler.partition import PartitionError
from drift_scheduler.policies.factory import PolicyFactory
from drift_scheduler.policies.names import AdaptiveSpec, TemporalSpec, parse_policy
from sglang.srt.errors import ConfigError
from sglang.srt.mem_cache.kv_pool import DeviceKVPool
from sglang.srt.model_config import ModelConfig
from sglang.srt.model_executor.lane_kernels import (
    choose_attention_backend,
    kernels_by_lane,
    matmuls_by_lane,
)
from sglang.srt.model_executor.live_model import LiveModel
from sglang.srt.model_executor.memory_for_serving import (
    take_memory,
    take_pinned_memory,
    take_small_memory,
)
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.warm_up import load_products, load_sampling, warm_up
from sglang.srt.model_loader import load_model
from sglang.srt.model_source import resolve_model_source
from sglang.srt.pdmux_config import PdmuxConfig
from sglang.srt.profiling.calibrate import latencies_for
from sglang.srt.profiling.graph_sizes import padded_sizes
from sglang.srt.profiling.nvml import NvmlClock, device_clock
from sglang.srt.server_args import ServerArgs, resolve_device

logger = logging.getLogger(__name__)

GPU_MEM_FRACTION = 0.86
# Every lane of a split keeps the activations of its largest batches.
SPLIT_GPU_MEM_FRACTION = 0.84
# Of the memory that is free once the weights are loaded; a CPU server shares its machine.
CPU_MEM_FRACTION = 0.4
GPU_MAX_RUNNING = 256
CPU_MAX_RUNNING = 64
GPU_CHUNK_TOKENS = 8192
CPU_CHUNK_TOKENS = 2048
DECODE_DEPTH = 2  # one step runs, the next is already launched


@dataclass(frozen=True, slots=True)
class Executor:
    """All that the scheduler process needs to run a model."""

    config: ModelConfig
    lanes: LaneProvider
    dispatcher: Dispatcher
    policies: PolicyFactory
    latencies: Latencies | None
    clock_reader: NvmlClock | None
    runner: ModelRunner
    live_model: LiveModel
    kv_pool: DeviceKVPool
    num_slots: int
    num_rows: int
    prefill_tokens: int
    attention_backend: str
    device: torch.device

    def close(self) -> None:
        """Waits for launched work, with a limit, and releases the lanes."""
        if self.clock_reader is not None:
            self.clock_reader.close()
        self.lanes.close()


def bring_up(args: ServerArgs) -> Executor:
    """Loads the model and sizes everything. Raises ConfigError naming the flag."""
    device = _device(args)
    policy = args.policy()
    prefill_tokens = _prefill_tokens(args, device.type == "cuda")
    lanes = make_lanes(device, policy.pdmux)
    needs_latencies = args.drift_profile is not None or isinstance(
        parse_policy(policy.text), AdaptiveSpec | TemporalSpec
    )
    if not needs_latencies:
        # A partition that does not exist is to be told before the weights are loaded.
        _named_policy(make_policies(args, lanes, None, 1, prefill_tokens), policy.text)
    source = resolve_model_source(
        args.model_path,
        load_format=args.load_format,
        revision=args.revision,
        download_dir=args.download_dir,
    )
    config = ModelConfig.load(
        source,
        dtype=args.dtype,
        device=device,
        context_length=args.context_length,
        override_args=args.json_model_override_args,
        trust_remote_code=args.trust_remote_code,
    )
    model = load_model(source, config, device, seed=args.random_seed or 0)
    on_gpu = device.type == "cuda"
    fuses = policy.text != "turns"
    num_rows = 1 + (args.max_running_requests or (GPU_MAX_RUNNING if on_gpu else CPU_MAX_RUNNING))
    matmuls = matmuls_by_lane(
        args.matmul_backend,
        lanes,
        model,
        device,
        max_prefill_tokens=prefill_tokens,
        max_decode_reqs=num_rows - 1,
    )
    table_bytes = num_rows * config.context_length * torch.int32.itemsize
    num_slots = _num_slots(
        args, config, device, reserved_bytes=table_bytes, splits=bool(lanes.table.splits)
    )
    pool = DeviceKVPool(
        num_slots,
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        config.dtype,
        device,
    )
    backend = choose_attention_backend(args.attention_backend, config, device)
    runner = ModelRunner(
        model,
        pool,
        kernels_by_lane(backend, lanes, pool, config, matmuls, max_prefill_tokens=prefill_tokens),
        device=device,
        num_rows=num_rows,
    )
    capture: Callable[[], None] | None = None
    if on_gpu:
        torch.cuda.synchronize(device)
        warm_up(
            runner,
            lanes,
            num_slots=num_slots,
            context_length=config.context_length,
            vocab_size=config.vocab_size,
        )
        lane = lanes.lane(Phase.PREFILL, lanes.table.whole)
        load_products(model, lane, max_tokens=prefill_tokens, max_reqs=num_rows - 1)
        load_sampling(config, lane, device, max_reqs=num_rows - 1)
        torch.cuda.empty_cache()
        if backend != "torch_native" and not args.disable_cuda_graph:
            from sglang.srt.model_executor.graph_capture import capture_graphs

            capture = partial(
                capture_graphs,
                runner,
                lanes,
                pool,
                max_reqs=min(args.cuda_graph_max_bs or num_rows, num_rows - 1),
                max_tokens=prefill_tokens,
                fuses=fuses,
            )
            capture()
    logger.info(
        "KV pool: %d tokens, %.2f GB; attention: %s; up to %d requests at once",
        num_slots - args.page_size,
        num_slots * config.kv_bytes_per_token / 1e9,
        backend,
        num_rows - 1,
    )
    clock = ClockRatio()
    latencies = None
    if needs_latencies:
        latencies = latencies_for(
            args, lanes, runner, num_slots=num_slots, prefill_tokens=prefill_tokens, clock=clock
        )
    clock_reader = device_clock(device, on_reading=clock.feed)
    policies = make_policies(args, lanes, latencies, config.num_layers, prefill_tokens)
    max_step_tokens = prefill_tokens if fuses else 0
    if captured := padded_sizes(lanes.table, runner).prefill:
        # A larger step is launched kernel by kernel: the host is kept from finished ones so long.
        policies = dataclasses.replace(policies, max_step_tokens=captured[-1])
        max_step_tokens = min(max_step_tokens, captured[-1])
    if on_gpu:
        take_pinned_memory()
        # After the calibration, which gives back what it took.
        take_memory(
            runner,
            lanes,
            lambda: torch.cuda.mem_get_info(device)[0],
            max_tokens=prefill_tokens,
            max_reqs=num_rows - 1,
            max_step_tokens=max_step_tokens,
            num_slots=num_slots,
            context_length=config.context_length,
        )
        take_small_memory(lanes, device)
    return Executor(
        config=config,
        lanes=lanes,
        dispatcher=_named_policy(policies, policy.text),
        policies=policies,
        latencies=latencies,
        clock_reader=clock_reader,
        runner=runner,
        live_model=LiveModel(args, model, source, runner, pool, capture),
        kv_pool=pool,
        num_slots=num_slots,
        num_rows=num_rows,
        prefill_tokens=prefill_tokens,
        attention_backend=backend,
        device=device,
    )


def make_lanes(device: torch.device, pdmux: PdmuxConfig | None) -> LaneProvider:
    """Lanes of the whole device, and of its splits when multiplexing. Raises ConfigError."""
    shares = [row.decode_sms for row in pdmux.manual_divisions] if pdmux else []
    if shares != sorted(set(shares)):
        raise ConfigError(f"manual_divisions must have rising decode SMs, got {shares}")
    split_count = pdmux.sm_group_num - 2 if pdmux else 0
    try:
        if device.type == "cuda":
            from drift_scheduler.lane_cuda import CudaLanes

            lanes: LaneProvider = CudaLanes(device, split_count, shares or None)
        else:
            from drift_scheduler.lane_cpu import CpuLanes

            lanes = CpuLanes(split_count, shares or None)
    except PartitionError as error:
        raise ConfigError(f"--enable-pd-multiplex: {error}") from error
    _log_partitions(lanes, pdmux, device)
    return lanes


def _log_partitions(lanes: LaneProvider, pdmux: PdmuxConfig | None, device: torch.device) -> None:
    """What was granted, and where a file asked for something else."""
    splits = lanes.table.splits
    for row in pdmux.manual_divisions if pdmux else ():
        granted = lanes.granted[row.decode_sms]
        rest = lanes.table.total_sms - granted
        if (rest, granted) != (row.prefill_sms, row.decode_sms):
            logger.warning(
                "manual_divisions asks for %d/%d, the device grants %d/%d",
                row.prefill_sms,
                row.decode_sms,
                rest,
                granted,
            )
    if splits:
        logger.info(
            "Partitions (prefill/decode %s): %s",
            "SMs" if device.type == "cuda" else "cores",
            ", ".join(f"{split.prefill_sms}/{split.decode_sms}" for split in splits),
        )


def make_policies(
    args: ServerArgs,
    lanes: LaneProvider,
    latencies: Latencies | None,
    num_layers: int,
    prefill_tokens: int,
) -> PolicyFactory:
    """What the flags leave to choose. prefill_tokens: size of a prefill chunk."""
    pdmux = args.policy().pdmux or PdmuxConfig()
    thresholds = None
    if pdmux.manual_divisions:
        # Rows whose shares were rounded to the same split: the smallest threshold counts.
        by_share: dict[int, int] = {}
        for row in pdmux.manual_divisions:
            by_share.setdefault(lanes.granted[row.decode_sms], row.min_decode_reqs)
        thresholds = tuple(by_share[split.decode_sms] for split in lanes.table.splits)
    return PolicyFactory(
        lanes.table,
        latencies,
        num_layers,
        prefill_tokens,
        decode_depth=1 if args.disable_overlap_schedule else DECODE_DEPTH,
        sheds=args.slo_overload == "shed",
        thresholds=thresholds,
        batch_size_for_last=pdmux.decode_bs_divisor,
        layer_token_budget=pdmux.split_forward_token_budget,
    )


def _named_policy(policies: PolicyFactory, text: str) -> Dispatcher:
    try:
        return policies.make(text)
    except ValueError as error:
        raise ConfigError(f"--pd-multiplex-policy: {error}") from None


def _device(args: ServerArgs) -> torch.device:
    if resolve_device(args) == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(args.base_gpu_id)
    return torch.device("cuda", args.base_gpu_id)


def _prefill_tokens(args: ServerArgs, on_gpu: bool) -> int:
    chunk = args.chunked_prefill_size
    if chunk == -1:
        return args.max_prefill_tokens
    default = GPU_CHUNK_TOKENS if on_gpu else CPU_CHUNK_TOKENS
    page = args.page_size
    tokens = min(args.max_prefill_tokens, chunk or default) // page * page
    if tokens == 0:
        raise ConfigError(
            f"--max-prefill-tokens {args.max_prefill_tokens} and chunks of {chunk or default} "
            f"tokens leave no room for a page: --page-size {page} must not be larger"
        )
    return tokens


def _num_slots(
    args: ServerArgs, config: ModelConfig, device: torch.device, reserved_bytes: int, splits: bool
) -> int:
    """Slots of the KV pool, the scratch page included: a multiple of the page size.

    splits: whether the device is split into lanes.
    """
    page = args.page_size
    room_bytes = _room_bytes(args, device, splits) - reserved_bytes
    fits = int(room_bytes // config.kv_bytes_per_token) // page * page - page
    wanted = args.max_total_tokens
    if wanted is not None and wanted > fits:
        raise ConfigError(
            f"--max-total-tokens {wanted} does not fit: memory has room for {max(fits, 0)}; lower "
            "it or raise --mem-fraction-static"
        )
    tokens = fits if wanted is None else wanted // page * page
    if tokens < page:
        raise ConfigError(
            f"no room for a KV pool: {room_bytes / 1e9:.2f} GB are left beside the weights; raise "
            "--mem-fraction-static or take a device with more memory"
        )
    return tokens + page


def _room_bytes(args: ServerArgs, device: torch.device, splits: bool) -> float:
    if device.type == "cpu":
        fraction = args.mem_fraction_static or CPU_MEM_FRACTION
        return fraction * float(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    default = SPLIT_GPU_MEM_FRACTION if splits else GPU_MEM_FRACTION
    fraction = args.mem_fraction_static or default
    return free_bytes - (1 - fraction) * total_bytes
