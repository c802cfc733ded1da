"""BenchOptions: one benchmark as asked for on the command line, checked by cli.parse_options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang.bench.goodput import Objectives


@dataclass(frozen=True, slots=True)
class RandomOptions:
    """Lengths of `random-ids`. A length is drawn uniformly from [full * range_ratio, full]."""

    input_len: int
    output_len: int
    range_ratio: float


@dataclass(frozen=True, slots=True)
class SharedPrefixOptions:
    """`generated-shared-prefix`: groups of prompts with one system prompt a group.

    Lengths are in tokens and drawn like those of RandomOptions. zipf_alpha is set exactly when
    prompts are spread over the groups by Zipf's law rather than evenly. send_routing_key: requests
    name their group, for a router that keeps a group on one server.
    """

    num_groups: int
    prompts_per_group: int
    system_prompt_len: int
    question_len: int
    output_len: int
    range_ratio: float
    num_turns: int
    ordered: bool
    zipf_alpha: float | None
    send_routing_key: bool = False


@dataclass(frozen=True, slots=True)
class MooncakeOptions:
    """Which rows of a trace are replayed, and how fast.

    max_input_len: rows with a longer prompt are left out. duration_s: only rows of this first
    part of the trace, in the trace's own time. slowdown_factor stretches the timestamps; 2 is
    half the load. spread_batches: rows that share a timestamp are spread up to the next one.
    min_turns: above 1, only whole conversations of at least so many rows. num_rounds: turns of
    each row's conversation. workload: which trace of a folder.
    """

    max_input_len: int | None
    min_turns: int
    duration_s: float | None
    slowdown_factor: float
    spread_batches: bool
    num_rounds: int = 1
    workload: str = "conversation"


@dataclass(frozen=True, slots=True)
class TextFileOptions:
    """Prompts from a file.

    output_len: tokens asked for; None takes what the file says, or the data set's own number.
    context_len: conversations longer than this (prompt and answer) are left out.
    prompt_suffix: put behind every prompt of `sharegpt` and `custom`.
    offset: the row to begin with; the rows before it come last. max_turns: of `agentic-trace`.
    """

    output_len: int | None
    context_len: int | None
    apply_chat_template: bool
    mt_bench_output_len: int
    prompt_suffix: str = ""
    offset: int = 0
    max_turns: int | None = None


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    """What /generate is to return beside the tokens, under its own names for it."""

    start_len: int
    top_num: int
    token_ids: tuple[int, ...]

    def as_body(self) -> dict[str, Any]:
        body = {
            "return_logprob": True,
            "logprob_start_len": self.start_len,
            "top_logprobs_num": self.top_num,
        }
        return body | ({"token_ids_logprob": list(self.token_ids)} if self.token_ids else {})


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """Servers whose profilers run during the measurement, and the body they are started with.

    stops_itself: after a number of steps; nobody has to tell it.
    """

    urls: tuple[str, ...]
    body: Mapping[str, Any]
    stops_itself: bool


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Everything that decides a run.

    num_prompts: conversations at most; None means all of `generated-shared-prefix`, else 1000.
    request_rate: conversations per second, Poisson; inf sends all at once.
    max_concurrency: conversations in flight at most, so requests in flight too.
    vocab_size: draw prompt ids from [0, vocab_size) and load no tokenizer.
    """

    backend: str
    base_url: str
    model: str | None
    served_model_name: str | None
    tokenizer: str | None
    vocab_size: int | None
    headers: Mapping[str, str]
    ready_timeout_s: float

    dataset_name: str
    dataset_path: str | None
    num_prompts: int | None
    random: RandomOptions
    gsp: SharedPrefixOptions
    mooncake: MooncakeOptions
    text_file: TextFileOptions
    tokenize_prompt: bool
    seed: int

    request_rate: float
    use_trace_timestamps: bool
    max_concurrency: int | None

    stream: bool
    ignore_eos: bool
    temperature: float
    top_p: float
    extra_body: Mapping[str, Any]
    logprobs: LogprobOptions | None
    profile: ProfileOptions | None

    warmup_requests: int
    flush_cache: bool
    flush_cache_timeout_s: float

    objectives: Objectives | None
    cache_report: bool
    output_file: str | None
    output_details: bool
    show_progress: bool
    print_requests: bool
    plot_throughput: bool
    tag: str | None

    @property
    def speaks_native(self) -> bool:
        """The backend is /generate, which takes token ids and returns them."""
        return self.backend in NATIVE_BACKENDS

    @property
    def speaks_chat(self) -> bool:
        return self.backend in CHAT_BACKENDS

    @property
    def embeds(self) -> bool:
        """The backend answers with vectors: there are no tokens to time."""
        return self.backend in EMBEDDING_BACKENDS


NATIVE_BACKENDS = ("sglang", "sglang-native")
COMPLETION_BACKENDS = ("sglang-oai", "vllm", "lmdeploy")
CHAT_BACKENDS = ("sglang-oai-chat", "vllm-chat", "lmdeploy-chat")
EMBEDDING_BACKENDS = ("sglang-embedding", "vllm-embedding")
BACKENDS = NATIVE_BACKENDS + COMPLETION_BACKENDS + CHAT_BACKENDS + EMBEDDING_BACKENDS
