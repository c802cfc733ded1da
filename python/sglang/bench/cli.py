"""The command line: every flag with its default, help and check. Errors exit with code 2."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from sglang.bench.datasets import DATASETS
from sglang.bench.goodput import OBJECTIVE_NAMES, Objectives
from sglang.bench.options import (
    BACKENDS,
    CHAT_BACKENDS,
    NATIVE_BACKENDS,
    BenchOptions,
    MooncakeOptions,
    RandomOptions,
    SharedPrefixOptions,
    TextFileOptions,
)
from sglang.bench.unsupported import add_unsupported_flags

_DEFAULT_PORT = 30000
_DEFAULT_VLLM_PORT = 8000

_SYNTHETIC_DATASETS = ("random-ids", "generated-shared-prefix", "mooncake")

# A flag with one of these prefixes belongs to these data sets, and is refused with another one.
_DATASET_FLAGS: dict[str, tuple[str, ...]] = {
    "random_": ("random-ids",),
    "gsp_": ("generated-shared-prefix",),
    "mooncake_": ("mooncake",),
    "mt_bench_": ("mt-bench",),
    "sharegpt_": ("sharegpt", "custom"),
    "apply_chat_template": ("sharegpt", "custom"),
    "use_trace_timestamps": ("mooncake",),
}


def parse_options(argv: Sequence[str] | None = None) -> BenchOptions:
    """Parses and checks; `argv` None takes the process's own arguments."""
    parser = build_parser()
    given = parser.parse_args(argv)
    _refuse_foreign_flags(parser, given)
    backend = given.backend
    native = backend in NATIVE_BACKENDS
    if given.dataset_name not in ("random-ids", "generated-shared-prefix"):
        if not given.dataset_path:
            parser.error(
                f"--dataset-name {given.dataset_name} needs --dataset-path: nothing is downloaded"
            )
    elif given.dataset_path:
        parser.error(f"--dataset-path: {given.dataset_name} reads no file")
    if given.dataset_name == "mt-bench" and backend not in CHAT_BACKENDS:
        parser.error(f"mt-bench needs a chat --backend: {', '.join(CHAT_BACKENDS)}")
    if given.tokenize_prompt and not native:
        parser.error("--tokenize-prompt needs --backend sglang: only /generate takes token ids")
    if given.vocab_size is not None and (not native or given.tokenizer):
        parser.error("--vocab-size replaces the tokenizer and needs --backend sglang")
    if given.vocab_size is not None and given.dataset_name not in _SYNTHETIC_DATASETS:
        parser.error(f"--vocab-size is of use only with {', '.join(_SYNTHETIC_DATASETS)}")
    if given.use_trace_timestamps and not math.isinf(given.request_rate):
        parser.error("--use-trace-timestamps and --request-rate exclude each other")
    if given.mooncake_slowdown_factor != 1.0 and not given.use_trace_timestamps:
        parser.error("--mooncake-slowdown-factor needs --use-trace-timestamps")
    if given.mooncake_spread_batches and not given.use_trace_timestamps:
        parser.error("--mooncake-spread-batches needs --use-trace-timestamps")
    if given.apply_chat_template and backend in CHAT_BACKENDS:
        parser.error(f"--apply-chat-template: the server applies it with --backend {backend}")
    if (given.gsp_group_distribution == "zipf") != (given.gsp_zipf_alpha is not None):
        parser.error("--gsp-group-distribution zipf and --gsp-zipf-alpha go together")
    if given.disable_stream and given.goodput and not set(given.goodput.as_json()) <= {"e2el"}:
        parser.error("--disable-stream measures no tokens: of --goodput only e2el remains")
    default_port = _DEFAULT_VLLM_PORT if backend.startswith("vllm") else _DEFAULT_PORT
    base_url = given.base_url or f"http://{given.host}:{given.port or default_port}"
    return BenchOptions(
        backend=backend,
        base_url=base_url.rstrip("/"),
        model=given.model,
        served_model_name=given.served_model_name,
        tokenizer=given.tokenizer,
        vocab_size=given.vocab_size,
        headers=dict(given.header),
        ready_timeout_s=given.ready_check_timeout_sec,
        dataset_name=given.dataset_name,
        dataset_path=given.dataset_path or None,
        num_prompts=given.num_prompts,
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
        ),
        mooncake=MooncakeOptions(
            max_input_len=given.mooncake_max_input_len,
            min_turns=given.mooncake_min_turns,
            duration_s=given.mooncake_duration_s,
            slowdown_factor=given.mooncake_slowdown_factor,
            spread_batches=given.mooncake_spread_batches,
        ),
        text_file=TextFileOptions(
            output_len=given.sharegpt_output_len,
            context_len=given.sharegpt_context_len,
            apply_chat_template=given.apply_chat_template,
            mt_bench_output_len=given.mt_bench_output_len,
        ),
        tokenize_prompt=given.tokenize_prompt,
        seed=given.seed,
        request_rate=given.request_rate,
        use_trace_timestamps=given.use_trace_timestamps,
        max_concurrency=given.max_concurrency,
        stream=not given.disable_stream,
        ignore_eos=not given.disable_ignore_eos,
        temperature=given.temperature,
        top_p=given.top_p,
        extra_body=given.extra_request_body,
        warmup_requests=given.warmup_requests,
        flush_cache=given.flush_cache,
        flush_cache_timeout_s=given.flush_cache_timeout,
        objectives=given.goodput,
        cache_report=given.cache_report,
        output_file=given.output_file,
        output_details=given.output_details,
        show_progress=not given.disable_tqdm,
        tag=given.tag,
    )


def build_parser() -> argparse.ArgumentParser:
    """All flags, the refused ones included."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang.bench_serving",
        description="Measures a running server: sends it a workload over HTTP and reports "
        "throughput, latencies and goodput.",
        usage="%(prog)s --backend NAME --dataset-name NAME [options]; --help lists them",
        allow_abbrev=False,
    )
    _add_server_flags(parser.add_argument_group("server"))
    _add_load_flags(parser.add_argument_group("load"))
    _add_dataset_flags(parser.add_argument_group("data sets"))
    _add_request_flags(parser.add_argument_group("requests"))
    _add_report_flags(parser.add_argument_group("report"))
    add_unsupported_flags(parser)
    return parser


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="sglang",
        help="sglang posts to /generate, sglang-oai (or vllm) to /v1/completions, "
        "sglang-oai-chat (or vllm-chat) to /v1/chat/completions",
    )
    group.add_argument("--base-url", help="address of the server, instead of --host and --port")
    group.add_argument("--host", default="0.0.0.0")
    group.add_argument("--port", type=_whole(1), help="30000, or 8000 for vllm")
    group.add_argument(
        "--ready-check-timeout-sec",
        type=_number(0),
        default=60,
        help="how long to wait until GET /v1/models answers",
    )
    group.add_argument("--model", help="the served model; asked from the server by default")
    group.add_argument("--served-model-name", help="name put in OpenAI requests, if not --model")
    group.add_argument(
        "--tokenizer",
        help="folder, .gguf file or name; by default what the server's /model_info says",
    )
    group.add_argument(
        "--vocab-size",
        type=_whole(1),
        help="load no tokenizer and draw prompt token ids from [0, N); an addition to SGLang's",
    )
    group.add_argument(
        "--header",
        nargs="+",
        action="extend",
        type=_header,
        default=[],
        metavar="NAME=VALUE",
        help="HTTP headers sent with every call",
    )
    group.add_argument("--flush-cache", action="store_true", help="empty the prefix cache first")
    group.add_argument("--flush-cache-timeout", type=_number(0), default=60, metavar="SECONDS")
    group.add_argument(
        "--warmup-requests",
        type=_whole(0),
        default=1,
        help="sent before the cache flush and the measurement: the first prompt, at most 32 tokens",
    )


def _add_load_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num-prompts",
        type=_whole(1),
        help="conversations at most: 1000, for generated-shared-prefix and mt-bench all",
    )
    group.add_argument(
        "--request-rate",
        type=_number(0, exclusive=True, infinite=True),
        default=math.inf,
        help="conversations per second with Poisson arrivals; inf sends all at once",
    )
    group.add_argument("--max-concurrency", type=_whole(1), help="conversations in flight at most")
    group.add_argument(
        "--use-trace-timestamps", action="store_true", help="arrivals as in the trace (mooncake)"
    )
    group.add_argument("--seed", type=_whole(0), default=42)


def _add_dataset_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset-name", choices=DATASETS, default="sharegpt")
    group.add_argument("--dataset-path", default="", help="JSON or JSONL file, .gz or not")
    group.add_argument("--random-input-len", "--random-input", type=_whole(1), default=1024)
    group.add_argument("--random-output-len", "--random-output", type=_whole(1), default=1024)
    group.add_argument(
        "--random-range-ratio",
        type=_number(0, at_most=1),
        default=0.0,
        help="lengths are uniform on [full x ratio, full]; 1 fixes them",
    )
    group.add_argument("--gsp-num-groups", type=_whole(1), default=64)
    group.add_argument("--gsp-prompts-per-group", type=_whole(1), default=16)
    group.add_argument("--gsp-system-prompt-len", type=_whole(1), default=2048)
    group.add_argument("--gsp-question-len", type=_whole(1), default=128)
    group.add_argument("--gsp-output-len", type=_whole(1), default=256)
    group.add_argument("--gsp-range-ratio", type=_number(0, at_most=1), default=1.0)
    group.add_argument(
        "--gsp-num-turns",
        type=_whole(1),
        default=1,
        help="turns of a conversation; each waits for the answer before it",
    )
    group.add_argument("--gsp-ordered", action="store_true", help="group by group, not shuffled")
    group.add_argument("--gsp-group-distribution", choices=("uniform", "zipf"), default="uniform")
    group.add_argument("--gsp-zipf-alpha", type=_number(0, exclusive=True))
    group.add_argument(
        "--mooncake-slowdown-factor",
        type=_number(0, exclusive=True),
        default=1.0,
        help="stretches the trace's timestamps; 2 halves the load",
    )
    group.add_argument(
        "--mooncake-max-input-len",
        type=_whole(1),
        help="leave out rows with longer prompts (their count is printed); an addition",
    )
    group.add_argument(
        "--mooncake-min-turns",
        type=_whole(1),
        default=1,
        help="only whole conversations of at least so many rows, the first that fit in "
        "--num-prompts; a row continues a conversation if it shares a block beyond its first "
        "with it; an addition",
    )
    group.add_argument(
        "--mooncake-duration-s",
        type=_number(0, exclusive=True),
        help="only the first seconds of the trace, in its own time; an addition",
    )
    group.add_argument(
        "--mooncake-spread-batches",
        action="store_true",
        help="spread rows that share a timestamp evenly up to the next one; an addition",
    )
    group.add_argument(
        "--mt-bench-output-len", type=_whole(1), default=512, help="tokens a turn; an addition"
    )
    group.add_argument(
        "--sharegpt-output-len",
        type=_whole(2),
        help="tokens asked for; by default as many as the answer in the file has",
    )
    group.add_argument(
        "--sharegpt-context-len", type=_whole(4), help="leave out longer conversations"
    )
    group.add_argument(
        "--apply-chat-template", action="store_true", help="format prompts here, not on the server"
    )
    group.add_argument(
        "--tokenize-prompt", action="store_true", help="send token ids instead of text"
    )


def _add_request_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--disable-stream", action="store_true")
    group.add_argument(
        "--disable-ignore-eos", action="store_true", help="let answers end before their length"
    )
    group.add_argument("--temperature", type=_number(0), default=0.0)
    group.add_argument("--top-p", type=_number(0, exclusive=True, at_most=1), default=1.0)
    group.add_argument(
        "--extra-request-body",
        type=_json_object,
        default={},
        metavar="JSON",
        help="object laid over every request body; objects such as sampling_params are merged",
    )


def _add_report_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput",
        nargs="+",
        action=_GoodputAction,
        metavar="NAME:MS",
        help="objectives: ttft, tpot, e2el; and as additions itl_p99 (99th percentile of a "
        "request's gaps between chunks) and ttft_per_token (the deadline of the first token "
        "becomes max(ttft, ttft_per_token x uncached prompt tokens))",
    )
    group.add_argument(
        "--cache-report",
        action="store_true",
        help="report cached prompt tokens by turn; on OpenAI backends the server needs "
        "--enable-cache-report",
    )
    group.add_argument("--output-file", help="JSONL file the result is appended to")
    group.add_argument("--output-details", action="store_true", help="add a list per request")
    group.add_argument("--tag", help="copied into the result")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


class _GoodputAction(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        bounds: dict[str, float] = {}
        for value in values or ():
            name, _, bound_ms = str(value).partition(":")
            if name not in OBJECTIVE_NAMES:
                parser.error(
                    f"--goodput: {value!r} is not NAME:MS with NAME one of "
                    f"{', '.join(OBJECTIVE_NAMES)}"
                )
            if name in bounds:
                parser.error(f"--goodput: {name} is given twice")
            try:
                bounds[name] = _number(0, exclusive=True)(bound_ms)
            except argparse.ArgumentTypeError as error:
                parser.error(f"--goodput {name}: {error}")
        objectives = Objectives(**{f"{name}_ms": bound for name, bound in bounds.items()})
        setattr(namespace, self.dest, objectives)


def _refuse_foreign_flags(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    for name, value in vars(given).items():
        if value == parser.get_default(name):
            continue
        for prefix, datasets in _DATASET_FLAGS.items():
            if name.startswith(prefix) and given.dataset_name not in datasets:
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} applies only to --dataset-name {' or '.join(datasets)}")


def _whole(at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {at_least}, got {text}"
            )
        return value

    return parse


def _number(
    at_least: float,
    *,
    exclusive: bool = False,
    at_most: float = math.inf,
    infinite: bool = False,
) -> Callable[[str], float]:
    """A parser of numbers in [at_least, at_most], or in (at_least, at_most] when exclusive."""
    lower = "above" if exclusive else "at least"
    upper = "" if math.isinf(at_most) else f" and at most {at_most:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low_ok = value > at_least if exclusive else value >= at_least
        if not (low_ok and value <= at_most and (infinite or not math.isinf(value))):
            raise argparse.ArgumentTypeError(f"must be {lower} {at_least:g}{upper}, got {text}")
        return value

    return parse


def _header(text: str) -> tuple[str, str]:
    """NAME=VALUE or NAME: VALUE, whichever mark comes first."""
    at = min((i for i in (text.find("="), text.find(":")) if i > 0), default=0)
    if at == 0:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return text[:at].strip(), text[at + 1 :].strip()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
