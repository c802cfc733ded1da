"""Every message that crosses a process boundary: msgspec structs, msgpack on the wire.

Sockets are one-way ZMQ PUSH/PULL over ipc:

    TokenizerManager --ToScheduler--> Scheduler --ToDetokenizer--> Detokenizer
    TokenizerManager <--ToTokenizer-- Detokenizer         (text)
    TokenizerManager <--ToTokenizer-- Scheduler           (replies to control calls)
    Scheduler        <--ToScheduler-- Detokenizer         (a stop string was found)

The detokenizer looks for stop strings so that the engine thread never decodes text.
Batches are columnar: element i of every list speaks of the same request.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from drift_scheduler.slo import Slo
from sglang.srt.logprobs import LogprobNews, LogprobWish
from sglang.srt.sampling_params import SamplingParams

if TYPE_CHECKING:
    TokenIds = array[int]
else:
    TokenIds = array  # Python 3.11 has no array[int]


def token_ids(ids: Iterable[int]) -> TokenIds:
    """As they travel: prompts are long, and 32-bit integers side by side are read at once.

    Raises OverflowError for an id that does not fit.
    """
    return array("i", ids)


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of all messages; the struct's name is its tag on the wire."""


class FinishReason(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request ended.

    `matched` is the stop token id or stop string (type "stop"); `length` is the number of
    completion tokens (type "length"); `message` and `status_code` speak of an abort.
    """

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None


class GenerateRequest(Message, frozen=True, tag=True, kw_only=True):
    """One tokenised prompt, see token_ids. `arrival_s` is time.monotonic() at the HTTP server.

    `namespace` separates prefix caches: requests with different namespaces share nothing.
    `slo_class` is the name under which the request is counted, "" for one of our own.
    `logprobs` is what to tell of each token, None if nothing; its `start` is a position. While
    they wait, requests of a lower `rank` go in front of others.
    """

    rid: str
    input_ids: TokenIds
    sampling: SamplingParams
    arrival_s: float
    namespace: str = ""
    slo: Slo = Slo()
    slo_class: str = "default"
    logprobs: LogprobWish | None = None
    rank: int = 0


class AbortRequest(Message, frozen=True, tag=True, kw_only=True):
    """Ends every request whose id starts with `rid`, or all of them."""

    rid: str = ""
    abort_all: bool = False


class StopMatched(Message, frozen=True, tag=True, kw_only=True):
    """The detokenizer found a stop string: the request has its answer, release it."""

    rid: str


class FlushCache(Message, frozen=True, tag=True, kw_only=True):
    """Empties the prefix cache; waits up to `timeout_s` for the engine to be idle."""

    call_id: int
    timeout_s: float = 0.0


class GetState(Message, frozen=True, tag=True, kw_only=True):
    """Asks for the scheduler's `internal_state`: memory, queue, lanes, timeline totals."""

    call_id: int


class GetTimeline(Message, frozen=True, tag=True, kw_only=True):
    """Asks for a page of what the lanes ran in the last `seconds`.

    next_run, next_sample: None for the first page, then as the page before said. The reply's
    data has `page`, a drift_scheduler.timeline.TimelinePage, and `total_sms`.
    """

    call_id: int
    seconds: float
    next_run: int | None = None
    next_sample: int | None = None


class SetPolicy(Message, frozen=True, tag=True, kw_only=True):
    """From the next turn on this policy decides who runs where; the reply says if it is one."""

    call_id: int
    policy: str


class Shutdown(Message, frozen=True, tag=True, kw_only=True):
    """The scheduler forwards it to the detokenizer; both leave their loops and exit 0."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the detokenizer must know of a request before its first token.

    `prompt_tail` holds the last few prompt ids: text of a token can depend on its left context.
    """

    rid: str
    prompt_tail: list[int]
    stop: list[str]
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    no_stop_trim: bool
    stop_regex: list[str] = []


class TokenBatch(Message, frozen=True, tag=True, kw_only=True):
    """New tokens of many requests, in order of generation.

    `opened` holds one entry for each request that appears for the first time. Every request
    that was accepted gets exactly one entry with a finish reason, its last. A matched stop
    token id is part of `new_ids`; the detokenizer leaves it out of the text. `logprobs` has, by
    rid, the news of those who asked.
    """

    opened: list[StreamOptions]
    rids: list[str]
    new_ids: list[list[int]]
    finish: list[FinishReason | None]
    prompt_tokens: list[int]
    cached_tokens: list[int]
    completion_tokens: list[int]
    retractions: list[int]
    logprobs: dict[str, LogprobNews] = {}


class TextBatch(Message, frozen=True, tag=True, kw_only=True):
    """Decoded increments: `text`, `new_ids` and `logprobs` hold only what is new since the last
    batch."""

    rids: list[str]
    text: list[str]
    new_ids: list[list[int]]
    finish: list[FinishReason | None]
    prompt_tokens: list[int]
    cached_tokens: list[int]
    completion_tokens: list[int]
    retractions: list[int]
    logprobs: dict[str, LogprobNews] = {}


class ControlReply(Message, frozen=True, tag=True, kw_only=True):
    """The scheduler's answer to a message with a call_id."""

    call_id: int
    ok: bool
    message: str = ""
    data: dict[str, Any] = {}


class Ready(Message, frozen=True, tag=True, kw_only=True):
    """A child's last word of the start-up handshake, over its pipe."""

    info: dict[str, Any] = {}


class Refused(Message, frozen=True, tag=True, kw_only=True):
    """Instead of Ready: why the child cannot start, fit to print."""

    reason: str


ToScheduler = (
    GenerateRequest
    | AbortRequest
    | StopMatched
    | FlushCache
    | GetState
    | GetTimeline
    | SetPolicy
    | Shutdown
)
ToDetokenizer = TokenBatch | Shutdown
ToTokenizer = TextBatch | ControlReply
Handshake = Ready | Refused

ALL_MESSAGES: tuple[type[Message], ...] = (
    GenerateRequest,
    AbortRequest,
    StopMatched,
    FlushCache,
    GetState,
    GetTimeline,
    SetPolicy,
    Shutdown,
    TokenBatch,
    TextBatch,
    ControlReply,
    Ready,
    Refused,
)


_ID_BYTES = array("i").itemsize


def _to_wire(value: Any) -> Any:
    if isinstance(value, array):
        return value.tobytes()
    raise NotImplementedError(f"{type(value).__name__} does not travel")


def _from_wire(kind: type, value: Any) -> Any:
    if kind is array and isinstance(value, bytes) and len(value) % _ID_BYTES == 0:
        ids = array("i")
        ids.frombytes(value)
        return ids
    raise ValueError(f"Expected the bytes of {kind.__name__}, got {type(value).__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_wire)


def encode(message: Message) -> bytes:
    """Packs one message."""
    return _encoder.encode(message)


def decoder_for(union: Any) -> msgspec.msgpack.Decoder[Any]:
    """A decoder of one direction, e.g. `decoder_for(ToScheduler)`; raises msgspec.DecodeError."""
    return msgspec.msgpack.Decoder(union, dec_hook=_from_wire)
