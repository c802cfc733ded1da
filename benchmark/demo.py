"""The demo: a real server, several conversations at once, and what became of their prompts.

`make demo`, or `python -m benchmark.demo [server flags]`. Starts a server on SmolLM2-135M with
prefill and decode side by side, holds five two-turn conversations with it in parallel, prints
them with time to first token (TTFT) and time between tokens (TBT), and checks two promises: the
second turn finds all of the first in the cache, and both phases ran at the same time. Exits 0
when they were kept and the server left cleanly, 1 otherwise.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import aiohttp

from benchmark.conversation import (
    ChatTokenizer,
    GenerateError,
    Script,
    Turn,
    ask,
    follow_up_ids,
    opening_ids,
    reusable_tokens,
)
from benchmark.server_process import ServerError, ServerProcess
from benchmark.smollm2 import model_path

START_LIMIT_S = 300.0
TALK_LIMIT_S = 600.0
STOP_LIMIT_S = 60.0
MAX_NEW_TOKENS = 64
TEXTS = Path(__file__).parent / "texts"


def scripts() -> list[Script]:
    """Three short conversations and two about a document, whose prefill takes a while."""
    return [
        Script("Sky", "Why is the sky blue?", "And why is it red in the evening?"),
        Script("Cats", "Tell me three facts about cats.", "Which of them surprises people most?"),
        Script("Tea", "How do I make a good cup of tea?", "How long should green tea draw?"),
        Script(
            "Lighthouse",
            "Who was Maria Lind, and what did she do in the winter of 1916?",
            "Which birds live on the rock today?",
            document=(TEXTS / "lighthouse.txt").read_text(encoding="utf-8"),
        ),
        Script(
            "Bakery",
            "What is special about the bread of this bakery?",
            "What does the baker do on Mondays?",
            document=(TEXTS / "bakery.txt").read_text(encoding="utf-8"),
        ),
    ]


class Progress:
    """One line that shows life: redrawn on a terminal, printed every few seconds elsewhere."""

    _LINE_EVERY_S = 5.0

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._redraws = out.isatty()
        self._wheel = itertools.cycle("|/-\\")
        self._next_line_s = 0.0

    def show(self, text: str) -> None:
        """Called often; shows `text` as the present state."""
        now_s = self._clock()
        if self._redraws:
            self._out.write(f"\r\x1b[K{next(self._wheel)} {text}")
        elif now_s >= self._next_line_s:
            self._out.write(f"{text} ...\n")
            self._next_line_s = now_s + self._LINE_EVERY_S
        self._out.flush()

    def clear(self) -> None:
        """Makes room for ordinary output."""
        if self._redraws:
            self._out.write("\r\x1b[K")
            self._out.flush()


class Talk:
    """All conversations against one server, in parallel."""

    def __init__(
        self, session: aiohttp.ClientSession, tokenizer: ChatTokenizer, progress: Progress
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._progress = progress
        self._tokens = 0
        self._decoding = asyncio.Event()

    async def hold_all(self, scripts: Sequence[Script]) -> list[list[Turn]]:
        """Two turns for each script. Documents start when the short ones have begun to decode."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._hold(script)) for script in scripts]
        return [task.result() for task in tasks]

    async def _hold(self, script: Script) -> list[Turn]:
        opening = script.opening
        if script.document:
            opening = f"{script.document}\n{script.opening}"
            await self._decoding.wait()
        first = Turn(opening, opening_ids(self._tokenizer, opening))
        await self._ask(first)
        second = Turn(script.follow_up, follow_up_ids(self._tokenizer, first, script.follow_up))
        await self._ask(second)
        self._progress.clear()
        print(render_conversation(script, first, second), flush=True)
        return [first, second]

    async def _ask(self, turn: Turn) -> None:
        await ask(self._session, turn, max_new_tokens=MAX_NEW_TOKENS, on_token=self._count)

    def _count(self, fresh: int) -> None:
        self._tokens += fresh
        self._decoding.set()
        self._progress.show(f"talking, {self._tokens} tokens generated")


def render_conversation(script: Script, first: Turn, second: Turn) -> str:
    """A conversation as text, with what the client measured below each answer."""
    title = script.name
    if script.document:
        title += f" (about a document of {len(script.document.split())} words)"
    lines = [title]
    asked = [(first, script.opening, "")]
    asked += [(second, script.follow_up, f" (at least {reusable_tokens(first)} expected)")]
    for turn, question, expected in asked:
        lines.append(_paragraph("You", question))
        lines.append(_paragraph("Model", " ".join(turn.answer.split())))
        lines.append(
            f"           {len(turn.prompt_ids)} prompt tokens, "
            f"{turn.cached_tokens} from the cache{expected}; {len(turn.output_ids)} new"
        )
        lines.append(
            f"           TTFT {turn.ttft_ms:.0f} ms; "
            f"TBT {turn.tbt_median_ms:.0f} ms median, {turn.tbt_p99_ms:.0f} ms p99"
        )
    return "\n".join(lines) + "\n"


def _paragraph(speaker: str, text: str) -> str:
    return textwrap.fill(
        text, width=96, initial_indent=f"  {speaker + ':':8} ", subsequent_indent=" " * 11
    )


def broken_promises(
    conversations: Sequence[tuple[str, Sequence[Turn]]], lanes: Mapping[str, Any]
) -> list[str]:
    """What was not as expected, in words; empty when all is well.

    lanes: `pd_multiplex` of the server's internal state, busy times in seconds.
    """
    problems = []
    for name, (first, second) in conversations:
        problems += [
            f"{name}, turn {number}: the answer is empty"
            for number, turn in enumerate((first, second), start=1)
            if not turn.answer.strip()
        ]
        expected = reusable_tokens(first)
        if second.cached_tokens < expected:
            problems.append(
                f"{name}, turn 2: {second.cached_tokens} tokens came from the cache, "
                f"expected at least {expected}"
            )
    if lanes["both_busy_s"] <= 0:
        problems.append("prefill and decode never ran at the same time")
    return problems


def render_lanes(lanes: Mapping[str, Any]) -> str:
    """How long each lane was busy, and how the device was divided, in words."""
    lines = [
        f"Prefill lane busy {lanes['prefill_busy_s']:.2f} s, decode lane "
        f"{lanes['decode_busy_s']:.2f} s, both at once {lanes['both_busy_s']:.2f} s."
    ]
    for partition in lanes["partitions"]:
        prefill, decode = partition["prefill_sms"], partition["decode_sms"]
        division = f"prefill on {prefill}, decode on {decode}"
        if partition["exclusive"]:
            division = f"one phase alone on all {prefill}"
        lines.append(f"  {division} SMs or cores: {partition['launches']} launches")
    return "\n".join(lines)


async def run(server: ServerProcess, model: Path, progress: Progress) -> list[str]:
    """The demo against a server that is starting; returns the broken promises."""
    loading = asyncio.create_task(asyncio.to_thread(load_tokenizer, model))
    ready_s = await server.wait_ready(START_LIMIT_S, lambda: progress.show("starting the server"))
    tokenizer = await loading
    progress.clear()
    print(f"Server ready after {ready_s:.0f} s with {model.name}.\n")

    everyone = scripts()
    timeout = aiohttp.ClientTimeout(total=TALK_LIMIT_S)
    async with aiohttp.ClientSession(server.base_url, timeout=timeout) as session:
        turns = await Talk(session, tokenizer, progress).hold_all(everyone)
        async with session.get("/server_info") as response:
            response.raise_for_status()
            lanes = (await response.json())["internal_states"][0]["pd_multiplex"]
    print(render_lanes(lanes))
    names = [script.name for script in everyone]
    return broken_promises(list(zip(names, turns, strict=True)), lanes)


def load_tokenizer(model: Path) -> ChatTokenizer:
    """The tokenizer inside a GGUF file."""
    from transformers import AutoTokenizer

    tokenizer: ChatTokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    return tokenizer


def main(server_flags: Sequence[str]) -> int:
    """Runs the demo; 0 when the server kept its promises and left cleanly."""
    try:
        model = model_path()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    progress = Progress(sys.stdout)
    # On a small machine taking turns may be the better way; the demo is to show both at once.
    multiplex = ["--enable-pd-multiplex", "--pd-multiplex-policy=adaptive:split-only"]
    server = ServerProcess(model, [*multiplex, *server_flags])
    problems: list[str] = []
    try:
        problems += asyncio.run(run(server, model, progress))
        server.stop(STOP_LIMIT_S)
    except* (ServerError, GenerateError, aiohttp.ClientError, TimeoutError) as failures:
        problems += [f"{type(error).__name__}: {error}" for error in _leaves(failures)]
        problems += ["the server's last words:", server.log_tail()]
    finally:
        progress.clear()
        server.kill()
    if problems:
        print("\nThe demo failed:", *problems, sep="\n", file=sys.stderr)
        return 1
    print("Every second turn reused the first, both phases ran at once, the server left cleanly.")
    return 0


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
