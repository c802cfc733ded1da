"""From the command line to BenchOptions. Errors exit with code 2 and name the option."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from typing import Any

from sglang.bench.flags import build_parser
from sglang.bench.options import (
    CHAT_BACKENDS,
    EMBEDDING_BACKENDS,
    NATIVE_BACKENDS,
    BenchOptions,
    LogprobOptions,
    MooncakeOptions,
    ProfileOptions,
    RandomOptions,
    SharedPrefixOptions,
    TextFileOptions,
)
from sglang.bench.unsupported import refuse_unsupported

_DEFAULT_PORT = 30000
_DEFAULT_PORTS = {"vllm": 8000, "lmdeploy": 23333}

_SYNTHETIC_DATASETS = ("random-ids", "generated-shared-prefix", "mooncake")
_WITHOUT_FILE = ("random-ids", "generated-shared-prefix")
_IN_ORDER_OF_FILE = ("agentic-trace", "openai", "mt-bench")
_ALL_BY_DEFAULT = ("generated-shared-prefix", "mt-bench")
# Their prompts are messages, or continue a conversation.
_CHAT_DATASETS = ("mt-bench", "agentic-trace", "openai")

# A flag with one of these prefixes belongs to these data sets, and is refused with another one.
_DATASET_FLAGS: dict[str, tuple[str, ...]] = {
    "random_": ("random-ids", "random"),
    "gsp_": ("generated-shared-prefix",),
    "mooncake_": ("mooncake",),
    "mt_bench_": ("mt-bench",),
    "agentic_": ("agentic-trace",),
    "sharegpt_output": ("sharegpt", "custom", "longbench_v2", "openai", "agentic-trace"),
    "sharegpt_context": ("sharegpt", "custom", "longbench_v2"),
    "prompt_suffix": ("sharegpt", "custom"),
    "apply_chat_template": ("sharegpt", "custom"),
    "use_trace_timestamps": ("mooncake",),
    "dataset_offset": _IN_ORDER_OF_FILE,
}


def parse_options(argv: Sequence[str] | None = None) -> BenchOptions:
    """Parses and checks; `argv` None takes the process's own arguments."""
    parser = build_parser()
    given = parser.parse_args(argv)
    refuse_unsupported(parser, given.backend, given.dataset_name)
    _refuse_foreign_flags(parser, given)
    _check_backend(parser, given)
    _check_dataset(parser, given)
    port = _DEFAULT_PORTS.get(given.backend.partition("-")[0], _DEFAULT_PORT)
    base_url = (given.base_url or f"http://{given.host}:{given.port or port}").rstrip("/")
    all_prompts = given.dataset_name in _ALL_BY_DEFAULT and not hasattr(given, "num_prompts_given")
    return BenchOptions(
        backend=given.backend,
        base_url=base_url,
        model=given.model,
        served_model_name=given.served_model_name,
        tokenizer=given.tokenizer,
        vocab_size=given.vocab_size,
        headers=_headers(given.header),
        ready_timeout_s=given.ready_check_timeout_sec,
        dataset_name=given.dataset_name,
        dataset_path=given.dataset_path or None,
        num_prompts=None if all_prompts else given.num_prompts,
        random=RandomOptions(
            given.random_input_len, given.random_output_len, given.random_range_ratio
        ),
        gsp=SharedPrefixOptions(
            num_groups=given.gsp_num_groups,
            prompts_per_group=given.gsp_prompts_per_group,
            system_prompt_len=given.gsp_system_prompt_len,
            question_len=given.gsp_question_len,
            output_len=given.gsp_output_len,
            range_ratio=given.gsp_range_ratio,
            num_turns=given.gsp_num_turns,
            ordered=given.gsp_ordered,
            zipf_alpha=given.gsp_zipf_alpha,
            send_routing_key=given.gsp_send_routing_key,
        ),
        mooncake=MooncakeOptions(
            max_input_len=given.mooncake_max_input_len,
            min_turns=given.mooncake_min_turns,
            duration_s=given.mooncake_duration_s,
            slowdown_factor=given.mooncake_slowdown_factor,
            spread_batches=given.mooncake_spread_batches,
            num_rounds=given.mooncake_num_rounds,
            workload=given.mooncake_workload,
        ),
        text_file=TextFileOptions(
            output_len=given.sharegpt_output_len,
            context_len=given.sharegpt_context_len,
            apply_chat_template=given.apply_chat_template,
            mt_bench_output_len=given.mt_bench_output_len,
            prompt_suffix=given.prompt_suffix,
            offset=given.dataset_offset,
            max_turns=given.agentic_max_turns,
        ),
        tokenize_prompt=given.tokenize_prompt,
        seed=given.seed,
        request_rate=given.request_rate,
        use_trace_timestamps=given.use_trace_timestamps,
        max_concurrency=given.max_concurrency,
        stream=not given.disable_stream and given.backend not in EMBEDDING_BACKENDS,
        ignore_eos=not given.disable_ignore_eos,
        temperature=given.temperature,
        top_p=given.top_p,
        extra_body=given.extra_request_body or {},
        logprobs=_logprobs(parser, given),
        profile=_profile(parser, given, base_url),
        warmup_requests=given.warmup_requests,
        flush_cache=given.flush_cache,
        flush_cache_timeout_s=given.flush_cache_timeout,
        objectives=given.goodput,
        cache_report=given.cache_report,
        output_file=given.output_file,
        output_details=given.output_details,
        show_progress=not given.disable_tqdm,
        print_requests=given.print_requests,
        plot_throughput=given.plot_throughput,
        tag=given.tag,
    )


def _refuse_foreign_flags(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    for name, value in vars(given).items():
        if value == parser.get_default(name):
            continue
        for prefix, datasets in _DATASET_FLAGS.items():
            if name.startswith(prefix) and given.dataset_name not in datasets:
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} applies only to --dataset-name {' or '.join(datasets)}")


def _check_backend(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    native, embeds = given.backend in NATIVE_BACKENDS, given.backend in EMBEDDING_BACKENDS
    if given.tokenize_prompt and not native:
        parser.error("--tokenize-prompt needs --backend sglang: only /generate takes token ids")
    if given.vocab_size is not None and (not native or given.tokenizer):
        parser.error("--vocab-size replaces the tokenizer and needs --backend sglang")
    if given.apply_chat_template and given.backend in CHAT_BACKENDS:
        parser.error(f"--apply-chat-template: the server applies it with --backend {given.backend}")
    untimed = "an embedding has no" if embeds else "--disable-stream measures no"
    untimed_tokens = given.disable_stream or embeds
    if untimed_tokens and given.goodput and not set(given.goodput.as_json()) <= {"e2el"}:
        parser.error(f"{untimed} tokens: of --goodput only e2el remains")


def _check_dataset(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    name, backend = given.dataset_name, given.backend
    if name in _WITHOUT_FILE:
        if given.dataset_path:
            parser.error(f"--dataset-path: {name} reads no file")
    elif not given.dataset_path:
        parser.error(f"--dataset-name {name} needs --dataset-path: nothing is downloaded")
    if name in _CHAT_DATASETS and backend not in CHAT_BACKENDS:
        parser.error(f"{name} needs a chat --backend: {', '.join(CHAT_BACKENDS)}")
    for flag, turns in (
        ("--gsp-num-turns", given.gsp_num_turns),
        ("--mooncake-num-rounds", given.mooncake_num_rounds),
    ):
        if turns > 1 and backend in EMBEDDING_BACKENDS:
            parser.error(f"{flag}: --backend {backend} holds no conversations")
    if given.vocab_size is not None and name not in _SYNTHETIC_DATASETS:
        parser.error(f"--vocab-size is of use only with {', '.join(_SYNTHETIC_DATASETS)}")
    if given.use_trace_timestamps and not math.isinf(given.request_rate):
        parser.error("--use-trace-timestamps and --request-rate exclude each other")
    if given.mooncake_slowdown_factor != 1.0 and not given.use_trace_timestamps:
        parser.error("--mooncake-slowdown-factor needs --use-trace-timestamps")
    if given.mooncake_spread_batches and not given.use_trace_timestamps:
        parser.error("--mooncake-spread-batches needs --use-trace-timestamps")
    if (given.gsp_group_distribution == "zipf") != (given.gsp_zipf_alpha is not None):
        parser.error("--gsp-group-distribution zipf and --gsp-zipf-alpha go together")


def _logprobs(parser: argparse.ArgumentParser, given: argparse.Namespace) -> LogprobOptions | None:
    if given.return_logprob:
        if given.backend not in NATIVE_BACKENDS:
            parser.error("--return-logprob needs --backend sglang")
        ids = tuple(given.token_ids_logprob or ())
        return LogprobOptions(given.logprob_start_len, given.top_logprobs_num, ids)
    _refuse_without(
        parser,
        given,
        "--return-logprob",
        ("top_logprobs_num", "token_ids_logprob", "logprob_start_len"),
    )
    return None


def _profile(
    parser: argparse.ArgumentParser, given: argparse.Namespace, base_url: str
) -> ProfileOptions | None:
    parts = [name for name in vars(given) if name.startswith("profile_")]
    if not given.profile:
        _refuse_without(parser, given, "--profile", [*parts, "pd_separated"])
        return None
    apart = (*(given.profile_prefill_url or ()), *(given.profile_decode_url or ()))
    if given.pd_separated != bool(apart):
        parser.error("--pd-separated goes with --profile-prefill-url or --profile-decode-url")
    steps, older = given.profile_num_steps, given.profile_steps
    if steps is not None and older is not None and steps != older:
        parser.error("--profile-steps differs from --profile-num-steps, give one")
    steps = older if steps is None else steps
    body: dict[str, Any] = {
        "activities": given.profile_activities,
        "start_step": given.profile_start_step,
        "num_steps": steps,
        "profile_by_stage": given.profile_by_stage or None,
        "profile_stages": given.profile_stages,
        "output_dir": given.profile_output_dir,
        "profile_prefix": given.profile_prefix,
    }
    urls = tuple(url.rstrip("/") for url in apart) or (base_url,)
    asked = {name: value for name, value in body.items() if value is not None}
    return ProfileOptions(urls, asked, stops_itself=steps is not None)


def _refuse_without(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    needed: str,
    names: Sequence[str],
) -> None:
    for name in names:
        if getattr(given, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} needs {needed}")


def _headers(given: Sequence[tuple[str, str]] | None) -> dict[str, str]:
    headers = dict(given or ())
    key = os.environ.get("OPENAI_API_KEY")
    if key and "authorization" not in map(str.lower, headers):
        headers["Authorization"] = f"Bearer {key}"
    return headers
