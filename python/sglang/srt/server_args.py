"""ServerArgs: every flag of the server with its default, help and check. Frozen after start.

Each field declares its flag once; parser, YAML keys and docs/flags.md are derived from it. Field
names and defaults are SGLang's wherever the flag is SGLang's. Importing this module is cheap:
`--help` answers without torch.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from drift_scheduler.policies.names import ChunkedSpec, parse_policy
from sglang.srt.errors import ConfigError
from sglang.srt.flags import (
    Flag,
    build_parser,
    flag,
    flags_of,
    json_object,
    parse_known,
    read_config_file,
    token_count,
)
from sglang.srt.multiplex_policy import MultiplexPolicy
from sglang.srt.parsers.reasoning import REASONING_PARSERS
from sglang.srt.parsers.tool_calls import TOOL_CALL_PARSERS
from sglang.srt.pdmux_config import PdmuxConfig
from sglang.srt.service_levels import KEYS as SLO_KEYS
from sglang.srt.service_levels import ServiceLevels, checked_classes, problem_of
from sglang.srt.upstream_flags import UNSUPPORTED_FLAGS
from sglang.version import __version__

PROG = "python -m sglang.launch_server"

_MODEL = "Model"
_HTTP = "HTTP server"
_API = "API behaviour"
_MEMORY = "Memory and scheduling"
_PDMUX = "Prefill and decode side by side"
_SLO = "Service levels"
_DEVICE = "Devices and kernels"
_OPERATION = "Operation and logs"


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """What the server was asked to do. `check()` is called by `from_cli`; call it after making
    one by hand. A None means that the server decides at start."""

    model_path: str = flag(
        "",
        "Model to serve: a directory, a .gguf file or a hub name. Required.",
        group=_MODEL,
        aliases=["--model"],
    )
    tokenizer_path: str | None = flag(
        None, "Tokenizer directory or hub name; the model's own if not given.", group=_MODEL
    )
    tokenizer_mode: Literal["auto", "slow"] = flag(
        "auto", "auto takes the fast tokenizer where there is one.", group=_MODEL
    )
    skip_tokenizer_init: bool = flag(
        False, "Take and give token ids only; no tokenizer is loaded.", group=_MODEL
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = flag(
        "auto", "Format of the weights; dummy fills them at random.", group=_MODEL
    )
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = flag(
        "auto", "Type of weights and activations; auto follows the model and device.", group=_MODEL
    )
    context_length: int | None = flag(
        None,
        "Longest sequence in tokens; the model's own if not given.",
        group=_MODEL,
        parse=token_count,
    )
    revision: str | None = flag(None, "Branch, tag or commit of a hub model.", group=_MODEL)
    download_dir: str | None = flag(None, "Where hub models are stored.", group=_MODEL)
    trust_remote_code: bool = flag(
        False, "Run Python code that comes with a hub model.", group=_MODEL
    )
    json_model_override_args: dict[str, Any] = flag(
        {}, "Values that replace those of the model's config.", group=_MODEL, parse=json_object
    )

    host: str = flag("127.0.0.1", "Address to listen on.", group=_HTTP)
    port: int = flag(30000, "Port to listen on.", group=_HTTP)
    api_key: str | None = flag(
        None, "Key that clients send as a bearer token; open if not given.", group=_HTTP
    )
    admin_api_key: str | None = flag(
        None,
        "Key of endpoints that change how the server runs, in place of --api-key.",
        group=_HTTP,
    )
    skip_server_warmup: bool = flag(
        False, "Report ready without serving a request to oneself first.", group=_HTTP
    )

    served_model_name: str | None = flag(
        None, "Name in /v1/models and in answers; the model path if not given.", group=_API
    )
    weight_version: str = flag(
        "default", "Name of the weights, told with every answer of /generate.", group=_API
    )
    chat_template: str | None = flag(
        None, "Chat template, a Jinja file; the tokenizer's own if not given.", group=_API
    )
    tool_call_parser: str | None = flag(
        None,
        f"How the model writes calls of tools: {', '.join(TOOL_CALL_PARSERS)}.",
        group=_API,
    )
    reasoning_parser: str | None = flag(
        None,
        f"How the model marks its thoughts: {', '.join(REASONING_PARSERS)}.",
        group=_API,
    )
    sampling_defaults: Literal["model", "openai"] = flag(
        "model",
        "Whether the model's generation config or the OpenAI API says what a request leaves open.",
        group=_API,
    )
    preferred_sampling_params: dict[str, Any] | None = flag(
        None,
        "Sampling parameters that /generate uses where a request is silent.",
        group=_API,
        parse=json_object,
    )
    stream_interval: int = flag(1, "Tokens between two stream events of a request.", group=_API)
    incremental_streaming_output: bool = flag(
        False,
        "/generate streams send only what is new instead of the whole text so far.",
        group=_API,
        aliases=["--stream-output"],
    )
    stream_response_default_include_usage: bool = flag(
        False, "OpenAI streams end with a usage chunk even when not asked for.", group=_API
    )
    enable_cache_report: bool = flag(
        False, "OpenAI usage tells how many prompt tokens came from the cache.", group=_API
    )
    allow_auto_truncate: bool = flag(
        False, "Shorten requests that exceed the context instead of refusing them.", group=_API
    )

    mem_fraction_static: float | None = flag(
        None,
        "Share of device memory for weights and KV pool together. Unless set, 0.86 of a GPU, 0.84 "
        "where it is split into lanes, and 0.4 of a CPU's free memory.",
        group=_MEMORY,
    )
    max_total_tokens: int | None = flag(
        None, "Size of the KV pool in tokens.", group=_MEMORY, parse=token_count
    )
    max_running_requests: int | None = flag(
        None, "Requests that decode at the same time.", group=_MEMORY
    )
    max_queued_requests: int | None = flag(
        None, "Requests that may wait; further ones get 503.", group=_MEMORY
    )
    chunked_prefill_size: int | None = flag(
        None,
        "Longest piece of a prompt in one prefill; -1 never cuts.",
        group=_MEMORY,
        parse=token_count,
    )
    enable_mixed_chunk: bool = flag(
        False,
        "Let prompts ride in decode steps of up to --chunked-prefill-size tokens; with "
        "--enable-pdmux that is --pd-multiplex-policy chunked.",
        group=_MEMORY,
    )
    max_prefill_tokens: int = flag(
        16384, "Prompt tokens in one prefill batch.", group=_MEMORY, parse=token_count
    )
    prefill_max_requests: int | None = flag(None, "Requests in one prefill batch.", group=_MEMORY)
    schedule_policy: Literal["fcfs", "lpm"] = flag(
        "fcfs",
        "Waiting order: first come first served, or longest cached prefix first.",
        group=_MEMORY,
    )
    enable_priority_scheduling: bool = flag(
        False,
        "Take waiting requests by the priority that they name, higher ones first.",
        group=_MEMORY,
    )
    schedule_low_priority_values_first: bool = flag(
        False, "Of priorities, lower ones first.", group=_MEMORY
    )
    schedule_conservativeness: float = flag(
        1.0, "Above 1 admits more slowly, below 1 risks more retractions.", group=_MEMORY
    )
    page_size: int = flag(1, "Tokens in a page of the KV pool.", group=_MEMORY)
    disable_radix_cache: bool = flag(
        False, "Forget every prefix when its request ends.", group=_MEMORY
    )
    disable_overlap_schedule: bool = flag(
        False, "Read a decode step's tokens before launching the next step.", group=_MEMORY
    )

    enable_pdmux: bool = flag(
        False,
        "Run prefill and decode at the same time on disjoint parts of the device.",
        group=_PDMUX,
        aliases=["--enable-pd-multiplex"],
    )
    pd_multiplex_policy: str | None = flag(
        None,
        "adaptive chooses at every step, from a latency model; the others are for comparison: "
        "static:P/D, temporal, chunked:N, table, turns. adaptive if not given.",
        group=_PDMUX,
    )
    pdmux_config_path: str | None = flag(
        None, "YAML file with the division of the device.", group=_PDMUX
    )
    sm_group_num: int | None = flag(
        None,
        "Partitions, the two whole-device ones included; the file's value, or 8.",
        group=_PDMUX,
    )
    drift_profile: str | None = flag(
        None,
        "JSON file with latencies of this model on this device, from "
        "`python -m sglang.profile_drift`; measured briefly at start if not given.",
        group=_PDMUX,
    )
    drift_profile_save: bool = flag(
        False,
        "At shutdown, write back to --drift-profile how much each phase was seen to slow the "
        "other down.",
        group=_PDMUX,
    )

    slo_ttft_ms: float | None = flag(
        None,
        "Milliseconds within which a request wants its first token; no limit if not given.",
        group=_SLO,
    )
    slo_ttft_ms_per_token: float | None = flag(
        None,
        "Milliseconds for each prompt token that is not cached; the first token is due after the "
        "longer of this and --slo-ttft-ms.",
        group=_SLO,
    )
    slo_tbt_ms: float | None = flag(
        None,
        "Milliseconds between two tokens of a request, at its 99th percentile; no limit if not "
        "given.",
        group=_SLO,
    )
    slo_overload: Literal["queue", "shed"] = flag(
        "queue",
        "What becomes of a request that can no longer have its first token in time: it waits on, "
        "or gets 503; the latter with policy adaptive only.",
        group=_SLO,
    )

    device: Literal["auto", "cuda", "cpu"] = flag(
        "auto", "auto takes the GPU where there is one.", group=_DEVICE
    )
    base_gpu_id: int = flag(0, "Index of the GPU to use.", group=_DEVICE)
    tp_size: int = flag(
        1,
        "GPUs a model is spread over; 1 only, for now.",
        group=_DEVICE,
        aliases=["--tensor-parallel-size"],
    )
    dp_size: int = flag(
        1,
        "Replicas of the model; 1 only, for now.",
        group=_DEVICE,
        aliases=["--data-parallel-size"],
    )
    pp_size: int = flag(
        1,
        "Pipeline stages; 1 only, for now.",
        group=_DEVICE,
        aliases=["--pipeline-parallel-size"],
    )
    attention_backend: Literal["auto", "flashinfer", "triton", "torch_native"] = flag(
        "auto",
        "auto is, on GPUs, flashinfer where it and nvcc are installed and takes the dtype, else "
        "triton; on CPUs torch_native.",
        group=_DEVICE,
    )
    matmul_backend: Literal["auto", "torch", "triton", "deep_gemm"] = flag(
        "auto",
        "Kernels of matrix products; auto measures, once, all that are installed on every lane. "
        "torch stays where another wins less than 3 %.",
        group=_DEVICE,
    )
    disable_cuda_graph: bool = flag(
        False,
        "Launch every kernel by itself: no graphs of decode steps and short prefills.",
        group=_DEVICE,
        aliases=["--disable-decode-cuda-graph"],
    )
    cuda_graph_max_bs: int | None = flag(
        None,
        "Largest decode batch with a graph; all that can run at once if not given.",
        group=_DEVICE,
        aliases=["--cuda-graph-max-bs-decode"],
    )
    sampling_backend: Literal["auto", "pytorch"] = flag(
        "auto", "Implementation of sampling; pytorch is the only one so far.", group=_DEVICE
    )
    random_seed: int | None = flag(
        None, "Seed of the server's sampling; drawn at start if not given.", group=_DEVICE
    )

    grammar_backend: Literal["xgrammar", "llguidance", "none"] | None = flag(
        None,
        "Library of structured output; xgrammar, loaded with the first request that needs it, if "
        "not given, otherwise loaded at start; none refuses such requests.",
        group=_API,
    )
    constrained_json_whitespace_pattern: str | None = flag(
        None,
        "Regex of what may stand between the parts of constrained JSON; llguidance only.",
        group=_API,
    )
    constrained_json_disable_any_whitespace: bool = flag(
        False, "Constrained JSON is compact instead of freely laid out.", group=_API
    )

    watchdog_timeout: float = flag(
        300.0, "Seconds without progress after which the server gives up.", group=_OPERATION
    )
    log_level: Literal["debug", "info", "warning", "error", "critical"] = flag(
        "info", "Level of all loggers.", group=_OPERATION
    )
    log_level_http: Literal["debug", "info", "warning", "error", "critical"] | None = flag(
        None, "Level of the HTTP server's loggers; --log-level if not given.", group=_OPERATION
    )
    log_requests: bool = flag(False, "Log every request and its end.", group=_OPERATION)
    log_requests_level: Literal[0, 1, 2, 3] = flag(
        2,
        "How much of a request is logged: 0 ids and counts, 1 sampling parameters too, "
        "2 the beginning of texts too, 3 whole texts.",
        group=_OPERATION,
        parse=int,
    )
    decode_log_interval: int = flag(
        40, "Decode steps between two lines of the log.", group=_OPERATION
    )
    enable_metrics: bool = flag(
        False, "Serve /metrics in Prometheus's text format.", group=_OPERATION
    )

    # Has no flag: {class: {key: milliseconds}} of the config file.
    slo_classes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_cli(cls, argv: Sequence[str], prog: str = PROG) -> ServerArgs:
        """Reads a command line (without the program's name) and the file of --config, if given.

        Prints and exits 0 for --help and --version. Raises ConfigError naming the flag.
        """
        given = parse_known(make_parser(prog), argv, FLAGS, UNSUPPORTED_FLAGS)
        config_path = given.pop("config", None)
        if config_path is not None:
            tables = {"slo_classes": checked_classes}
            given = read_config_file(Path(config_path), FLAGS, UNSUPPORTED_FLAGS, tables) | given
        args = cls(**given)
        args.check()
        return args

    def check(self) -> None:
        """Raises ConfigError naming the first flag whose value cannot be served."""
        self._check_types()
        _require(self.model_path != "", "model_path", "is required")
        self._check_parallelism()
        self._check_ranges()
        self._check_combinations()
        self._check_service_levels()
        self._check_parsers()
        self.policy()

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer comes from."""
        return self.tokenizer_path or self.model_path

    @property
    def model_name(self) -> str:
        """The name that clients see."""
        return self.served_model_name or self.model_path

    def policy(self) -> MultiplexPolicy:
        """How prefill and decode share the device. Reads the file of --pdmux-config-path."""
        text = self.pd_multiplex_policy
        if not self.enable_pdmux:
            return MultiplexPolicy("chunked" if self.enable_mixed_chunk else "turns")
        pdmux = PdmuxConfig.load(self.pdmux_config_path, self.sm_group_num)
        return MultiplexPolicy(
            text or ("chunked" if self.enable_mixed_chunk else "adaptive"), pdmux
        )

    def service_levels(self) -> ServiceLevels:
        """What requests may ask of time, by class or by themselves."""
        return ServiceLevels(self._default_limits_ms(), self.slo_classes)

    def _default_limits_ms(self) -> dict[str, float | None]:
        return {key: getattr(self, f"slo_{key}") for key in SLO_KEYS}

    def _check_types(self) -> None:
        """A command line is typed by its parser; this is for args made in Python."""
        try:
            msgspec.convert(dataclasses.asdict(self), type(self))
        except msgspec.ValidationError as error:
            reason, _, field = str(error).partition(" - at `$.")
            raise _bad(field.rstrip("`"), f"has a wrong value: {reason}") from None

    def _check_parallelism(self) -> None:
        for field in ("tp_size", "dp_size", "pp_size"):
            size = getattr(self, field)
            _require(size == 1, field, f"{size} is not supported yet, only 1 is")

    def _check_ranges(self) -> None:
        _require(1 <= self.port <= 65535, "port", f"must be in [1, 65535], got {self.port}")
        fraction = self.mem_fraction_static
        _require(
            fraction is None or 0 < fraction < 1,
            "mem_fraction_static",
            f"must be between 0 and 1, both excluded, got {fraction}",
        )
        for field in (
            "context_length",
            "stream_interval",
            "max_total_tokens",
            "max_running_requests",
            "cuda_graph_max_bs",
            "max_prefill_tokens",
            "prefill_max_requests",
            "page_size",
            "decode_log_interval",
        ):
            count = getattr(self, field)
            _require(count is None or count >= 1, field, f"must be at least 1, got {count}")
        for field in ("max_queued_requests", "base_gpu_id", "random_seed"):
            count = getattr(self, field)
            _require(count is None or count >= 0, field, f"must be at least 0, got {count}")
        for field in ("schedule_conservativeness", "watchdog_timeout"):
            amount = getattr(self, field)
            _require(amount > 0, field, f"must be greater than 0, got {amount}")

    def _check_combinations(self) -> None:
        chunk, page = self.chunked_prefill_size, self.page_size
        _require(
            chunk is None or chunk == -1 or (chunk >= 1 and chunk % page == 0),
            "chunked_prefill_size",
            f"must be -1 or a positive multiple of --page-size {page}, got {chunk}",
        )
        _require(
            self.enable_priority_scheduling or not self.schedule_low_priority_values_first,
            "schedule_low_priority_values_first",
            "has no effect without --enable-priority-scheduling",
        )
        if not self.enable_pdmux:
            self._require_unset(
                "without --enable-pdmux",
                "pd_multiplex_policy",
                "pdmux_config_path",
                "sm_group_num",
                "drift_profile",
            )
        _require(
            self.drift_profile is not None or not self.drift_profile_save,
            "drift_profile_save",
            "has no effect without --drift-profile",
        )
        self._check_policy()
        self._check_grammars()
        _require(
            self.device != "cpu" or self.attention_backend in ("auto", "torch_native"),
            "attention_backend",
            f"{self.attention_backend} needs a GPU, --device cpu has torch_native",
        )
        _require(
            not (self.skip_tokenizer_init and self.chat_template is not None),
            "chat_template",
            "has no effect with --skip-tokenizer-init",
        )

    def _check_grammars(self) -> None:
        backend = self.grammar_backend
        _require(
            self.constrained_json_whitespace_pattern is None or backend == "llguidance",
            "constrained_json_whitespace_pattern",
            "needs --grammar-backend llguidance",
        )
        _require(
            self.constrained_json_whitespace_pattern is None
            or not self.constrained_json_disable_any_whitespace,
            "constrained_json_whitespace_pattern",
            "contradicts --constrained-json-disable-any-whitespace: leave one of them out",
        )
        _require(
            backend != "none" or not self.constrained_json_disable_any_whitespace,
            "constrained_json_disable_any_whitespace",
            "has no effect with --grammar-backend none",
        )
        _require(
            backend in (None, "none") or not self.skip_tokenizer_init,
            "grammar_backend",
            "needs a tokenizer: leave out --skip-tokenizer-init",
        )

    def _check_policy(self) -> None:
        policy, mixed = self.pd_multiplex_policy, self.enable_mixed_chunk
        _require(
            not mixed or self.chunked_prefill_size != -1,
            "enable_mixed_chunk",
            "cuts prompts, --chunked-prefill-size -1 never does: leave one of them out",
        )
        adaptive = self.enable_pdmux and (
            not mixed if policy is None else policy.partition(":")[0] == "adaptive"
        )
        _require(
            self.slo_overload == "queue" or adaptive,
            "slo_overload",
            "shed needs --enable-pd-multiplex with --pd-multiplex-policy adaptive: no other policy "
            "knows which first tokens will be late",
        )
        if policy is None:
            return
        try:
            spec = parse_policy(policy)
        except ValueError as error:
            raise _bad("pd_multiplex_policy", str(error)) from None
        chunked = isinstance(spec, ChunkedSpec)
        _require(
            not mixed or chunked,
            "enable_mixed_chunk",
            f"contradicts --pd-multiplex-policy {policy}: leave one of them out",
        )
        step_tokens = spec.step_tokens if isinstance(spec, ChunkedSpec) else None
        _require(
            step_tokens is None or step_tokens <= self.max_prefill_tokens,
            "max_prefill_tokens",
            f"{self.max_prefill_tokens} is less than the {step_tokens} tokens of a step: raise it",
        )

    def _check_service_levels(self) -> None:
        for key, limit_ms in self._default_limits_ms().items():
            problem = problem_of(key, limit_ms)
            _require(problem is None, f"slo_{key}", problem or "")
        try:
            checked_classes(self.slo_classes)
        except ValueError as error:
            raise ConfigError(f"slo_classes: {error}") from None

    def _check_parsers(self) -> None:
        for field, known in (
            ("tool_call_parser", TOOL_CALL_PARSERS),
            ("reasoning_parser", REASONING_PARSERS),
        ):
            name = getattr(self, field)
            _require(
                name is None or name in known,
                field,
                f"{name} is not one of {', '.join(known)}",
            )
            _require(
                name is None or not self.skip_tokenizer_init,
                field,
                "has no effect with --skip-tokenizer-init",
            )

    def _require_unset(self, when: str, *fields: str) -> None:
        for field in fields:
            _require(getattr(self, field) is None, field, f"has no effect {when}")


FLAGS: tuple[Flag, ...] = tuple(flags_of(ServerArgs))


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The argparse parser of the command `prog`."""
    parser = build_parser(
        FLAGS,
        prog=prog,
        usage="%(prog)s --model-path MODEL [flag ...]",
        description="Serve a language model over HTTP. Token counts may be written 4096 or 4K.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=None,
        help="YAML file of flags, names with dashes or underscores; the command line wins",
    )
    return parser


def resolve_device(args: ServerArgs) -> Literal["cuda", "cpu"]:
    """Settles `--device auto` by looking at the machine. Imports torch.

    Raises ConfigError when the GPU that was asked for is not there.
    """
    if args.device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        _require(args.device == "auto", "device", "cuda was asked for, but torch sees no GPU")
        _require(
            args.attention_backend in ("auto", "torch_native"),
            "attention_backend",
            f"{args.attention_backend} needs a GPU, but torch sees none",
        )
        return "cpu"
    gpus = torch.cuda.device_count()
    _require(
        args.base_gpu_id < gpus, "base_gpu_id", f"{args.base_gpu_id}: this machine has {gpus} GPUs"
    )
    return "cuda"


def _require(ok: bool, field: str, problem: str) -> None:
    if not ok:
        raise _bad(field, problem)


def _bad(field: str, problem: str) -> ConfigError:
    return ConfigError(f"--{field.replace('_', '-')} {problem}")
