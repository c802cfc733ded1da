"""SamplingParams: how one request wants its tokens chosen and its text ended.

The public field names and defaults are SGLang's. `SamplingParams.parse` turns a client's JSON
object into a checked value; everything behind it may rely on the ranges stated here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from sglang.srt.constrained.grammar import GRAMMAR_KINDS, Grammar
from sglang.srt.errors import RequestError
from sglang.srt.stop_regex import UnsupportedPattern, compiled

GREEDY_TEMPERATURE = 1e-6  # below this a temperature means "take the likeliest token"
MAX_STOP_STRINGS = 32
MAX_ANSWERS = 128
MAX_GRAMMAR_BYTES = 1 << 20  # larger ones are a mistake, and would travel with every answer
MAX_COUNT = 2**31 - 1  # no sequence, vocabulary or batch is larger

_JSON_KINDS = ("json_schema", "structural_tag")
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)

# Fields of SGLang that this server does not serve yet, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "beam_width": (None,),
    "custom_params": (None,),
    "watermark": (None,),
}


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Checked sampling parameters of one request.

    max_new_tokens: tokens to generate; 0 only fills the prefix cache; None until the context ends.
    min_new_tokens: stop ids and end-of-sequence cannot be chosen before this many tokens.
    stop: the text ends before the first of these strings (or after it with `no_stop_trim`).
    stop_regex: the same for regular expressions, see stop_regex.py.
    stream_interval: tokens between two reports of this request; None as the server has it.
    stop_token_ids: generation ends at one of these ids, beside the model's own.
    temperature: 0 means greedy. top_k: -1 means off. top_p in (0, 1], min_p in [0, 1].
    frequency_penalty, presence_penalty: taken from the logit of a token for each time that it is in
    the output, and if it is there at all; in [-2, 2]. repetition_penalty: the logit of a token of
    prompt or output is divided by it, or multiplied if it is negative; in (0, 2].
    logit_bias: token id -> what is added to its logit.
    sampling_seed: the same seed, prompt and parameters give the same tokens in any batch.
    n: number of answers; the tokenizer manager turns one request into n.
    json_schema, regex, ebnf, structural_tag: what the answer is to follow, at most one of them.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    stop: list[str] = []
    stop_regex: list[str] = []
    stop_token_ids: list[int] = []
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    n: int = 1
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: int | None = None
    stream_interval: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None

    @property
    def grammar(self) -> Grammar | None:
        for kind in GRAMMAR_KINDS:
            text = getattr(self, kind)
            if text is not None:
                return Grammar(kind, text)
        return None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def penalises(self) -> bool:
        """Whether what a request has had changes what comes next."""
        return (
            self.frequency_penalty != 0
            or self.presence_penalty != 0
            or self.repetition_penalty != 1
        )

    @classmethod
    def parse(cls, fields: Mapping[str, Any] | None, *, vocab_size: int) -> SamplingParams:
        """Checks a client's object. Null means the default, except for max_new_tokens.

        Raises RequestError naming the field.
        """
        if fields is None:
            return cls()
        if not isinstance(fields, Mapping):
            raise RequestError("sampling_params must be an object", "sampling_params")
        known = cls.__struct_fields__
        given: dict[str, Any] = {}
        for name, value in fields.items():
            if name in known:
                if value is not None or name == "max_new_tokens":
                    given[name] = value
            elif name in _NEUTRAL:
                if value not in _NEUTRAL[name]:
                    raise _bad(name, "is not supported by this server yet")
            else:
                raise _bad(name, "is not a sampling parameter")
        for kind in GRAMMAR_KINDS:
            if kind in given:
                given[kind] = _grammar_text(kind, given[kind])
        for name in ("stop", "stop_regex"):
            if isinstance(given.get(name), str):
                given[name] = [given[name]] if given[name] else []
        for name in _NUMBERS:
            if name in given:
                given[name] = _finite(name, given[name])
        if "logit_bias" in given:
            given["logit_bias"] = _biases(given["logit_bias"], vocab_size)
        try:
            params = msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            raise RequestError(f"sampling_params: {error}", _field_of(error)) from None
        params._check(vocab_size)
        return params

    def _check(self, vocab_size: int) -> None:
        for name in ("max_new_tokens", "min_new_tokens", "top_k"):
            count = getattr(self, name)
            if count is not None and count > MAX_COUNT:
                raise _bad(name, f"must be at most {MAX_COUNT}")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise _bad("max_new_tokens", f"must be at least 0, got {self.max_new_tokens}")
        if self.min_new_tokens < 0:
            raise _bad("min_new_tokens", f"must be at least 0, got {self.min_new_tokens}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise _bad("min_new_tokens", f"must be at most max_new_tokens={self.max_new_tokens}")
        if self.temperature < 0:
            raise _bad("temperature", f"must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise _bad("top_p", f"must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise _bad("min_p", f"must be in [0, 1], got {self.min_p}")
        for name in ("frequency_penalty", "presence_penalty"):
            penalty = getattr(self, name)
            if not -2 <= penalty <= 2:
                raise _bad(name, f"must be in [-2, 2], got {penalty}")
        if not 0 < self.repetition_penalty <= 2:
            raise _bad("repetition_penalty", f"must be in (0, 2], got {self.repetition_penalty}")
        if self.top_k != -1 and self.top_k < 1:
            raise _bad("top_k", f"must be -1 (off) or at least 1, got {self.top_k}")
        if not 1 <= self.n <= MAX_ANSWERS:
            raise _bad("n", f"must be in [1, {MAX_ANSWERS}], got {self.n}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise _bad("stop", f"takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        for text in self.stop:
            if not text:
                raise _bad("stop", "must not hold an empty string")
            if not _encodable(text):
                raise _bad("stop", "must be valid Unicode, without lone surrogates")
        if len(self.stop_regex) > MAX_STOP_STRINGS:
            count = len(self.stop_regex)
            raise _bad("stop_regex", f"takes at most {MAX_STOP_STRINGS} patterns, got {count}")
        for pattern in self.stop_regex:
            try:
                compiled(pattern)
            except UnsupportedPattern as error:
                raise _bad("stop_regex", f"{pattern!r} {error}") from None
        if self.stream_interval is not None and not 1 <= self.stream_interval <= MAX_COUNT:
            raise _bad("stream_interval", f"must be at least 1, got {self.stream_interval}")
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise _bad("stop_token_ids", f"{token} is outside the vocabulary [0, {vocab_size})")
        if self.sampling_seed is not None and not -(2**63) <= self.sampling_seed < 2**63:
            raise _bad("sampling_seed", "must fit in 64 bits")
        self._check_grammar()

    def _check_grammar(self) -> None:
        kinds = [kind for kind in GRAMMAR_KINDS if getattr(self, kind) is not None]
        if len(kinds) > 1:
            raise _bad(kinds[1], f"must not be given beside {kinds[0]}: an answer follows only one")
        for kind in kinds:
            text = getattr(self, kind)
            if not _encodable(text):
                raise _bad(kind, "must be valid Unicode, without lone surrogates")
            if "\0" in text:
                raise _bad(kind, "must not hold a null character")
            if len(text.encode()) > MAX_GRAMMAR_BYTES:
                raise _bad(kind, f"must have at most {MAX_GRAMMAR_BYTES} bytes")


def _grammar_text(kind: str, value: Any) -> str | None:
    """What is JSON may be given as an object too; an empty string asks for nothing."""
    if kind in _JSON_KINDS and isinstance(value, dict):
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise _bad(kind, f"is not JSON: {error}") from None
    if not isinstance(value, str):
        wanted = "a string or an object" if kind in _JSON_KINDS else "a string"
        raise _bad(kind, f"must be {wanted}, got {type(value).__name__}")
    return value or None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bad(field: str, problem: str) -> RequestError:
    return RequestError(f"sampling_params.{field} {problem}", field)


def _biases(given: Any, vocab_size: int) -> dict[int, float]:
    """JSON's keys are strings; integers are taken too."""
    if not isinstance(given, Mapping):
        raise _bad("logit_bias", "must be an object of token ids and numbers")
    biases: dict[int, float] = {}
    for key, value in given.items():
        is_id = type(key) is int or (isinstance(key, str) and key.isascii() and key.isdigit())
        token = int(key) if is_id and len(str(key)) <= 10 else -1
        if not 0 <= token < vocab_size:
            problem = f"has the key {key!r:.40}, which is no token id in [0, {vocab_size})"
            raise _bad("logit_bias", problem)
        biases[token] = _finite("logit_bias", value)
    return biases


def _finite(field: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise _bad(field, f"must be a finite number, got {value!r:.40}")


def _field_of(error: msgspec.ValidationError) -> str | None:
    """msgspec ends its text with the path, e.g. "... - at `$.top_k`"."""
    text = str(error)
    return text.rpartition("$.")[2].rstrip("`").partition("[")[0] if "$." in text else None
