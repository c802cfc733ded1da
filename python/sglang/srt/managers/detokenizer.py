"""Token ids to text, piece by piece, with stop strings. Pure: no sockets, no clock.

The text of a token can depend on its left neighbours (a leading space, the bytes of one emoji
spread over four tokens), so a token is never decoded alone. Each request keeps a window

    ids: [ context | fresh ]

and the new text is what `decode(context + fresh)` has beyond `decode(context)`. The window moves
on whenever its text ends in a whole character.

Text is released in two steps: complete characters first, then whatever can no longer be the
beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang.srt.logprobs import LogprobNews, LogprobRows
from sglang.srt.messages import FinishReason, StreamOptions, TextBatch, TokenBatch
from sglang.srt.stop_regex import StopPattern

# decode(id lists, skip_special_tokens, spaces_between_special_tokens) -> texts
BatchDecode = Callable[[list[list[int]], bool, bool], list[str]]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders put where bytes form no character
_WINDOW_LIMIT = 64  # tokens; output that never ends in a whole character must not grow the window


class Decoded(NamedTuple):
    """One batch's text, and the requests that a stop string ended before the engine did."""

    batch: TextBatch
    stopped: list[str]


@dataclass(slots=True)
class _Stream:
    """What is known of one request between two batches."""

    options: StreamOptions
    ids: list[int]
    mark: int  # ids[:mark] is the context
    shown: int = 0  # characters of the fresh text that are already out
    owed: int = 0  # characters at the context's end that are not out
    held: str = ""  # decoded, but may be the beginning of a stop string
    patterns: list[StopPattern] = field(default_factory=list)
    fed: int = 0  # characters that were decoded, held ones included
    stopped: bool = False  # a stop string ended it; the engine's last entry is still to come

    @property
    def context(self) -> list[int]:
        return self.ids[: self.mark]

    @property
    def stops(self) -> bool:
        """Whether its text may end it."""
        return bool(self.options.stop or self.patterns)

    def find_stop(self, fresh: str, last: bool) -> tuple[int, int, str] | None:
        """(end, start, what matched) in `held + fresh` of what is complete first; on a tie, of
        what starts first."""
        found: list[tuple[int, int, str]] = []
        match = first_stop(self.held + fresh, self.options.stop)
        if match is not None:
            start, stop = match
            found.append((start + len(stop), start, stop))
        before = self.fed - len(self.held)
        self.fed += len(fresh)
        hits = [pattern.feed(fresh, last=last) for pattern in self.patterns]
        found += [
            (hit.end - before, max(hit.start - before, 0), hit.pattern) for hit in hits if hit
        ]
        return min(found, default=None)

    def overlap(self, text: str) -> int:
        """Characters at the end of `held + fresh` that may be the beginning of a stop."""
        lengths = [stop_overlap(text, self.options.stop)]
        lengths += [pattern.pending for pattern in self.patterns]
        return min(max(lengths), len(text))

    def gained(self, context: str, window: str, last: bool) -> str:
        """What to show now, given the text of both; moves the window on if it may."""
        # A prompt may end inside a character, which the first tokens then complete.
        same = len(context) if window.startswith(context) else _common_length(context, window)
        fresh = window[min(same, len(context) - self.owed) :]
        whole = fresh if last else fresh.rstrip(REPLACEMENT)
        moves_on = fresh and whole == fresh
        if not moves_on and len(self.ids) > _WINDOW_LIMIT:
            moves_on = True
            whole = fresh[:-1] if fresh and not last else fresh  # only the last can still change
        gained = whole[self.shown :]
        self.shown = max(self.shown, len(whole))
        if moves_on:
            self.ids = self.ids[self.mark :]
            self.mark = len(self.ids)
            self.owed = len(fresh) - len(whole)
            self.shown = 0
        return gained


@dataclass(slots=True)
class _Entry:
    """One request's part of a batch while it is worked on."""

    stream: _Stream
    new_ids: list[int]
    finish: FinishReason | None
    completion_tokens: int
    chunks: list[list[int]]
    pieces: list[str] = field(default_factory=list)


class IncrementalDetokenizer:
    """Text of many requests, each fed a few tokens at a time.

    `decode` None sends ids only, for a server without a tokenizer.
    """

    def __init__(self, decode: BatchDecode | None) -> None:
        self._decode = decode
        self._streams: dict[str, _Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def process(self, batch: TokenBatch) -> Decoded:
        """Decodes the batch's new tokens.

        An entry ends early, with a finish reason naming the string, where a stop string is
        complete: ids and counts reach up to the token that completed it. Later tokens of that
        request are dropped until the engine's own last entry, which is dropped as well.
        """
        for options in batch.opened:
            self._streams[options.rid] = _Stream(
                options,
                list(options.prompt_tail),
                mark=len(options.prompt_tail),
                patterns=[StopPattern(pattern) for pattern in options.stop_regex],
            )
        entries = [self._entry(batch, i) for i in range(len(batch.rids))]
        self._run([entry for entry in entries if not entry.stream.stopped])

        kept = [i for i, entry in enumerate(entries) if not entry.stream.stopped]
        stopped = []
        for i in kept:
            rid, entry = batch.rids[i], entries[i]
            if entry.finish is not None and batch.finish[i] is None:
                entry.stream.stopped = True
                stopped.append(rid)
        for rid, finish in zip(batch.rids, batch.finish, strict=True):
            if finish is not None:
                self._streams.pop(rid, None)

        text = TextBatch(
            rids=[batch.rids[i] for i in kept],
            text=["".join(entries[i].pieces) for i in kept],
            new_ids=[entries[i].new_ids for i in kept],
            finish=[entries[i].finish for i in kept],
            prompt_tokens=[batch.prompt_tokens[i] for i in kept],
            cached_tokens=[batch.cached_tokens[i] for i in kept],
            completion_tokens=[entries[i].completion_tokens for i in kept],
            retractions=[batch.retractions[i] for i in kept],
            logprobs={
                batch.rids[i]: self._logprobs(batch.logprobs[batch.rids[i]], entries[i])
                for i in (kept if batch.logprobs else ())
                if batch.rids[i] in batch.logprobs
            },
        )
        return Decoded(text, stopped)

    def _entry(self, batch: TokenBatch, i: int) -> _Entry:
        rid, new_ids, finish = batch.rids[i], batch.new_ids[i], batch.finish[i]
        stream = self._streams.get(rid)
        assert stream is not None, f"request {rid} has tokens but was never opened"
        visible = new_ids
        if _ends_in_stop_token(finish) and not stream.options.no_stop_trim:
            visible = new_ids[:-1]
        # Token by token where a stop string has to be pinned to the token that completes it.
        chunks = [[token] for token in visible] if stream.stops else [visible]
        return _Entry(stream, new_ids, finish, batch.completion_tokens[i], chunks)

    def _logprobs(self, news: LogprobNews, entry: _Entry) -> LogprobNews:
        """Of the tokens that the entry has kept, with their texts if those are asked for."""
        prompt, output = news.prompt, news.output
        if output is not None:
            output = output.first(len(entry.new_ids))
        return LogprobNews(prompt=self._with_texts(prompt), output=self._with_texts(output))

    def _with_texts(self, rows: LogprobRows | None) -> LogprobRows | None:
        decode = self._decode
        if rows is None or decode is None or not rows.wants_texts:
            return rows
        return rows.with_texts(lambda ids: decode([[token] for token in ids], False, True))

    def _run(self, entries: Sequence[_Entry]) -> None:
        if self._decode is None:
            return
        for turn in range(max((len(entry.chunks) for entry in entries), default=0)):
            active = [e for e in entries if turn < len(e.chunks) and not _stop_found(e)]
            for entry in active:
                entry.stream.ids.extend(entry.chunks[turn])
            fresh = self._fresh_texts([entry.stream for entry in active])
            for entry, text in zip(active, fresh, strict=True):
                self._release(entry, text, used=turn + 1)
        finishing = [e for e in entries if e.finish is not None and not _stop_found(e)]
        for entry, text in zip(
            finishing, self._fresh_texts([e.stream for e in finishing], last=True), strict=True
        ):
            self._release(entry, text, used=len(entry.chunks), last=True)
            if not _stop_found(entry):
                entry.pieces.append(entry.stream.held)

    def _release(self, entry: _Entry, fresh: str, used: int, last: bool = False) -> None:
        """Adds what may be shown of `held + fresh`, or ends the entry at a stop string."""
        stream = entry.stream
        text = stream.held + fresh
        match = stream.find_stop(fresh, last)
        if match is None:
            cut = len(text) - stream.overlap(text)
            entry.pieces.append(text[:cut])
            stream.held = text[cut:]
            return
        end, start, stop = match
        if not stream.options.no_stop_trim:
            end = start
        entry.pieces.append(text[:end])
        stream.held = ""
        dropped = len(entry.new_ids) - used
        if dropped > 0:
            entry.new_ids = entry.new_ids[:used]
            entry.completion_tokens -= dropped
        entry.finish = FinishReason(type="stop", matched=stop)

    def _fresh_texts(self, streams: Sequence[_Stream], last: bool = False) -> list[str]:
        """The text each stream has gained; with `last`, broken characters included."""
        rows = [s.context for s in streams] + [s.ids for s in streams]
        texts = self._decode_rows(rows, [s.options for s in streams] * 2)
        return [
            stream.gained(context, window, last)
            for stream, context, window in zip(
                streams, texts[: len(streams)], texts[len(streams) :], strict=True
            )
        ]

    def _decode_rows(
        self, rows: Sequence[list[int]], options: Sequence[StreamOptions]
    ) -> list[str]:
        """Decodes id lists, in one call for each combination of options."""
        assert self._decode is not None
        groups: dict[tuple[bool, bool], list[int]] = {}
        for i, option in enumerate(options):
            if rows[i]:
                key = (option.skip_special_tokens, option.spaces_between_special_tokens)
                groups.setdefault(key, []).append(i)
        texts = [""] * len(rows)
        for (skip_special, spaces), members in groups.items():
            decoded = self._decode([rows[i] for i in members], skip_special, spaces)
            for i, text in zip(members, decoded, strict=True):
                texts[i] = text
        return texts


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(position, stop string) of the one that is complete first; on a tie, that starts first.

    Going by the end makes the answer independent of how the text was cut into pieces.
    """
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return None
    _, at, stop = min(found)
    return at, stop


def stop_overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest


def _common_length(a: str, b: str) -> int:
    """Characters at the beginning that both have."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _ends_in_stop_token(finish: FinishReason | None) -> bool:
    return finish is not None and finish.type == "stop" and isinstance(finish.matched, int)


def _stop_found(entry: _Entry) -> bool:
    return entry.finish is not None and isinstance(entry.finish.matched, str)
