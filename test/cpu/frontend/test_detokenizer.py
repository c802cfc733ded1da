"""IncrementalDetokenizer: pieces add up to the whole, stop strings end it exactly."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang.srt.managers.detokenizer import IncrementalDetokenizer, first_stop, stop_overlap
from sglang.srt.managers.detokenizer_manager import decode_with
from sglang.srt.messages import FinishReason, StreamOptions, TextBatch, TokenBatch

LENGTH = FinishReason(type="length", length=0)
TEXTS = [
    "Zürich, naïve café",
    "family: 👨‍👩‍👧‍👦, flag: 🇨🇭, thumbs 👍🏽",
    "日本語のテキストと中文字符和한국어",
    "def f(x):\n\treturn  x ** 2  # twice\n\n",
    "\U0001d518\U0001d52b ﷽ \u200b zero",
]


def options(rid: str = "r", **changes: Any) -> StreamOptions:
    fields: dict[str, Any] = {
        "rid": rid,
        "prompt_tail": [],
        "stop": [],
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "no_stop_trim": False,
    }
    return StreamOptions(**{**fields, **changes})


def batch(
    ids: list[int],
    finish: FinishReason | None = None,
    *,
    opened: StreamOptions | None = None,
    completion_tokens: int = 0,
    rid: str = "r",
) -> TokenBatch:
    return TokenBatch(
        opened=[] if opened is None else [opened],
        rids=[rid],
        new_ids=[ids],
        finish=[finish],
        prompt_tokens=[5],
        cached_tokens=[2],
        completion_tokens=[completion_tokens],
        retractions=[0],
    )


def run(
    detokenizer: IncrementalDetokenizer, pieces: list[list[int]], opened: StreamOptions
) -> tuple[list[TextBatch], list[str]]:
    """Feeds the pieces, the last with a length finish; returns batches and stopped rids."""
    batches, stopped, count = [], [], 0
    for i, piece in enumerate(pieces):
        count += len(piece)
        decoded = detokenizer.process(
            batch(
                piece,
                LENGTH if i == len(pieces) - 1 else None,
                opened=opened if i == 0 else None,
                completion_tokens=count,
            )
        )
        batches.append(decoded.batch)
        stopped += decoded.stopped
    return batches, stopped


def text_of(batches: list[TextBatch]) -> str:
    return "".join(text for b in batches for text in b.text)


def ids_of(batches: list[TextBatch]) -> list[int]:
    return [token for b in batches for ids in b.new_ids for token in ids]


@pytest.fixture
def make(tokenizer: Any) -> Callable[[], IncrementalDetokenizer]:
    return lambda: IncrementalDetokenizer(decode_with(tokenizer))


@pytest.fixture(scope="module")
def byte_ids(tokenizer: Any) -> list[int]:
    """Ids of tokens that are no whole characters, or only just."""
    return [i for i in range(3, 400) if "\ufffd" in tokenizer.decode([i])]


def reference(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    def whole(tokens: list[int]) -> str:
        text: str = tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    text, before = whole(prompt + ids), whole(prompt)
    shared = next(
        (i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before)
    )
    return text[shared:]


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(ids[at : at + size])
        at, turn = at + size, turn + 1
    return pieces or [[]]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_real_text_survives_any_cut(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any, text: str, size: int
) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    batches, _ = run(make(), cut(ids, [size]), options())
    assert text_of(batches) == text
    assert ids_of(batches) == ids
    for before_the_end in batches[:-1]:
        assert "\ufffd" not in before_the_end.text[0]


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_ids_add_up_to_the_whole(
    make: Callable[[], IncrementalDetokenizer],
    tokenizer: Any,
    byte_ids: list[int],
    data: st.DataObject,
) -> None:
    token = st.one_of(st.integers(0, 49151), st.sampled_from(byte_ids))
    prompt = data.draw(st.lists(token, max_size=5))
    ids = data.draw(st.lists(token, min_size=1, max_size=60))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    batches, _ = run(make(), cut(ids, sizes), options(prompt_tail=prompt))
    assert text_of(batches) == reference(tokenizer, prompt, ids)


def test_endless_broken_bytes_do_not_grow_the_window(tokenizer: Any, byte_ids: list[int]) -> None:
    longest = 0
    decode = decode_with(tokenizer)

    def watching(rows: list[list[int]], skip: bool, spaces: bool) -> list[str]:
        nonlocal longest
        longest = max(longest, *map(len, rows))
        return decode(rows, skip, spaces)

    lone = next(i for i in byte_ids if tokenizer.decode([i, i, i]) == "\ufffd" * 3)
    ids = [lone] * 500
    batches, _ = run(IncrementalDetokenizer(watching), cut(ids, [1]), options())
    assert text_of(batches) == tokenizer.decode(ids)
    assert longest < 200


def test_prompt_that_ends_inside_a_character(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any
) -> None:
    ids = tokenizer("好", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    batches, _ = run(make(), cut(ids[1:], [1]), options(prompt_tail=ids[:1]))
    assert text_of(batches) == "好"


def test_unfinished_character_is_shown_at_the_end(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any
) -> None:
    ids = tokenizer("ok 好", add_special_tokens=False)["input_ids"][:-1]
    batches, _ = run(make(), cut(ids, [1]), options())
    assert text_of(batches) == tokenizer.decode(ids)
    assert text_of(batches).endswith("\ufffd")


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_string_across_tokens(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any, trim: bool, size: int
) -> None:
    text = "One two three. STOP HERE and four five six"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    opened = options(stop=["STOP HERE"], no_stop_trim=not trim)
    batches, stopped = run(make(), cut(ids, [size]), opened)
    expected = "One two three. " if trim else "One two three. STOP HERE"
    assert text_of(batches) == expected
    shown_ids = ids_of(batches)
    assert "STOP HERE" in tokenizer.decode(shown_ids)
    assert "STOP HERE" not in tokenizer.decode(shown_ids[:-1])
    last = batches[[bool(b.rids) for b in batches].count(True) - 1]
    assert last.finish == [FinishReason(type="stop", matched="STOP HERE")]
    assert last.completion_tokens == [len(shown_ids)]
    assert stopped == ([] if size == 100 else ["r"])


def test_text_that_may_become_a_stop_string_is_held_back(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any
) -> None:
    ids = tokenizer("a END b", add_special_tokens=False)["input_ids"]
    detokenizer = make()
    shown = ""
    for i, token in enumerate(ids):
        decoded = detokenizer.process(
            batch([token], opened=options(stop=["END of it"]) if i == 0 else None)
        )
        shown += decoded.batch.text[0]
        assert not any(shown.endswith("END of it"[:k]) for k in range(1, 9))
    finish = detokenizer.process(batch([], LENGTH))
    assert shown + finish.batch.text[0] == "a END b"


def test_held_text_is_not_lost_at_the_end(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any
) -> None:
    ids = tokenizer("wait for it: EN", add_special_tokens=False)["input_ids"]
    batches, stopped = run(make(), cut(ids, [1]), options(stop=["END"]))
    assert text_of(batches) == "wait for it: EN"
    assert batches[-1].finish == [LENGTH]
    assert stopped == []


def test_tokens_after_a_stop_string_are_swallowed_until_the_engine_ends(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any
) -> None:
    detokenizer = make()
    [token] = tokenizer("hello", add_special_tokens=False)["input_ids"][:1]
    word = tokenizer.decode([token])
    first = detokenizer.process(batch([token], opened=options(stop=[word]), completion_tokens=1))
    assert first.stopped == ["r"]
    assert first.batch.text == [""]
    assert first.batch.new_ids == [[token]]
    second = detokenizer.process(batch([token, token], completion_tokens=3))
    assert (second.batch.rids, second.stopped) == ([], [])
    third = detokenizer.process(batch([], FinishReason(type="abort"), completion_tokens=3))
    assert third.batch.rids == []
    assert len(detokenizer) == 0


@pytest.mark.parametrize("trim", [True, False])
def test_matched_stop_token_keeps_its_id_and_loses_its_text(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any, trim: bool
) -> None:
    ids = tokenizer("good bye", add_special_tokens=False)["input_ids"]
    finish = FinishReason(type="stop", matched=ids[-1])
    opened = options(no_stop_trim=not trim)
    decoded = make().process(batch(ids, finish, opened=opened, completion_tokens=len(ids)))
    assert decoded.batch.text == [tokenizer.decode(ids[:-1] if trim else ids)]
    assert decoded.batch.new_ids == [ids]
    assert decoded.batch.completion_tokens == [len(ids)]
    assert decoded.batch.finish == [finish]


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any, skip: bool
) -> None:
    ids = tokenizer("a<|im_end|>b", add_special_tokens=False)["input_ids"]
    batches, _ = run(make(), cut(ids, [1]), options(skip_special_tokens=skip))
    assert text_of(batches) == ("ab" if skip else "a<|im_end|>b")


def test_many_requests_in_one_batch(
    make: Callable[[], IncrementalDetokenizer], tokenizer: Any
) -> None:
    detokenizer = make()
    rows = {
        str(i): tokenizer(t, add_special_tokens=False)["input_ids"] for i, t in enumerate(TEXTS)
    }
    shown = dict.fromkeys(rows, "")
    opened = [options(rid, skip_special_tokens=int(rid) % 2 == 0) for rid in rows]
    for turn in range(max(map(len, rows.values()))):
        active = [rid for rid, ids in rows.items() if turn < len(ids)]
        decoded = detokenizer.process(
            TokenBatch(
                opened=opened if turn == 0 else [],
                rids=active,
                new_ids=[[rows[rid][turn]] for rid in active],
                finish=[LENGTH if turn == len(rows[rid]) - 1 else None for rid in active],
                prompt_tokens=[1] * len(active),
                cached_tokens=[0] * len(active),
                completion_tokens=[turn + 1] * len(active),
                retractions=[0] * len(active),
            )
        )
        assert decoded.batch.rids == active
        for rid, text in zip(active, decoded.batch.text, strict=True):
            shown[rid] += text
    assert list(shown.values()) == TEXTS
    assert len(detokenizer) == 0


def test_without_a_tokenizer_ids_pass_through() -> None:
    detokenizer = IncrementalDetokenizer(None)
    decoded = detokenizer.process(batch([1, 2], LENGTH, opened=options(), completion_tokens=2))
    assert decoded.batch.text == [""]
    assert decoded.batch.new_ids == [[1, 2]]
    assert len(detokenizer) == 0


def test_tokens_of_an_unknown_request_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="never opened"):
        IncrementalDetokenizer(None).process(batch([1]))


SMALL = st.text(alphabet="ab", max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


@given(SMALL, STOPS)
def test_stop_overlap_is_the_longest(text: str, stops: list[str]) -> None:
    sizes = [k for stop in stops for k in range(len(stop)) if text.endswith(stop[:k])]
    assert stop_overlap(text, stops) == max(sizes, default=0)


@given(SMALL, STOPS)
def test_first_stop_does_not_depend_on_how_text_is_cut(text: str, stops: list[str]) -> None:
    whole = first_stop(text, stops)
    for size in range(len(text) + 1):
        found = first_stop(text[:size], stops)
        if found is not None:
            assert found == whole
            return
    assert whole is None


@settings(
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.lists(st.integers(0, 49151), max_size=6), min_size=1, max_size=8),
    skip=st.booleans(),
)
def test_decoding_is_the_tokenizers_own(tokenizer: Any, rows: list[list[int]], skip: bool) -> None:
    expected = tokenizer.batch_decode(
        rows, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    assert decode_with(tokenizer)(rows, skip, True) == expected


def test_a_tokenizer_with_a_decoding_of_its_own_keeps_it(tokenizer: Any) -> None:
    class Shouting(type(tokenizer)):  # type: ignore[misc]
        def _decode(self, *args: Any, **options: Any) -> str:
            return str(super()._decode(*args, **options)).upper()

    shouting = copy.copy(tokenizer)
    shouting.__class__ = Shouting
    ids = tokenizer("quiet words", add_special_tokens=False)["input_ids"]
    assert decode_with(shouting)([ids], True, True) == ["QUIET WORDS"]


@settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    text=st.text("ab \u00fc\U0001f44d\n1", min_size=1, max_size=24),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    trim=st.booleans(),
)
def test_a_stop_pattern_cuts_the_text_at_its_first_match(
    make: Any, tokenizer: Any, text: str, sizes: list[int], trim: bool
) -> None:
    """However the ids are divided, and with a stop string beside it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = reference(tokenizer, [], ids)
    pattern, stop = "b+\\s|1.a", "aa"
    opened = options(stop=[stop], stop_regex=[pattern], no_stop_trim=not trim)
    batches, stopped = run(make(), cut(ids, sizes), opened)
    # The one that ends first, at a tie the one that starts first.
    ends = [
        (end, start, what)
        for end in range(1, len(whole) + 1)
        for start in range(end)
        for what, regex in ((pattern, pattern), (stop, stop))
        if re.fullmatch(regex, whole[start:end])
    ]
    finish = batches[-1].finish[-1] if batches[-1].finish else None
    if not ends:
        assert text_of(batches) == whole
        assert stopped == []
        assert finish == LENGTH
        return
    end, start, what = min(ends)
    assert text_of(batches) == whole[: start if trim else end]
    reasons = [reason for b in batches for reason in b.finish if reason is not None]
    assert reasons == [FinishReason(type="stop", matched=what)]
