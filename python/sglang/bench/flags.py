"""Every option of bench_serving with its default, help and check."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from sglang.bench.datasets import DATASETS
from sglang.bench.datasets.mooncake import WORKLOADS
from sglang.bench.datasets.random_ids import DEFAULT_NUM_PROMPTS
from sglang.bench.flag_types import GoodputAction, header, json_object, number, whole
from sglang.bench.options import BACKENDS
from sglang.bench.unsupported import (
    UNSUPPORTED_BACKENDS,
    UNSUPPORTED_DATASETS,
    add_unsupported_flags,
)


class _Given(argparse.Action):
    """Stores a value, and that it was given: NAME_given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_given", True)


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
    _add_profile_flags(parser.add_argument_group("the server's profiler"))
    _add_report_flags(parser.add_argument_group("report"))
    add_unsupported_flags(parser)
    return parser


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backend",
        choices=(*BACKENDS, *UNSUPPORTED_BACKENDS),
        default="sglang",
        metavar="NAME",
        help=f"{', '.join(BACKENDS)}: sglang posts to /generate, the others, whoever's server it "
        "is, to /v1/completions, with -chat to /v1/chat/completions, with -embedding to "
        "/v1/embeddings",
    )
    group.add_argument("--base-url", help="address of the server, instead of --host and --port")
    group.add_argument("--host", default="0.0.0.0")
    group.add_argument("--port", type=whole(1), help="30000, for vllm 8000, for lmdeploy 23333")
    group.add_argument(
        "--ready-check-timeout-sec",
        type=number(0),
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
        type=whole(1),
        help="load no tokenizer and draw prompt token ids from [0, N); an addition to SGLang's",
    )
    group.add_argument(
        "--header",
        nargs="+",
        action="extend",
        type=header,
        metavar="NAME=VALUE",
        help="HTTP headers sent with every call; OPENAI_API_KEY in the environment is a bearer "
        "token unless Authorization is given",
    )
    group.add_argument("--flush-cache", action="store_true", help="empty the prefix cache first")
    group.add_argument("--flush-cache-timeout", type=number(0), default=60, metavar="SECONDS")
    group.add_argument(
        "--warmup-requests",
        type=whole(0),
        default=1,
        help="sent before the cache flush and the measurement: the first prompt, at most 32 tokens",
    )


def _add_load_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num-prompts",
        type=whole(1),
        default=DEFAULT_NUM_PROMPTS,
        action=_Given,
        help="conversations at most; by default 1000, but all of generated-shared-prefix and "
        "mt-bench",
    )
    group.add_argument(
        "--request-rate",
        type=number(0, exclusive=True, infinite=True),
        default=math.inf,
        help="conversations per second with Poisson arrivals; inf sends all at once",
    )
    group.add_argument("--max-concurrency", type=whole(1), help="conversations in flight at most")
    group.add_argument(
        "--use-trace-timestamps", action="store_true", help="arrivals as in the trace (mooncake)"
    )
    group.add_argument("--seed", type=whole(0), default=42)


def _add_dataset_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset-name",
        choices=(*DATASETS, *UNSUPPORTED_DATASETS),
        default="sharegpt",
        metavar="NAME",
        help=", ".join(DATASETS),
    )
    group.add_argument(
        "--dataset-path",
        default="",
        help="JSON or JSONL file, .gz or not; for mooncake also a folder of traces",
    )
    group.add_argument(
        "--dataset-offset",
        type=whole(0),
        default=0,
        help="row of the file to begin with; those before it come last (agentic-trace, openai, "
        "mt-bench)",
    )
    group.add_argument(
        "--agentic-max-turns", type=whole(1), help="of each conversation; the rest is left out"
    )
    group.add_argument("--random-input-len", "--random-input", type=whole(1), default=1024)
    group.add_argument("--random-output-len", "--random-output", type=whole(1), default=1024)
    group.add_argument(
        "--random-range-ratio",
        type=number(0, at_most=1),
        default=0.0,
        help="lengths are uniform on [full x ratio, full]; 1 fixes them",
    )
    _add_shared_prefix_flags(group)
    _add_mooncake_flags(group)
    _add_text_flags(group)


def _add_shared_prefix_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gsp-num-groups", type=whole(1), default=64)
    group.add_argument("--gsp-prompts-per-group", type=whole(1), default=16)
    group.add_argument("--gsp-system-prompt-len", type=whole(1), default=2048)
    group.add_argument("--gsp-question-len", type=whole(1), default=128)
    group.add_argument("--gsp-output-len", type=whole(1), default=256)
    group.add_argument("--gsp-range-ratio", type=number(0, at_most=1), default=1.0)
    group.add_argument(
        "--gsp-num-turns",
        type=whole(1),
        default=1,
        help="turns of a conversation; each waits for the answer before it",
    )
    group.add_argument("--gsp-ordered", action="store_true", help="group by group, not shuffled")
    group.add_argument("--gsp-group-distribution", choices=("uniform", "zipf"), default="uniform")
    group.add_argument("--gsp-zipf-alpha", type=number(0, exclusive=True))
    group.add_argument(
        "--gsp-send-routing-key",
        action="store_true",
        help="name the group in the header X-SMG-Routing-Key, for routers",
    )
    group.add_argument(
        "--gsp-fast-prepare",
        action="store_true",
        help="for SGLang's command lines: preparation is always fast, no prompt is counted",
    )


def _add_mooncake_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mooncake-workload",
        choices=WORKLOADS,
        default="conversation",
        help="which trace, NAME_trace.jsonl, where --dataset-path is a folder",
    )
    group.add_argument(
        "--mooncake-num-rounds",
        type=whole(1),
        default=1,
        help="turns of a conversation: each row's prompt, then as many blocks of new tokens",
    )
    group.add_argument(
        "--mooncake-slowdown-factor",
        type=number(0, exclusive=True),
        default=1.0,
        help="stretches the trace's timestamps; 2 halves the load",
    )
    group.add_argument(
        "--mooncake-max-input-len",
        type=whole(1),
        help="leave out rows with longer prompts (their count is printed); an addition",
    )
    group.add_argument(
        "--mooncake-min-turns",
        type=whole(1),
        default=1,
        help="only whole conversations of at least so many rows, the first that fit in "
        "--num-prompts; a row continues a conversation if it shares a block beyond its first "
        "with it; an addition",
    )
    group.add_argument(
        "--mooncake-duration-s",
        type=number(0, exclusive=True),
        help="only the first seconds of the trace, in its own time; an addition",
    )
    group.add_argument(
        "--mooncake-spread-batches",
        action="store_true",
        help="spread rows that share a timestamp evenly up to the next one; an addition",
    )


def _add_text_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mt-bench-output-len", type=whole(1), default=512, help="tokens a turn; an addition"
    )
    group.add_argument(
        "--sharegpt-output-len",
        type=whole(2),
        help="tokens asked for; by default as many as the answer in the file has",
    )
    group.add_argument(
        "--sharegpt-context-len", type=whole(4), help="leave out longer conversations"
    )
    group.add_argument(
        "--prompt-suffix", default="", help="put behind every prompt of sharegpt and custom"
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
    group.add_argument("--temperature", type=number(0), default=0.0)
    group.add_argument("--top-p", type=number(0, exclusive=True, at_most=1), default=1.0)
    group.add_argument(
        "--extra-request-body",
        type=json_object,
        metavar="JSON",
        help="object laid over every request body; objects such as sampling_params are merged",
    )
    group.add_argument(
        "--return-logprob", action="store_true", help="of every token; --backend sglang"
    )
    group.add_argument("--top-logprobs-num", type=whole(0), default=0, help="likeliest tokens too")
    group.add_argument("--token-ids-logprob", type=whole(0), nargs="+", help="and of these tokens")
    group.add_argument(
        "--logprob-start-len",
        type=whole(-1),
        default=-1,
        help="from this token of the prompt on; -1: of the answer only",
    )


def _add_profile_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--profile",
        action="store_true",
        help="have the server's profiler run (POST /start_profile, /stop_profile)",
    )
    group.add_argument(
        "--profile-activities",
        nargs="+",
        choices=("CPU", "GPU", "CUDA_PROFILER", "XPU", "MEM"),
        default=["CPU", "GPU"],
    )
    group.add_argument("--profile-start-step", type=whole(0), help="engine step it begins with")
    group.add_argument("--profile-num-steps", type=whole(1), help="engine steps it lasts")
    group.add_argument("--profile-steps", type=whole(1), help="older name of --profile-num-steps")
    group.add_argument("--profile-by-stage", action="store_true", help="prefill and decode apart")
    group.add_argument("--profile-stages", nargs="+", metavar="STAGE", help="only these")
    group.add_argument("--profile-output-dir", help="folder on the server")
    group.add_argument("--profile-prefix", help="of the names of the files")
    group.add_argument(
        "--pd-separated",
        action="store_true",
        help="prefill and decode are servers of their own, with profilers at the URLs below",
    )
    group.add_argument("--profile-prefill-url", nargs="*", metavar="URL")
    group.add_argument("--profile-decode-url", nargs="*", metavar="URL")


def _add_report_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput",
        nargs="+",
        action=GoodputAction,
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
    group.add_argument(
        "--print-requests", action="store_true", help="a JSON line for every request that ends"
    )
    group.add_argument(
        "--plot-throughput",
        action="store_true",
        help="output tokens and requests in flight over time, drawn with characters",
    )
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
