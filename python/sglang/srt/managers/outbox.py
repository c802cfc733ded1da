"""Outbox: what happened to requests since the last flush, as one TokenBatch."""

from __future__ import annotations

from sglang.srt.logprobs import LogprobNews
from sglang.srt.messages import FinishReason, StreamOptions, TokenBatch
from sglang.srt.requests import Request


class Outbox:
    """Collects requests with news. A request is reported every `stream_interval` new tokens, its
    own or the server's, with its first token, and when it ends."""

    def __init__(self, stream_interval: int = 1) -> None:
        self._stream_interval = stream_interval
        # In order of the first news; a dict so that a request is reported once a flush.
        self._news: dict[str, Request] = {}

    def note(self, request: Request) -> None:
        """The request has new tokens or has finished."""
        unsent = len(request.output) - request.sent_output
        first = request.sent_output == 0
        interval = request.sampling.stream_interval or self._stream_interval
        if request.finish or first or unsent >= interval:
            self._news[request.rid] = request

    def flush(self) -> TokenBatch | None:
        """The batch to send, None without news."""
        if not self._news:
            return None
        requests = list(self._news.values())
        self._news.clear()
        opened: list[StreamOptions] = []
        new_ids: list[list[int]] = []
        finish: list[FinishReason | None] = []
        logprobs: dict[str, LogprobNews] = {}
        for request in requests:
            if not request.stream_opened:
                request.stream_opened = True
                opened.append(request.stream_options())
            if request.logprobs is not None:
                logprobs[request.rid] = request.logprobs.news(request.output, request.sent_output)
            new_ids.append(request.output[request.sent_output :])
            request.sent_output = len(request.output)
            finish.append(request.finish)
        return TokenBatch(
            opened=opened,
            rids=[request.rid for request in requests],
            new_ids=new_ids,
            finish=finish,
            prompt_tokens=[len(request.prompt) for request in requests],
            cached_tokens=[request.cached_tokens for request in requests],
            completion_tokens=[len(request.output) for request in requests],
            retractions=[request.retractions for request in requests],
            logprobs=logprobs,
        )
